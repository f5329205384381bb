"""Every kernel in every form that counts, as calls on meta tensors: for export and the static sheet."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mekd.checks import SLACK

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Few classes; ImageNet; the longest rows in registers, of some kernels and of others; ImageNet-21k and a large
#: vocabulary, which loop.
CLASSES = (10, 1000, 8192, 16384, 21841, 128256)
ROWS = 4096
TOPK = 5
IMAGES = (64, 3, 224, 224)


class Variant(NamedTuple):
    """One call of a launcher; bytes_least: what it cannot avoid to read and write; elements: of its largest tensor.

    backward: bytes that the backward after it moves where what comes from above is 1, and where it is not.
    """

    kernel: str
    name: str
    dtype: torch.dtype
    classes: int
    call: Callable[[], object]
    elements: int
    bytes_least: int
    backward: tuple[int, int]


def variants(dtypes: Sequence[torch.dtype] = DTYPES, classes: Sequence[int] = CLASSES) -> Iterator[Variant]:
    """All of them, with gradients; reduction "rowmean" for rows, "mean" for the others."""
    for dtype in dtypes:
        for count in classes:
            yield from _rows(dtype, count)
            yield from _answers(dtype, count)
        yield from _images(dtype)
        yield from _scalars(dtype)
        if dtype != torch.float16:  # whose gradient is multiplied while it is rounded, by torch
            yield _backward(dtype)


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _gradient(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 else x


def _after(student: Tensor) -> tuple[int, int]:
    if student.dtype == torch.float16:
        return (6 * student.numel(),) * 2  # the float32 gradient is read, and rounded
    return 0, 2 * student.nbytes


def _variant(kernel: str, name: str, classes: int, tensors: Sequence[Tensor], losses: int, *arguments: Any) -> Variant:
    """tensors: read in full, the first of them the student, which gets a gradient."""
    student = tensors[0]
    least = sum(x.nbytes for x in tensors) + _gradient(student).nbytes + 4 * losses
    launcher = getattr(import_module(f"mekd.kernels.{kernel.rstrip('_')}"), kernel)
    elements = max(x.numel() for x in tensors)
    return Variant(
        kernel, name, student.dtype, classes, partial(launcher, *arguments), elements, least, _after(student)
    )


def _rows(dtype: torch.dtype, classes: int) -> Iterator[Variant]:
    x, y = (_meta(ROWS, classes, dtype=dtype) for _ in range(2))
    labels = _meta(ROWS, dtype=torch.int64)
    tau = _meta(dtype=torch.float64)
    few = min(TOPK, classes)
    best, places = _meta(ROWS, few, dtype=dtype), _meta(ROWS, few, dtype=torch.int64)
    end = ("tau2", "rowmean", True)

    def of(kernel: str, name: str, targets: tuple[Tensor, ...], *options: Any) -> Variant:
        return _variant(kernel, name, classes, (x, *targets, tau), ROWS, x, *targets, tau, None, None, *options, *end)

    yield of("tempered_kl", "logits", (y,), False, SLACK)
    yield of("tempered_kl", "probs", (y,), True, SLACK)
    yield of("tempered_kl_labels", "labels", (labels,), -100)
    yield of("tempered_kl_topk", "spread", (best, places), "spread", SLACK)
    yield of("tempered_kl_topk", "drop", (best, places), "drop", SLACK)
    yield of("tempered_kl_topk", "tail", (best, places), "tail", SLACK)
    yield of("dkd", "logits", (y, labels), 1.0, 8.0, -100)
    yield of("jsd", "mixture", (y,), 0.5, 0.5, 0.5, False)
    yield of("jsd", "forward", (y,), 0.0, 1.0, 1.0, False)
    yield of("jsd", "reverse", (y,), 1.0, 1.0, 1.0, False)
    yield of("jsd", "skewed", (y,), 0.1, 1.0, 0.0, False)
    yield of("jsd", "log_probs", (y,), 0.5, 0.5, 0.5, True)


def _answers(dtype: torch.dtype, classes: int) -> Iterator[Variant]:
    d, answer = _meta(ROWS, dtype=dtype), _meta(ROWS, classes, dtype=dtype)
    for kind in ("logits", "probs"):
        arguments = (d, answer, kind, SLACK, 1.0, 0.5, False, "mean", True)
        yield _variant("gan_generator", kind, classes, (d, answer), ROWS, *arguments)


def _images(dtype: torch.dtype) -> Iterator[Variant]:
    a, b = (_meta(*IMAGES, dtype=dtype) for _ in range(2))
    pixels, samples = a[0].numel(), len(a)
    for name, tanh, finished in (("tanh", True, False), ("finished", True, True), ("images", False, False)):
        arguments = (a, b, None, tanh, finished, "mean")
        yield _variant("tanh_l1", name, pixels, (a, b), samples, *arguments, True)
        # In place the gradient has the dtype of what it is written over.
        twin = _variant("tanh_l1_", name, pixels, (a, b), samples, *arguments)
        least = twin.bytes_least - _gradient(a).nbytes + a.nbytes
        yield twin._replace(bytes_least=least, backward=(0, 2 * a.nbytes))


def _scalars(dtype: torch.dtype) -> Iterator[Variant]:
    d, other = (_meta(ROWS, dtype=dtype) for _ in range(2))
    end, weights = ("mean", True), (SLACK, 1.0, 0.5)
    yield _variant("gan_generator", "confidence", 1, (d, other), ROWS, d, other, "confidence", *weights, False, *end)
    yield _variant("gan_generator", "label", 1, (d,), ROWS, d, None, "confidence", *weights, False, *end)
    yield _variant("gan_generator", "minimax", 1, (d, other), ROWS, d, other, "confidence", *weights, True, *end)
    both = _variant("gan_discriminator", "logits", 1, (d, other), ROWS, d, other, *end)
    after = tuple(2 * x for x in both.backward)
    yield both._replace(elements=2 * ROWS, bytes_least=both.bytes_least + _gradient(other).nbytes, backward=after)


def _backward(dtype: torch.dtype) -> Variant:
    """The kernel behind a backward whose upstream gradient is not 1."""
    from mekd.kernels.scale import scale_

    grad, upstream = _meta(ROWS, 1000, dtype=dtype), _meta(dtype=torch.float32)
    least = 2 * grad.nbytes + upstream.nbytes
    return Variant("scale_", "backward", dtype, 1000, partial(scale_, grad, upstream), grad.numel(), least, (0, 0))
