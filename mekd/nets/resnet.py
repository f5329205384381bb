"""The ResNets for small images of He et al. (2016), section 4.2: depths 8, 20, 32, 56 and 110."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

DEPTHS = (8, 20, 32, 56, 110)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; where the shape changes, the shortcut subsamples and pads with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.padding:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.padding))
        return F.relu(out + shortcut)


class ResNet(nn.Module):
    """A ResNet of depth 6n + 2 with widths 16, 32, 64: images (m, channels, H, W) to logits (m, num_classes)."""

    def __init__(self, depth: int, num_classes: int, channels: int = 3) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"depth is {depth}; it must be one of {DEPTHS}")
        blocks = (depth - 2) // 6
        self.conv = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        widths = [16, *(w for w in (16, 32, 64) for _ in range(blocks))]
        self.blocks = nn.Sequential(*(Block(i, o, 1 if i == o else 2) for i, o in pairwise(widths)))
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits
