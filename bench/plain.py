"""Both stages as one writes them from the paper with PyTorch alone: what the steps of mekd are measured against.

Nothing is frozen, folded or shared: G keeps its weight gradients in step 2, fakes carry their graph into D's step, and
the discriminator runs twice for each step of G.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mekd.nets import Generator


class PlainGenerator(nn.Module):
    """Linear, batch norm, then upsampling, convolution, batch norm and leaky ReLU, then a convolution and tanh."""

    def __init__(self, like: Generator) -> None:
        super().__init__()
        self.start, self.linear, self.bn, self.last = like.start, like.linear, like.bn, like.last
        layers: list[nn.Module] = []
        for up, bn in zip(like.convs, like.bns, strict=True):
            conv = nn.Conv2d(up.in_channels, up.out_channels, 3, 1, 1)
            conv.weight, conv.bias = up.weight, up.bias
            layers += [nn.Upsample(scale_factor=2), conv, bn, nn.LeakyReLU(0.2)]
        self.doublings = nn.Sequential(*layers)

    def forward(self, code: Tensor, n: Tensor) -> Tensor:
        x = self.bn(self.linear(torch.cat([code, n], 1)).unflatten(1, (-1, self.start, self.start)))
        return self.last(self.doublings(x)).tanh()


def distill_step(
    generator: nn.Module, teacher: nn.Module, student: nn.Module, optimizer: torch.optim.Optimizer, z: Tensor,
    n: Tensor, tau: float, kl_tau: float,
) -> Tensor:  # fmt: skip
    """One step of distillation from logits, fresh latents."""
    fake = generator(z, n)
    with torch.no_grad():
        t = teacher(fake)
    s = student(fake)
    image = F.l1_loss(generator(s / tau, n), generator(t / tau, n))
    kl = F.kl_div(F.log_softmax(s / kl_tau, 1), F.softmax(t / kl_tau, 1), reduction="batchmean")
    loss = image + kl_tau**2 * kl
    optimizer.zero_grad()
    generator.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def gan_step(
    generator: nn.Module, discriminator: nn.Module, teacher: Callable[[Tensor], Tensor] | None,
    adam_g: torch.optim.Optimizer, adam_d: torch.optim.Optimizer, real: Tensor, z: Tensor, n: Tensor,
    alpha: float = 0.5,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step of the GAN, with the information term if alpha is not 0; D's logits are asked for twice then."""
    bce = F.binary_cross_entropy_with_logits
    adam_d.zero_grad()
    fake = generator(z, n)
    d_real, d_fake = discriminator(real), discriminator(fake)
    loss_d = bce(d_real, torch.ones_like(d_real)) + bce(d_fake, torch.zeros_like(d_fake))
    loss_d.backward()
    adam_d.step()

    adam_g.zero_grad()
    fake = generator(z, n)
    d = discriminator(fake)
    loss_g = bce(d, torch.ones_like(d))
    if alpha and teacher is not None:
        with torch.no_grad():
            y = teacher(fake).softmax(1).amax(1)
        loss_g = loss_g - alpha * (y * F.logsigmoid(discriminator(fake))).mean()
    loss_g.backward()
    adam_g.step()
    return loss_d.detach(), loss_g.detach()
