"""Where the samples of shards lie: WebDataset's tar files and TFRecords, with an index beside them or without."""

import os
import struct
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mekd.data.arrays import DataError
from mekd.data.names import IMAGES, is_hidden

SUFFIXES = {"webdataset": (".tar",), "tfrecord": (".tfrecord", ".tfrecords")}
FIRST_TFRECORD_LABEL = 1  # image/class/label of ImageNet's records counts from here; 0 is their background
BYTES, FLOATS, INTEGERS = 1, 2, 3  # the lists of a tf.train.Feature
KINDS = {BYTES: "bytes", FLOATS: "floats", INTEGERS: "integers"}
Span = tuple[int, int, int, int]


def is_shard(kind: str, name: str) -> bool:
    """Whether a file of that name is a shard; TFRecords are often named train-00000-of-01024, without a suffix."""
    lower = name.lower()
    return lower.endswith(SUFFIXES[kind]) or (kind == "tfrecord" and "-of-" in lower and not lower.endswith(".idx"))


def index(kind: str, shards: list[str]) -> np.ndarray:
    """The samples of all shards: (n, 5) int64, the columns of Listing.spans. Raises DataError naming the shard."""
    walk = _tar_index if kind == "webdataset" else _record_index
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda file: _indexed(file, walk), shards))
    spans = [np.array([(i, *span) for span in shard], np.int64).reshape(-1, 5) for i, shard in enumerate(found)]
    return np.concatenate(spans)


def sample(kind: str, shard: str, span: Span) -> tuple[bytes | memoryview, int]:
    """The bytes of an image and its label, counted from 0. Raises OSError or ValueError saying what is missing."""
    offset, length, label_offset, label_length = span
    with open(shard, "rb", buffering=0) as file:
        content = os.pread(file.fileno(), length, offset)
        text = os.pread(file.fileno(), label_length, label_offset)
    if kind == "tfrecord":
        return _example(memoryview(content))
    try:
        return content, int(text)
    except ValueError:
        raise ValueError(f"its cls is {text[:20]!r} and no class number") from None


def _indexed(file: str, walk: Callable[[str, Path], list[Span]]) -> list[Span]:
    """The samples of a shard: from the .idx beside it, or else found by walking through it, which writes nothing."""
    try:
        # Both names are in use: shard.idx and shard.tar.idx.
        beside = (p for p in (Path(file).with_suffix(".idx"), Path(file + ".idx")) if p.is_file())
        spans = walk(file, next(beside, Path("")))
        size = os.path.getsize(file)
        if any(min(span) < 0 for span in spans):
            raise ValueError("it has a place or a length below 0")
        if any(offset + length > size or at + more > size for offset, length, at, more in spans):
            raise ValueError("it ends before its last sample")
    except (OSError, ValueError, IndexError, StopIteration, tarfile.TarError, struct.error) as error:
        raise DataError(f"{file} cannot be read ({error}); it may be cut short, or its .idx be another's") from error
    return spans


def _tar_index(file: str, idx: Path) -> list[Span]:
    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    last = None
    for key, extension, offset, length in _idx_members(idx) if idx.name else _tar_members(file):
        # A key that comes again later is another sample, and so is one whose extension is there already.
        if key != last or extension in samples[-1][1]:
            samples.append((key, {}))
        samples[-1][1][extension] = (offset, length)
        last = key
    spans = []
    for number, (key, parts) in enumerate(samples):
        images = [extension for extension in parts if f".{extension}" in IMAGES]
        if len(images) != 1 or "cls" not in parts:
            raise ValueError(
                f"sample {number}, {key}, has {', '.join(parts)}; it needs one image (jpg, png, ...) and cls. A key "
                "that comes twice in a row, or whose files lie apart, makes such a sample"
            )
        spans.append((*parts[images[0]], *parts["cls"]))
    return spans


def _tar_members(file: str) -> Iterator[tuple[str, str, int, int]]:
    """Key, extension, offset and length of each file, but those that macOS and old archivers add."""
    with tarfile.open(file, "r:") as tar:
        for member in tar:
            if member.isdir() or _is_added(member.name):
                continue
            if not member.isfile():
                raise ValueError(f"{member.name} is a link and no file; pack the shard with its links followed")
            yield *_key(member.name), member.offset_data, member.size


