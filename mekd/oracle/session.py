"""Opening an ONNX file with ONNX Runtime on the execution provider that was asked for, or saying why not."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch  # before ONNX Runtime, so that both work with torch's CUDA libraries

from mekd.errors import MekdError
from mekd.formats import AS_ONNX, NAMES, kind_of

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
PRECISIONS = ("float32", "float16")


class ModelError(MekdError, ValueError):
    """The .onnx file is no classifier that can be asked, or not one for these images."""


class ProviderError(MekdError, RuntimeError):
    """The execution provider that was asked for does not run here, or cannot do what was asked of it."""


def provider_names(providers: str | Sequence[str] = "auto") -> list[str]:
    """ONNX Runtime's own names of "auto", "cpu", "cuda" or "tensorrt", or of its own names; the first one must run.

    Nodes that TensorRT cannot take run on CUDA. Raises ProviderError for names that this machine does not know.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ProviderError(
            "ONNX Runtime is not installed: pip install 'mekd[onnx]' (CPU) or 'mekd[onnx-gpu]'"
        ) from error
    if clash := runtime_clash():
        raise ProviderError(clash)
    available = ort.get_available_providers()
    if providers == "auto":
        providers = "cuda" if torch.cuda.is_available() and PROVIDERS["cuda"] in available else "cpu"
    if isinstance(providers, str):
        if providers not in PROVIDERS:
            raise ProviderError(f"provider is {providers!r}; it must be auto, {', '.join(PROVIDERS)}")
        behind = [PROVIDERS["cuda"]] if providers == "tensorrt" else []
        providers = [PROVIDERS[providers], *behind]
    for name in providers:
        if name not in available:
            raise ProviderError(f"{name} is not in this build of ONNX Runtime, which has {', '.join(available)}")
    if not providers:
        raise ProviderError("no execution provider is named; say auto, cpu, cuda or tensorrt")
    return list(providers)


def runs_on_cuda(names: Sequence[str]) -> bool:
    """Whether the first of these providers works in CUDA memory."""
    return names[0] in (PROVIDERS["cuda"], PROVIDERS["tensorrt"])


def open_session(
    path: Path,
    providers: str | Sequence[str] = "auto",
    *,
    precision: str = "float32",
    cuda_graph: bool = False,
    stream: torch.cuda.Stream | None = None,
    cache: Path | None = None,
) -> Any:
    """An ONNX Runtime session on the providers that were asked for, or an error that says why not.

    precision: "float16" computes so, with inputs and outputs as they are in the file; cuda_graph: kernels are
    recorded once and replayed; stream: the CUDA stream that the session works on; cache: a folder for TensorRT's
    engines. Raises ModelError, ProviderError.
    """
    names = provider_names(providers)
    import onnxruntime as ort

    check_options(names, precision, cuda_graph)
    check_format(path)
    model: str | bytes = str(path)
    if precision == "float16" and names[0] == PROVIDERS["cuda"]:
        from mekd.oracle.half import to_float16

        model = to_float16(path)
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # what is an error is raised as one
    settings.intra_op_num_threads = torch.get_num_threads()
    # A spinning pool would take the cores that torch's own threads work on.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    chosen = [(name, _options(name, precision, cuda_graph, stream, cache)) for name in names]
    if names[0] == PROVIDERS["tensorrt"]:
        _load_tensorrt()
    try:
        # Without its fallback: it would begin again on another provider and only print so.
        session = ort.InferenceSession(model, settings, providers=chosen, enable_fallback=0)
    except Exception as error:
        said = one_line(error).replace(str(path), "")
        if "provider" in said.lower() or "CUDA" in said or "TensorRT" in said:
            raise ProviderError(f"{names[0]} does not start: {said}{_hint(names[0], cuda_graph)}") from error
        from mekd.oracle.identity import external_files

        external_files(path)  # a file of weights that is missing is named
        raise ModelError(
            f"{path} is no ONNX model that ONNX Runtime {ort.__version__} can load: {one_line(error)}. It may be cut "
            "short, or newer than this ONNX Runtime: fetch or export it again, or install a newer ONNX Runtime"
        ) from error
    running = session.get_providers()
    for name, runs in zip(names, [*running, *names], strict=False):
        if name != runs:
            raise ProviderError(
                f"{name} was asked for, but {runs} would run: no driver, or its libraries are missing (`mekd doctor` "
                f"shows which). Use --oracle.provider cpu to run on the processor{_hint(name, False)}"
            )
    assigned = getattr(session, "get_provider_graph_assignment_info", None)  # older versions do not say
    taken = {share.ep_name for share in assigned()} if assigned else set()
    if taken and names[0] not in taken:
        raise ProviderError(
            f"{names[0]} was asked for, but can compute no node of {path}: {', '.join(sorted(taken))} would run all of "
            "it. Name another --oracle.provider"
        )
    return session


