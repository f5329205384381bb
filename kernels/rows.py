"""What the kernels over rows of logits share: rows of any layout, what a row counts for, losses and gradients."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mekd.checks import check_floating
from mekd.kernels import tuning
from mekd.kernels.launch import launch

POWERS = {"one": 0, "tau": 1, "tau2": 2}
MINUS_INF = tl.constexpr(float("-inf"))
#: Where rows do not begin at a multiple of 16 bytes, blocks begin at a multiple of so many elements.
EVEN = tl.constexpr(8)


@triton.jit
def number(x, A: tl.constexpr):
    """A float of the host as A. It comes as float64, since Triton would round it; interpreted, it is a float."""
    return (tl.full((), 0, A) + x).to(A)


@triton.jit
def rows_here(rows, mask, weights, ROWS: tl.constexpr):
    """The rows of this program, those that exist, and those of them that count, and for something."""
    # int64: a row may begin beyond 2^31 elements.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    on = there
    if mask is not None:
        on = there & (tl.load(mask + row, mask=there, other=0) != 0)
    if weights is not None:
        on = on & (tl.load(weights + row, mask=on, other=0) != 0)
    return row, there, on


@triton.jit
def columns(row, lanes, CLASSES: tl.constexpr, start=0, SHIFTED: tl.constexpr = False):
    """The classes of a block: (1, BLOCK), or (ROWS, BLOCK) where it is shifted, and begins before its row does."""
    col = (start + lanes)[None, :]
    return col - (row * CLASSES % EVEN)[:, None] if SHIFTED else col


@triton.jit
def _places(row, lanes, start, CLASSES: tl.constexpr):
    """Elements of a shifted block; which are of the row; which of a piece of EVEN of them that is all of the row; and
    whether others may be there: at the ends of a row alone."""
    begin = (row * CLASSES)[:, None]
    end = begin + CLASSES
    # Written so that the compiler sees where pieces begin, and that all of a piece is masked or none.
    at = (row * CLASSES // EVEN * EVEN)[:, None] + (start + lanes)[None, :]
    piece = at // EVEN * EVEN
    ends = start == 0 or start + lanes.shape[0] > CLASSES
    return at, (at >= begin) & (at < end), (piece >= begin) & (piece + EVEN <= end), ends


@triton.jit
def load(
    x, row, lanes, on, STEP: tl.constexpr, CLASSES: tl.constexpr, A: tl.constexpr, start=0,
    SHIFTED: tl.constexpr = False,
):  # fmt: skip
    """A tile (ROWS, BLOCK); what is no class, or in no row that counts, is not read and is a class that is masked."""
    # Cast at once: interpreted bfloat16 is raw bits.
    if SHIFTED:
        at, inside, whole, ends = _places(row, lanes, start, CLASSES)
        value = tl.load(x + at, mask=on[:, None] & whole, other=MINUS_INF).to(A)
        if ends:
            rest = tl.load(x + at, mask=on[:, None] & inside & (whole == 0), other=MINUS_INF).to(A)
            value = tl.where(whole, value, rest)
    else:
        col = start + lanes
        at = x + row[:, None] * STEP + col[None, :]
        value = tl.load(at, mask=on[:, None] & (col < CLASSES)[None, :], other=MINUS_INF).to(A)
    return value


@triton.jit
def load_one(x, row, col, on, STEP: tl.constexpr, CLASSES: tl.constexpr, A: tl.constexpr):
    """One class of each row; NaN for what is no class, which must not be read."""
    x = tl.load(x + row * STEP + col, mask=on & (col >= 0) & (col < CLASSES), other=float("nan"))
    return x.to(A)


@triton.jit
def rates(tau, weights, count, by, row, on, POWER: tl.constexpr, A: tl.constexpr):
    """1 / tau, and what each row's loss is multiplied with: weight * tau^POWER / what the reduction divides by."""
    value = tl.load(tau).to(A)
    factor = number(by, A)
    for _ in tl.static_range(POWER):
        factor *= value
    if count is not None:
        factor /= tl.maximum(tl.load(count), 1).to(A)
    factors = tl.where(on, factor, 0)
    if weights is not None:
        factors *= tl.load(weights + row, mask=on, other=0).to(A)
    return 1 / value, factors


