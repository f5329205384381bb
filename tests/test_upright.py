"""Photos are decoded as people see them: upright, on white, eight bits a channel, the middle square."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mekd.data.arrays import DataError
from mekd.data.upright import decode

LEFT, RIGHT = (200, 40, 20), (20, 60, 220)


def halves(side: int = 32) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (side, side), LEFT)
    image.paste(RIGHT, (side // 2, 0, side, side))
    return image


def colour(pixels: np.ndarray, x: int, y: int) -> tuple[int, ...]:
    return tuple(int(v) for v in pixels[:, y, x])


def near(found: tuple[int, ...], wanted: tuple[int, ...], off: int = 0) -> bool:
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= off


@pytest.mark.parametrize(
    ("ending", "options", "off"),
    [
        # Lossy: the format's own error.
        ("jpg", {"quality": 95, "subsampling": 0}, 6),
        ("webp", {"quality": 95}, 12),
        ("avif", {"quality": 95}, 8),
        ("heic", {"quality": 95}, 12),
        # Exact.
        ("png", {}, 0),
        ("jp2", {"irreversible": False}, 0),
        ("bmp", {}, 0),
        ("tif", {}, 0),
        ("ppm", {}, 0),
        ("tga", {}, 0),
        ("pcx", {}, 0),
        ("sgi", {}, 0),
        ("ico", {"sizes": [(32, 32)]}, 0),
        # A palette of its own.
        ("gif", {}, 0),
    ],
)
def test_each_format_is_read(ending: str, options: dict, off: int, tmp_path: Path) -> None:
    if ending == "heic":
        pytest.importorskip(
            "pillow_heif", reason="pillow-heif is not installed: pip install pillow-heif"
        ).register_heif_opener()
    path = tmp_path / f"photo.{ending}"
    halves().save(path, **options)
    pixels = decode(path, 32)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert near(colour(pixels, 4, 16), LEFT, off) and near(colour(pixels, 28, 16), RIGHT, off)


def grey16(level: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8), level, np.uint16))


def floats(level: float, low: float = 0) -> Image.Image:
    values = np.full((8, 8), level, np.float32)
    values[0, 0] = low
    return Image.fromarray(values)


def with_alpha(mode: str) -> Image.Image:
    """Half transparent black: 127 or 128 on white."""
    return Image.new("RGBA", (8, 8), (0, 0, 0, 128)).convert(mode)


def keyed(mode: str, **options: object) -> io.BytesIO:
    """A PNG whose colour 0 is transparent."""
    content = io.BytesIO()
    Image.new(mode, (8, 8), 0).save(content, "PNG", transparency=0 if mode != "RGB" else (0, 0, 0), **options)
    return content


@pytest.mark.parametrize(
    ("image", "ending", "wanted"),
    [
        (Image.new("1", (8, 8), 1), "png", (255, 255, 255)),
        (Image.new("L", (8, 8), 77), "png", (77, 77, 77)),
        (halves(8).quantize(4), "png", LEFT),
        # Adobe's inverted inks: pure red is neither cyan nor black.
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpg", (255, 0, 0)),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "tif", (255, 0, 0)),
        # 16 bits: 257 levels are one; 300 of 65535 is dark, where 8 bits would be cut at white.
        (grey16(200 * 257), "png", (200, 200, 200)),
        (grey16(300), "png", (1, 1, 1)),
        (grey16(200 * 257), "tif", (200, 200, 200)),
        (grey16(257), "ppm", (1, 1, 1)),
        # 32 bits: the range is told by the values.
        (floats(0.5), "tif", (128, 128, 128)),
        (floats(128.0), "tif", (128, 128, 128)),
        (floats(100 * 257.0), "tif", (100, 100, 100)),
        (Image.new("I", (8, 8), 90), "tif", (90, 90, 90)),
        (Image.new("I", (8, 8), 90 * 257), "tif", (90, 90, 90)),
        # What is transparent lies on white.
        (with_alpha("RGBA"), "png", (127, 127, 127)),
        (with_alpha("LA"), "png", (127, 127, 127)),
        (with_alpha("RGBA"), "tif", (127, 127, 127)),
        (keyed("P"), "png", (255, 255, 255)),
        (keyed("L"), "png", (255, 255, 255)),
        (keyed("RGB"), "png", (255, 255, 255)),
    ],
)
def test_each_mode_becomes_eight_bits_of_rgb(
    image: Image.Image | io.BytesIO, ending: str, wanted: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / f"photo.{ending}"
    if isinstance(image, io.BytesIO):
        path.write_bytes(image.getvalue())
    else:
        image.save(path)
    assert near(colour(decode(path, 8), 2, 4), wanted, 3 if ending == "jpg" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_photo(orientation: int, tmp_path: Path) -> None:
    """The eight ways in which a camera may lie: what was written is what the orientation undoes."""
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    corners = np.zeros((16, 16, 3), np.uint8)
    corners[:8, :8], corners[:8, 8:], corners[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undo[orientation](corners))).save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(decode(tmp_path / "photo.png", 16), corners.transpose(2, 0, 1))


def test_damaged_exif_turns_nothing(tmp_path: Path) -> None:
    halves().save(tmp_path / "photo.jpg", quality=95, exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff\x00\x07garbage")
    assert near(colour(decode(tmp_path / "photo.jpg", 32), 4, 16), LEFT, 6)


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif"])
def test_the_first_picture_counts(ending: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), level) for level in (LEFT, RIGHT)]
    frames[0].save(tmp_path / f"photo.{ending}", save_all=True, append_images=frames[1:], lossless=True)
    assert near(colour(decode(tmp_path / f"photo.{ending}", 8), 4, 4), LEFT)


@pytest.mark.parametrize(
    ("width", "height", "size", "resize"),
    [
        # A camera's shapes, upright and lying.
        (640, 427, 64, None),
        (427, 640, 64, 74),
        # A square; larger than the photo.
        (100, 100, 32, 36),
        (20, 31, 64, 70),
        # A panorama, of which the middle is little.
        (4000, 20, 16, None),
        # One pixel.
        (1, 1, 16, None),
    ],
)
def test_the_shorter_side_is_resized_and_the_middle_cropped(
    width: int, height: int, size: int, resize: int | None, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    photo = Image.fromarray(noise)
    photo.save(tmp_path / "photo.png")
    shorter = resize or size
    edge = (shorter - size) // 2
    square = ImageOps.fit(photo, (shorter, shorter), Image.Resampling.BILINEAR)
    wanted = np.asarray(square.crop((edge, edge, edge + size, edge + size)))
    found = decode(tmp_path / "photo.png", size, resize).transpose(1, 2, 0)
    assert np.abs(found.astype(int) - wanted).max() <= 2  # rounding; Pillow holds a box in float32


def test_a_large_jpeg_is_read_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many blocks are decoded as anybody sees: 1600 px shrink to 200 while 64 are wanted."""
    halves(1600).save(tmp_path / "photo.jpg", quality=95)
    seen = []
    monkeypatch.setattr("PIL.ImageOps.exif_transpose", lambda image: seen.append(image.size) or image.copy())
    pixels = decode(tmp_path / "photo.jpg", 64)
    assert seen == [(200, 200)]
    assert near(colour(pixels, 8, 32), LEFT, 6) and near(colour(pixels, 56, 32), RIGHT, 6)


