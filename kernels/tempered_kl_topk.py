"""tempered_kl against the k best probabilities of a row: what is missing to 1 is spread over the others, dropped, or a
bucket of its own, which is held against all that the student gives to the others."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mekd.checks import check_best, check_named_classes, check_tau, rows_with_answer
from mekd.kernels.rows import (
    EVEN,
    MINUS_INF,
    as_rows,
    check_shape,
    columns,
    load,
    load_one,
    rates,
    rows_here,
    run,
    store,
    store_losses,
)
from mekd.kernels.softmax import absorb, divergence, product, refer
from mekd.kernels.tempered_kl import named_share, online, tile


@triton.jit
def _answer(
    student, values, indices, row, on, inverse, CLASSES: tl.constexpr, STEP: tl.constexpr, A: tl.constexpr,
    VALUES_STEP: tl.constexpr, K: tl.constexpr, NAMED: tl.constexpr,
):  # fmt: skip
    """Of the named classes (ROWS, NAMED): log of the teacher's weights, the student's logits; and log of the bucket's.

    Weights are p^(1 / tau), referred to the largest of the row, which comes last; an absent entry is a mask.
    """
    k = tl.arange(0, NAMED)
    index = tl.load(indices + row[:, None] * K + k[None, :], mask=on[:, None] & (k < K)[None, :], other=-1)
    named = (index >= 0) & (index < CLASSES)
    p = tl.load(values + row[:, None] * VALUES_STEP + k[None, :], mask=named, other=0).to(A)
    x = tl.load(student + row[:, None] * STEP + index, mask=named, other=MINUS_INF).to(A)
    share, most, others = named_share(values, indices, row, on, CLASSES, VALUES_STEP, A, K, True)
    # Numbers of a row, that all of the loss goes through, in float64.
    part = share.to(tl.float64) / most
    log_rest = tl.log(tl.maximum(others, 1).to(tl.float64)) + tl.log(tl.where(share > 0, part, 1)) * inverse
    log_rest = tl.where(share > 0, log_rest, MINUS_INF)
    log_w = tl.where(p <= 0, MINUS_INF, tl.log(p / most[:, None]) * inverse)  # NaN stays
    return log_w, x, log_rest, most


@triton.jit
def _compare(log_w, x, log_rest, top_others, z_others, inverse):
    """The KL over the buckets; the top and the sums of both sides, and what the bucket has of each."""
    top = refer(tl.maximum(tl.max(x, 1), top_others))
    b = (x - top[:, None]) * inverse
    log_together = (refer(top_others) - top) * inverse + tl.log(z_others.to(tl.float64))
    log_together = tl.where(z_others == 0, MINUS_INF, log_together)
    z_s = tl.sum(tl.exp(b), 1) + tl.exp(log_together)
    w = tl.exp(log_w)
    rest = tl.exp(log_rest)
    z_t = tl.sum(w, 1) + rest
    weighted = tl.sum(product(w, log_w - b), 1) + product(rest, log_rest - log_together)
    apart = tl.exp(log_together) / z_s - rest / z_t
    return divergence(weighted, z_s, z_t), top, z_s.to(x.dtype), z_t.to(x.dtype), apart.to(x.dtype)


@triton.jit
def _hidden(indices, row, col, on, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Which classes of a block, of columns, are named (ROWS, BLOCK)."""
    hidden = tl.zeros((ROWS, BLOCK), tl.int1)
    for k in range(K):
        index = tl.load(indices + row * K + k, mask=on, other=-1)
        hidden = hidden | (col == index[:, None])
    return hidden


