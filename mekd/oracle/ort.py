"""Any ONNX classifier as a black box, run by ONNX Runtime."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mekd.oracle.base import Oracle
from mekd.oracle.binding import DTYPES, Ask, bound, in_pieces, on_stream, out_of_memory, replayed, run_options
from mekd.oracle.half import random_pixels, require_agreement
from mekd.oracle.response import AnswerError, Response, answer, from_names
from mekd.oracle.session import (
    PROVIDERS,
    ModelError,
    ProviderError,
    check_options,
    one_line,
    open_session,
    provider_names,
    runs_on_cuda,
    runtime_clash,
)

__all__ = ["PROVIDERS", "ModelError", "OnnxOracle", "ProviderError", "open_session", "runtime_clash"]

_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")
_IMAGES = ("tensor(uint8)", *_FLOATS)
#: Nodes behind a softmax that leave probabilities what they are.
_SAME = ("Cast", "Identity", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Dropout")
#: Measures the query batch: it is given a function that runs m blank images, and gives the size.
Measure = Callable[[Callable[[int], object]], int]


class OnnxOracle(Oracle):
    """Ask an ONNX classifier, and nothing but ask it.

    path: the file. Its one image input, (m, ch, H, W) or (m, H, W, ch), is found and checked, and so is its
    output: scores (m, C), class indices (m,) or class names (m,). output says what scores are: "logits", "probs"
    or "auto" (probabilities if the graph ends in a softmax). A uint8 input gets pixels 0 to 255; a floating one
    gets (pixels / 255 - mean) / std. image=(ch, H, W) and num_classes are needed where the file leaves them open,
    and checked where it does not. classes: the names of the classes in order, for a model that answers names.
    providers: "auto", "cpu", "cuda", "tensorrt", or ONNX Runtime's own names in order; the first must run. On CUDA
    images and answers stay in torch's memory, and the work has a stream of its own. batch: images that the teacher
    gets at once, or a function that measures it; None for a whole request. A request remains one request to the
    ledger. precision: "float16" is compared with float32 on the CPU first. cuda_graph: the work is recorded once
    and replayed, every piece filled up to batch; so it is with TensorRT, which builds an engine for one size. cache:
    a folder for that engine. The rest as in Oracle. Raises ModelError, ProviderError.
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
        batch: int | Measure | None = None,
        precision: str = "float32",
        cuda_graph: bool = False,
        cache: Path | None = None,
        **options: Any,
    ) -> None:
        path, names = Path(path), provider_names(providers)
        check_options(names, precision, cuda_graph)
        _check_batch(batch, names, cuda_graph)
        stream = _stream(names)
        session = open_session(path, names, precision=precision, cuda_graph=cuda_graph, stream=stream, cache=cache)
        source, image, last = _find_input(session, path, image)
        sink, output, count = _find_output(session, path, response, output, classes)
        if num_classes is not None and count is not None and num_classes != count:
            raise ModelError(f"{path} answers {count} classes; {num_classes} were expected")
        num_classes = num_classes or count
        if num_classes is None:
            raise ModelError(f"{path} does not say how many classes it has: give num_classes")
        super().__init__(image, num_classes, response, **options)
        self.ahead = stream is not None
        dtype, device = DTYPES[source.type], torch.device("cpu") if stream is None else stream.device
        if dtype == torch.uint8 and self.transport == "float":
            raise ModelError(f"{path} takes uint8 images; transport must be 'uint8'")
        for name, numbers in (("mean", mean), ("std", std)):
            if len(numbers) not in (1, image[0]) or (name == "std" and min(numbers) <= 0):
                raise ModelError(f"{name} is {tuple(numbers)}; the teacher takes {image[0]} channels, std above 0")
        if output == "probs" and response == "logits":
            raise ModelError(f"{path} answers probabilities; its logits cannot be had: --oracle.response probs")
        fixed = source.shape[0] if isinstance(source.shape[0], int) else None
        if fixed is not None and isinstance(batch, int) and batch != fixed:
            raise ModelError(f"batch is {batch} (oracle.batch); {path} takes {fixed} images at once: leave it null")
        batch = fixed or batch
        filled = fixed is not None or cuda_graph or names[0] == PROVIDERS["tensorrt"]
        feed = _feeder(dtype, mean, std, last, device)

        def blank(m: int) -> Tensor:
            return torch.zeros(m, *image, dtype=torch.uint8, device=device)

        m = batch if filled and isinstance(batch, int) else 2
        width = num_classes if output in ("logits", "probs") else 1
        row, kind = _first_answer(session, path, source.name, sink, feed(blank(m)), width)
        if output == "names":
            ask = _asking_names(session, source.name, sink, list(classes or []))
        else:
            ask = bound(session, source.name, sink, row, kind, device)

        def transported(ask: Ask) -> Ask:
            """Ask with images as they are transported, on the session's stream if it has one."""
            return on_stream(lambda images: ask(feed(images)), stream)

        if callable(batch):
            batch = batch(lambda m: _wait(transported(ask)(blank(m))))
        if cuda_graph:
            ask = replayed(session, source.name, sink, feed(blank(batch or 1)), row, kind)
        run = transported(in_pieces(ask, batch, filled))
        if stream is not None and batch is not None:
            # What is too large shows here, before it costs a query; algorithms are chosen, a graph is recorded.
            try:
                _wait(run(blank(batch)))
            except Exception as error:
                raise ProviderError(_failed(batch, error)) from error
        if precision == "float16" and output != "names":
            pixels = random_pixels(16, image)
            truth = bound(open_session(path, "cpu"), source.name, sink, row, kind, torch.device("cpu"))
            theirs = in_pieces(truth, fixed, fixed is not None)(feed(pixels).cpu())
            require_agreement(path, run(pixels).cpu(), theirs, output)
        self._respond = _responder(run, self, output)

    def _send(self, images: Tensor) -> Response:
        return self._respond(images)


