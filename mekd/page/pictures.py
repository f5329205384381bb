"""Pictures within the page: as data, scaled to what the page has room for."""

import base64
import functools
import importlib.util
import io
from pathlib import Path
from typing import Any

from torch import Tensor

#: Sides in pixels that the images of a page may have at most, the largest first; 0 leaves them out.
SIDES = (96, 64, 48, 32, 24, 16, 0)
#: Above this side an image is a JPEG, and one with few pixels is shown as such.
SMALL = 32


def there() -> bool:
    """Whether pictures can be written: Pillow comes with matplotlib."""
    return importlib.util.find_spec("PIL") is not None


def tile(image: Tensor, side: int) -> str:
    """An image (ch, S, S), uint8, as the address of an <img>, S being side at most."""
    return _tile(image.permute(1, 2, 0).contiguous().numpy().tobytes(), image.shape[0], image.shape[-1], side)


@functools.lru_cache(maxsize=512)
def _tile(pixels: bytes, channels: int, size: int, side: int) -> str:
    from PIL import Image

    picture = Image.frombytes("L" if channels == 1 else "RGB", (size, size), pixels)
    if size > side:
        picture = picture.resize((side, side), Image.Resampling.BOX)
    return _written(picture, lossless=picture.width <= SMALL)


def file(path: Path, width: int) -> str:
    """A picture of the run's folder as the address of an <img>, no wider than that."""
    from PIL import Image

    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    if picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    return _written(picture, lossless=False)


def _written(picture: Any, lossless: bool) -> str:
    buffer = io.BytesIO()
    if lossless:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=82, optimize=True)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
