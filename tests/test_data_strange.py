"""Trees as people have them: what macOS and notebooks leave, links, every format, names of any bytes, what vanishes."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from jpeg_tree import grey_tree, numbers, opened
from mekd.config import Config, DataConfig
from mekd.data import listing, open_source, read_names
from mekd.data.arrays import DataError
from mekd.data.names import IMAGES, NATIVE


def put(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16)).save(file, "JPEG")


def link(path: Path, to: str | Path) -> None:
    path.symlink_to(to)


# What is listed.


def test_nothing_hidden_is_an_image_or_a_class_and_no_folder_is_entered_twice(tmp_path: Path) -> None:
    tree = grey_tree(tmp_path / ".hidden above" / "tree", {"train": {"cat": 2, "dog": 2}})
    cat, dog = tree / "train" / "cat", tree / "train" / "dog"
    for left_behind in (
        ".ipynb_checkpoints/00-checkpoint.jpg", "__MACOSX/cat/._00.jpg", "cat/._00.jpg", "cat/.hidden/00.jpg",
        "cat/.DS_Store", "cat/Thumbs.db", "cat/@eaDir/00.jpg", "cat/.ipynb_checkpoints/00-checkpoint.jpg",
        "dog/__MACOSX/._02.jpg", "dog/desktop.ini",
    ):  # fmt: skip
        put(tree / "train" / left_behind)
    (tree / "train" / "lost+found").mkdir()
    # Out of the tree: followed, once. What leads back into it, or around the link, is not.
    outside = tmp_path / "more"
    put(outside / "deeper" / "x.JPEG")
    link(cat / "more", outside)
    link(dog / "more", outside)
    link(outside / "deeper" / "again", "..")
    link(outside / "home", cat)
    link(outside / "above", tree.parent)
    put(tmp_path / "far" / "inner" / "y.jpg")
    put(tmp_path / "far" / "not asked for.jpg")
    link(dog / "far", tmp_path / "far" / "inner")
    link(tmp_path / "far" / "inner" / "up", "..")
    link(cat / "self", ".")
    link(cat / "up", "../..")
    link(cat / "sister", "../dog")
    link(dog / "root", tree / "train")
    link(dog / "everything", "/")
    link(tree / "train" / "kitten", "cat")
    link(dog / "loop", "loop")
    # A link to a file is a file, whether it dangles or not; what is no image is counted.
    link(dog / "file.png", outside / "deeper" / "x.JPEG")
    link(dog / "gone.png", "nowhere.png")
    for other in ("cat/a.txt", "cat/B.TXT", "cat/photo.heic", "stray.jpg"):
        (tree / "train" / other).touch()
    os.mkfifo(dog / "pipe.jpg")

    listed = listing.read(tree, "folder", "train")
    assert listed.classes == ("cat", "dog")
    found = [os.path.relpath(file, tree / "train") for file in listed.files]
    assert found == [
        "cat/00.jpg", "cat/01.jpg", "cat/more/deeper/x.JPEG", "dog/02.jpg", "dog/03.jpg", "dog/file.png",
        "dog/gone.png", "dog/far/y.jpg",
    ]  # fmt: skip
    assert listed.labels is not None and listed.labels.tolist() == [0] * 3 + [1] * 5
    others, beside, links = listed.notes
    assert "5 files (.txt 2, .heic 1, no ending 1, .jpg 1)" in others and "first" in others  # the pipe, the loop
    assert f"1 files (.jpg 1), {tree / 'train' / 'stray.jpg'} first" in beside
    assert "11 links" in links and "kitten" in links
    # The same from inside a link to the tree.
    link(tmp_path / "linked", tree)
    assert [Path(file).name for file in listing.read(tmp_path / "linked", "folder", "train").files] == [
        Path(file).name for file in listed.files
    ]


def test_a_class_without_images_says_what_it_holds(tmp_path: Path) -> None:
    tree = grey_tree(tmp_path, {"train": {"cat": 1}})
    (tree / "train" / "dog").mkdir()
    for name in ("a.heic", "b.HEIC", ".c.jpg"):
        (tree / "train" / "dog" / name).touch()
    with pytest.raises(DataError, match=r"dog holds no image \(\.jpg, .*\); it holds 2 files \(\.heic 2\)"):
        listing.read(tree, "folder", "train")


# What each file is.


def write_formats(folder: Path) -> dict[str, tuple[np.ndarray, int]]:
    """A picture of 16 x 16 in every format and depth; of each file name the pixels it must give, to within so much."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    colour = small.resize((16, 16), Image.Resampling.BICUBIC)
    grey, levels = colour.convert("L"), random.integers(0, 65536, (16, 16)).astype(np.uint16)
    deep = Image.fromarray(levels)
    clear = Image.fromarray(random.integers(0, 256, (16, 16), dtype=np.uint8))
    palette, bits, cmyk = colour.convert("P"), colour.convert("1"), colour.convert("CMYK")
    with_alpha = colour.copy()
    with_alpha.putalpha(clear)
    grey_alpha = Image.merge("LA", (grey, clear))
    wanted: dict[str, tuple[np.ndarray, int]] = {}

    def add(name: str, image: Image.Image, pixels: Any = None, within: int = 0, **how: Any) -> None:
        image.save(folder / name, **how)
        same = np.asarray(image.convert("RGB") if pixels is None else pixels)
        wanted[name] = (np.broadcast_to(same if same.ndim == 3 else same[:, :, None], (16, 16, 3)), within)

    lossy = {".jpg": 16, ".jpeg": 16, ".jpe": 16, ".jfif": 16, ".avif": 16}
    formats = {".apng": "PNG", ".j2k": "JPEG2000", ".pnm": "PPM", ".sgi": "SGI"}
    for suffix in IMAGES:
        how: dict[str, Any] = {"format": formats[suffix]} if suffix in formats else {}
        how |= (
            {"lossless": True}
            if suffix == ".webp"
            else {"quality": 95, "subsampling": "4:4:4"}
            if suffix in lossy
            else {}
        )
        how |= {"no_jp2": True} if suffix == ".j2k" else {}
        by_suffix = {".gif": palette, ".pgm": grey, ".pbm": bits}.get(suffix, colour)
        add(f"suffix{suffix.upper()}", by_suffix, None, lossy.get(suffix, 0), **how)
    # 16 bits of grey become 8 by rounding, and are not cut off at 255.
    rounded = np.rint(levels / 257)
    for name in ("deep.png", "deep.tif", "deep.pgm", "deep.jp2"):
        add(name, deep, rounded)
    add("grey.png", grey)
    add("palette.png", palette)
    add("palette-clear.png", palette, None, 0, transparency=bytes(range(256)))
    add("bits.png", bits)
    # Transparency is left out.
    add("alpha.png", with_alpha, colour)
    add("grey-alpha.png", grey_alpha, grey)
    add("cmyk.jpg", cmyk, colour, 16, quality=95, subsampling=0)
    add("grey.jpg", grey, grey, 16, quality=95)
    # What DALI reads wrongly, or not at all, when it is left alone with it.
    add("grey-alpha.tif", grey_alpha, grey)
    add("bits.tif", bits)
    add("palette.tif", palette)
    add("cmyk.tif", cmyk)
    add("alpha.tif", with_alpha, colour)
    (folder / "few.pgm").write_bytes(b"P5\n16 16\n15\n" + bytes(range(16)) * 16)
    wanted["few.pgm"] = (np.broadcast_to(np.arange(16)[:, None] * 17, (16, 16, 3)), 0)
    moving = [Image.fromarray(np.full((16, 16, 3), level, np.uint8)) for level in (10, 200, 90)]
    moving[0].save(folder / "moving.webp", save_all=True, append_images=moving[1:], lossless=True)
    moving[0].save(folder / "moving.gif", save_all=True, append_images=moving[1:])
    for name in ("moving.webp", "moving.gif"):
        wanted[name] = (np.full((16, 16, 3), 10), 0)
    return wanted


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_every_format_and_depth_gives_its_own_pixels(loader: Any, tmp_path: Path) -> None:
    wanted = write_formats(tmp_path / "train" / "x")
    listed = listing.read(tmp_path, "folder", "train")
    assert {Path(file).name for file in listed.files} == wanted.keys()
    rows = [row for row, file in enumerate(listed.files) if file.lower().endswith(NATIVE)]
    alone = dataclasses.replace(listed, files=tuple(listed.files[row] for row in rows), labels=np.zeros(len(rows), int))
    for some in (listed, alone):  # where all of them are its own, DALI reads the files itself
        images = torch.cat([batch for batch, _ in opened(loader, some, 64, 16, resize=16, crop="once")])
        for file, image in zip(some.files, images.permute(0, 2, 3, 1).numpy(), strict=True):
            pixels, within = wanted[Path(file).name]
            assert np.abs(image.astype(int) - pixels).max() <= within, file
    # A float of no stated range is no picture.
    Image.fromarray(np.full((16, 16), 0.5, np.float32)).save(tmp_path / "train" / "x" / "float.tif")
    with pytest.raises(DataError, match=r"float\.tif cannot be decoded \(its pixels are 32-bit"):
        list(opened(loader, listing.read(tmp_path, "folder", "train"), 64, 16, resize=16, crop="once"))


