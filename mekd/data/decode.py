"""An image by Pillow: three channels of eight bits, whatever the file holds."""

import io
from typing import Any

import numpy as np

from mekd.data.arrays import DataError

#: Pillow's names of the formats of mekd.data.names.IMAGES; it knows others, of which some start programs.
FORMATS = (
    "JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "PPM", "AVIF", "TGA", "QOI", "PCX", "SGI",
    "ICO",
)  # fmt: skip


def decode(content: bytes | memoryview) -> Any:
    """A PIL.Image of mode RGB: the first picture, without its transparency, as it lies: EXIF's rotation is unheeded.

    16-bit grey is rounded to 8 bits. Raises OSError or ValueError saying what is wrong, DataError without Pillow.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("this image needs Pillow: pip install pillow") from error
    Image.init()
    try:
        image = Image.open(io.BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.UnidentifiedImageError as error:
        raise OSError("it is no image that Pillow reads") from error
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
        # Pillow's own conversion cuts off at 255.
        grey = (np.asarray(image).astype(np.int32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise OSError("its pixels are 32-bit numbers of a range that it does not tell; save it with 8 or 16 bits")
    return image.convert("RGB")
