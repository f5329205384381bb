"""Images as an API sees them (uint8, 0 to 255) and as networks see them (float32, -1 to 1)."""

import torch
from torch import Tensor

#: Sides in pixels that an image may have, as the generator draws it.
SIDES = (16, 32, 64, 128, 224)


def to_uint8(images: Tensor) -> Tensor:
    """Round float images in [-1, 1], any shape, to the nearest of the 256 values a pixel can have."""
    return images.add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def to_float(pixels: Tensor) -> Tensor:
    """Map uint8 pixels, any shape, to float32 in [-1, 1]."""
    return pixels.to(torch.float32).div_(127.5).sub_(1)


def as_float(images: Tensor) -> Tensor:
    """Images as a network sees them, however they were transported: uint8 is mapped, float is left as it is."""
    return to_float(images) if images.dtype == torch.uint8 else images