# Names of any bytes, and files that vanish.


def strange_names(root: Path) -> list[bytes]:
    """A tree of train and val whose names are no UTF-8; the images of train in their order."""
    grey_tree(root, {"train": {"a": 3, "b": 3}, "val": {"a": 1, "b": 1}})
    raw = os.fsencode(root)
    for split in (b"train", b"val"):
        os.rename(raw + b"/" + split + b"/b", raw + b"/" + split + b"/gr\xf6n")
    os.rename(raw + b"/train/a/01.jpg", raw + b"/train/a/\xff caf\xe9\n.jpg")
    return [b"a/00.jpg", b"a/02.jpg", b"a/\xff caf\xe9\n.jpg", b"gr\xf6n/03.jpg", b"gr\xf6n/04.jpg", b"gr\xf6n/05.jpg"]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_file_name_of_any_bytes_and_files_that_vanish(loader: Any, tmp_path: Path, mixed: bool) -> None:
    """DALI reads the files itself, or, where one of them (here a GIF) is not for it, gets their bytes."""
    names = strange_names(tmp_path)
    train = os.fsencode(tmp_path / "train")
    if mixed:
        (tmp_path / "train" / "a" / "z.gif").write_bytes(b"GIF89a, and no more")
    os.symlink("nowhere", train + b"/gr\xf6n/dangling \xe9.jpg")
    kind = "dali" if loader.__name__.endswith("dali_loader") else "torchvision"
    settings = {
        "name": "folder", "path": str(tmp_path), "size": 16, "resize": 16, "loader": kind, "local_fraction": 1.0,
        "workers": 1 if kind == "dali" else 0,
    }  # fmt: skip
    stopping, source = (
        open_source(Config(data=DataConfig(**settings, on_error=on_error)), torch.device("cpu"))
        for on_error in ("raise", "skip")
    )
    assert source.classes == ("a", "gr\\xf6n")
    os.unlink(train + b"/a/\xff caf\xe9\n.jpg")  # listed, and gone
    seen = [n for images, _ in source.once("local", 3) for n in numbers(images)]
    assert seen == [0, 2, 3, 4, 5] and [os.path.basename(name) for name in names][2] == b"\xff caf\xe9\n.jpg"
    for draw in (source.training, source.local):
        batches = draw(3)
        labels = torch.cat([batches.take(step)[1] for step in range(6)])
        assert set(labels.tolist()) == {0, 1}
    # Three ways to the same files: each is counted once, and its name can be printed.
    assert len(source.left_out()) == 2 + mixed
    assert [name for name in source.left_out() if "\\xff caf\\xe9" in name and "�" not in name]
    assert "\n".join(source.left_out()).encode("utf-8")
    why = "it is no image that Pillow reads" if mixed else "No such file or directory"
    with pytest.raises(DataError, match=rf"cannot be decoded \({why}\)") as caught:
        list(stopping.once("local", 2))
    assert str(caught.value).encode("utf-8")
    listed = listing.read(tmp_path, "folder", "train")
    kept, bad = listing.check(listed, "skip")
    assert bad == 1 and len(kept) == 5 + mixed


