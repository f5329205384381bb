"""The generalised Jensen-Shannon divergence beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, of two
softmaxes or of log-probabilities taken as they are; beta = 0 is KL(p || q) and beta = 1 is KL(q || p)."""

import triton
import triton.language as tl
from torch import Tensor

from mekd.checks import check_tau
from mekd.kernels.rows import NEVER, as_rows, check_shape, load, number, rates, rows_here, run, store, store_losses
from mekd.kernels.softmax import absorb, exponents, product, refer


@triton.jit
def _parts(log_q, log_p, beta, other, LIMIT: tl.constexpr):
    """What each class adds to the loss, its derivative in log q, and q. other: 1 - beta, which float32 may round."""
    q = tl.exp(log_q)
    p = tl.exp(log_p)
    if LIMIT == 0:
        return product(p, log_p - log_q), -p, q
    if LIMIT == 1:
        return product(q, log_q - log_p), product(q, log_q - log_p + 1), q
    # As large as each of its parts, also where the smaller factor underflows.
    log_m = tl.maximum(log_p + tl.log(beta), log_q + tl.log(other))
    log_m = tl.maximum(tl.log(beta * p + other * q), log_m)
    # The derivatives of log m cancel against those of m.
    slope = other * product(q, log_q - log_m)
    return beta * product(p, log_p - log_m) + slope, slope, q


@triton.jit
def _log_softmax(x, inverse):
    a = exponents(x, inverse)
    return a - tl.log(tl.sum(tl.exp(a), 1))[:, None]


@triton.jit
def _tile(
    student, tau, weights, mask, count, losses, gradient, rows, by: tl.float64, teacher,
    beta: tl.float64, other: tl.float64,
    CLASSES: tl.constexpr, STEP: tl.constexpr, POWER: tl.constexpr, A: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TEACHER_STEP: tl.constexpr, LIMIT: tl.constexpr, LOGS: tl.constexpr,
):  # fmt: skip
    row, there, on = rows_here(rows, mask, ROWS)
    inverse, factors = rates(tau, weights, count, by, row, on, POWER, A)
    col = tl.arange(0, BLOCK)
    s = load(student, row, col, on, STEP, CLASSES, A)
    t = load(teacher, row, col, on, TEACHER_STEP, CLASSES, A)
    if not LOGS:
        s = _log_softmax(s, inverse)
        t = _log_softmax(t, inverse)
    part, slope, q = _parts(s, t, number(beta, A), number(other, A), LIMIT)
    store_losses(losses, tl.sum(part, 1), factors, row, there, on)
    if gradient is not None:
        if LOGS:
            grad = slope * factors[:, None]
        else:  # through log softmax
            grad = (slope - q * tl.sum(slope, 1)[:, None]) * (factors * inverse)[:, None]
        store(gradient, grad, row, col, there, on, CLASSES)


@triton.jit
def _load_logs(x, row, col, on, top, log_z, inverse, STEP: tl.constexpr, CLASSES: tl.constexpr, A: tl.constexpr,
               LOGS: tl.constexpr):  # fmt: skip
    x = load(x, row, col, on, STEP, CLASSES, A)
    return x if LOGS else (x - refer(top)[:, None]) * inverse - log_z[:, None]


@triton.jit
def _online(
    student, tau, weights, mask, count, losses, gradient, rows, by: tl.float64, teacher,
    beta: tl.float64, other: tl.float64,
    CLASSES: tl.constexpr, STEP: tl.constexpr, POWER: tl.constexpr, A: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TEACHER_STEP: tl.constexpr, LIMIT: tl.constexpr, LOGS: tl.constexpr,
):  # fmt: skip
    """Normalisers, then the loss, then the gradient, which needs the sum of all slopes: each reads the row."""
    row, there, on = rows_here(rows, mask, ROWS)
    inverse, factors = rates(tau, weights, count, by, row, on, POWER, A)
    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros((ROWS, BLOCK), A)
    top_s = tl.full((ROWS,), NEVER, A)
    top_t = top_s
    log_z_s = tl.zeros((ROWS,), A)
    log_z_t = log_z_s
    if not LOGS:
        z_s = zero
        z_t = zero
        for start in range(0, CLASSES, BLOCK):
            s = load(student, row, start + lanes, on, STEP, CLASSES, A)
            t = load(teacher, row, start + lanes, on, TEACHER_STEP, CLASSES, A)
            top_s, b, _, kept_s = absorb(s, top_s, inverse)
            top_t, a, _, kept_t = absorb(t, top_t, inverse)
            z_s = z_s * kept_s + tl.exp(b)
            z_t = z_t * kept_t + tl.exp(a)
        log_z_s = tl.log(tl.sum(z_s, 1))
        log_z_t = tl.log(tl.sum(z_t, 1))
    parts = zero
    slopes = zero
    for start in range(0, CLASSES, BLOCK):
        s = _load_logs(student, row, start + lanes, on, top_s, log_z_s, inverse, STEP, CLASSES, A, LOGS)
        t = _load_logs(teacher, row, start + lanes, on, top_t, log_z_t, inverse, TEACHER_STEP, CLASSES, A, LOGS)
        part, slope, _ = _parts(s, t, number(beta, A), number(other, A), LIMIT)
        parts += part
        slopes += slope
    store_losses(losses, tl.sum(parts, 1), factors, row, there, on)
    if gradient is not None:
        pull = log_z_s * 0 if LOGS else tl.sum(slopes, 1)
        rate = factors if LOGS else factors * inverse
        for start in range(0, CLASSES, BLOCK):
            s = _load_logs(student, row, start + lanes, on, top_s, log_z_s, inverse, STEP, CLASSES, A, LOGS)
            t = _load_logs(teacher, row, start + lanes, on, top_t, log_z_t, inverse, TEACHER_STEP, CLASSES, A, LOGS)
            _, slope, q = _parts(s, t, number(beta, A), number(other, A), LIMIT)
            grad = (slope - q * pull[:, None]) * rate[:, None]
            store(gradient, grad, row, start + lanes, there, on, CLASSES)


def jsd(
    student: Tensor, teacher: Tensor, tau: Tensor, weights: Tensor | None, mask: Tensor | None,
    beta: float, log_probs: bool, scale: str, reduction: str, grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and gradient of logits, or log-probabilities, (..., C) against the same (Agarwal et al., 2024).

    ValueError or TypeError where shapes do not fit; values are checked as mekd.functional says.
    """
    check_shape("teacher", teacher, student.shape)
    check_tau(tau)
    theirs = as_rows(teacher)
    return run(
        "jsd", (_tile, _online), student, (theirs,), tau, weights, mask, scale, reduction, grad, beta, 1 - beta,
        TEACHER_STEP=theirs.stride(0), LIMIT=int(beta) if beta in (0, 1) else None, LOGS=log_probs,
    )  # fmt: skip