def bytes_of(ending: str) -> bytes:
    content = io.BytesIO()
    halves(256).save(content, ending)
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cut.jpg", bytes_of("JPEG")[:1000], "damaged or cut short"),
        ("cut.png", bytes_of("PNG")[:200], "damaged"),
        ("head.png", bytes_of("PNG")[:10], "no image that Pillow reads"),
        ("empty.jpg", b"", "it is empty"),
        ("notes.txt", b"buy milk", "no image that Pillow reads"),
        # A language that draws: Pillow would start a program for it.
        ("drawing.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
        ("none.jpg", None, "No such file"),
    ],
)
def test_what_is_no_photo_is_named(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        decode(tmp_path / name, 16)
    assert name in str(caught.value) and said in str(caught.value)


def test_a_pipe_is_no_photo(tmp_path: Path) -> None:
    """To open one waits until somebody writes into it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.jpg").symlink_to(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"a.jpg is no file, but a pipe"):
        decode(tmp_path / "a.jpg", 16)


def test_numbers_without_a_range_are_refused(tmp_path: Path) -> None:
    for image in (floats(0.5, -1.0), floats(1e9), floats(float("nan"))):
        image.save(tmp_path / "depth.tif")
        with pytest.raises(DataError, match=r"depth\.tif.*32-bit numbers.*8 or 16 bits"):
            decode(tmp_path / "depth.tif", 4)


def test_heic_without_its_reader_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    (tmp_path / "photo.heic").write_bytes(b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(64))
    with pytest.raises(DataError, match=r"photo\.heic.*pip install pillow-heif"):
        decode(tmp_path / "photo.heic", 16)


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size is 32 and resize is 16"):
        decode(tmp_path / "photo.jpg", 32, 16)
