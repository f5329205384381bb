"""softplus(-d(x)) + softplus(d(G(z))): both sides of the discriminator's loss from one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mekd.checks import check_choice, check_floating
from mekd.kernels.gan_generator import softplus_and_sigmoid
from mekd.kernels.launch import launch
from mekd.kernels.rows import empty_gradient, number

BLOCK = 128


@triton.jit
def gan_discriminator_kernel(
    real, fake, losses, grad_real, grad_fake, reals, fakes, by_real: tl.float64, by_fake: tl.float64,
    A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One place of both batches, of which one may have ended.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_real = i < reals
    in_fake = i < fakes
    missed, doubt = softplus_and_sigmoid(-tl.load(real + i, in_real, 0).to(A), A)
    fooled, trust = softplus_and_sigmoid(tl.load(fake + i, in_fake, 0).to(A), A)
    loss = tl.where(in_real, missed, 0) * number(by_real, A) + tl.where(in_fake, fooled, 0) * number(by_fake, A)
    tl.store(losses + i, loss, in_real | in_fake)
    if grad_real is not None:
        tl.store(grad_real + i, -doubt * number(by_real, A), in_real)
        tl.store(grad_fake + i, trust * number(by_fake, A), in_fake)


def gan_discriminator(d_real: Tensor, d_fake: Tensor, reduction: str, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of both batches (m,) and (n,), each reduced, and both gradients; ValueError for reduction "none"."""
    check_floating("d_real", d_real)
    check_floating("d_fake", d_fake)
    check_choice("reduction", reduction, ("mean", "sum"))  # both batches have no loss for each sample in common
    wide = torch.float64 in (d_real.dtype, d_fake.dtype)
    both = (d_real, d_fake)
    real, fake = (d.contiguous() for d in both)
    gradients = [empty_gradient(d if grad else d.new_empty(0)) for d in both]
    losses = torch.empty(
        max(real.numel(), fake.numel()), dtype=torch.float64 if real.dtype == torch.float64 else torch.float32,
        device=real.device,
    )  # fmt: skip
    launch(
        gan_discriminator_kernel, (triton.cdiv(losses.numel(), BLOCK),), real, fake, losses,
        *(gradients if grad else (None, None)), real.numel(), fake.numel(),
        *(1.0 if reduction == "sum" else 1 / max(d.numel(), 1) for d in both),
        A=tl.float64 if wide else tl.float32, BLOCK=BLOCK, num_warps=4, num_stages=1,
    )  # fmt: skip
    return losses.sum(), *gradients
