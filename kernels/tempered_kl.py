"""KL(p_t^tau || softmax(student / tau)) against logits or probabilities, with the student's gradient (q - p) / tau."""

import triton
import triton.language as tl
from torch import Tensor

from mekd.checks import check_probabilities, check_tau
from mekd.kernels.rows import NEVER, as_rows, check_shape, load, rates, rows_here, run, store, store_losses
from mekd.kernels.softmax import absorb_pair, divergence, pair, refer


@triton.jit
def _load_target(target, row, col, on, STEP: tl.constexpr, CLASSES: tl.constexpr, A: tl.constexpr, PROBS: tl.constexpr):
    """The target as logits: softmax(log p / tau) is p^(1 / tau), normalised."""
    t = load(target, row, col, on, STEP, CLASSES, A)
    return tl.where(t <= 0, NEVER, tl.log(t)) if PROBS else t


@triton.jit
def _tile(
    student, tau, weights, mask, count, losses, gradient, rows, by: tl.float64, target,
    CLASSES: tl.constexpr, STEP: tl.constexpr, POWER: tl.constexpr, A: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TARGET_STEP: tl.constexpr, PROBS: tl.constexpr,
):  # fmt: skip
    row, there, on = rows_here(rows, mask, ROWS)
    inverse, factors = rates(tau, weights, count, by, row, on, POWER, A)
    col = tl.arange(0, BLOCK)
    s = load(student, row, col, on, STEP, CLASSES, A)
    t = _load_target(target, row, col, on, TARGET_STEP, CLASSES, A, PROBS)
    kl, q, p, z_s, z_t = pair(s, t, inverse)
    store_losses(losses, kl, factors, row, there, on)
    if gradient is not None:
        slope = factors * inverse
        grad = q * (slope / z_s)[:, None] - p * (slope / z_t)[:, None]
        store(gradient, grad, row, col, there, on, CLASSES)


@triton.jit
def _online(
    student, tau, weights, mask, count, losses, gradient, rows, by: tl.float64, target,
    CLASSES: tl.constexpr, STEP: tl.constexpr, POWER: tl.constexpr, A: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TARGET_STEP: tl.constexpr, PROBS: tl.constexpr,
):  # fmt: skip
    row, there, on = rows_here(rows, mask, ROWS)
    inverse, factors = rates(tau, weights, count, by, row, on, POWER, A)
    lanes = tl.arange(0, BLOCK)
    top_s = tl.full((ROWS,), NEVER, A)
    top_t = top_s
    z_s = tl.zeros((ROWS, BLOCK), A)
    z_t = z_s
    weighted = z_s
    for start in range(0, CLASSES, BLOCK):
        s = load(student, row, start + lanes, on, STEP, CLASSES, A)
        t = _load_target(target, row, start + lanes, on, TARGET_STEP, CLASSES, A, PROBS)
        top_s, top_t, z_s, z_t, weighted = absorb_pair(s, t, top_s, top_t, z_s, z_t, weighted, inverse)
    sum_s = tl.sum(z_s, 1)
    sum_t = tl.sum(z_t, 1)
    store_losses(losses, divergence(tl.sum(weighted, 1), sum_s, sum_t), factors, row, there, on)
    if gradient is not None:
        by_s = (factors * inverse / sum_s)[:, None]
        by_t = (factors * inverse / sum_t)[:, None]
        for start in range(0, CLASSES, BLOCK):
            s = load(student, row, start + lanes, on, STEP, CLASSES, A)
            t = _load_target(target, row, start + lanes, on, TARGET_STEP, CLASSES, A, PROBS)
            q = tl.exp((s - refer(top_s)[:, None]) * inverse)
            p = tl.exp((t - refer(top_t)[:, None]) * inverse)
            store(gradient, q * by_s - p * by_t, row, start + lanes, there, on, CLASSES)


def tempered_kl(
    student: Tensor, target: Tensor, tau: Tensor, weights: Tensor | None, mask: Tensor | None,
    probs: bool, scale: str, reduction: str, grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and gradient of logits (..., C) against logits, or probabilities, of the same shape (Hinton et al., 2015).

    ValueError or TypeError where shapes do not fit; values are checked as mekd.functional says.
    """
    check_shape("target", target, student.shape)
    check_tau(tau)
    if probs:
        check_probabilities("probs", target, mask)
    theirs = as_rows(target)
    return run(
        "tempered_kl", (_tile, _online), student, (theirs,), tau, weights, mask, scale, reduction, grad,
        TARGET_STEP=theirs.stride(0), PROBS=probs,
    )  # fmt: skip
