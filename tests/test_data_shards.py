"""Shards as archivers and other writers leave them: keys that come twice, members of macOS, fields in any order."""

import io
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from jpeg_tree import field, varint
from mekd.data import listing
from mekd.data.arrays import DataError


def write_tar(file: Path, names: list[str]) -> None:
    """Members by name, each with other content; what ends with "->" is a link to the first."""
    file.parent.mkdir(parents=True)
    with tarfile.open(file, "w") as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name.removesuffix("->"))
            content = b"%d" % (number % 2) if name.lower().endswith("cls") else b"image %d" % number
            if name.endswith("->"):
                info.type, info.linkname = tarfile.LNKTYPE, names[0]
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("idx", [False, True])
@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        # A key that comes twice, at once or later or in another folder, is two samples.
        ("a.jpg a.cls a.jpg a.cls", [0, 2]),
        ("a.jpg a.cls b.png b.cls a.jpg a.cls", [0, 2, 4]),
        ("x/a.jpg x/a.cls y/a.jpg y/a.cls", [0, 2]),
        # Where its files lie apart, or one of two is missing, nobody can say what belongs together.
        ("a.jpg b.jpg a.cls b.cls", r"sample 0, .*, has jpg; it needs one image .* and cls"),
        ("a.jpg a.jpg a.cls", r"sample 0, .*, has jpg; it needs"),
        ("a.jpg a.png a.cls", r"sample 0, .*, has jpg, png, cls; it needs one image"),
        # Other files of a sample are of no interest, and neither is the case of the letters.
        ("a.json a.JPG a.seg.png a.CLS", [1]),
        # What macOS and old archivers add.
        ("._a.jpg a.jpg ._a.cls a.cls .DS_Store __MACOSX/a.jpg ./b.jpg ./b.cls", [1, 6]),
        ("PaxHeader/a.jpg a.jpg a.cls", [1]),
    ],
)
def test_members_of_a_tar_file(tmp_path: Path, names: str, wanted: list[int] | str, idx: bool) -> None:
    shard = tmp_path / "train" / "s.tar"
    write_tar(shard, names.split())
    (tmp_path / "classes.txt").write_text("a\nb\n")
    (shard.parent / "._s.tar").write_bytes(b"what macOS knows of s.tar")
    (shard.parent / "t.tar.gz").touch()
    if idx:
        command = Path(sys.executable).parent / "wds2idx"
        if not command.exists():
            pytest.skip("wds2idx, which comes with DALI, is not beside this Python: pip install 'mekd[dali]'")
        subprocess.run([command, shard, shard.with_suffix(".idx")], check=True, capture_output=True)
    if isinstance(wanted, str):
        with pytest.raises(DataError, match=rf"s\.tar cannot be read \(.*{wanted}"):
            listing.read(tmp_path, "webdataset", "train")
        return
    shards = listing.read(tmp_path, "webdataset", "train")
    assert [listing.sample(shards, row)[0] for row in range(len(shards))] == [b"image %d" % n for n in wanted]
    assert shards.notes == (f"{shard.parent}: left out as no shards by their endings: 1 files (.gz 1), "
                            f"{shard.parent / 't.tar.gz'} first",)  # fmt: skip


@pytest.mark.parametrize("place", ["-5 10", "512 -99999999999999999999"])
def test_an_index_with_a_place_below_0_is_refused(tmp_path: Path, place: str) -> None:
    write_tar(tmp_path / "train" / "s.tar", ["a.jpg", "a.cls"])
    (tmp_path / "train" / "s.idx").write_text(f"v1.2 1\njpg {place} a.jpg cls 1536 1 a.cls\n")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"s\.tar cannot be read \(it has a place or a length below 0\)"):
        listing.read(tmp_path, "webdataset", "train")


def test_a_link_in_a_tar_file_is_no_sample_that_goes_missing(tmp_path: Path) -> None:
    write_tar(tmp_path / "train" / "s.tar", ["a.jpg", "a.cls", "b.jpg->", "b.cls->"])
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"s\.tar cannot be read \(b\.jpg is a link and no file"):
        listing.read(tmp_path, "webdataset", "train")


IMAGE, LABEL = field(1, field(1, b"pixels")), field(3, field(1, varint(2)))
TWO = varint(1 << 3) + varint(2)  # field 1 as a varint: not packed


