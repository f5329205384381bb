"""How images go up to a service: resized to what it takes, then as raw pixels, PNG or JPEG."""

import io
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mekd.errors import UsageError


class Encoding(NamedTuple):
    """kind: raw, png or jpeg (of that quality); size: side of what goes up, in pixels, None for the images' own."""

    kind: str = "raw"
    quality: int = 95
    size: int | None = None

    def encode(self, images: Tensor) -> "list[bytes] | Tensor":
        """uint8 images (m, ch, H, W) as files, or as resized raw pixels."""
        images = resized(images, self.size)
        return images if self.kind == "raw" else [_file(image, self.kind, self.quality) for image in images]

    def shown(self, images: Tensor) -> Tensor:
        """The images as they arrive, at their own size: JPEG changes them, and a student sees what its teacher saw."""
        if self.kind != "jpeg":
            return images
        seen = torch.stack([_pixels(file, images.shape[1]) for file in self.encode(images.cpu())])
        return resized(seen, images.shape[-1]).to(images.device)


def resized(images: Tensor, size: int | None) -> Tensor:
    """Images (m, ch, S, S) with another side, bilinear and antialiased; of the same type, uint8 rounded."""
    if size is None or images.shape[-1] == size:
        return images
    larger = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    if images.is_floating_point():
        return larger
    return larger.round().clamp(0, 255).to(torch.uint8)


def _file(image: Tensor, kind: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture = pillow().fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).contiguous().numpy())
    if kind == "png":
        picture.save(buffer, "PNG", compress_level=1)
    else:
        picture.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _pixels(file: bytes, channels: int) -> Tensor:
    picture = pillow().open(io.BytesIO(file)).convert("L" if channels == 1 else "RGB")
    values = torch.from_numpy(np.array(picture))
    return values[None] if channels == 1 else values.permute(2, 0, 1).contiguous()


def pillow() -> Any:
    """PIL.Image, or UsageError saying what to install."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError("images that go up as PNG or JPEG need Pillow: pip install 'mekd[remote]'") from error
    return Image
