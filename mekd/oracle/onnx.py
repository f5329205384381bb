"""Any ONNX classifier as a black box, run by ONNX Runtime."""

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mekd.oracle.base import Oracle
from mekd.oracle.response import AnswerError, Response, answer, from_names

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_DTYPES = {
    "tensor(uint8)": np.uint8,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
}


#: Nodes behind a softmax that leave probabilities what they are.
_SAME = ("Cast", "Identity", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Dropout")


class ModelError(ValueError):
    """The .onnx file is no classifier that can be asked, or not one for these images."""


class ProviderError(RuntimeError):
    """The execution provider that was asked for does not run here."""


class OnnxOracle(Oracle):
    """Ask an ONNX classifier, and nothing but ask it.

    path: the file. Its one image input, (m, ch, H, W) or (m, H, W, ch), is found and checked, and so is its
    output: scores (m, C), class indices (m,) or class names (m,). output says what scores are: "logits", "probs"
    or "auto" (probabilities if the graph ends in a softmax). A uint8 input gets pixels 0 to 255; a floating one
    gets (pixels / 255 - mean) / std. image=(ch, H, W) and num_classes are needed where the file leaves them open,
    and checked where it does not. classes: the names of the classes in order, for a model that answers names.
    providers: "auto", "cpu", "cuda", "tensorrt", or ONNX Runtime's own names in order; the first must run. The
    rest as in Oracle. Raises ModelError, ProviderError.
    """

    def __init__(
        self,
        path: str | Path,
        response: str = "probs",
        *,
        providers: str | Sequence[str] = "auto",
        image: tuple[int, int, int] | None = None,
        num_classes: int | None = None,
        classes: Sequence[str] | None = None,
        output: str = "auto",
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        **options: Any,
    ) -> None:
        session = open_session(Path(path), providers)
        source, image, last = _find_input(session, path, image)
        batch = source.shape[0] if isinstance(source.shape[0], int) else None
        sink, output, count = _find_output(session, path, response, output, classes)
        if num_classes is not None and count is not None and num_classes != count:
            raise ModelError(f"{path} answers {count} classes; {num_classes} were expected")
        num_classes = num_classes or count
        if num_classes is None:
            raise ModelError(f"{path} does not say how many classes it has: give num_classes")
        super().__init__(image, num_classes, response, **options)
        dtype = _DTYPES[source.type]
        if dtype == np.uint8 and self.transport == "float":
            raise ModelError(f"{path} takes uint8 images; transport must be 'uint8'")
        for name, numbers in (("mean", mean), ("std", std)):
            if len(numbers) not in (1, image[0]) or (name == "std" and min(numbers) <= 0):
                raise ModelError(f"{name} is {tuple(numbers)}; the teacher takes {image[0]} channels, std above 0")
        if output == "probs" and response == "logits":
            raise ModelError(f"{path} answers probabilities; its logits cannot be had: --oracle.response probs")
        shift, spread = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 1) for x in (mean, std))

        normalised = any(shift.flatten()) or any(spread.flatten() != 1)

        def feed(images: Tensor) -> np.ndarray:
            if dtype != np.uint8:
                # In place in one fresh tensor: a pass over the images costs more than what it computes.
                unit = images / 255 if images.dtype == torch.uint8 else images.add(1).mul_(0.5)
                images = unit.cpu()
                if normalised:
                    images = images.sub_(shift).div_(spread)
            if last:
                images = images.permute(0, 2, 3, 1)
            return np.ascontiguousarray(images.cpu().numpy().astype(dtype, copy=False))

        def run(images: Tensor) -> np.ndarray:
            fed, m = feed(images), len(images)
            if batch is None:
                return session.run([sink], {source.name: fed})[0]
            # A model exported for one batch size: asked in slices of it, the last one padded with its first row.
            fed = np.concatenate([fed, np.repeat(fed[:1], -m % batch, 0)])
            parts = [session.run([sink], {source.name: fed[i : i + batch]})[0] for i in range(0, len(fed), batch)]
            return np.concatenate(parts)[:m]

        try:  # two blank images: what fails here costs nothing, what fails in query() does
            blank = run(torch.zeros(2, *image, dtype=torch.uint8))
        except Exception as error:
            raise ModelError(f"{path} does not run on images {image}: {error}") from error
        width = num_classes if output in ("logits", "probs") else 1
        if len(blank) != 2 or blank.size != 2 * width:
            raise ModelError(
                f"{path} answers two images with {sink} of shape {blank.shape}: {blank.size // 2} scores an image; "
                f"{width} were expected"
            )
        self._respond = _responder(run, self, output, list(classes or []))

    def _send(self, images: Tensor) -> Response:
        return self._respond(images)


def _responder(
    run: Callable[[Tensor], np.ndarray], oracle: Oracle, output: str, classes: list[str]
) -> Callable[[Tensor], Response]:
    """images -> Response, by what the model puts out."""
    kind, k, decimals, num_classes = oracle.response, oracle.k, oracle.decimals, oracle.num_classes

    def respond(images: Tensor) -> Response:
        raw = run(images)
        if output == "names":
            return Response("label", None, from_names([str(name) for name in raw.reshape(-1)], classes))
        if output == "index":
            indices = torch.from_numpy(raw.astype(np.int64).reshape(-1))
            if indices.min() < 0 or indices.max() >= num_classes:
                wrong = indices[(indices < 0) | (indices >= num_classes)][0]
                raise AnswerError(f"the teacher answered class {int(wrong)}; there are {num_classes}")
            return Response("label", None, indices)
        scores = torch.from_numpy(raw.astype(np.float32, copy=False).reshape(len(raw), -1))
        if scores.shape[1] != num_classes:
            raise AnswerError(f"the teacher answered {scores.shape[1]} scores an image; {num_classes} were expected")
        return answer(scores, kind, output=output, k=k, decimals=decimals)

    return respond


