"""(base + alpha y) softplus(-d), with y, the teacher's top probability, taken from its answer on the way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mekd.checks import SAY_CONFIDENCE, check_confidence, check_floating, check_probabilities
from mekd.kernels.launch import launch
from mekd.kernels.rows import MINUS_INF, as_rows, check_shape, empty_gradient, load, number
from mekd.kernels.softmax import absorb

TILE = 1024  # elements of the answer that one program reads at a time, where rows are short
LONGEST = 4096  # classes that it reads at a time


@triton.jit
def log1p(e, A: tl.constexpr):
    """log(1 + e) for e from 0 to 1, to the last digits of small e too, as 2 artanh(e / (2 + e))."""
    t = e / (2 + e)
    t2 = t * t
    # t is at most 1/3: a term more is worth a ninth.
    TERMS: tl.constexpr = 17 if A == tl.float64 else 8  # noqa: SIM300
    series = t2 * 0 + 1.0 / (2 * TERMS + 1)
    for k in tl.static_range(TERMS):
        series = series * t2 + 1.0 / (2 * (TERMS - 1 - k) + 1)
    return 2 * t * series


@triton.jit
def softplus_and_sigmoid(x, A: tl.constexpr):
    """log(1 + e^x) and 1 / (1 + e^-x) of a logit x, from one exponential."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x > 0, x, 0) + log1p(e, A), tl.where(x > 0, 1, e) / (1 + e)


@triton.jit
def _top_probability(
    response, row, there, STEP: tl.constexpr, CLASSES: tl.constexpr, LOGITS: tl.constexpr, A: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    top = tl.full((ROWS,), MINUS_INF, A)
    total = tl.zeros((ROWS, BLOCK), A)
    for start in range(0, CLASSES, BLOCK):
        x = load(response, row, start + lanes, there, STEP, CLASSES, A)
        if LOGITS:
            top, x, _, kept = absorb(x, top, 1)
            total = total * kept + tl.exp(x)
        else:
            top = tl.maximum(top, tl.max(x, 1))
            total = total + tl.where(x == x, 0, x)  # a maximum may step over NaN; a sum does not
    z = tl.sum(total, 1)
    # Of logits that are all masked nothing can be said: 1 / 0 would be infinite.
    return tl.where(z == 0, z / z, 1 / z) if LOGITS else top + z


@triton.jit
def gan_generator_kernel(
    d, response, losses, gradient, count, base: tl.float64, alpha: tl.float64, by: tl.float64,
    CLASSES: tl.constexpr, STEP: tl.constexpr, LOGITS: tl.constexpr, MINIMAX: tl.constexpr, A: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < count
    weight = number(alpha, A)
    if CLASSES > 0:
        weight *= _top_probability(response, row, there, STEP, CLASSES, LOGITS, A, ROWS, BLOCK)
    elif response is not None:
        weight *= tl.load(response + row, there, 0).to(A)
    x = tl.load(d + row, there, 0).to(A)
    foolish, doubt = softplus_and_sigmoid(-x, A)
    if MINIMAX:
        caught, trust = softplus_and_sigmoid(x, A)
        loss = weight * foolish - number(base, A) * caught
        grad = -weight * doubt - number(base, A) * trust
    else:
        loss = (number(base, A) + weight) * foolish
        grad = -(number(base, A) + weight) * doubt
    tl.store(losses + row, loss * number(by, A), there)
    if gradient is not None:
        tl.store(gradient + row, grad * number(by, A), there)


def gan_generator(
    d: Tensor, response: Tensor | None, kind: str, slack: float, base: float, alpha: float, minimax: bool,
    reduction: str, grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and gradient for d (m,) and a response: confidence (m,), or logits or probs (m, C); y = 1 without one.

    ValueError where shapes do not fit (Ma et al., 2024, with the sign set right).
    """
    check_floating("d", d)
    known, count = kind == "confidence", d.numel()
    if response is not None and (known and response.numel() != count):
        raise ValueError(f"{kind} has shape {tuple(response.shape)}; d has {tuple(d.shape)}")
    if response is not None and not known:
        check_shape(kind, response, (count, response.shape[-1]))
    if response is not None and known:
        check_confidence(response, slack)
    if response is not None and kind == "probs":
        check_probabilities(response, None, None, slack, SAY_CONFIDENCE)
    if alpha == 0:  # a weight of 0 is not multiplied with what may be NaN
        response = None
    rows = response if response is None else response.contiguous() if known else as_rows(response)
    classes = 0 if rows is None or known else rows.shape[1]
    block = min(triton.next_power_of_2(max(classes, 1)), LONGEST)
    at_once = max(1, TILE // block) if classes else 128
    wide = d.dtype == torch.float64 or (rows is not None and rows.dtype == torch.float64)
    x, gradient = d.contiguous(), empty_gradient(d if grad else d.new_empty(0))
    losses = torch.empty(d.shape, dtype=torch.float64 if d.dtype == torch.float64 else torch.float32, device=d.device)
    launch(
        gan_generator_kernel, (triton.cdiv(count, at_once),), x, rows, losses, gradient if grad else None, count,
        base, alpha, 1 / max({"mean": count, "batchmean": d.shape[0]}.get(reduction, 1), 1),
        CLASSES=classes, STEP=rows.stride(0) if classes else 0, LOGITS=kind == "logits", MINIMAX=minimax,
        A=tl.float64 if wide else tl.float32, ROWS=at_once, BLOCK=block,
        num_warps=8 if block > 1024 else 4, num_stages=1,
    )  # fmt: skip
    return losses if reduction == "none" else losses.sum(), gradient
