"""Any ONNX classifier as a black box, run by ONNX Runtime."""

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mekd.errors import MekdError
from mekd.oracle.base import Oracle, about_scale
from mekd.oracle.binding import DTYPES, Ask, bound, in_pieces, on_stream, out_of_memory, replayed
from mekd.oracle.half import random_pixels, require_agreement
from mekd.oracle.meaning import Reading, probe, probe_images, read
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

_IMAGES = ("tensor(uint8)", "tensor(float)", "tensor(float16)", "tensor(double)")
#: Measures the query batch: it is given a function that runs m blank images, and gives the size.
Measure = Callable[[Callable[[int], object]], int]


class OnnxOracle(Oracle):
    """Ask an ONNX classifier, and nothing but ask it.

    path: the file. Its one image input, (m, ch, H, W) or (m, H, W, ch), is found and checked, and so is its
    output: scores (m, C), class indices (m,) or class names (m,). Which output that is, and whether scores are
    logits or probabilities, is told by their values for a few images (meaning.py); output_name names one of several,
    and output ("logits", "probs") says what its scores are. A uint8 input gets pixels 0 to 255; a floating one
    gets (pixels / 255 - mean) / std. image=(ch, H, W) and num_classes are needed where the file leaves them open,
    and checked where it does not. classes: the names of the classes in order, for a model that answers names.
    providers: "auto", "cpu", "cuda", "tensorrt", or ONNX Runtime's own names in order; the first must run. On CUDA
    images and answers stay in torch's memory, on device (the current one if it is None), and the work has a stream of
    its own. batch: images that the teacher gets at once, or a function that measures it; None for a whole call,
    which remains one call to the ledger. precision: "float16" is compared with float32 on the CPU first.
    cuda_graph: the work is recorded once and replayed, every piece filled up to batch, and the oracle is asked on the
    thread that opened it; TensorRT builds an engine for one size. cache: a folder for that engine. The rest as in
    Oracle. notes: sentences for the log on how the file was read. Raises ModelError, ProviderError.
    """

    def __init__(
        self,
        path: str | Path,
        response: str = "probs",
        *,
        providers: str | Sequence[str] = "auto",
        device: torch.device | None = None,
        image: tuple[int, int, int] | None = None,
        num_classes: int | None = None,
        classes: Sequence[str] | None = None,
        output: str = "auto",
        output_name: str | None = None,
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
        _check_classes(classes)
        stream = _stream(names, device)
        # ONNX Runtime makes its own device the current one and leaves it so.
        with contextlib.nullcontext() if stream is None else torch.cuda.device(stream.device):
            session = open_session(path, names, precision=precision, cuda_graph=cuda_graph, stream=stream, cache=cache)
            source, image, last = find_input(session, path, image)
            dtype, here = DTYPES[source.type], torch.device("cpu") if stream is None else stream.device
            for name, numbers in (("mean", mean), ("std", std)):
                if len(numbers) not in (1, image[0]) or (name == "std" and min(numbers) <= 0):
                    raise ModelError(
                        f"{name} is {tuple(numbers)} (oracle.{name}); the teacher takes {image[0]} channels, and std "
                        "is above 0"
                    )
            fixed = source.shape[0] if isinstance(source.shape[0], int) else None
            if fixed is not None and isinstance(batch, int) and batch != fixed:
                raise ModelError(f"batch is {batch} (oracle.batch); {path} takes {fixed} images at once: leave it null")
            batch = fixed or batch
            filled = fixed is not None or cuda_graph or names[0] == PROVIDERS["tensorrt"]
            feed = feeder(dtype, mean, std, last, here)
            plain = open_session(path, "cpu") if precision == "float16" else session
            piece = batch if filled and isinstance(batch, int) and plain is session else fixed or 2
            seen = probe(plain, path, source.name, feed(probe_images(image)), piece)
            reading = read(
                session, path, seen, response,
                output=output, output_name=output_name, num_classes=num_classes, classes=classes,
            )  # fmt: skip
            if reading.kind == "probs" and response == "logits":
                raise ModelError(f"{path} answers probabilities; its logits cannot be had: --oracle.response probs")
            super().__init__(image, reading.classes or 0, response, **options)
            if dtype == torch.uint8 and self.transport == "float":
                raise ModelError(f"{path} takes uint8 images; transport must be 'uint8': --oracle.transport uint8")
            self.notes = [reading.note, *about_scale(dtype != torch.uint8, mean, std)]
            row, kind = reading.row, reading.dtype
            if reading.kind == "names":
                ask = _asking_names(session, source.name, reading.name, list(classes or []))
            else:
                ask = bound(session, source.name, reading.name, row, kind, here)

            def blank(m: int) -> Tensor:
                return torch.zeros(m, *image, dtype=torch.uint8, device=here)

            def transported(ask: Ask) -> Ask:
                """Ask with images as they are transported, on the session's stream if it has one."""
                return on_stream(lambda images: ask(feed(images)), stream)

            if callable(batch):
                batch = batch(lambda m: _wait(transported(ask)(blank(m))))
            if cuda_graph:
                ask = replayed(session, source.name, reading.name, feed(blank(batch or 1)), row, kind)
            run = transported(in_pieces(ask, batch, filled))
            if stream is not None and batch is not None:
                # What is too large shows here, before it costs a query; algorithms are chosen, a graph is recorded.
                try:
                    _wait(run(blank(batch)))
                except Exception as error:
                    raise ProviderError(_failed(batch, batch, error)) from error
            if precision == "float16" and reading.kind != "names":
                pixels = random_pixels(16, image)
                truth = bound(plain, source.name, reading.name, row, kind, torch.device("cpu"))
                theirs = in_pieces(truth, fixed, fixed is not None)(feed(pixels).cpu())
                ours = run(pixels).cpu()
                if reading.kind != "index":
                    ours, theirs = reading.scores(ours), reading.scores(theirs)
                require_agreement(path, ours, theirs, reading.kind)
            self._respond = _responder(run, self, reading, batch)
            self._thread = threading.get_ident() if cuda_graph else None

    def query(self, images: Tensor) -> Response:
        """As Oracle.query; with a CUDA graph on the thread that opened the oracle, ProviderError on another.

        ONNX Runtime keeps a graph for each thread, and while one is recorded no other thread may use the card.
        """
        if self._thread not in (None, threading.get_ident()):
            raise ProviderError(
                "a teacher with a CUDA graph is asked on another thread than the one that opened it: open it there, or "
                "say --oracle.cuda_graph false"
            )
        return super().query(images)

    def _send(self, images: Tensor) -> Response:
        return self._respond(images)


def _check_batch(batch: int | Measure | None, names: Sequence[str], cuda_graph: bool) -> None:
    """Raise for a batch that is no size (ModelError), and where one is needed and not given (ProviderError)."""
    if isinstance(batch, int) and batch < 1:
        raise ModelError(f"batch is {batch} (oracle.batch); it must be at least 1, or null")
    if names[0] == PROVIDERS["tensorrt"] and not isinstance(batch, int):
        raise ProviderError(
            "batch is not given (oracle.batch), but TensorRT builds an engine for one size, which takes minutes: say "
            "--oracle.batch N, for instance what distill.batch is"
        )
    if cuda_graph and batch is None:
        raise ProviderError(
            "batch is not given (oracle.batch), but a CUDA graph (oracle.cuda_graph) is recorded for one size: say "
            "--oracle.batch N"
        )


def _check_classes(classes: Sequence[str] | None) -> None:
    """Raise ModelError for a name that stands in the list twice."""
    for name, count in Counter(classes or ()).items():
        if count > 1:
            raise ModelError(
                f"classes (oracle.classes) has {name!r} more than once; each class needs a name of its own"
            )


def _stream(names: Sequence[str], device: torch.device | None) -> torch.cuda.Stream | None:
    """A stream for the teacher's work on that CUDA device, or the current one, where the provider works on CUDA."""
    if not runs_on_cuda(names):
        return None
    if not torch.cuda.is_available():
        raise ProviderError(
            f"{names[0]} was asked for, but torch finds no CUDA device (`mekd doctor` says more). Use "
            "--oracle.provider cpu to run on the processor"
        )
    return torch.cuda.Stream(device if device is not None and device.type == "cuda" else None)


def feeder(dtype: torch.dtype, mean: Sequence[float], std: Sequence[float], last: bool, device: torch.device) -> Ask:
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


def _wait(answer: Tensor) -> None:
    if answer.is_cuda:
        torch.cuda.current_stream(answer.device).synchronize()


def _asking_names(session: Any, source: str, sink: str, classes: list[str]) -> Ask:
    """Class names are strings, which live in the processor's memory; they come out as indices (m,)."""

    def ask(images: Tensor) -> Tensor:
        raw = session.run([sink], {source: images.cpu().numpy()})[0]
        return from_names([str(name) for name in raw.reshape(-1)], classes)

    return ask


def _responder(run: Ask, oracle: Oracle, reading: Reading, batch: int | None) -> Callable[[Tensor], Response]:
    """images -> Response, by how the file is read."""
    kind, k, decimals, num_classes = oracle.response, oracle.k, oracle.decimals, oracle.num_classes

    def respond(images: Tensor) -> Response:
        try:
            raw = run(images)
        except MekdError:
            raise
        except Exception as error:
            raise AnswerError(_failed(len(images), batch, error)) from error
        if reading.kind in ("logits", "probs"):
            scores = reading.scores(raw)
            return answer(scores, kind, output=reading.kind, k=k, decimals=decimals, step=reading.step)
        indices = raw.to(torch.int64).flatten()
        wrong = (indices < 0) | (indices >= num_classes)
        if wrong.any():
            raise AnswerError(
                f"the teacher answered class {int(indices[wrong][0])}; there are {num_classes} (oracle.num_classes)"
            )
        return Response("label", None, indices)

    return respond


def _failed(m: int, batch: int | None, error: BaseException) -> str:
    if out_of_memory(error):
        smaller = "free some" if 1 in (m, batch) else "say a smaller --oracle.batch"
        return f"the teacher ran out of memory on {m} images: {smaller} ({one_line(error)})"
    return f"the teacher failed on {m} images: {one_line(error)}"


def find_input(
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
