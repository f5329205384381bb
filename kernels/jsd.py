"""Divergences through a mixture, left KL(p || m) + right KL(q || m), m = beta p + (1 - beta) q, of two softmaxes or of
log-probabilities taken as they are; beta = 0 is left KL(p || q) and beta = 1 is right KL(q || p)."""

import triton
import triton.language as tl
from torch import Tensor

from mekd.checks import check_tau
from mekd.kernels.rows import (
    EVEN,
    MINUS_INF,
    as_rows,
    check_shape,
    load,
    number,
    rates,
    rows_here,
    run,
    store,
    store_losses,
)
from mekd.kernels.softmax import absorb, exponents, product, refer


@triton.jit
def _parts(q, p, gap, beta, other, left, right, LIMIT: tl.constexpr, LOGS: tl.constexpr, SKEWED: tl.constexpr):
    """What each class adds to the loss, and its derivative in log q. gap: log p - log q; other: 1 - beta."""
    if LIMIT == 0:
        part, slope = product(p, gap), -p
        return (number(left, gap.dtype) * part, number(left, gap.dtype) * slope) if SKEWED else (part, slope)
    if LIMIT == 1:
        # Through a log softmax the 1 would cancel.
        part, slope = product(q, -gap), product(q, 1 - gap) if LOGS else product(q, -gap)
        return (number(right, gap.dtype) * part, number(right, gap.dtype) * slope) if SKEWED else (part, slope)
    beta = number(beta, gap.dtype)
    other = number(other, gap.dtype)
    # Below this gap the series, as in csrc/jsd.cpp: the formula is a difference of numbers 1 / gap times as large.
    close = tl.abs(gap) < (0.0078125 if gap.dtype == tl.float64 else 0.25)
    v = beta * other
    skew = other - beta
    more = 1 / 24 + gap * (1 / 120 + gap * (1 / 720 + gap / 5040))
    extra = gap * gap * (0.5 + gap * (1 / 6 + gap * more))
    more = gap + extra
    second = v * (1 - 30 * v + 120 * v * v) / 720 + gap * (v * skew * (1 - 60 * v + 360 * v * v) / 5040)
    second = v * (1 - 6 * v) / 24 + gap * (v * skew * (1 - 12 * v) / 120 + gap * second)
    second = gap * gap * (v / 2 + gap * (v * skew / 6 + gap * second))
    m = beta * p + other * q
    # No more than this, also where the smaller part of m underflows; NaN stays NaN.
    most_p = -tl.log(beta)
    most_q = -tl.log(other)
    over_p = tl.log(p / m)
    over_q = tl.log(q / m)
    if SKEWED:  # as in csrc/jsd.cpp
        left = number(left, gap.dtype)
        right = number(right, gap.dtype)
        k = beta * right - other * left
        # k (p - q), which is 0 over all classes, is added: what is left is small where p and q are close.
        # log(m / p) and log(m / q), which differ by the gap: of the smaller, from an exponential that is at most 1.
        least = tl.exp(-tl.abs(gap))
        less = tl.log(tl.where(gap > 0, beta + other * least, other + beta * least))
        slope = -right * product(q, tl.where(gap > 0, less + gap, less))
        part = slope - left * product(p, tl.where(gap > 0, less, less - gap)) + k * (p - q)
        near = left * other * gap * more - second * (left * (1 + more) + right) + k * extra
        slope = tl.where(close, -right * q * (beta * gap + second), slope)
        slope += k * other * product(q, tl.where(close, more / (1 + beta * more), (p - q) / m))
        return tl.where(close, q * near, part), slope
    # The derivatives of log m cancel against those of m.
    slope = other * product(q, tl.where(over_q > most_q, most_q, over_q))
    part = beta * product(p, tl.where(over_p > most_p, most_p, over_p)) + slope
    part = tl.where(close, q * (v * gap * more - second * (1 + beta * more)), part)
    return part, tl.where(close, -other * q * (beta * gap + second), slope)


@triton.jit
def _total(parts, LIMIT: tl.constexpr, LOGS: tl.constexpr):
    """The loss of each row; log-probabilities that do not add up to 1 may have a KL below 0, nothing else has."""
    total = tl.sum(parts, 1)
    return total if LOGS and LIMIT is not None else tl.where(total < 0, 0, total)


@triton.jit
def _tile(
    student, tau, weights, mask, count, losses, gradient, rows, by: tl.float64, teacher,
    beta: tl.float64, other: tl.float64, left: tl.float64, right: tl.float64,
    CLASSES: tl.constexpr, STEP: tl.constexpr, POWER: tl.constexpr, A: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TEACHER_STEP: tl.constexpr, LIMIT: tl.constexpr, LOGS: tl.constexpr,
    SKEWED: tl.constexpr,
):  # fmt: skip
    row, there, on = rows_here(rows, mask, weights, ROWS)
    inverse, factors = rates(tau, weights, count, by, row, on, POWER, A)
    lanes = tl.arange(0, BLOCK)
    s = load(student, row, lanes, on, STEP, CLASSES, A)
    t = load(teacher, row, lanes, on, TEACHER_STEP, CLASSES, A)
    if LOGS:
        q = tl.exp(s)
        p = tl.exp(t)
        gap = t - s
    else:
        b = exponents(s, inverse)
        a = exponents(t, inverse)
        q = tl.exp(b)
        p = tl.exp(a)
        z_s = tl.sum(q, 1)
        z_t = tl.sum(p, 1)
        q /= z_s[:, None]
        p /= z_t[:, None]
        gap = a - b + tl.log(z_s / z_t)[:, None]
    part, slope = _parts(q, p, gap, beta, other, left, right, LIMIT, LOGS, SKEWED)
    store_losses(losses, _total(part, LIMIT, LOGS), factors, row, there, on)
    if gradient is not None:
        if LOGS:
            grad = slope * factors[:, None]
        else:  # through log softmax
            grad = (slope - q * tl.sum(slope, 1)[:, None]) * (factors * inverse)[:, None]
        store(gradient, grad, row, lanes, there, on, CLASSES)


