"""tempered_kl against the k best probabilities of a row: what is missing to 1 is spread over the others, or dropped."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mekd.checks import check_named_classes, check_probabilities, check_tau
from mekd.kernels.rows import NEVER, as_rows, check_shape, load, rates, rows_here, run, store, store_losses
from mekd.kernels.softmax import absorb_pair, divergence, pair, refer
from mekd.kernels.tempered_kl import tempered_kl

#: Each class is compared with each that is named: from here on that costs more than a target in memory.
MOST_NAMED = 32


@triton.jit
def _share(values, row, on, K: tl.constexpr, STEP: tl.constexpr, OTHERS: tl.constexpr, A: tl.constexpr):
    """What each class that is not named gets, 0 where OTHERS, the count of those that share, is 0; the most of all."""
    missing = tl.full(row.shape, 1, A)
    most = tl.zeros(row.shape, A)
    for k in range(K):
        value = tl.load(values + row * STEP + k, mask=on, other=0).to(A)
        missing -= value
        most = tl.maximum(most, value)
    share = tl.where(missing < 0, 0, missing) / OTHERS if OTHERS > 0 else tl.zeros(row.shape, A)
    return share, tl.maximum(most, share)


@triton.jit
def _logits(
    values, indices, share, most, row, col, on,
    K: tl.constexpr, STEP: tl.constexpr, CLASSES: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """A tile of the target as logits: log(p / the most of the row), precise where it counts."""
    p = tl.where((col < CLASSES)[None, :], share[:, None], 0)
    for k in range(K):
        index = tl.load(indices + row * K + k, mask=on, other=-1).to(tl.int32)
        value = tl.load(values + row * STEP + k, mask=on, other=0).to(A)
        p = tl.where(col[None, :] == index[:, None], value[:, None], p)
    return tl.log(tl.where(p < 0, 0, p) / most[:, None])


@triton.jit
def _tile(
    student, tau, weights, mask, count, losses, gradient, rows, by: tl.float64, values, indices,
    CLASSES: tl.constexpr, STEP: tl.constexpr, POWER: tl.constexpr, A: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, VALUES_STEP: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    row, there, on = rows_here(rows, mask, ROWS)
    inverse, factors = rates(tau, weights, count, by, row, on, POWER, A)
    col = tl.arange(0, BLOCK)
    s = load(student, row, col, on, STEP, CLASSES, A)
    share, most = _share(values, row, on, K, VALUES_STEP, OTHERS, A)
    t = _logits(values, indices, share, most, row, col, on, K, VALUES_STEP, CLASSES, A)
    kl, q, p, z_s, z_t = pair(s, t, inverse)
    store_losses(losses, kl, factors, row, there, on)
    if gradient is not None:
        slope = factors * inverse
        grad = q * (slope / z_s)[:, None] - p * (slope / z_t)[:, None]
        store(gradient, grad, row, col, there, on, CLASSES)


@triton.jit
def _online(
    student, tau, weights, mask, count, losses, gradient, rows, by: tl.float64, values, indices,
    CLASSES: tl.constexpr, STEP: tl.constexpr, POWER: tl.constexpr, A: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, VALUES_STEP: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    row, there, on = rows_here(rows, mask, ROWS)
    inverse, factors = rates(tau, weights, count, by, row, on, POWER, A)
    share, most = _share(values, row, on, K, VALUES_STEP, OTHERS, A)
    lanes = tl.arange(0, BLOCK)
    top_s = tl.full((ROWS,), NEVER, A)
    top_t = top_s
    z_s = tl.zeros((ROWS, BLOCK), A)
    z_t = z_s
    weighted = z_s
    for start in range(0, CLASSES, BLOCK):
        s = load(student, row, start + lanes, on, STEP, CLASSES, A)
        t = _logits(values, indices, share, most, row, start + lanes, on, K, VALUES_STEP, CLASSES, A)
        top_s, top_t, z_s, z_t, weighted = absorb_pair(s, t, top_s, top_t, z_s, z_t, weighted, inverse)
    sum_s = tl.sum(z_s, 1)
    sum_t = tl.sum(z_t, 1)
    store_losses(losses, divergence(tl.sum(weighted, 1), sum_s, sum_t), factors, row, there, on)
    if gradient is not None:
        by_s = (factors * inverse / sum_s)[:, None]
        by_t = (factors * inverse / sum_t)[:, None]
        for start in range(0, CLASSES, BLOCK):
            s = load(student, row, start + lanes, on, STEP, CLASSES, A)
            t = _logits(values, indices, share, most, row, start + lanes, on, K, VALUES_STEP, CLASSES, A)
            q = tl.exp((s - refer(top_s)[:, None]) * inverse)
            p = tl.exp((t - refer(top_t)[:, None]) * inverse)
            store(gradient, q * by_s - p * by_t, row, start + lanes, there, on, CLASSES)


def tempered_kl_topk(
    student: Tensor, values: Tensor, indices: Tensor, tau: Tensor, weights: Tensor | None, mask: Tensor | None,
    rest: str, scale: str, reduction: str, grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and gradient of logits (..., C) against probabilities and int64 classes (..., K), K from 1 to C.

    ValueError or TypeError where shapes do not fit; values are checked as mekd.functional says.
    """
    classes, k = student.shape[-1], values.shape[-1]
    check_shape("topk values", values, (*student.shape[:-1], min(k, classes)))
    check_shape("topk indices", indices, values.shape, torch.int64)
    check_tau(tau)
    check_probabilities("topk values", values, mask)
    check_named_classes(indices, classes, mask)
    spread = rest == "spread"
    if k > MOST_NAMED:
        target = _dense(student, values, indices, mask, spread)
        return tempered_kl(student, target, tau, weights, mask, False, scale, reduction, grad)
    v = as_rows(values)
    return run(
        "tempered_kl_topk", (_tile, _online), student, (v,), tau, weights, mask, scale, reduction, grad,
        indices.reshape(v.shape).contiguous(),
        K=k, VALUES_STEP=v.stride(0), OTHERS=classes - k if spread else 0,
    )  # fmt: skip


def _dense(student: Tensor, values: Tensor, indices: Tensor, mask: Tensor | None, spread: bool) -> Tensor:
    """The target in memory, as _logits has it."""
    values = values.to(torch.float64 if torch.float64 in (student.dtype, values.dtype) else torch.float32)
    k, classes = values.shape[-1], student.shape[-1]
    if mask is not None:  # rows that do not count may name what is no class
        indices = indices.where(mask.unsqueeze(-1), torch.arange(k, device=indices.device))
    missing = (1 - values.sum(-1, keepdim=True)).clamp_min(0)
    share = missing / (classes - k) if spread and k < classes else torch.zeros_like(missing)
    filled = share.expand(*values.shape[:-1], classes).scatter(-1, indices, values)
    return (filled / filled.amax(-1, keepdim=True)).log()