@triton.jit
def store_losses(losses, loss, factors, row, there, on):
    tl.store(losses + row, tl.where(on, loss * factors, 0), mask=there)


@triton.jit
def store(gradient, grad, row, lanes, there, on, CLASSES: tl.constexpr, start=0, SHIFTED: tl.constexpr = False):
    """A tile of the gradient, 0 in rows that do not count, whatever was computed there."""
    grad = tl.where(on[:, None], grad, 0)
    if SHIFTED:
        at, inside, whole, ends = _places(row, lanes, start, CLASSES)
        tl.store(gradient + at, grad, mask=there[:, None] & whole)
        if ends:
            tl.store(gradient + at, grad, mask=there[:, None] & inside & (whole == 0))
    else:
        col = start + lanes
        at = gradient + row[:, None] * CLASSES + col[None, :]
        tl.store(at, grad, mask=there[:, None] & (col < CLASSES)[None, :])


def as_rows(x: Tensor) -> Tensor:
    """(..., C) as rows (N, C) with unit stride inside; copied only where the strides do not allow it."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"expected shape (..., C) with at least one class, got {tuple(x.shape)}")
    rows = x if x.dim() == 2 else x.reshape(x.numel() // x.shape[-1], x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def flat(x: Tensor) -> Tensor:
    """One element for each row, one after another."""
    return x.reshape(-1).contiguous()


def check_shape(name: str, x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Raise unless x has this shape and dtype: a kernel would read beyond its end."""
    if x is not None and (x.shape != shape or (dtype is not None and x.dtype != dtype)):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}; it must be {tuple(shape)} {dtype or ''}"
        )


def empty_gradient(x: Tensor) -> Tensor:
    """Contiguous, however x lies; float32 for float16, which is too narrow before a GradScaler."""
    return torch.empty(x.shape, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype, device=x.device)


def run(
    name: str, kernels: tuple[Any, Any], student: Tensor, targets: tuple[Tensor, ...], tau: Tensor,
    weights: Tensor | None, mask: Tensor | None, scale: str, reduction: str, grad: bool, *others: Any, **constants: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and gradient by the first kernel where a row fits into a tile, by the second, which loops, where not.

    targets and others are arguments of the kernels, constants are known to their compiler; name is the tuning's.
    """
    check_floating("student", student)
    if tau.dim() != 0:
        raise ValueError(f"tau has shape {tuple(tau.shape)}; it must be 0-d")
    lead, ours = student.shape[:-1], as_rows(student)
    check_shape("weights", weights, lead)
    check_shape("mask", mask, lead, torch.bool)
    count, classes = ours.shape
    wide = any(x.dtype == torch.float64 for x in (student, *targets))
    losses = torch.empty(
        lead, dtype=torch.float64 if student.dtype == torch.float64 else torch.float32, device=student.device
    )
    gradient = empty_gradient(student) if grad else None
    by_rows = count if mask is None else 1  # those that count are counted on the device
    divisor = {"mean": count * classes, "batchmean": student.shape[0], "rowmean": by_rows}.get(reduction, 1)
    tile = tuning.tile(name, torch.float64 if wide else student.dtype, classes)
    if tile.block < classes:
        # Rows one after another, as blocks of neighbours are read that begin where rows do not.
        rows = [x for x in (ours, *targets) if x.shape[-1] == classes]
        constants["SHIFTED"] = (
            tile.rows == 1
            and all(x.stride(0) == classes for x in rows)
            and any(classes * x.itemsize % 16 for x in rows)
        )
    launch(
        kernels[tile.block < classes],
        (triton.cdiv(count, tile.rows),),
        ours, tau, None if weights is None else flat(weights), None if mask is None else flat(mask),
        mask.sum() if mask is not None and reduction == "rowmean" else None,
        losses, gradient, count, 1 / max(divisor, 1), *targets, *others,
        CLASSES=classes, STEP=ours.stride(0), POWER=POWERS[scale], A=tl.float64 if wide else tl.float32,
        ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps, num_stages=tile.stages, **constants,
    )  # fmt: skip
    loss = losses if reduction == "none" else losses.sum()
    return loss, student.new_empty(
        0, dtype=torch.float32 if student.dtype == torch.float16 else None
    ) if gradient is None else gradient
