"""The DCGAN generator that draws an image from a code of the length of a logit vector, and a nuisance beside it."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mekd.checks import check_tensor

#: Image size: where the picture starts, and the channels before the first and after each doubling.
STAGES: dict[int, tuple[int, tuple[int, ...]]] = {
    16: (4, (128, 128, 64)),
    32: (8, (128, 128, 64)),
    64: (8, (256, 128, 128, 64)),
    128: (8, (256, 256, 128, 128, 64)),
    224: (7, (512, 512, 256, 128, 64, 32)),
}


class UpConv(nn.Conv2d):
    """Nearest upsampling x2 and a 3x3 convolution with padding 1, as one transposed 4x4 convolution with stride 2.

    Every output pixel sees only 2x2 different inputs, so the 3x3 kernel, flipped and summed over the four shifts,
    gives the same image with 2.25 times fewer multiplications. The weight stays the 3x3 one.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)

    @staticmethod
    def kernel(weight: Tensor) -> Tensor:
        """The 4x4 kernel (in, out, 4, 4) of the transposed convolution for a 3x3 one (out, in, 3, 3)."""
        w = weight.flip(2, 3).transpose(0, 1)
        return F.pad(w, (0, 1, 0, 1)) + F.pad(w, (1, 0, 0, 1)) + F.pad(w, (0, 1, 1, 0)) + F.pad(w, (1, 0, 1, 0))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel(self.weight).contiguous(memory_format=torch.channels_last)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


class Generator(nn.Module):
    """Linear, then doublings (nearest upsampling, 3x3 convolution, batch norm, leaky ReLU 0.2), then tanh.

    Codes (m, num_classes) and nuisances (m, nuisance) to images (m, channels, size, size) in [-1, 1]. A code has the
    shape of a logit vector; the nuisance is N(0, I) and drawn here where it is not given, so that one code has a family
    of images. size: 16, 32, 64, 128 or 224. width multiplies the channels. At 32 px, without a nuisance, this is the
    paper's network.
    """

    def __init__(self, num_classes: int, size: int, channels: int = 3, width: float = 1.0, nuisance: int = 0) -> None:
        super().__init__()
        if size not in STAGES:
            raise ValueError(f"size is {size}; the generator draws {', '.join(map(str, STAGES))} px")
        if nuisance < 0:
            raise ValueError(f"nuisance is {nuisance}; it must be at least 0 entries")
        self.num_classes, self.nuisance = num_classes, nuisance
        self.start, plan = STAGES[size]
        widths = [max(8, round(w * width)) for w in plan]
        self.linear = nn.Linear(num_classes + nuisance, widths[0] * self.start**2)
        self.bn = nn.BatchNorm2d(widths[0])
        self.convs = nn.ModuleList(UpConv(i, o) for i, o in pairwise(widths))
        self.bns = nn.ModuleList(nn.BatchNorm2d(o) for o in widths[1:])
        self.last = nn.Conv2d(widths[-1], channels, 3, 1, 1)

    def preactivation(self, code: Tensor, n: Tensor | None = None) -> Tensor:
        """The image before its tanh."""
        latent = torch.cat([code, nuisance_of(code, self.nuisance, n)], 1)
        x = self.bn(self.linear(latent).unflatten(1, (-1, self.start, self.start)))
        x = x.contiguous(memory_format=torch.channels_last)
        for conv, bn in zip(self.convs, self.bns, strict=True):
            x = F.leaky_relu(bn(conv(x)), 0.2, inplace=True)  # batch norm needs its input alone
        images: Tensor = self.last(x)
        return images

    def forward(self, code: Tensor, n: Tensor | None = None) -> Tensor:
        """The image in [-1, 1]."""
        return self.preactivation(code, n).tanh()


def nuisance_of(code: Tensor, entries: int, n: Tensor | None) -> Tensor:
    """The nuisance (m, entries) for codes (m, C): n itself, in their dtype, or drawn from N(0, I) where it is None.

    ValueError where n has another shape, TypeError where it is no tensor.
    """
    if n is None and not entries:
        return code.new_empty(len(code), 0)  # vmap refuses even to draw no number
    if n is None:
        return torch.randn(len(code), entries, dtype=code.dtype, device=code.device)
    check_tensor("n", n)
    if n.shape != (len(code), entries):
        raise ValueError(f"n has shape {tuple(n.shape)}; the generator takes ({len(code)}, {entries}) for these codes")
    return n.to(code.dtype)
