"""Two softmaxes of a row, in one reading: a tile at once, or block by block, referred to the largest logit so far."""

import triton
import triton.language as tl

from mekd.kernels.rows import MINUS_INF


@triton.jit
def refer(top):
    """What exponentials are referred to: the largest logit, or 0 where there are nothing but masks."""
    return tl.where(top == MINUS_INF, 0, top)


@triton.jit
def exponents(x, inverse):
    """(x - max) / tau of each row of a tile: the logarithms of its exponentials."""
    return (x - refer(tl.max(x, 1))[:, None]) * inverse


@triton.jit
def product(p, log_ratio):
    """p * log_ratio with 0 log 0 = 0, also where the logarithm is infinite."""
    return tl.where(p == 0, 0, p * log_ratio)


@triton.jit
def divergence(weighted, z_s, z_t):
    """KL(p || q) from the sum of p (a - b) and both normalisers; below 0 by rounding alone."""
    kl = weighted / z_t + tl.log(z_s / z_t)
    return tl.where(kl < 0, 0, kl)


@triton.jit
def pair(s, t, inverse):
    """KL(p || q) of each row of a tile, the exponentials of s and t, and their sums."""
    b = exponents(s, inverse)
    a = exponents(t, inverse)
    q = tl.exp(b)
    p = tl.exp(a)
    z_s = tl.sum(q, 1)
    z_t = tl.sum(p, 1)
    return divergence(tl.sum(product(p, a - b), 1), z_s, z_t), q, p, z_s, z_t


@triton.jit
def absorb(x, top, inverse):
    """One more block of a row: the new top, (x - top) / tau, and by what, in logarithm and as a factor, sums shrink."""
    new = tl.maximum(top, tl.max(x, 1))
    to = refer(new)
    # Before the first number there is nothing to shrink; inf - inf must not be met.
    down = tl.where(top == MINUS_INF, 0, (top - to) * inverse)
    kept = tl.where(top == MINUS_INF, 0, tl.exp(down))
    return new, (x - to[:, None]) * inverse, down[:, None], kept[:, None]


@triton.jit
def absorb_pair(s, t, top_s, top_t, z_s, z_t, weighted, inverse):
    """One more block of both sides: tops (ROWS), and sums by lane (ROWS, BLOCK) of the exponentials and p (a - b)."""
    top_s, b, down_s, kept_s = absorb(s, top_s, inverse)
    top_t, a, down_t, kept_t = absorb(t, top_t, inverse)
    q = tl.exp(b)
    p = tl.exp(a)
    # Where nothing is left of p, it does not matter what q was: infinities too.
    weighted = tl.where(kept_t == 0, 0, kept_t * (weighted + product(z_t, down_t - down_s))) + product(p, a - b)
    return top_s, top_t, z_s * kept_s + q, z_t * kept_t + p, weighted