def _idx_members(idx: Path) -> Iterator[tuple[str, str, int, int]]:
    """The same of DALI's index: of each sample extension, offset, length and, from v1.2 on, the file's name."""
    first, *lines = idx.read_text("utf-8", "surrogateescape").splitlines()
    version, count = first.split()
    if version not in ("v1.1", "v1.2") or int(count) != len(lines):
        raise ValueError(f"{idx.name} is no index of version v1.1 or v1.2 with {len(lines)} samples")
    width = 3 if version == "v1.1" else 4
    for number, line in enumerate(lines):
        words = line.split()
        if len(words) % width:
            raise ValueError(f"{idx.name}, line {number + 2}: {len(words)} words; a file has {width}")
        for at in range(0, len(words), width):
            extension, offset, length, *name = words[at : at + width]
            # Without names: of "._x.jpg" the index keeps the extension "_x.jpg".
            if _is_added(name[0]) if name else extension.startswith("_") or f".{extension}".lower() == ".ds_store":
                continue
            yield f"line {number + 2} of {idx.name}", extension.lower(), int(offset), int(length)


def _key(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return f"{folder}/{key}" if folder else key, extension.lower()


def _is_added(name: str) -> bool:
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return any(is_hidden(part) or part.startswith("PaxHeader") for part in parts)


def _record_index(file: str, idx: Path) -> list[Span]:
    """Records without the 12 bytes before them (length, checksum) and the 4 behind."""
    if idx.name:
        pairs = (map(int, line.split()) for line in idx.read_text("utf-8", "surrogateescape").splitlines())
        return [(offset + 12, length - 16, 0, 0) for offset, length in pairs]
    spans: list[Span] = []
    size, at = os.path.getsize(file), 0
    with open(file, "rb") as opened:
        while at < size:
            opened.seek(at)
            (length,) = struct.unpack("<Q", opened.read(8))
            if at + length + 16 > size:
                raise ValueError(f"record {len(spans)} ends behind the file's end")
            spans.append((at + 12, length, 0, 0))
            at += length + 16
    return spans


def _example(record: memoryview) -> tuple[memoryview, int]:
    """image/encoded and image/class/label of a serialised tf.train.Example, the label counted from 0."""
    found: dict[str, memoryview] = {}
    for features in _messages(record, 1):
        for entry in _messages(features, 1):
            # Fields come in any order, and one that is empty may be left out.
            key, value = ([*_messages(entry, number)][-1:] for number in (1, 2))
            found[b"".join(key).decode("utf-8", "replace")] = value[0] if value else record[:0]
    image, label = _only(found, "image/encoded", BYTES), _only(found, "image/class/label", INTEGERS)
    return image, _signed(_varint(label, 0)[0]) - FIRST_TFRECORD_LABEL


def _only(features: dict[str, memoryview], name: str, kind: int) -> memoryview:
    """The one value of a feature: its bytes, or of an integer its varint."""
    if name not in features:
        raise ValueError(f"it has no {name}, but {', '.join(sorted(features)) or 'nothing'}")
    values: list[memoryview] = []
    for number, wire, content in _fields(features[name]):
        if wire != 2 or number not in KINDS:
            continue
        if number != kind:
            raise ValueError(f"its {name} holds {KINDS[number]}; it must hold {KINDS[kind]}")
        for inner, inner_wire, value in _fields(content):
            if inner == 1 and (kind == BYTES or inner_wire == 0):
                values.append(value)
            elif inner == 1:  # packed: one integer behind the other
                values += _varints(value)
    if len(values) != 1:
        raise ValueError(f"its {name} has {len(values)} values; it must have one")
    return values[0]


def _messages(message: memoryview, wanted: int) -> Iterator[memoryview]:
    return (value for number, wire, value in _fields(message) if (number, wire) == (wanted, 2))


def _fields(message: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Number, wire type and bytes of the fields of a protocol buffer; of a varint its own bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        begin, wire = at, tag & 7
        if wire == 0:
            _, at = _varint(message, at)
        elif wire == 2:
            length, begin = _varint(message, at)
            at = begin + length
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"it is no tf.train.Example: a field of wire type {wire}")
        if at > len(message):
            raise ValueError("it is no tf.train.Example: a field ends behind its message")
        yield tag >> 3, wire, message[begin:at]


def _varints(message: memoryview) -> Iterator[memoryview]:
    at = 0
    while at < len(message):
        begin = at
        _, at = _varint(message, at)
        yield message[begin:at]


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 70:
        byte = message[at]
        value |= (byte & 127) << shift
        shift, at = shift + 7, at + 1
        if byte < 128:
            return value, at
    raise ValueError("it is no tf.train.Example: an integer that does not end")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
