"""Parquet files as Hugging Face's datasets writes them: a column of images, labels or none, and what is damaged."""

import io
import json
import struct
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'mekd[parquet]'")

import pyarrow as pa
import pyarrow.parquet as pq

from mekd import cli, files
from mekd.config import DataConfig
from mekd.data import listing
from mekd.data.arrays import DataError
from mekd.data.stream import Plan

NAMES = ["cat", "dog", "eel"]


def encoded(grey: int, kind: str = "PNG", side: int = 24) -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (side, side), (grey, grey, grey)).save(made, kind)
    return made.getvalue()


def bomb() -> bytes:
    """A PNG of some bytes that claims 40,000 x 30,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 40_000, 30_000, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def write(path: Path, images: list[Any], labels: list[Any] | None = None, names: list[str] | None = None,
          group: int = 4, column: str = "image") -> None:  # fmt: skip
    """A file with the metadata that datasets gives it, where there are names."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = [one if isinstance(one, dict) or one is None else {"bytes": one, "path": None} for one in images]
    columns: dict[str, Any] = {column: pa.array(rows, kind)}
    if labels is not None:
        columns["label"] = pa.array(labels)
    table = pa.table(columns)
    if names is not None:
        features = {column: {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten training images in two files of three row groups, whose brightness is ten times their number; two of val."""
    for number in range(2):
        rows = range(5 * number, 5 * number + 5)
        write(tmp_path / "data" / f"train-0000{number}-of-00002.parquet", [encoded(10 * i) for i in rows],
              [i % 3 for i in rows], NAMES)  # fmt: skip
    write(tmp_path / "data" / "validation-00000-of-00001.parquet", [encoded(5), encoded(7)], [0, 2], NAMES)
    return tmp_path


def test_rows_labels_and_the_names_of_classes(folder: Path) -> None:
    train, val = (listing.read(folder, "parquet", split) for split in ("train", "val"))
    assert train.classes == tuple(NAMES) == val.classes and (len(train), len(val)) == (10, 2)
    assert len(train.files) == 4, "a row group is a shard: 4 and 1 rows of each file"
    for row in range(10):
        image, label = listing.sample(train, row)
        assert (np.asarray(Image.open(io.BytesIO(image)))[0, 0, 0], label) == (10 * row, row % 3)
    assert "train-00001-of-00002.parquet:0, sample 1" in train.name(6)
    assert [listing.sample(val, row)[1] for row in range(2)] == [0, 2]
    listing.same_classes(train, val)
    assert listing.read(folder, "parquet", "train").digest() == train.digest() != val.digest()


def test_parts_and_what_is_held_back(folder: Path) -> None:
    train = listing.read(folder, "parquet", "train")
    half = listing.part(train, 0.5, 0)
    assert len(half.files) == 2 and len(half) in (2, 5, 8)
    kept, held = listing.apart(train, 3, 0)
    assert (len(kept), len(held)) == (7, 3)
    labels = [listing.sample(part, row)[1] for part in (kept, held) for row in range(len(part))]
    assert sorted(labels) == sorted(i % 3 for i in range(10))


def test_both_loaders_give_its_images(folder: Path, loader: ModuleType) -> None:
    plan = Plan(listing.read(folder, "parquet", "train"), 4, 16, "once", threads=1, resize=16)
    loader.check(plan.listing)
    batches = [(images.cpu(), labels.cpu()) for images, labels in loader.open(plan)]
    images = torch.cat([images for images, _ in batches])
    assert images[:, 0, 8, 8].tolist() == [10 * i for i in range(10)]
    assert torch.cat([labels for _, labels in batches]).tolist() == [i % 3 for i in range(10)]


@pytest.mark.parametrize("content", [bomb(), b"no image", b"", None, {"bytes": None, "path": "a.png"}])
def test_an_image_that_cannot_be_read_is_named_or_left_out(tmp_path: Path, loader: ModuleType, content: Any) -> None:
    images = [encoded(10), content, encoded(30)]
    write(tmp_path / "train" / "0000.parquet", images, [0, 1, 2], NAMES)
    listed = listing.read(tmp_path, "parquet", "train")
    with pytest.raises(DataError, match=r"0000\.parquet:0, sample 1 cannot be decoded .*data\.on_error skip"):
        list(loader.open(Plan(listed, 3, 16, "once", threads=1)))
    stream = loader.open(Plan(listed, 3, 16, "once", threads=1, on_error="skip"))
    assert [labels.tolist() for _, labels in stream] == [[0, 2]]
    assert len(stream.left_out) == 1


def test_a_file_that_claims_a_thousand_million_pixels_is_not_unpacked(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [bomb()], [0], NAMES)
    with pytest.raises(ValueError, match="1200000000 pixels"):
        listing.sample(listing.read(tmp_path, "parquet", "train"), 0)


@pytest.mark.parametrize(
    ("layout", "split", "count"),
    [
        (["train.parquet", "test.parquet"], "train", 1),
        (["train.parquet", "test.parquet"], "val", 1),
        (["default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"], "train", 2),
        (["default/train/0000.parquet", "default/test/0000.parquet"], "val", 1),
        (["train/a.parquet", "val/b.parquet", "test/c.parquet"], "val", 1),
        (["part-0.parquet", "part-1.parquet"], "train", 2),
        (["part-0.parquet", ".hidden.parquet", "training.parquet"], "train", 2),
        (["train.parquet", "training-notes.parquet"], "train", 1),
    ],
)
def test_where_the_files_of_a_split_lie(tmp_path: Path, layout: list[str], split: str, count: int) -> None:
    for name in layout:
        write(tmp_path / name, [encoded(1)], [0], NAMES)
    assert len(listing.read(tmp_path, "parquet", split)) == count


def test_the_kind_of_data_is_seen_where_it_is_not_said(folder: Path, tmp_path: Path) -> None:
    assert DataConfig(path=str(folder)).decided().name == "parquet"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "metadata.parquet").touch()
    assert DataConfig(path=str(tmp_path / "photos")).decided().name == "photos"


def test_labels_as_text_as_plain_numbers_and_with_a_list(tmp_path: Path) -> None:
    images = [encoded(1), encoded(2), encoded(3)]
    write(tmp_path / "text" / "train.parquet", images, ["eel", "cat", "eel"])
    listed = listing.read(tmp_path / "text", "parquet", "train")
    assert listed.classes == ("cat", "eel") and [listing.sample(listed, i)[1] for i in range(3)] == [1, 0, 1]
    write(tmp_path / "number" / "train.parquet", images, [0, 2, 1])
    assert listing.read(tmp_path / "number", "parquet", "train").classes == ("0", "1", "2")
    (tmp_path / "number" / "classes.txt").write_text("a\nb\nc\nd\n")
    assert listing.read(tmp_path / "number", "parquet", "train").classes == ("a", "b", "c", "d")


def test_plain_bytes_of_another_writer(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([encoded(9, "JPEG")], pa.binary())}), tmp_path / "train.parquet")
    listed = listing.read(tmp_path, "parquet", "train")
    assert not listed.labelled and Image.open(io.BytesIO(listing.sample(listed, 0)[0])).format == "JPEG"


def broken(path: Path) -> None:
    write(path, [encoded(i) for i in range(5)], [0] * 5, NAMES)
    path.write_bytes(path.read_bytes()[:-30])


def other_columns(path: Path) -> None:
    write(path, [encoded(1)], [0], NAMES)
    write(path.with_name("train-2.parquet"), [encoded(1)], [0], NAMES[:2])


def names_and_numbers(path: Path) -> None:
    for file, label in ((path, pa.array(["cat"])), (path.with_name("train-2.parquet"), pa.array([0]))):
        pq.write_table(pa.table({"image": pa.array([encoded(1)], pa.binary()), "label": label}), file)


def with_columns(**columns: Any) -> Any:
    return lambda path: pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (broken, "is damaged or no Parquet file"),
        (lambda path: path.write_bytes(b""), "is damaged or no Parquet file"),
        (with_columns(label=[1]), r"has no column of images among label \(int64\): one is needed, called image"),
        (with_columns(image=["a.png"], label=[1]), r"no column of images among image \(string\)"),
        (with_columns(a=pa.array([b"x"], pa.binary()), b=pa.array([b"x"], pa.binary())), "has 2 columns of images"),
        (with_columns(image=pa.array([b"x"], pa.binary()), label=[0.5]), "column label is of double; labels are"),
        (lambda path: write(path, [encoded(1)] * 2, [0, None]), "has 1 rows without a label"),
        (lambda path: write(path, [encoded(1)], [-1], NAMES), "column label holds -1"),
        (lambda path: write(path, [encoded(1)], [3], NAMES), "a label is 3, and there are 3 classes"),
        (lambda path: write(path, []), "holds no row"),
        # As many classes as a number that is none: each of them would get a name.
        (with_columns(image=pa.array([b"x"], pa.binary()), label=[1 << 20]), "a label is 1,048,576, and no class has"),
        (other_columns, "has other columns or classes than"),
        (names_and_numbers, "has other columns or classes than"),
        (lambda path: None, "holds no Parquet file of train"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, make: Any, said: str) -> None:
    make(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=said):
        listing.read(tmp_path, "parquet", "train")


def test_a_row_group_that_is_too_large_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mekd.data import parquet

    write(tmp_path / "train.parquet", [encoded(1)] * 4, [0] * 4, NAMES)
    monkeypatch.setattr(parquet, "LARGEST", 100)
    with pytest.raises(DataError, match="row_group_size=100"):
        listing.read(tmp_path, "parquet", "train")


def test_few_row_groups_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mekd.data import parquet

    monkeypatch.setattr(parquet, "KEPT", 0)
    train = listing.read(folder, "parquet", "train")
    assert [listing.sample(train, row)[1] for row in (0, 9, 0, 5)] == [0, 0, 0, 2]
    assert len(parquet._groups) == 1


def test_without_pyarrow_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"pip install 'mekd\[parquet\]'"):
        listing.read(folder, "parquet", "train")


def test_step_1_learns_from_images_without_labels(
    tmp_path: Path, loader: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    name = loader.__name__.rpartition(".")[2].removesuffix("_loader")
    write(tmp_path / "in" / "photos.parquet", [encoded(10 * i, "JPEG") for i in range(20)])
    settings = {
        "data.name": "parquet", "data.path": tmp_path / "in", "data.size": 16, "data.local_fraction": 1,
        "data.loader": name, "data.workers": 1, "oracle.num_classes": 3, "engine.device": "cpu",
        "deprivatize.steps": 2, "deprivatize.batch": 4, "deprivatize.width": 0.1, "deprivatize.d_width": 0.5,
        "deprivatize.precision": "float32", "distill.precision": "float32", "teacher.precision": "float32",
    }  # fmt: skip
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    assert cli.main(["deprivatize", *words, "--out", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    assert files.load(tmp_path / "run" / "checkpoints" / "deprivatize.pt")["step"] == 2
    for stage, more in (("teacher", []), ("evaluate", ["--evaluate.enabled", "true"])):
        assert cli.main([stage, *words, *more, "--out", str(tmp_path / "other")]) == 2
        assert "images without labels" in capsys.readouterr().err
