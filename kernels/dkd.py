"""Decoupled KD: the KL of target against rest, and the KL within the rest, each with its weight."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mekd.checks import check_tau, rows_with_label
from mekd.kernels.gan_generator import softplus_and_sigmoid
from mekd.kernels.rows import (
    EVEN,
    MINUS_INF,
    as_rows,
    check_shape,
    columns,
    flat,
    load,
    load_one,
    number,
    rates,
    rows_here,
    run,
    store,
    store_losses,
)  # fmt: skip
from mekd.kernels.softmax import absorb_pair, divergence, pair, product, refer


@triton.jit
def _load_rest(
    x, row, lanes, label, on, STEP: tl.constexpr, CLASSES: tl.constexpr, A: tl.constexpr, start=0,
    SHIFTED: tl.constexpr = False,
):  # fmt: skip
    """The rest is a softmax of its own, in which the target is masked."""
    hidden = columns(row, lanes, CLASSES, start, SHIFTED) == label[:, None]
    return tl.where(hidden, MINUS_INF, load(x, row, lanes, on, STEP, CLASSES, A, start, SHIFTED))


@triton.jit
def _against_rest(odds_s, odds_t, A: tl.constexpr):
    """KL of target against rest from the log-odds of both sides, and its derivative in the student's."""
    lost_s, _ = softplus_and_sigmoid(-odds_s, A)
    lost_t, miss_t = softplus_and_sigmoid(-odds_t, A)
    kept_s, hit_s = softplus_and_sigmoid(odds_s, A)
    kept_t, hit_t = softplus_and_sigmoid(odds_t, A)
    return product(hit_t, lost_s - lost_t) + product(miss_t, kept_s - kept_t), hit_s - hit_t


@triton.jit
def _compared(beta, z_s, z_t):
    """What the rest counts, 0 where either side leaves none of it, and what divides its exponentials, all 0 there."""
    within = tl.where((z_s == 0) | (z_t == 0), 0, beta)
    return within, tl.where(z_s == 0, 1, z_s), tl.where(z_t == 0, 1, z_t)


@triton.jit
def _tile(
    student, tau, weights, mask, count, losses, gradient, rows, by: tl.float64, teacher, labels,
    alpha: tl.float64, beta: tl.float64,
    CLASSES: tl.constexpr, STEP: tl.constexpr, POWER: tl.constexpr, A: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TEACHER_STEP: tl.constexpr,
):  # fmt: skip
    row, there, on = rows_here(rows, mask, weights, ROWS)
    inverse, factors = rates(tau, weights, count, by, row, on, POWER, A)
    label = tl.load(labels + row, mask=on, other=0).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    s = _load_rest(student, row, lanes, label, on, STEP, CLASSES, A)
    t = _load_rest(teacher, row, lanes, label, on, TEACHER_STEP, CLASSES, A)
    hit_s = load_one(student, row, label, on, STEP, CLASSES, A)
    hit_t = load_one(teacher, row, label, on, TEACHER_STEP, CLASSES, A)
    kl, q, p, z_s, z_t = pair(s, t, inverse)
    odds_s = (hit_s - refer(tl.max(s, 1))) * inverse - tl.log(z_s)
    odds_t = (hit_t - refer(tl.max(t, 1))) * inverse - tl.log(z_t)
    binary, pull = _against_rest(odds_s, odds_t, A)
    pull *= number(alpha, A)
    within, z_s, z_t = _compared(number(beta, A), z_s, z_t)
    store_losses(losses, product(number(alpha, A), binary) + product(within, kl), factors, row, there, on)
    if gradient is not None:
        slope = factors * inverse
        grad = q * (slope * (within - pull) / z_s)[:, None] - p * (slope * within / z_t)[:, None]
        grad = tl.where(lanes[None, :] == label[:, None], (slope * pull)[:, None], grad)
        store(gradient, grad, row, lanes, there, on, CLASSES)


