"""A trained generator rewritten for step 2: the same pictures from fewer multiplications."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from mekd.checks import check_positive
from mekd.nets.generator import Generator, UpConv, nuisance_of
from mekd.reference import accumulation_dtype

SLOPE = 0.2


class FrozenGenerator(nn.Module):
    """What freeze() makes of a Generator: nothing to train, the input's gradient as ever.

    first and columns (outputs, nuisance): the first layer's weights for the code, and for the nuisance. merged: whether
    that layer holds the first up-convolution too, so that a leaky ReLU follows it. tau: what codes are divided by
    within; hand them over undivided.
    """

    def __init__(
        self, first: nn.Linear, columns: Tensor, merged: bool, ups: list[nn.ConvTranspose2d], last: nn.Conv2d,
        tau: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.first, self.merged, self.ups, self.last, self.tau = first, merged, nn.ModuleList(ups), last, tau
        self.register_buffer("columns", columns)
        self.num_classes, self.nuisance = first.in_features, columns.shape[1]
        self.side = math.isqrt(first.out_features // (ups[0] if ups else last).in_channels)
        self.requires_grad_(False).to(memory_format=torch.channels_last).eval()

    columns: Tensor

    def offset(self, n: Tensor) -> Tensor:
        """What a nuisance (m, nuisance) adds in the first layer, bias included: once for all codes drawn with it."""
        return torch.addmm(self.first.bias, n.to(self.columns.dtype), self.columns.T)

    def preactivation(self, code: Tensor, n: Tensor | None = None) -> Tensor:
        """The image before its tanh, (m, channels, size, size) in channels_last, of codes (m, num_classes).

        n: the nuisance (m, nuisance); drawn from N(0, I) where it is None.
        """
        return self.preactivation_at(code, self.offset(nuisance_of(code, self.nuisance, n)))

    def preactivation_at(self, code: Tensor, offset: Tensor) -> Tensor:
        """The same, of codes and of the offset() of their nuisances."""
        x = torch.addmm(offset, code.to(offset.dtype), self.first.weight.T)
        if self.merged:
            x = F.leaky_relu(x, SLOPE, inplace=True)  # in place of a view, autograd would copy
        channels = self.first.out_features // self.side**2  # of no image, view() finds none
        x = x.view(len(code), self.side, self.side, channels).permute(0, 3, 1, 2)
        for up in self.ups:
            x = F.leaky_relu(up(x), SLOPE, inplace=True)  # a convolution does not need its result again
        images: Tensor = self.last(x)
        return images

    def forward(self, code: Tensor, n: Tensor | None = None) -> Tensor:
        """The image in [-1, 1], float32 where the weights are narrower."""
        image = self.preactivation(code, n)
        return image.to(accumulation_dtype(image)).tanh()

    @torch.no_grad()
    def divided_by(self, tau: float) -> "FrozenGenerator":
        """The same generator, which divides codes by tau; all but the code's weights are shared."""
        if tau == self.tau:
            return self
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.first, other.tau = copy.deepcopy(self.first), tau
        other.first.weight.mul_(self.tau / tau)
        return other


@torch.no_grad()
def freeze(generator: nn.Module, tau: float = 1.0) -> FrozenGenerator:
    """Rewrite a Generator as it is in eval mode; codes are divided by tau in its first layer.

    Batch norm is folded into the layer before it, upsampling and convolution are one transposed convolution, and all
    that comes before the first leaky ReLU is one linear layer where that takes fewer multiplications. The same values
    up to rounding (1e-5). TypeError for a generator of another make, ValueError for a tau that is not above 0.
    """
    if not isinstance(generator, Generator):
        raise TypeError(
            f"generator is a {type(generator).__name__}; freeze() rewrites mekd.nets.Generator alone, use any other as "
            "it is, in eval mode"
        )
    check_positive("tau", tau)
    # In double precision: what is folded is rounded once.
    linear, side, classes = generator.linear, generator.start, generator.num_classes
    weight, bias = _folded(linear.weight.double(), linear.bias.double(), generator.bn, side**2)
    ups = [_transposed(conv, bn) for conv, bn in zip(generator.convs, generator.bns, strict=True)]
    outputs = (2 * side) ** 2 * ups[0].out_channels
    # By the code alone: the nuisance's part is computed once for both sides of a distance.
    merged = classes * outputs < classes * len(weight) + 4 * ups[0].in_channels * outputs
    if merged:
        up, side = ups.pop(0), 2 * side
        assert up.bias is not None
        columns = torch.cat([weight.T, bias[None]]).unflatten(1, (up.in_channels, side // 2, side // 2))
        *columns, shift = F.conv_transpose2d(columns, up.weight, stride=2, padding=1).flatten(1)
        weight, bias = torch.stack(columns, 1), shift + up.bias.repeat_interleave(side**2)
    # Made without the initialisation, which would draw random numbers that a resumed run draws elsewhere.
    first = skip_init(nn.Linear, classes, len(weight), device=weight.device, dtype=weight.dtype)
    # In the order of channels_last.
    order = torch.arange(len(bias), device=bias.device).view(-1, side * side).T.flatten()
    weight = weight[order]
    first.weight.copy_(weight[:, :classes] / tau)
    first.bias.copy_(bias[order])
    frozen = FrozenGenerator(first, weight[:, classes:].contiguous(), merged, ups, copy.deepcopy(generator.last), tau)
    return frozen.to(linear.weight.dtype)


def _folded(weight: Tensor, bias: Tensor, bn: nn.Module, repeats: int = 1) -> tuple[Tensor, Tensor]:
    """Weight (out, ...) and bias of a layer with the running statistics of the batch norm after it.

    repeats: how many outputs in a row are of one channel.
    """
    assert isinstance(bn, nn.BatchNorm2d) and bn.running_mean is not None and bn.running_var is not None
    factor = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    shift = bn.bias.double() - bn.running_mean.double() * factor
    factor, shift = factor.repeat_interleave(repeats), shift.repeat_interleave(repeats)
    return weight * factor.view(-1, *[1] * (weight.dim() - 1)), bias * factor + shift


def _transposed(conv: nn.Module, bn: nn.Module) -> nn.ConvTranspose2d:
    assert isinstance(conv, UpConv) and conv.bias is not None
    weight, bias = _folded(conv.weight.double(), conv.bias.double(), bn)
    channels, like = (conv.in_channels, conv.out_channels), {"device": weight.device, "dtype": weight.dtype}
    up: nn.ConvTranspose2d = skip_init(nn.ConvTranspose2d, *channels, 4, stride=2, padding=1, **like)
    up.weight.copy_(UpConv.kernel(weight))
    assert up.bias is not None
    up.bias.copy_(bias)
    return up
