"""KL(onehot(label) || softmax(student / tau)), the cross-entropy, with the student's gradient (q - onehot) / tau."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mekd.checks import check_tau, rows_with_label
from mekd.kernels.rows import (
    EVEN,
    MINUS_INF,
    check_shape,
    columns,
    flat,
    load,
    load_one,
    rates,
    rows_here,
    run,
    store,
    store_losses,
)
from mekd.kernels.softmax import absorb, exponents, refer


@triton.jit
def _tile(
    student, tau, weights, mask, count, losses, gradient, rows, by: tl.float64, labels,
    CLASSES: tl.constexpr, STEP: tl.constexpr, POWER: tl.constexpr, A: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, there, on = rows_here(rows, mask, weights, ROWS)
    inverse, factors = rates(tau, weights, count, by, row, on, POWER, A)
    label = tl.load(labels + row, mask=on, other=0).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    s = load(student, row, lanes, on, STEP, CLASSES, A)
    b = exponents(s, inverse)
    q = tl.exp(b)
    z = tl.sum(q, 1)
    here = lanes[None, :] == label[:, None]
    store_losses(losses, tl.log(z) - tl.sum(tl.where(here, b, 0), 1), factors, row, there, on)
    if gradient is not None:
        slope = factors * inverse
        grad = q * (slope / z)[:, None] - tl.where(here, slope[:, None], 0)
        store(gradient, grad, row, lanes, there, on, CLASSES)


@triton.jit
def _online(
    student, tau, weights, mask, count, losses, gradient, rows, by: tl.float64, labels,
    CLASSES: tl.constexpr, STEP: tl.constexpr, POWER: tl.constexpr, A: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    row, there, on = rows_here(rows, mask, weights, ROWS)
    inverse, factors = rates(tau, weights, count, by, row, on, POWER, A)
    label = tl.load(labels + row, mask=on, other=0).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    top = tl.full((ROWS,), MINUS_INF, A)
    total = tl.zeros((ROWS, BLOCK), A)
    for start in range(0, CLASSES + EVEN * SHIFTED, BLOCK):
        s = load(student, row, lanes, on, STEP, CLASSES, A, start, SHIFTED)
        top, b, _, kept = absorb(s, top, inverse)
        total = total * kept + tl.exp(b)
    z = tl.sum(total, 1)
    hit = (load_one(student, row, label, on, STEP, CLASSES, A) - refer(top)) * inverse
    store_losses(losses, tl.log(z) - hit, factors, row, there, on)
    if gradient is not None:
        slope = factors * inverse
        for start in range(0, CLASSES + EVEN * SHIFTED, BLOCK):
            s = load(student, row, lanes, on, STEP, CLASSES, A, start, SHIFTED)
            q = tl.exp((s - refer(top)[:, None]) * inverse)
            here = columns(row, lanes, CLASSES, start, SHIFTED) == label[:, None]
            grad = q * (slope / z)[:, None] - tl.where(here, slope[:, None], 0)
            store(gradient, grad, row, lanes, there, on, CLASSES, start, SHIFTED)


def tempered_kl_labels(
    student: Tensor, labels: Tensor, tau: Tensor, weights: Tensor | None, mask: Tensor | None,
    ignore_index: int, scale: str, reduction: str, grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and gradient of logits (..., C) against int64 labels (...), none where they are ignore_index.

    ValueError or TypeError where shapes do not fit; values are checked as mekd.functional says.
    """
    check_shape("labels", labels, student.shape[:-1], torch.int64)
    check_shape("mask", mask, labels.shape, torch.bool)
    check_tau(tau)
    kept = rows_with_label(labels, weights, mask, ignore_index, student.shape[-1])
    return run(
        "tempered_kl_labels", (_tile, _online), student, (), tau, weights, kept, scale, reduction, grad,
        flat(labels),
    )  # fmt: skip