def _check_batch(batch: int | Measure | None, names: Sequence[str], cuda_graph: bool) -> None:
    """Raise for a batch that is no size (ValueError), and where one is needed and not given (ProviderError)."""
    if isinstance(batch, int) and batch < 1:
        raise ValueError(f"batch is {batch} (oracle.batch); it must be at least 1, or null")
    if names[0] == PROVIDERS["tensorrt"] and not isinstance(batch, int):
        raise ProviderError(
            "batch is not given (oracle.batch), but TensorRT builds an engine for one size, which takes minutes: say "
            "--oracle.batch N, for instance what distill.batch is"
        )
    if cuda_graph and batch is None:
        raise ProviderError("batch is not given, but a CUDA graph (cuda_graph) is recorded for one size: give batch=N")


def _stream(names: Sequence[str]) -> torch.cuda.Stream | None:
    """A stream for the teacher's work on the current CUDA device, where that is where it works."""
    if not runs_on_cuda(names):
        return None
    if not torch.cuda.is_available():
        raise ProviderError(
            f"{names[0]} was asked for, but torch finds no CUDA device (`mekd doctor` says more). Use "
            "--oracle.provider cpu to run on the processor"
        )
    return torch.cuda.Stream()


def _feeder(dtype: torch.dtype, mean: Sequence[float], std: Sequence[float], last: bool, device: torch.device) -> Ask:
    """From images as they are transported to what the model takes: contiguous and on device."""
    shift, spread = (torch.tensor(x, dtype=torch.float32, device=device).view(-1, 1, 1) for x in (mean, std))
    normalised = any(mean) or any(x != 1 for x in std)

    def feed(images: Tensor) -> Tensor:
        images = images.to(device)
        if dtype != torch.uint8:
            # In place in one fresh tensor: a pass over the images costs more than what it computes.
            images = images / 255 if images.dtype == torch.uint8 else images.add(1).mul_(0.5)
            if normalised:
                images = images.sub_(shift).div_(spread)
        if last:
            images = images.permute(0, 2, 3, 1)
        return images.to(dtype).contiguous()

    return feed


def _first_answer(
    session: Any, path: object, source: str, sink: str, blank: Tensor, width: int
) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape and type of one image's raw output, from blank images (m, ...): what fails here costs nothing."""
    m, shape = len(blank), tuple(blank.shape)
    try:
        raw = session.run([sink], {source: blank.cpu().numpy()}, run_options(blank.device, wait=True))[0]
    except Exception as error:
        raise ModelError(f"{path} does not run on images {shape}: {one_line(error)}") from error
    if len(raw) != m or raw.size != m * width:
        raise ModelError(
            f"{path} answers {m} images with {sink} of shape {raw.shape}: {raw.size // m} scores an image; "
            f"{width} were expected"
        )
    return raw.shape[1:], torch.int64 if raw.dtype == object else torch.from_numpy(raw).dtype


def _wait(answer: Tensor) -> None:
    if answer.is_cuda:
        torch.cuda.current_stream(answer.device).synchronize()


def _asking_names(session: Any, source: str, sink: str, classes: list[str]) -> Ask:
    """Class names are strings, which live in the processor's memory; they come out as indices (m,)."""

    def ask(images: Tensor) -> Tensor:
        raw = session.run([sink], {source: images.cpu().numpy()})[0]
        return from_names([str(name) for name in raw.reshape(-1)], classes)

    return ask


def _responder(run: Ask, oracle: Oracle, output: str) -> Callable[[Tensor], Response]:
    """images -> Response, by what the model puts out."""
    kind, k, decimals, num_classes = oracle.response, oracle.k, oracle.decimals, oracle.num_classes

    def respond(images: Tensor) -> Response:
        try:
            raw = run(images)
        except AnswerError:
            raise
        except Exception as error:
            raise AnswerError(_failed(len(images), error)) from error
        if output in ("logits", "probs"):
            return answer(raw.to(torch.float32).flatten(1), kind, output=output, k=k, decimals=decimals)
        indices = raw.to(torch.int64).flatten()
        wrong = (indices < 0) | (indices >= num_classes)
        if wrong.any():
            raise AnswerError(f"the teacher answered class {int(indices[wrong][0])}; there are {num_classes}")
        return Response("label", None, indices)

    return respond


def _failed(m: int, error: BaseException) -> str:
    if out_of_memory(error):
        return f"the teacher ran out of memory on {m} images: say a smaller --oracle.batch ({one_line(error)})"
    return f"the teacher failed on {m} images: {one_line(error)}"


def _find_input(
    session: Any, path: object, image: tuple[int, int, int] | None
) -> tuple[Any, tuple[int, int, int], bool]:
    """The image input, its (ch, H, W), and whether channels come last."""
    inputs = session.get_inputs()
    found = [i for i in inputs if len(i.shape) == 4 and i.type in _IMAGES]
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
    scores = [o for o in sinks if o.type in _FLOATS and len(o.shape) in (2, 4)]
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