def open_session(path: Path, providers: str | Sequence[str] = "auto") -> Any:
    """An ONNX Runtime session on the providers that were asked for, or an error that says why not."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ProviderError(
            "ONNX Runtime is not installed: pip install 'mekd[onnx]' (CPU) or 'mekd[onnx-gpu]'"
        ) from error
    if clash := runtime_clash():
        raise ProviderError(clash)
    if not path.is_file():
        raise FileNotFoundError(f"teacher.onnx is {str(path)!r}; no such file")
    names = _provider_names(providers, ort.get_available_providers())
    if not names:
        raise ProviderError("no execution provider is named; say auto, cpu, cuda or tensorrt")
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = torch.get_num_threads()
    # A spinning pool would take the cores that torch's own threads work on.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(str(path), settings, providers=names)
    except Exception as error:
        said = str(error).replace(str(path), "")
        if "provider" in said.lower() or "CUDA" in said:
            raise ProviderError(f"{names[0]} does not start: {error}") from error
        raise ModelError(f"{path} is no ONNX model that ONNX Runtime can load: {error}") from error
    if session.get_providers()[0] != names[0]:
        raise ProviderError(
            f"{names[0]} was asked for, but {session.get_providers()[0]} would run: no driver, or its libraries are "
            "missing (`mekd doctor` shows which). Use --oracle.provider cpu to run on the processor"
        )
    return session


def _provider_names(providers: str | Sequence[str], available: list[str]) -> list[str]:
    if providers == "auto":
        providers = "cuda" if torch.cuda.is_available() and PROVIDERS["cuda"] in available else "cpu"
    if isinstance(providers, str):
        if providers not in PROVIDERS:
            raise ProviderError(f"provider is {providers!r}; it must be auto, {', '.join(PROVIDERS)}")
        providers = [PROVIDERS[providers]]
    for name in providers:
        if name not in available:
            raise ProviderError(f"{name} is not in this build of ONNX Runtime, which has {', '.join(available)}")
    return list(providers)


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


def _find_input(
    session: Any, path: object, image: tuple[int, int, int] | None
) -> tuple[Any, tuple[int, int, int], bool]:
    """The image input, its (ch, H, W), and whether channels come last."""
    inputs = session.get_inputs()
    found = [i for i in inputs if len(i.shape) == 4 and i.type in _DTYPES]
    if len(inputs) != 1 or not found:
        shown = "; ".join(f"{i.name}: {i.type} {i.shape}" for i in inputs) or "none"
        raise ModelError(f"{path} is no image classifier: it needs one input (m, ch, H, W) of pixels, it has {shown}")
    shape: list[Any] = [n if isinstance(n, int) else None for n in found[0].shape[1:]]
    last = shape[2] in (1, 3) and shape[0] not in (1, 3)
    if last:
        shape = [shape[2], shape[0], shape[1]]
    wanted = list(image or shape)
    if None in wanted:
        raise ModelError(f"{path} leaves its image size open ({found[0].shape}): give image=(ch, H, W)")
    if any(have is not None and have != want for have, want in zip(shape, wanted, strict=True)):
        raise ModelError(
            f"{path} takes images (ch, H, W) = {tuple(shape)}, but the images are {tuple(wanted)}: set data.size and "
            "the data's channels to fit, or export the model with its resizing inside"
        )
    return found[0], (wanted[0], wanted[1], wanted[2]), last


def _find_output(
    session: Any, path: object, response: str, output: str, classes: Sequence[str] | None
) -> tuple[str, str, int | None]:
    """The output's name, what it holds (logits, probs, index, names), and the number of classes if it says."""
    if output not in ("auto", "logits", "probs"):
        raise ValueError(f"output is {output!r}; it must be 'auto', 'logits' or 'probs'")
    sinks = session.get_outputs()
    scores = [o for o in sinks if o.type in _DTYPES and o.type != "tensor(uint8)" and len(o.shape) in (2, 4)]
    if scores:
        sink = scores[0]
        if output == "auto":
            output = "probs" if _ends_in_softmax(path, sink.name) else "logits"
        tail = sink.shape[1:]
        if any(isinstance(n, int) and n != 1 for n in tail[1:]):
            raise ModelError(f"{path} is no classifier: its output {sink.name} has shape {sink.shape}, not (m, C)")
        return sink.name, output, tail[0] if isinstance(tail[0], int) else None
    labels = [
        o for o in sinks if o.type in ("tensor(int64)", "tensor(int32)", "tensor(string)") and len(o.shape) in (1, 2)
    ]
    if labels and response == "label":
        if labels[0].type == "tensor(string)":
            if not classes:
                raise ModelError(f"{path} answers class names: give their list as classes (--oracle.classes FILE)")
            return labels[0].name, "names", len(classes)
        return labels[0].name, "index", None
    shown = "; ".join(f"{o.name}: {o.type} {o.shape}" for o in sinks)
    raise ModelError(f"{path} is no classifier that can answer {response!r}: it needs an output (m, C), it has {shown}")


def _ends_in_softmax(path: object, sink: str) -> bool:
    try:
        import onnx
    except ImportError as error:
        raise ModelError("output='auto' needs the package onnx; or say output='logits' or 'probs'") from error
    graph = onnx.load(str(path), load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    while (node := makers.get(sink)) is not None and node.op_type in _SAME:
        sink = node.input[0]
    return node is not None and node.op_type == "Softmax"
