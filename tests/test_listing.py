"""Trees of images: what is listed, in which order, and what is refused."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jpeg_tree import grey_tree, write_records, write_tars
from mekd.data import listing
from mekd.data.arrays import DataError

COUNTS = {"train": {"b": 3, "a": 2, "c10": 2}, "val": {"a": 1, "b": 1, "c10": 1}}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return grey_tree(tmp_path / "tree", COUNTS)


def test_folders_are_listed_as_image_folder_does(tree: Path) -> None:
    image_folder = pytest.importorskip("torchvision.datasets").ImageFolder
    inside = tree / "train" / "b" / "deeper"
    inside.mkdir()
    (tree / "train" / "b" / "00.jpg").rename(inside / "X.JPEG")
    (tree / "train" / "a" / "notes.txt").write_text("no image")
    listed, theirs = listing.read(tree, "folder", "train"), image_folder(tree / "train")
    assert listed.labels is not None
    assert list(zip(listed.files, listed.labels.tolist(), strict=True)) == theirs.samples
    assert list(listed.classes) == theirs.classes and len(listed) == 7


@pytest.mark.parametrize(
    ("kind", "change", "parts"),
    [
        ("folder", lambda t: (t / "train").rename(t / "trian"), ["train is missing", "data.path"]),
        ("folder", lambda t: (t / "train" / "empty").mkdir(), ["empty", "no image", ".jpeg"]),
        ("folder", lambda t: [(t / "train" / c).rename(t / c) for c in ("a", "b", "c10")], ["no class folders"]),
        # The shards of nobody, and shards whose classes have no names.
        ("webdataset", lambda t: None, ["classes.txt is missing", "one a line"]),
        ("tfrecord", lambda t: (t / "classes.txt").write_text("a\n"), ["no shard", ".tfrecord"]),
        ("tfrecord", lambda t: (t / "classes.txt").write_text("\n"), ["classes.txt is empty"]),
    ],
)  # fmt: skip
def test_trees_that_are_refused(tree: Path, kind: str, change: Callable[[Path], Any], parts: list[str]) -> None:
    change(tree)
    with pytest.raises(DataError) as caught:
        listing.read(tree, kind, "train")
    for part in parts:
        assert part in str(caught.value)


def test_train_and_val_have_the_same_classes(tree: Path) -> None:
    train, val = (listing.read(tree, "folder", split) for split in ("train", "val"))
    listing.same_classes(train, val)
    (tree / "val" / "a").rename(tree / "val" / "z")
    val = listing.read(tree, "folder", "val")
    with pytest.raises(DataError, match="train has the class 'a'"):
        listing.same_classes(train, val)
    (tree / "train" / "z").mkdir()
    (tree / "train" / "z" / "x.png").touch()
    (tree / "val" / "a").mkdir()
    (tree / "val" / "a" / "x.png").touch()
    (tree / "val" / "y").mkdir()
    (tree / "val" / "y" / "x.png").touch()
    with pytest.raises(DataError, match="val has the class 'y'"):
        listing.same_classes(*(listing.read(tree, "folder", split) for split in ("train", "val")))


@pytest.mark.parametrize("kind", ["folder", "webdataset", "tfrecord"])
def test_a_share_is_random_and_repeats(tree: Path, kind: str) -> None:
    train = listing.read(tree, "folder", "train")
    if kind != "folder":
        {"webdataset": write_tars, "tfrecord": write_records}[kind](train, tree / kind / "train", 2)
        train = listing.read(tree / kind, kind, "train")
    half = listing.part(train, 0.5, seed=1)
    assert len(half.files) == round(len(train.files) / 2) and set(half.files) < set(train.files)
    assert half.files == tuple(sorted(half.files)) and half.files == listing.part(train, 0.5, seed=1).files
    assert len({listing.part(train, 0.5, seed=seed).files for seed in range(8)}) > 1
    assert len(listing.part(train, 1e-9, seed=0).files) == 1
    # What is chosen is still what it was.
    place = {bytes(listing.sample(train, row)[0]): listing.sample(train, row)[1] for row in range(len(train))}
    assert len(half) == sum(1 for row in range(len(half)) if place[bytes(listing.sample(half, row)[0])] is not None)
    assert all(place[bytes(image)] == label for image, label in (listing.sample(half, r) for r in range(len(half))))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda raw: b"", "empty"),
        (lambda raw: b"<html>404</html>", "begins with 3c 68 74"),
        (lambda raw: raw[: len(raw) // 2], "cut short"),
        (lambda raw: raw[:-1], "cut short"),
        # Cameras and editors append bytes; decoders do not mind.
        (lambda raw: raw + bytes(3000), None),
    ],
)
def test_files_are_looked_at_without_decoding(tree: Path, damage: Callable[[bytes], bytes], word: str | None) -> None:
    train = listing.read(tree, "folder", "train")
    for i in (2, 4):
        file = Path(train.files[i])
        file.write_bytes(damage(file.read_bytes()))
    if word is None:
        assert listing.check(train)[1] == 0
        return
    with pytest.raises(DataError, match=rf"{re.escape(train.files[2])}.*{word}.*\(and 1 more\)"):
        listing.check(train)
    kept, count = listing.check(train, "skip")
    assert count == 2 and kept.files == tuple(f for i, f in enumerate(train.files) if i not in (2, 4))
    assert kept.labels is not None and train.labels is not None
    assert kept.labels.tolist() == [label for i, label in enumerate(train.labels) if i not in (2, 4)]


@pytest.mark.parametrize("idx", [False, True])
@pytest.mark.parametrize("kind", ["webdataset", "tfrecord"])
def test_shards_hold_what_the_folder_held(tree: Path, kind: str, idx: bool) -> None:
    train = listing.read(tree, "folder", "train")
    write, tool = {"webdataset": (write_tars, "wds2idx"), "tfrecord": (write_records, "tfrecord2idx")}[kind]
    for shard in write(train, tree / kind / "train", 3):
        if idx:
            command = Path(sys.executable).parent / tool
            if not command.exists():
                pytest.skip(f"{tool} is not there: pip install 'mekd[dali]'")
            subprocess.run([command, shard, shard.with_suffix(".idx")], check=True, capture_output=True)
    before = sorted((tree / kind / "train").iterdir())
    shards = listing.read(tree / kind, kind, "train")
    assert sorted((tree / kind / "train").iterdir()) == before  # nothing is written beside the shards
    assert len(shards) == 7 and len(shards.files) == 3 and shards.classes == train.classes
    for row in range(7):
        image, label = listing.sample(shards, row)
        assert (bytes(image), label) == listing.sample(train, row)
    assert shards.name(4).endswith("sample 1")


@pytest.mark.parametrize("kind", ["webdataset", "tfrecord"])
def test_damaged_shards(tree: Path, kind: str) -> None:
    train = listing.read(tree, "folder", "train")
    shards = {"webdataset": write_tars, "tfrecord": write_records}[kind](train, tree / kind / "train", 3)
    whole = shards[1].read_bytes()
    (tree / kind / "train" / "classes.txt").write_text("a\nb\n")
    listed = listing.read(tree / kind, kind, "train")
    said = {"webdataset": "label 2; there are 2 classes, from 0", "tfrecord": "label 3; there are 2 classes, from 1"}
    with pytest.raises(DataError, match=f"sample 2 has {said[kind]}"):
        listing.sample(listed, 5)
    shards[1].write_bytes(whole[: len(whole) // 20])
    with pytest.raises(DataError, match=re.escape(str(shards[1]))):
        listing.read(tree / kind, kind, "train")


def test_a_fingerprint_is_that_of_the_names_and_not_of_the_place(tree: Path) -> None:
    train = listing.read(tree, "folder", "train")
    moved = listing.read(tree.rename(tree.parent / "moved"), "folder", "train")
    assert moved.files != train.files and moved.digest() == train.digest()
    (tree.parent / "moved" / "train" / "a" / "new.png").touch()
    assert listing.read(tree.parent / "moved", "folder", "train").digest() != train.digest()
    assert isinstance(train.labels, np.ndarray)
