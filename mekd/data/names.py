"""Which names are images, which belong to nobody, and the names of classes in a text file."""

import os
from pathlib import Path

from mekd import files
from mekd.data.arrays import DataError

#: What DALI itself decodes, to the same pixels as Pillow; anything else reaches it by way of Pillow.
NATIVE = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp")
#: What both loaders read; the case of the letters does not matter.
IMAGES = (
    *NATIVE, ".bmp", ".dib", ".gif", ".tif", ".tiff", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm",
    ".avif", ".tga", ".qoi", ".pcx", ".sgi", ".ico",
)  # fmt: skip
#: What systems and archivers leave in folders, besides all that begins with a dot.
LEFT_BEHIND = {
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information",
    "lost+found",
}  # fmt: skip


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is neither an image nor a class, whatever it holds."""
    return name.startswith(".") or name.lower() in LEFT_BEHIND


def ending(name: str) -> str:
    """The suffix in small letters, for counting."""
    return os.path.splitext(name)[1].lower() or "no ending"


def read_names(path: str | Path, setting: str, least: int = 2) -> list[str]:
    """Class names, one a line, in UTF-8, so many at least; empty lines are passed over.

    Raises DataError naming the setting that gave the file, and what is wrong in which line.
    """
    if not Path(path).is_file():
        raise DataError(f"{setting} is {str(path)!r}; no such file. It lists the names of the classes, one a line")
    try:
        text = files.read_text(path)
    except files.ReadError as error:
        raise DataError(f"{setting}: {error}") from error
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        name = line.strip()
        if name in lines:
            raise DataError(
                f"{setting}: {path}: {name!r} stands in line {lines[name]} and in line {number}; each class has a "
                "name of its own"
            )
        if name:
            lines[name] = number
    if not lines:
        raise DataError(f"{setting}: {path} is empty; write the names of the classes into it, one a line")
    if len(lines) < least:
        raise DataError(
            f"{setting}: {path} lists one name, {next(iter(lines))[:80]!r}; a teacher has at least 2 classes, and each "
            "name stands in a line of its own"
        )
    return list(lines)