LOCALE = """
import sys
from pathlib import Path
from mekd import files
from mekd.data import listing, read_names, DataError

assert sys.getfilesystemencoding() == "ascii" and sys.stdout.encoding == "ascii", sys.getfilesystemencoding()
tree, names, latin = sys.argv[1:]
listed = listing.read(tree, "folder", "train")
print(listed.digest(), ascii(listed.classes), ascii(read_names(names, "oracle.classes")))
files.write_text(Path(names + ".copy"), files.read_text(names))
try:
    read_names(latin, "oracle.classes")
except DataError as error:
    print(ascii(str(error)))
"""


def test_text_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    tree = grey_tree(tmp_path / "tree", {"train": {"größer ✓": 1, "klein": 1}})
    names = tmp_path / "names – alle.txt"
    names.write_bytes("größer ✓\r\nklein\r\n".encode())
    latin = tmp_path / "latin.txt"
    latin.write_bytes("größer\n".encode("latin-1"))
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-c", LOCALE, os.fsencode(tree), os.fsencode(names), os.fsencode(latin)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **ascii_only})
    assert done.returncode == 0, done.stderr
    digest, said = done.stdout.splitlines()
    listed = listing.read(tree, "folder", "train")
    assert digest == f"{listed.digest()} {('größer ✓', 'klein')!a} {['größer ✓', 'klein']!a}"
    assert "latin.txt is no text in UTF-8" in said and "save it as UTF-8" in said
    assert (tmp_path / "names – alle.txt.copy").read_bytes() == "größer ✓\nklein\n".encode()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        # As editors save it: a byte-order mark, Windows' line ends, empty lines at the end, spaces.
        (b"\xef\xbb\xbfcat\r\n dog \r\n\r\n", ["cat", "dog"]),
        ("猫\u2028mimi\nChat\nchat".encode(), ["猫\u2028mimi", "Chat", "chat"]),
        (b"cat\n\ndog\ncat\n", r"oracle\.classes: .*names\.txt: 'cat' stands in line 1 and in line 4"),
        (b"\xef\xbb\xbf\r\n", r"oracle\.classes: .*names\.txt is empty"),
        (b"cat, dog, bird\n", r"lists one name, 'cat, dog, bird'; .*each name stands in a line of its own"),
        ("cat\n".encode("utf-16"), r"names\.txt is no text in UTF-8"),
        (None, r"oracle\.classes is '.*names\.txt'; no such file"),
    ],
)
def test_names_of_classes(tmp_path: Path, content: bytes | None, wanted: list[str] | str) -> None:
    file = tmp_path / "names.txt"
    if content is not None:
        file.write_bytes(content)
    if isinstance(wanted, list):
        assert read_names(file, "oracle.classes") == wanted
        return
    with pytest.raises(DataError, match=wanted):
        read_names(str(file), "oracle.classes")