@triton.jit
def _slopes(
    grad, student, values, indices, row, col, on, inverse, top, most, by_s, by_t, CLASSES: tl.constexpr,
    STEP: tl.constexpr, A: tl.constexpr, VALUES_STEP: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The gradient of the others in a block, with that of the named classes put in their places."""
    for k in range(K):
        index = tl.load(indices + row * K + k, mask=on, other=-1)
        p = tl.load(values + row * VALUES_STEP + k, mask=on & (index >= 0), other=0).to(A)
        x = load_one(student, row, index, on, STEP, CLASSES, A)
        w = tl.where(p <= 0, 0, tl.exp(tl.log(p / most) * inverse))
        slope = tl.exp((x - top) * inverse) * by_s - w * by_t
        grad = tl.where(col == index[:, None], slope[:, None], grad)
    return grad


@triton.jit
def tail_tile(
    student, tau, weights, mask, count, losses, gradient, rows, by: tl.float64, values, indices,
    CLASSES: tl.constexpr, STEP: tl.constexpr, POWER: tl.constexpr, A: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VALUES_STEP: tl.constexpr, K: tl.constexpr, NAMED: tl.constexpr,
):  # fmt: skip
    row, there, on = rows_here(rows, mask, weights, ROWS)
    inverse, factors = rates(tau, weights, count, by, row, on, POWER, A)
    log_w, x, log_rest, most = _answer(
        student, values, indices, row, on, inverse, CLASSES, STEP, A, VALUES_STEP, K, NAMED
    )
    lanes = tl.arange(0, BLOCK)
    col = columns(row, lanes, CLASSES)
    s = load(student, row, lanes, on, STEP, CLASSES, A)
    s = tl.where(_hidden(indices, row, col, on, K, BLOCK, ROWS), MINUS_INF, s)
    top_others = tl.max(s, 1)
    e = tl.exp((s - refer(top_others)[:, None]) * inverse)
    z_others = tl.sum(e, 1)
    kl, top, z_s, z_t, apart = _compare(log_w, x, log_rest, top_others, z_others, inverse)
    store_losses(losses, kl, factors, row, there, on)
    if gradient is not None:
        slope = factors * inverse
        grad = e * tl.where(z_others == 0, 0, slope * apart / z_others)[:, None]
        grad = _slopes(
            grad, student, values, indices, row, col, on, inverse, top, most, slope / z_s, slope / z_t, CLASSES, STEP,
            A, VALUES_STEP, K,
        )  # fmt: skip
        store(gradient, grad, row, lanes, there, on, CLASSES)


@triton.jit
def tail_online(
    student, tau, weights, mask, count, losses, gradient, rows, by: tl.float64, values, indices,
    CLASSES: tl.constexpr, STEP: tl.constexpr, POWER: tl.constexpr, A: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VALUES_STEP: tl.constexpr, K: tl.constexpr, NAMED: tl.constexpr,
    SHIFTED: tl.constexpr,
):  # fmt: skip
    row, there, on = rows_here(rows, mask, weights, ROWS)
    inverse, factors = rates(tau, weights, count, by, row, on, POWER, A)
    log_w, x, log_rest, most = _answer(
        student, values, indices, row, on, inverse, CLASSES, STEP, A, VALUES_STEP, K, NAMED
    )
    lanes = tl.arange(0, BLOCK)
    top_others = tl.full((ROWS,), MINUS_INF, A)
    sums = tl.zeros((ROWS, BLOCK), A)
    for start in range(0, CLASSES + EVEN * SHIFTED, BLOCK):
        s = load(student, row, lanes, on, STEP, CLASSES, A, start, SHIFTED)
        col = columns(row, lanes, CLASSES, start, SHIFTED)
        s = tl.where(_hidden(indices, row, col, on, K, BLOCK, ROWS), MINUS_INF, s)
        top_others, b, _, kept = absorb(s, top_others, inverse)
        sums = sums * kept + tl.exp(b)
    z_others = tl.sum(sums, 1)
    kl, top, z_s, z_t, apart = _compare(log_w, x, log_rest, top_others, z_others, inverse)
    store_losses(losses, kl, factors, row, there, on)
    if gradient is not None:
        slope = factors * inverse
        rate = tl.where(z_others == 0, 0, slope * apart / z_others)
        for start in range(0, CLASSES + EVEN * SHIFTED, BLOCK):
            s = load(student, row, lanes, on, STEP, CLASSES, A, start, SHIFTED)
            # What is named is too far above to be raised to a power, and is put in its place behind.
            over = (s - refer(top_others)[:, None]) * inverse
            grad = tl.exp(tl.where(over > 0, 0, over)) * rate[:, None]
            col = columns(row, lanes, CLASSES, start, SHIFTED)
            grad = _slopes(
                grad, student, values, indices, row, col, on, inverse, top, most, slope / z_s, slope / z_t,
                CLASSES, STEP, A, VALUES_STEP, K,
            )  # fmt: skip
            store(gradient, grad, row, lanes, there, on, CLASSES, start, SHIFTED)


def tempered_kl_topk(
    student: Tensor, values: Tensor, indices: Tensor, tau: Tensor, weights: Tensor | None, mask: Tensor | None,
    rest: str, slack: float, scale: str, reduction: str, grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and gradient of logits (..., C) against probabilities and int64 classes (..., K), K from 1 to C.

    An index of -1 is an absent entry. ValueError or TypeError where shapes do not fit; values are checked as
    mekd.functional says.
    """
    classes, k = student.shape[-1], values.shape[-1]
    check_shape("topk values", values, (*student.shape[:-1], min(k, classes)))
    check_shape("topk indices", indices, values.shape, torch.int64)
    check_tau(tau)
    check_best(values, indices, weights, mask, slack, rest, classes)
    check_named_classes(indices, classes, weights, mask)
    mask = rows_with_answer(indices, mask, rest)
    v = as_rows(values)
    shared = indices.reshape(v.shape).contiguous()
    if rest == "tail":
        return run(
            "tempered_kl_topk", (tail_tile, tail_online), student, (v,), tau, weights, mask, scale, reduction, grad,
            shared, VALUES_STEP=v.stride(0), K=k, NAMED=triton.next_power_of_2(k),
        )  # fmt: skip
    return run(
        "tempered_kl_topk", (tile, online), student, (v,), tau, weights, mask, scale, reduction, grad, shared,
        TARGET_STEP=v.stride(0), K=k, SPREAD=rest == "spread", PROBS=True,
    )  # fmt: skip