@triton.jit
def _online(
    student, tau, weights, mask, count, losses, gradient, rows, by: tl.float64, teacher, labels,
    alpha: tl.float64, beta: tl.float64,
    CLASSES: tl.constexpr, STEP: tl.constexpr, POWER: tl.constexpr, A: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TEACHER_STEP: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    row, there, on = rows_here(rows, mask, weights, ROWS)
    inverse, factors = rates(tau, weights, count, by, row, on, POWER, A)
    label = tl.load(labels + row, mask=on, other=0).to(tl.int32)
    hit_s = load_one(student, row, label, on, STEP, CLASSES, A)
    hit_t = load_one(teacher, row, label, on, TEACHER_STEP, CLASSES, A)
    lanes = tl.arange(0, BLOCK)
    top_s = tl.full((ROWS,), MINUS_INF, A)
    top_t = top_s
    z_s = tl.zeros((ROWS, BLOCK), A)
    z_t = z_s
    weighted = z_s
    for start in range(0, CLASSES + EVEN * SHIFTED, BLOCK):
        s = _load_rest(student, row, lanes, label, on, STEP, CLASSES, A, start, SHIFTED)
        t = _load_rest(teacher, row, lanes, label, on, TEACHER_STEP, CLASSES, A, start, SHIFTED)
        top_s, top_t, z_s, z_t, weighted = absorb_pair(s, t, top_s, top_t, z_s, z_t, weighted, inverse)
    sum_s = tl.sum(z_s, 1)
    sum_t = tl.sum(z_t, 1)
    odds_s = (hit_s - refer(top_s)) * inverse - tl.log(sum_s)
    odds_t = (hit_t - refer(top_t)) * inverse - tl.log(sum_t)
    binary, pull = _against_rest(odds_s, odds_t, A)
    pull *= number(alpha, A)
    kl = divergence(tl.sum(weighted, 1), sum_s, sum_t)
    within, sum_s, sum_t = _compared(number(beta, A), sum_s, sum_t)
    store_losses(losses, product(number(alpha, A), binary) + product(within, kl), factors, row, there, on)
    if gradient is not None:
        slope = factors * inverse
        by_s = (slope * (within - pull) / sum_s)[:, None]
        by_t = (slope * within / sum_t)[:, None]
        for start in range(0, CLASSES + EVEN * SHIFTED, BLOCK):
            s = _load_rest(student, row, lanes, label, on, STEP, CLASSES, A, start, SHIFTED)
            t = _load_rest(teacher, row, lanes, label, on, TEACHER_STEP, CLASSES, A, start, SHIFTED)
            q = tl.exp((s - refer(top_s)[:, None]) * inverse)
            p = tl.exp((t - refer(top_t)[:, None]) * inverse)
            here = columns(row, lanes, CLASSES, start, SHIFTED) == label[:, None]
            grad = tl.where(here, (slope * pull)[:, None], q * by_s - p * by_t)
            store(gradient, grad, row, lanes, there, on, CLASSES, start, SHIFTED)


def dkd(
    student: Tensor, teacher: Tensor, labels: Tensor, tau: Tensor, weights: Tensor | None, mask: Tensor | None,
    alpha: float, beta: float, ignore_index: int, scale: str, reduction: str, grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and gradient of logits (..., C) against logits and int64 target classes (...) (Zhao et al., 2022).

    ValueError or TypeError where shapes do not fit; values are checked as mekd.functional says.
    """
    check_shape("teacher", teacher, student.shape)
    check_shape("labels", labels, student.shape[:-1], torch.int64)
    check_shape("mask", mask, labels.shape, torch.bool)
    check_tau(tau)
    kept = rows_with_label(labels, weights, mask, ignore_index, student.shape[-1])
    theirs = as_rows(teacher)
    return run(
        "dkd", (_tile, _online), student, (theirs,), tau, weights, kept, scale, reduction, grad, flat(labels),
        # Of two classes the rest is one, with nothing within.
        alpha, beta if student.shape[-1] > 2 else 0.0, TEACHER_STEP=theirs.stride(0),
    )  # fmt: skip
