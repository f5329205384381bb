"""Where an ONNX file runs: on the execution provider that was asked for, or not at all."""

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import onnxruntime as ort
import pytest
import torch

from mekd.config import OracleConfig
from mekd.oracle.ort import OnnxOracle, ProviderError, open_session
from onnx_files import asked, echo


def test_cuda_never_becomes_the_cpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: CUDA may well run")
    path = echo(tmp_path / "x.onnx")
    with pytest.raises(ProviderError, match="CUDAExecutionProvider"):
        OnnxOracle(path, providers="cuda")
    with pytest.raises(ProviderError, match="CUDAExecutionProvider"):
        OnnxOracle(path, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])


def test_a_session_that_fell_back_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a machine whose driver is too old, whatever this one has.
    class Fallen:
        def __init__(self, path: str, settings: Any, providers: list[Any], enable_fallback: int) -> None:
            assert [name for name, _ in providers] == ["CUDAExecutionProvider"] and not enable_fallback

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", Fallen)
    with pytest.raises(ProviderError, match="CUDAExecutionProvider was asked for, but CPUExecutionProvider would run"):
        open_session(echo(tmp_path / "x.onnx"), "cuda")


def test_auto_runs_where_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session = open_session(echo(tmp_path / "x.onnx"))
    assert session.get_providers() == ["CPUExecutionProvider"]


def test_a_provider_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match="provider is 'gpu'; it must be auto, cpu, cuda, tensorrt"):
        OnnxOracle(echo(tmp_path / "x.onnx"), providers="gpu")


def test_a_provider_that_this_build_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = echo(tmp_path / "x.onnx")
    with pytest.raises(ProviderError, match="NoSuchExecutionProvider is not in this build of ONNX Runtime, which has"):
        OnnxOracle(path, providers=["NoSuchExecutionProvider"])
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match=r"CUDAExecutionProvider is not in this build .* has CPUExecutionProvider"):
        OnnxOracle(path, providers="cuda")


def test_no_provider_at_all(tmp_path: Path) -> None:
    with pytest.raises((ProviderError, ValueError), match="provider"):
        OnnxOracle(echo(tmp_path / "x.onnx"), providers=[])


def test_two_runtimes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mekd.oracle.session.version", lambda name: "1.2.3")
    with pytest.raises(ProviderError, match=r"onnxruntime 1.2.3 and onnxruntime-gpu 1.2.3 are both installed"):
        asked(echo(tmp_path / "x.onnx"))


def test_no_runtime_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ProviderError, match=r"not installed: pip install 'mekd\[onnx\]' \(CPU\) or 'mekd\[onnx-gpu\]'"):
        asked(tmp_path / "x.onnx")


# -- options that a provider takes or refuses --------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"precision": "float16"},
            r"precision is 'float16', .* which cannot do it; it must be float32 there: say --oracle",
        ),
        (
            {"cuda_graph": True, "batch": 4},
            r"cuda_graph is True, .* it must be false there: say --oracle.cuda_graph false",
        ),
    ],
)
def test_the_cpu_refuses_what_is_for_gpus(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ProviderError, match=says):
        asked(echo(tmp_path / "x.onnx"), **options)


def test_a_precision_that_is_misspelt(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"precision is 'fp16' \(oracle.precision\); it must be float32 or float16"):
        asked(echo(tmp_path / "x.onnx"), precision="fp16")
    with pytest.raises(ValueError, match=r"oracle.precision is 'fp16'; it must be one of"):
        OracleConfig(precision="fp16")