def check_format(path: Path, setting: str = "teacher.onnx") -> None:
    """Raise ModelError for a file that is missing, or whose first bytes say that it is something else than ONNX."""
    if not path.exists():
        raise ModelError(f"{setting} is {str(path)!r}; no such file")
    if kind := kind_of(path):
        raise ModelError(f"{setting} is {str(path)!r}, {NAMES[kind]}; it must be an ONNX model: {AS_ONNX[kind]}")


def check_options(names: Sequence[str], precision: str, cuda_graph: bool) -> None:
    """Raise for an unknown precision (ModelError) and for what the first provider cannot do (ProviderError)."""
    if precision not in PRECISIONS:
        raise ModelError(f"precision is {precision!r} (oracle.precision); it must be {' or '.join(PRECISIONS)}")
    for name, asked, instead in (
        ("precision", precision if precision != "float32" else None, "float32"),
        ("cuda_graph", cuda_graph or None, "false"),
    ):
        if asked is not None and not runs_on_cuda(names):
            raise ProviderError(
                f"{name} is {asked!r}, but the teacher runs on {names[0]}, which cannot do it; it must be {instead} "
                f"there: say --oracle.{name} {instead}, or --oracle.provider cuda"
            )


def _options(
    name: str, precision: str, cuda_graph: bool, stream: torch.cuda.Stream | None, cache: Path | None
) -> dict[str, str]:
    """What a provider is told, in ONNX Runtime's own words."""
    if not runs_on_cuda([name]):
        return {}
    options: dict[str, str] = {}
    if stream is not None:
        options |= {"device_id": str(stream.device.index), "user_compute_stream": str(stream.cuda_stream)}
    if name == PROVIDERS["tensorrt"]:
        options |= {"trt_fp16_enable": str(int(precision == "float16")), "trt_cuda_graph_enable": str(int(cuda_graph))}
        if cache is not None:  # building an engine takes minutes, and every stage opens the teacher
            options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache)}
        return options
    # Algorithms chosen by trying them out change from one start to the next, and the answers' last digits with them.
    options |= {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}
    return options | ({"enable_cuda_graph": "1"} if cuda_graph else {})


def _load_tensorrt() -> None:
    """TensorRT's Python package loads its libraries, which lie where no linker looks."""
    try:
        import tensorrt  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
    except Exception:  # without the package, or with one that does not load, the session says what is missing
        return


def _hint(name: str, cuda_graph: bool) -> str:
    if cuda_graph:
        return ". If a node of the model cannot run on the GPU, its graph cannot be recorded: --oracle.cuda_graph false"
    return ". It needs TensorRT 10: pip install 'tensorrt<11'" if name == PROVIDERS["tensorrt"] else ""


def one_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return " ".join(str(error).split())


def runtime_clash() -> str | None:
    """A sentence if onnxruntime and onnxruntime-gpu are both installed: they overwrite each other's files."""
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    if len(found) < 2:
        return None
    return (
        f"{' and '.join(found)} are both installed and overwrite each other: pip uninstall both, then install one of "
        "'mekd[onnx]' and 'mekd[onnx-gpu]'"
    )