def entry(key: str | None, value: bytes | None, backwards: bool = False) -> bytes:
    parts = [b"" if key is None else field(1, key.encode()), b"" if value is None else field(2, value)]
    return field(1, b"".join(reversed(parts) if backwards else parts))


def record(*entries: bytes) -> bytes:
    return field(1, b"".join(entries))


#: Fields 6 to 9, of every wire type, which tf.train.Example does not have.
UNKNOWN = field(9, b"?") + varint(8 << 3) + varint(300) + varint(7 << 3 | 1) + bytes(8) + varint(6 << 3 | 5) + bytes(4)
PIXELS, NUMBER = entry("image/encoded", IMAGE), entry("image/class/label", LABEL)


def labelled(value: bytes) -> bytes:
    return record(PIXELS, entry("image/class/label", value))


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (record(PIXELS, NUMBER), 1),
        # The value before its key; fields that nobody knows, everywhere; integers that are not packed.
        (record(entry("image/class/label", LABEL, True), entry("image/encoded", IMAGE, True)), 1),
        (UNKNOWN + record(UNKNOWN, entry("image/encoded", UNKNOWN + IMAGE), UNKNOWN, NUMBER), 1),
        (labelled(field(3, TWO + UNKNOWN)), 1),
        # The features in two pieces, and a later entry of the same key, which counts.
        (record(PIXELS) + record(NUMBER), 1),
        (record(entry("image/encoded", field(1, field(1, b"old"))), PIXELS, NUMBER), 1),
        # What is empty is left out by its writer.
        (record(entry(None, None), entry("more", None), PIXELS, NUMBER), 1),
        (b"", "it has no image/encoded, but nothing"),
        (record(entry("label", LABEL), PIXELS), "it has no image/class/label, but image/encoded, label"),
        (record(entry("image/encoded", None), NUMBER), "its image/encoded has 0 values"),
        (record(entry("image/encoded", field(1, b"")), NUMBER), "its image/encoded has 0 values"),
        # What is there is not what it should be.
        (labelled(field(3, field(1, b"\2\2"))), "label has 2 values"),
        (labelled(field(2, field(1, bytes(4)))), "label holds floats; it must hold integers"),
        (labelled(field(3, field(1, varint(2**64 - 1)))), "sample 1 has label -1; there are 2 classes, from 1"),
        (labelled(field(3, field(1, b"\0")))[:-1], "it is no tf.train.Example"),
        (b"\xff" * 30, "it is no tf.train.Example"),
    ],
)
def test_records_of_any_writer(tmp_path: Path, content: bytes, wanted: int | str) -> None:
    first = record(entry("image/encoded", IMAGE), entry("image/class/label", LABEL))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.tfrecords").write_bytes(
        b"".join(struct.pack("<QI", len(r), 0) + r + bytes(4) for r in (first, content))
    )
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    shards = listing.read(tmp_path, "tfrecord", "train")
    assert shards.classes == ("a", "b") and len(shards) == 2
    if isinstance(wanted, int):
        image, label = listing.sample(shards, 1)
        assert (bytes(image), label) == (b"pixels", wanted)
        return
    with pytest.raises(ValueError, match=wanted):
        listing.sample(shards, 1)


def test_a_record_without_a_label_is_named_or_left_out(tmp_path: Path) -> None:
    dali_loader = pytest.importorskip("mekd.data.dali_loader")
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'mekd[dali]'")
    from PIL import Image

    from jpeg_tree import opened

    picture = io.BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "GIF")  # of shards too, what DALI does not decode goes through Pillow
    good = entry("image/encoded", field(1, field(1, picture.getvalue())))
    records = [record(good, entry("image/class/label", LABEL)), record(good), record(entry("image/class/label", LABEL))]
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.tfrecord").write_bytes(
        b"".join(struct.pack("<QI", len(r), 0) + r + bytes(4) for r in records)
    )
    (tmp_path / "classes.txt").write_text("a\nb\n")
    shards = listing.read(tmp_path, "tfrecord", "train")
    with pytest.raises(DataError, match=r"a\.tfrecord, sample 1 cannot be decoded \(it has no image/class/label, but"):
        list(opened(dali_loader, shards, 3, 16, crop="once"))
    stream = opened(dali_loader, shards, 3, 16, crop="once", on_error="skip")
    assert [labels.tolist() for _, labels in stream] == [[1]] and len(stream.left_out) == 2
