"""KL(p_t^tau || softmax(student / tau)) against logits or probabilities, with the student's gradient (q - p) / tau."""

import triton
import triton.language as tl
from torch import Tensor

from mekd.checks import check_probabilities, check_tau
from mekd.kernels.rows import (
    EVEN,
    MINUS_INF,
    as_rows,
    check_shape,
    columns,
    load,
    rates,
    rows_here,
    run,
    store,
    store_losses,
)
from mekd.kernels.softmax import absorb_pair, divergence, pair, refer


@triton.jit
def named_share(
    values, indices, row, on, CLASSES: tl.constexpr, STEP: tl.constexpr, A: tl.constexpr, K: tl.constexpr,
    SPREAD: tl.constexpr,
):  # fmt: skip
    """What each class that is not named gets, where what is missing is spread; the most of all; how many there are."""
    # float64: a rounding of 1 would be a share, and a large one once it is tempered.
    missing = tl.full(row.shape, 1, tl.float64)
    most = tl.zeros(row.shape, A)
    others = tl.full(row.shape, CLASSES, A)
    if K > 0:
        for k in range(K):
            named = on & (tl.load(indices + row * K + k, mask=on, other=-1) >= 0)
            value = tl.load(values + row * STEP + k, mask=named, other=0).to(A)
            missing -= value.to(tl.float64)
            most = tl.maximum(most, value)
            others -= tl.where(named, 1, 0)
    missing = tl.where((missing < 0) | (others == 0), 0, missing)
    share = missing.to(A) / tl.maximum(others, 1) if SPREAD else tl.zeros(row.shape, A)
    return share, tl.maximum(most, share), others


@triton.jit
def _load_target(
    target, indices, share, most, row, lanes, on, STEP: tl.constexpr, CLASSES: tl.constexpr, A: tl.constexpr,
    K: tl.constexpr, PROBS: tl.constexpr, start=0, SHIFTED: tl.constexpr = False,
):  # fmt: skip
    """The target as logits: softmax(log p / tau) is p^(1 / tau), normalised. Of K values, by the most of the row."""
    if K == 0:
        t = load(target, row, lanes, on, STEP, CLASSES, A, start, SHIFTED)
        t = tl.where(t <= 0, MINUS_INF, tl.log(t)) if PROBS else t
    else:
        col = columns(row, lanes, CLASSES, start, SHIFTED)
        p = tl.where((col >= 0) & (col < CLASSES), share[:, None], 0)
        for k in range(K):
            index = tl.load(indices + row * K + k, mask=on, other=-1).to(tl.int32)
            value = tl.load(target + row * STEP + k, mask=on & (index >= 0), other=0).to(A)
            p = tl.where(col == index[:, None], value[:, None], p)
        t = tl.log(tl.where(p < 0, 0, p) / most[:, None])
    return t


@triton.jit
def tile(
    student, tau, weights, mask, count, losses, gradient, rows, by: tl.float64, target, indices,
    CLASSES: tl.constexpr, STEP: tl.constexpr, POWER: tl.constexpr, A: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TARGET_STEP: tl.constexpr,
    K: tl.constexpr, SPREAD: tl.constexpr, PROBS: tl.constexpr,
):  # fmt: skip
    """target: logits or probabilities of all classes where K is 0, else K values, of the classes in indices."""
    row, there, on = rows_here(rows, mask, weights, ROWS)
    inverse, factors = rates(tau, weights, count, by, row, on, POWER, A)
    lanes = tl.arange(0, BLOCK)
    s = load(student, row, lanes, on, STEP, CLASSES, A)
    share, most, _ = named_share(target, indices, row, on, CLASSES, TARGET_STEP, A, K, SPREAD)
    t = _load_target(target, indices, share, most, row, lanes, on, TARGET_STEP, CLASSES, A, K, PROBS)
    kl, q, p, z_s, z_t = pair(s, t, inverse)
    store_losses(losses, kl, factors, row, there, on)
    if gradient is not None:
        slope = factors * inverse
        grad = q * (slope / z_s)[:, None] - p * (slope / z_t)[:, None]
        store(gradient, grad, row, lanes, there, on, CLASSES)


@triton.jit
def online(
    student, tau, weights, mask, count, losses, gradient, rows, by: tl.float64, target, indices,
    CLASSES: tl.constexpr, STEP: tl.constexpr, POWER: tl.constexpr, A: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TARGET_STEP: tl.constexpr,
    K: tl.constexpr, SPREAD: tl.constexpr, PROBS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    row, there, on = rows_here(rows, mask, weights, ROWS)
    inverse, factors = rates(tau, weights, count, by, row, on, POWER, A)
    share, most, _ = named_share(target, indices, row, on, CLASSES, TARGET_STEP, A, K, SPREAD)
    lanes = tl.arange(0, BLOCK)
    top_s = tl.full((ROWS,), MINUS_INF, A)
    top_t = top_s
    z_s = tl.zeros((ROWS, BLOCK), A)
    z_t = z_s
    weighted = z_s
    for start in range(0, CLASSES + EVEN * SHIFTED, BLOCK):
        s = load(student, row, lanes, on, STEP, CLASSES, A, start, SHIFTED)
        t = _load_target(
            target, indices, share, most, row, lanes, on, TARGET_STEP, CLASSES, A, K, PROBS, start, SHIFTED
        )
        top_s, top_t, z_s, z_t, weighted = absorb_pair(s, t, top_s, top_t, z_s, z_t, weighted, inverse)
    sum_s = tl.sum(z_s, 1)
    sum_t = tl.sum(z_t, 1)
    store_losses(losses, divergence(tl.sum(weighted, 1), sum_s, sum_t), factors, row, there, on)
    if gradient is not None:
        by_s = (factors * inverse / sum_s)[:, None]
        by_t = (factors * inverse / sum_t)[:, None]
        for start in range(0, CLASSES + EVEN * SHIFTED, BLOCK):
            s = load(student, row, lanes, on, STEP, CLASSES, A, start, SHIFTED)
            t = _load_target(
                target, indices, share, most, row, lanes, on, TARGET_STEP, CLASSES, A, K, PROBS, start, SHIFTED
            )
            q = tl.exp((s - refer(top_s)[:, None]) * inverse)
            p = tl.exp((t - refer(top_t)[:, None]) * inverse)
            store(gradient, q * by_s - p * by_t, row, lanes, there, on, CLASSES, start, SHIFTED)


def tempered_kl(
    student: Tensor, target: Tensor, tau: Tensor, weights: Tensor | None, mask: Tensor | None,
    probs: bool, slack: float, scale: str, reduction: str, grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and gradient of logits (..., C) against logits, or probabilities, of the same shape (Hinton et al., 2015).

    ValueError or TypeError where shapes do not fit; values are checked as mekd.functional says.
    """
    check_shape("target", target, student.shape)
    check_tau(tau)
    if probs:
        check_probabilities(target, weights, mask, slack)
    theirs = as_rows(target)
    return run(
        "tempered_kl", (tile, online), student, (theirs,), tau, weights, mask, scale, reduction, grad, None,
        TARGET_STEP=theirs.stride(0), K=0, SPREAD=False, PROBS=probs,
    )  # fmt: skip