def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of ONNX Runtime that has all three, as that for GPUs has."""
    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: names)


@pytest.mark.parametrize("batch", [None, lambda run: 8], ids=["whole", "measured"])
def test_tensorrt_wants_one_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: Any) -> None:
    known(monkeypatch)
    with pytest.raises(
        ProviderError, match=r"batch is not given \(oracle.batch\), but TensorRT .*: say --oracle.batch N"
    ):
        OnnxOracle(echo(tmp_path / "x.onnx"), providers="tensorrt", batch=batch)


def test_a_graph_wants_one_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch)
    with pytest.raises(
        ProviderError, match=r"batch is not given \(oracle.batch\), but a CUDA graph .* one size: say --oracle.batch N"
    ):
        OnnxOracle(echo(tmp_path / "x.onnx"), providers="cuda", cuda_graph=True)


def test_no_device_is_known_before_anything_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "tensorrt"):
        with pytest.raises(
            ProviderError, match=r"was asked for, but torch finds no CUDA device .*--oracle.provider cpu"
        ):
            OnnxOracle(echo(tmp_path / "x.onnx"), providers=name, batch=4)


@pytest.mark.parametrize(
    ("device", "asked_of"),
    [(torch.device("cuda:1"), torch.device("cuda:1")), (torch.device("cpu"), None), (None, None)],
)
def test_the_teacher_is_opened_on_the_card_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device | None, asked_of: torch.device | None
) -> None:
    known(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    entered: list[Any] = []

    class Entered:
        def __init__(self, where: torch.device) -> None:
            self.where = where

        def __enter__(self) -> None:
            entered.append(self.where)

        def __exit__(self, *error: Any) -> None:
            entered.append("left")

    def stream(where: torch.device | None) -> Any:
        assert where == asked_of
        return SimpleNamespace(device=where or torch.device("cuda:0"), cuda_stream=7)

    class Opened(Exception):
        pass

    def open_here(path: Path, names: Any, **options: Any) -> None:
        assert options["stream"].device == (asked_of or torch.device("cuda:0"))
        raise Opened

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "device", Entered)
    monkeypatch.setattr("mekd.oracle.ort.open_session", open_here)
    with pytest.raises(Opened):
        OnnxOracle(echo(tmp_path / "x.onnx"), providers="cuda", device=device)
    # ONNX Runtime changes the current device: whatever it was comes back.
    assert entered == [asked_of or torch.device("cuda:0"), "left"]


class Session:
    """A session that starts on whatever runs says, its nodes taken by taken; it notes what it was told."""

    runs: tuple[str, ...] = ()
    taken: tuple[str, ...] = ()
    told: ClassVar[dict[str, dict[str, str]]] = {}

    def __init__(self, model: Any, settings: Any, providers: list[Any], enable_fallback: int) -> None:
        Session.told = dict(providers)
        assert enable_fallback == 0

    def get_providers(self) -> list[str]:
        return [*self.runs, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return [SimpleNamespace(ep_name=name) for name in self.taken]


TENSORRT, CUDA = "TensorrtExecutionProvider", "CUDAExecutionProvider"


@pytest.fixture
def gpu_runtime(monkeypatch: pytest.MonkeyPatch) -> type[Session]:
    known(monkeypatch)
    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(Session, "runs", (TENSORRT, CUDA))
    monkeypatch.setattr(Session, "taken", (TENSORRT,))
    return Session


STREAM: Any = SimpleNamespace(device=torch.device("cuda:1"), cuda_stream=12345)


def test_what_cuda_is_told(tmp_path: Path, gpu_runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "runs", (CUDA,))
    monkeypatch.setattr(Session, "taken", (CUDA,))
    path = echo(tmp_path / "x.onnx")
    open_session(path, "cuda", stream=STREAM)
    assert gpu_runtime.told == {
        CUDA: {
            "device_id": "1",
            "user_compute_stream": "12345",
            "cudnn_conv_algo_search": "HEURISTIC",
            "use_tf32": "0",
        }
    }
    open_session(path, "cuda", stream=STREAM, cuda_graph=True)
    assert gpu_runtime.told[CUDA]["enable_cuda_graph"] == "1"


def test_what_tensorrt_is_told(tmp_path: Path, gpu_runtime: Any) -> None:
    path = echo(tmp_path / "x.onnx")
    options: dict[str, Any] = {"precision": "float16", "cuda_graph": True, "stream": STREAM, "cache": tmp_path / "made"}
    open_session(path, "tensorrt", **options)
    assert list(gpu_runtime.told) == [TENSORRT, CUDA]  # CUDA takes what TensorRT cannot
    told = gpu_runtime.told[TENSORRT]
    assert told["trt_fp16_enable"] == told["trt_cuda_graph_enable"] == told["trt_engine_cache_enable"] == "1"
    assert told["user_compute_stream"] == gpu_runtime.told[CUDA]["user_compute_stream"] == "12345"
    assert told["trt_engine_cache_path"] == str(tmp_path / "made")
    open_session(path, "tensorrt", stream=STREAM)
    assert gpu_runtime.told[TENSORRT]["trt_fp16_enable"] == "0"


def test_cuda_in_float16_gets_the_converted_file(
    tmp_path: Path, gpu_runtime: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "runs", (CUDA,))
    monkeypatch.setattr(Session, "taken", (CUDA,))
    monkeypatch.setattr("mekd.oracle.half.to_float16", lambda path: b"half")
    models: list[Any] = []
    monkeypatch.setattr(Session, "__init__", lambda self, model, settings, **options: models.append(model))
    path = echo(tmp_path / "x.onnx")
    open_session(path, "cuda", precision="float16")
    open_session(path, "cuda")
    assert models == [b"half", str(path)]


@pytest.mark.parametrize("runs", [(CUDA,), (TENSORRT,), ()], ids=["on CUDA alone", "on TensorRT alone", "on the CPU"])
def test_tensorrt_never_becomes_something_else(
    tmp_path: Path, gpu_runtime: Any, monkeypatch: pytest.MonkeyPatch, runs: tuple[str, ...]
) -> None:
    monkeypatch.setattr(Session, "runs", runs)
    with pytest.raises(ProviderError, match=r"ExecutionProvider was asked for, but .* would run"):
        open_session(echo(tmp_path / "x.onnx"), "tensorrt", stream=STREAM)


def test_a_provider_that_takes_no_node(tmp_path: Path, gpu_runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "taken", (CUDA, "CPUExecutionProvider"))
    with pytest.raises(
        ProviderError, match=r"can compute no node of .*: CPUExe.*, CUDAExe.* would run all of it. Name"
    ):
        open_session(echo(tmp_path / "x.onnx"), "tensorrt", stream=STREAM)


def test_tensorrt_without_its_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if TENSORRT not in ort.get_available_providers():
        pytest.skip("this build of ONNX Runtime has no TensorRT")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: TensorRT may well run")
    with pytest.raises(ProviderError, match=r"TensorrtExecutionProvider .*It needs TensorRT 10: pip install") as caught:
        open_session(echo(tmp_path / "x.onnx"), "tensorrt")
    assert "\n" not in str(caught.value)


def test_a_graph_that_cannot_be_recorded(tmp_path: Path, gpu_runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, *what: Any, **options: Any) -> None:
        raise RuntimeError("This session cannot use the graph capture\nfeature: not all nodes are on CUDA")

    monkeypatch.setattr(Session, "__init__", refuse)
    with pytest.raises(ProviderError, match=r"does not start: .*not all nodes.*: --oracle.cuda_graph false"):
        open_session(echo(tmp_path / "x.onnx"), "cuda", cuda_graph=True)