@triton.jit
def _load_exponents(
    x, row, lanes, on, top, inverse, STEP: tl.constexpr, CLASSES: tl.constexpr, A: tl.constexpr, LOGS: tl.constexpr,
    start, SHIFTED: tl.constexpr,
):  # fmt: skip
    x = load(x, row, lanes, on, STEP, CLASSES, A, start, SHIFTED)
    return x if LOGS else (x - refer(top)[:, None]) * inverse


@triton.jit
def _online(
    student, tau, weights, mask, count, losses, gradient, rows, by: tl.float64, teacher,
    beta: tl.float64, other: tl.float64, left: tl.float64, right: tl.float64,
    CLASSES: tl.constexpr, STEP: tl.constexpr, POWER: tl.constexpr, A: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TEACHER_STEP: tl.constexpr, LIMIT: tl.constexpr, LOGS: tl.constexpr,
    SKEWED: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Normalisers, then the loss, then the gradient, which needs the sum of all slopes: each reads the row."""
    row, there, on = rows_here(rows, mask, weights, ROWS)
    inverse, factors = rates(tau, weights, count, by, row, on, POWER, A)
    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros((ROWS, BLOCK), A)
    top_s = tl.full((ROWS,), MINUS_INF, A)
    top_t = top_s
    z_s = tl.full((ROWS,), 1, A)
    z_t = z_s
    if not LOGS:
        sum_s = zero
        sum_t = zero
        for start in range(0, CLASSES + EVEN * SHIFTED, BLOCK):
            s = load(student, row, lanes, on, STEP, CLASSES, A, start, SHIFTED)
            t = load(teacher, row, lanes, on, TEACHER_STEP, CLASSES, A, start, SHIFTED)
            top_s, b, _, kept_s = absorb(s, top_s, inverse)
            top_t, a, _, kept_t = absorb(t, top_t, inverse)
            sum_s = sum_s * kept_s + tl.exp(b)
            sum_t = sum_t * kept_t + tl.exp(a)
        z_s = tl.sum(sum_s, 1)
        z_t = tl.sum(sum_t, 1)
    log_z = tl.log(z_s / z_t)[:, None]
    parts = zero
    slopes = zero
    for start in range(0, CLASSES + EVEN * SHIFTED, BLOCK):
        b = _load_exponents(student, row, lanes, on, top_s, inverse, STEP, CLASSES, A, LOGS, start, SHIFTED)
        a = _load_exponents(teacher, row, lanes, on, top_t, inverse, TEACHER_STEP, CLASSES, A, LOGS, start, SHIFTED)
        q = tl.exp(b) / z_s[:, None]
        p = tl.exp(a) / z_t[:, None]
        part, slope = _parts(q, p, a - b + log_z, beta, other, left, right, LIMIT, LOGS, SKEWED)
        parts += part
        slopes += slope
    store_losses(losses, _total(parts, LIMIT, LOGS), factors, row, there, on)
    if gradient is not None:
        pull = tl.sum(slopes, 1)[:, None]
        rate = (factors if LOGS else factors * inverse)[:, None]
        for start in range(0, CLASSES + EVEN * SHIFTED, BLOCK):
            b = _load_exponents(student, row, lanes, on, top_s, inverse, STEP, CLASSES, A, LOGS, start, SHIFTED)
            a = _load_exponents(teacher, row, lanes, on, top_t, inverse, TEACHER_STEP, CLASSES, A, LOGS, start, SHIFTED)
            q = tl.exp(b) / z_s[:, None]
            p = tl.exp(a) / z_t[:, None]
            _, slope = _parts(q, p, a - b + log_z, beta, other, left, right, LIMIT, LOGS, SKEWED)
            grad = (slope if LOGS else slope - q * pull) * rate
            store(gradient, grad, row, lanes, there, on, CLASSES, start, SHIFTED)


def jsd(
    student: Tensor, teacher: Tensor, tau: Tensor, weights: Tensor | None, mask: Tensor | None,
    beta: float, left: float, right: float, log_probs: bool, scale: str, reduction: str, grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and gradient of logits, or log-probabilities, (..., C) against the same (Agarwal et al., 2024).

    ValueError or TypeError where shapes do not fit; values are checked as mekd.functional says.
    """
    check_shape("teacher", teacher, student.shape)
    check_tau(tau)
    theirs = as_rows(teacher)
    weighed = (left, right) != ((1, right) if beta == 0 else (left, 1) if beta == 1 else (beta, 1 - beta))
    return run(
        "jsd_skewed" if weighed else "jsd", (_tile, _online), student, (theirs,), tau, weights, mask, scale, reduction,
        grad, beta, 1 - beta, left, right, TEACHER_STEP=theirs.stride(0), LIMIT=int(beta) if beta in (0, 1) else None,
        LOGS=log_probs, SKEWED=weighed,
    )  # fmt: skip
