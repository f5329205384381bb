"""tanh_l1 and tanh_l1_, its twin in place: the L1 distance of two images, given before or after their tanh."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mekd.checks import check_floating
from mekd.kernels.launch import launch
from mekd.kernels.rows import empty_gradient, number
from mekd.kernels.softmax import product

LIMIT = tl.constexpr(22.0)  # tanh(x) has long been 1, and the product of two e^44 stays finite
LOG2E = tl.constexpr(1.4426950408889634)
PIECE = 2048  # elements of one sample that one program works on


@triton.jit
def cut_off(x):
    """x where tanh(x) still changes; NaN stays NaN."""
    x = tl.where(x > LIMIT, LIMIT, x)
    return tl.where(x < -LIMIT, -LIMIT, x)


@triton.jit
def reduced(x):
    """2^n and r of 2x = n ln 2 + r: the product 2x / ln 2 would carry its rounding into every digit of e^2x."""
    n = tl.floor(x * (2 * LOG2E) + 0.5)
    # ln 2 in two parts, the first so short that its product with n is exact.
    r = (2 * x - n * 0.693359375) + n * 2.12194440e-4
    return ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True), r


@triton.jit
def exp_twice(x, A: tl.constexpr):
    """e^2x, cut off at both ends."""
    x = cut_off(x)
    if A == tl.float64:  # noqa: SIM300
        e = tl.exp(2 * x)
    else:
        power, r = reduced(x)
        e = tl.exp2(r * LOG2E) * power
    return e


@triton.jit
def parts_of_exp_twice(x, A: tl.constexpr):
    """e^2x as s (1 + p), s a power of two and p small, so that no digit of p is lost beside 1."""
    if A == tl.float64:  # noqa: SIM300
        power = exp_twice(x, A)  # there are digits enough
        p = power * 0
    else:
        power, r = reduced(cut_off(x))
        p = r * 0 + 1 / 5040
        for k in tl.static_range(6):
            p = p * r + 1 / (720, 120, 24, 6, 2, 1)[k]
        p = tl.where(tl.abs(x) >= LIMIT, 0, p * r)  # cut off, a saturated pixel may be a tie
    return power, p


@triton.jit
def tanh_l1_kernel(
    a_ptr, b_ptr, weights_ptr, partial_ptr, grad_ptr, by: tl.float64,
    PIXELS: tl.constexpr, PIECES: tl.constexpr, TANH: tl.constexpr, FINISHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype = partial_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    sample = program // PIECES
    columns = program % PIECES * BLOCK + tl.arange(0, BLOCK)
    # PIXELS is known to the compiler, so that it sees which samples begin at a multiple of 16 bytes.
    at = sample * PIXELS + columns
    inside = columns < PIXELS
    factor = number(by, dtype)
    read = inside
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + sample).to(dtype)
        factor *= weight
        # Of weight 0 the image may hold anything, and 0 times NaN is NaN.
        read = columns < tl.where(weight == 0, 0, PIXELS)
    a = tl.load(a_ptr + at, read, 0.0).to(dtype)
    b = tl.load(b_ptr + at, read, 0.0).to(dtype)
    if TANH and FINISHED:
        # tanh(a) = (e - 1) / (e + 1) with e = e^2a, less b over the same denominator.
        s, p = parts_of_exp_twice(a, dtype)
        e = s + s * p
        w = e + 1
        gap = ((s - 1) - b * (s + 1) + s * p * (1 - b)) / w
        slope = 4 * e / (w * w)
        a = gap
        b = gap * 0
    elif TANH:
        # With f = e^2b the difference is 2 (e - f) / ((e + 1) (f + 1)) and 1 - tanh(a)^2 is 4 e / (e + 1)^2. tanh is
        # monotonous, so that the sign is that of a - b.
        e = exp_twice(a, dtype)
        f = exp_twice(b, dtype)
        w = e + 1
        gap = 2 * ((e - f) / (w * (f + 1)))
        slope = 4 * e / (w * w)
    else:
        gap = a - b
        slope = tl.full((BLOCK,), 1.0, dtype)
    tl.store(partial_ptr + program, product(factor, tl.sum(tl.abs(gap))))
    if grad_ptr is not None:
        # A tie gives 0 as torch's abs does; a slope that is NaN stays NaN.
        grad = tl.where(a > b, slope, tl.where(a < b, -slope, slope * 0)) * factor
        tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), inside)


def tanh_l1(
    a: Tensor, b: Tensor, weights: Tensor | None, tanh: bool, finished: bool, reduction: str, grad: bool
) -> tuple[Tensor, Tensor]:
    """Losses and the gradient for a (m, ...); NCHW and channels_last are read and written as they lie."""
    x = a if _sample_major(a) else a.contiguous()
    gradient = empty_gradient(x if grad else x.new_empty(0))
    if grad and not x.is_contiguous():
        gradient = gradient.to(memory_format=torch.channels_last)
    return _distances(x, b, weights, tanh, finished, reduction, gradient if grad else None), gradient


def tanh_l1_(a: Tensor, b: Tensor, weights: Tensor | None, tanh: bool, finished: bool, reduction: str) -> Tensor:
    """The losses of tanh_l1, with the gradient written over a."""
    if not _sample_major(a):
        raise ValueError(
            f"student has shape {tuple(a.shape)} and strides {a.stride()}; inplace=True writes over samples that lie "
            "one after another, contiguous or channels_last: use inplace=False"
        )
    return _distances(a, b, weights, tanh, finished, reduction, a)


def _sample_major(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _distances(
    a: Tensor, b: Tensor, weights: Tensor | None, tanh: bool, finished: bool, reduction: str, grad: Tensor | None
) -> Tensor:
    check_floating("a", a)
    if a.shape != b.shape:
        raise ValueError(f"b has shape {tuple(b.shape)}; it must be {tuple(a.shape)}")
    samples = a.shape[0]
    if weights is not None and weights.numel() != samples:
        raise ValueError(f"weights have shape {tuple(weights.shape)}; there are {samples} samples")
    if b.stride() != a.stride():
        b = torch.empty_like(a, dtype=b.dtype).copy_(b)
    pixels = a.numel() // max(samples, 1)
    block = min(PIECE, max(triton.next_power_of_2(pixels), 16))
    pieces = triton.cdiv(pixels, block)
    partial = a.new_empty((samples, pieces), dtype=torch.float64 if a.dtype == torch.float64 else torch.float32)
    divisor = {"mean": a.numel(), "batchmean": samples}.get(reduction, 1)
    if partial.numel():
        launch(
            tanh_l1_kernel, (partial.numel(),),
            a, b, None if weights is None else weights.contiguous(), partial, grad, 1 / max(divisor, 1),
            PIXELS=pixels, PIECES=pieces, TANH=tanh, FINISHED=finished, BLOCK=block,
            num_warps=max(1, block // 256), num_stages=1,
        )  # fmt: skip
    if reduction != "none":
        return partial.sum()
    return partial.reshape(samples) if pieces == 1 else partial.sum(1)
