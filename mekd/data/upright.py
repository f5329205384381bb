"""A photo as people see it: upright, on white, eight bits a channel, the middle square of it."""

import contextlib
import functools
import os
import stat
from typing import Any

import numpy as np

from mekd.data.arrays import DataError
from mekd.data.decode import FORMATS

#: Counts up when decode() gives other pixels: what was decoded before is then decoded again.
VERSION = 1
#: Kinds of files, as their bytes 8 to 12 name them behind "ftyp", that Pillow reads with the help of pillow-heif.
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def decode(path: str | os.PathLike[str], size: int, resize: int | None = None) -> np.ndarray:
    """A photo's middle (3, size, size), uint8 RGB, its shorter side resized to resize pixels (default: size) first.

    It is turned as its EXIF says, of several pictures the first counts, and what is transparent lies on white. Raises
    DataError naming the file and what is wrong, and ValueError for a resize below size.
    """
    shorter = size if resize is None else resize
    if not 1 <= size <= shorter:
        raise ValueError(f"size is {size} and resize is {shorter}; they must be at least 1, and resize at least size")
    image = _as_rgb(_load(path, shorter), path)
    side = min(image.size) * size / shorter  # of what is kept, before it is resized
    left, top = ((whole - side) / 2 for whole in image.size)
    box = (left, top, left + side, top + side)
    # Pillow weighs pixels outside the box too, so that this is the whole photo resized, and then cropped.
    small = image.resize((size, size), _pillow().Resampling.BILINEAR, box=box)
    return np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))


def _load(path: str | os.PathLike[str], shorter: int) -> Any:
    """The first picture of a file, upright."""
    from PIL import ImageOps

    pillow = _pillow()
    with contextlib.suppress(OSError):  # what is not there is named below
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe waits for ever
            raise DataError(f"{os.fspath(path)} is no file, but a pipe, a socket or a device")
    try:
        with pillow.open(path, formats=[name for name in (*FORMATS, "HEIF") if name in pillow.OPEN]) as image:
            image.draft(image.mode, (2 * shorter, 2 * shorter))  # JPEG leaves out what nobody will see
            image.load()
            try:
                upright = ImageOps.exif_transpose(image)
            except Exception:  # EXIF that is damaged turns nothing
                upright = image.copy()
            upright.format = image.format
            return upright
    except pillow.UnidentifiedImageError as error:
        raise DataError(f"{os.fspath(path)}: {_no_image(path)}") from error
    except pillow.DecompressionBombError as error:
        raise DataError(f"{os.fspath(path)} is larger than Pillow opens: {error}. Save it smaller") from error
    except OSError as error:
        raise DataError(f"{os.fspath(path)} cannot be read ({error.strerror or error}){_hint(error)}") from error
    except Exception as error:  # each decoder has errors of its own for damaged files
        raise DataError(f"{os.fspath(path)} cannot be decoded ({error}); it is damaged: fetch it again") from error


def _hint(error: OSError) -> str:
    return "" if error.strerror else "; it is damaged or cut short: fetch it again"


def _no_image(path: str | os.PathLike[str]) -> str:
    """Why Pillow knows nothing of a file."""
    with open(path, "rb") as file:
        head = file.read(12)
    if not head:
        return "it is empty"
    if head[4:8] == b"ftyp" and head[8:] in _HEIC and "HEIF" not in _pillow().OPEN:
        return "HEIC and HEIF need pillow-heif: pip install pillow-heif"
    if head[4:8] == b"ftyp" and head[8:11] == b"avi" and "AVIF" not in _pillow().OPEN:
        return "AVIF needs Pillow 11.3 or newer: pip install --upgrade pillow"
    return "it is no image that Pillow reads, or a damaged one"


def _as_rgb(image: Any, path: str | os.PathLike[str]) -> Any:
    if image.mode.startswith("I") or image.mode == "F":
        image = _pillow().fromarray(_eight_bits(image, path))
    try:
        if image.has_transparency_data:
            white = _pillow().new("RGBA", image.size, "white")
            image = _pillow().alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except ValueError as error:
        raise DataError(f"{os.fspath(path)}: {error}; save it as JPEG or PNG") from error


def _eight_bits(image: Any, path: str | os.PathLike[str]) -> np.ndarray:
    """Grey of 16 or 32 bits (H, W) as uint8: the range is 16 bits where the format says so, else told by the values."""
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        scale = 257.0
    elif image.mode == "F" and high <= 1:
        scale = 1 / 255
    else:
        scale = 1.0 if high <= 255 else 257.0
    if not (low >= 0 and high <= 255 * scale):  # NaN too
        raise DataError(
            f"{os.fspath(path)}: its pixels are 32-bit numbers from {low:g} to {high:g}, of a range that it does not "
            "tell; save it with 8 or 16 bits"
        )
    return np.rint(values / scale).astype(np.uint8)


@functools.cache
def _pillow() -> Any:
    """PIL.Image, which reads HEIC too where pillow-heif is installed."""
    import warnings

    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("photos need Pillow: pip install pillow") from error
    Image.init()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of 100 megapixels, which are a photo, and of odd EXIF
    try:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    except ImportError:
        pass
    return Image
