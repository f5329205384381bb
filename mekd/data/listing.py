"""What there is to read: class folders of images, or shards (WebDataset's tar files, TFRecords) with their indexes."""

import dataclasses
import hashlib
import os
import struct
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mekd.data.arrays import DataError

IMAGES = (".jpg", ".jpeg", ".png")
SHARDS = {"webdataset": ".tar", "tfrecord": ".tfrecord"}
FIRST_TFRECORD_LABEL = 1  # image/class/label of ImageNet's records counts from here; 0 is their background
END_OF_JPEG = b"\xff\xd9"
TAIL = 4096  # bytes at a file's end that are searched for the end of the JPEG: cameras append what they like
BLOCK = 512  # of a tar file


@dataclass(frozen=True)
class Listing:
    """Images and their classes, in a fixed order: files of images with labels, or shards with the place of each sample.

    files are images (folder) or shards; labels (n,) int64 of a folder; of shards spans (n, 5) int64: the shard, offset
    and length of the image (tfrecord: of the record), offset and length of the label's text (tfrecord: 0).
    """

    kind: str
    root: str
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: np.ndarray | None = None
    spans: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.files if self.spans is None else self.spans)

    def name(self, row: int) -> str:
        """The file of an image, or its shard and its number in it."""
        if self.spans is None:
            return self.files[row]
        shard = self.spans[row, 0]
        return f"{self.files[shard]}, sample {row - int(np.searchsorted(self.spans[:, 0], shard))}"

    def digest(self) -> str:
        """A fingerprint of the order of names and labels, wherever the root lies."""
        hashed = hashlib.sha256(repr((self.kind, self.classes, len(self))).encode())
        for file in self.files:
            hashed.update(os.path.relpath(file, self.root).encode() + b"\0")
        for array in (self.labels, self.spans):
            hashed.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
        return hashed.hexdigest()[:16]


def read(path: str | Path, kind: str, split: str, classes: tuple[str, ...] | None = None) -> Listing:
    """The images of path/split; kind is folder, webdataset or tfrecord; classes are names in place of classes.txt.

    Raises DataError naming the folder, the class or the shard, and what to do.
    """
    if kind != "folder" and kind not in SHARDS:
        raise ValueError(f"data.name is {kind!r}; a tree of files is folder, webdataset or tfrecord")
    root = Path(path) / split
    if not root.is_dir():
        raise DataError(f"{root} is missing; data.path must hold the folder {split}")
    return _folder(root, classes) if kind == "folder" else _shards(root, kind, classes)


def same_classes(train: Listing, val: Listing) -> None:
    """Raises DataError naming a class that only one of both has."""
    for one, other in ((train, val), (val, train)):
        if extra := [name for name in one.classes if name not in other.classes]:
            raise DataError(f"{one.root} has the class {extra[0]!r}{_more(extra)}, which {other.root} has not")
    if train.classes != val.classes:
        raise DataError(f"{train.root} and {val.root} name the same classes in different orders")


def part(listing: Listing, fraction: float, seed: int) -> Listing:
    """A random share of the images of a folder, or of the shards, at least one, in the listing's order."""
    count = max(1, round(fraction * len(listing.files)))
    chosen = np.sort(np.random.default_rng([seed, len(listing.files)]).permutation(len(listing.files))[:count])
    files = tuple(listing.files[i] for i in chosen)
    if listing.spans is None:
        assert listing.labels is not None
        return dataclasses.replace(listing, files=files, labels=listing.labels[chosen])
    spans = listing.spans[np.isin(listing.spans[:, 0], chosen)].copy()
    spans[:, 0] = np.searchsorted(chosen, spans[:, 0])
    if len(spans) == 0:
        raise DataError(f"{files[0]}{_more(files)} hold no sample; choose a larger data.local_fraction")
    return dataclasses.replace(listing, files=files, spans=spans)


def check(listing: Listing, on_error: str = "raise") -> tuple[Listing, int]:
    """The listing without the files whose beginning or end is no JPEG's or PNG's, and how many those are.

    Nothing is decoded, and shards are left as they are. Raises DataError naming the first such file where on_error is
    "raise".
    """
    if listing.spans is not None:
        return listing, 0
    assert listing.labels is not None
    with ThreadPoolExecutor(16) as pool:  # waits for the disk, not for the processor
        faults = list(pool.map(_fault, listing.files, chunksize=256))
    bad = [i for i, fault in enumerate(faults) if fault]
    if bad and on_error == "raise":
        raise DataError(
            f"{listing.files[bad[0]]} {faults[bad[0]]}{_more(bad)}; repair or remove them, or set data.on_error skip"
        )
    if len(bad) == len(listing.files):
        raise DataError(f"{listing.root}: none of its {len(bad)} files can be read; the first {faults[0]}")
    keep = np.array([not fault for fault in faults])
    files = tuple(file for file, fault in zip(listing.files, faults, strict=True) if not fault)
    return dataclasses.replace(listing, files=files, labels=listing.labels[keep]), len(bad)


def sample(listing: Listing, row: int) -> tuple[bytes | memoryview, int]:
    """The bytes of an image as its file holds them, and its label. Raises DataError naming the file."""
    if listing.spans is None:
        assert listing.labels is not None
        try:
            return Path(listing.files[row]).read_bytes(), int(listing.labels[row])
        except OSError as error:
            raise DataError(f"{listing.files[row]} cannot be read ({error})") from error
    shard, offset, length, label_offset, label_length = map(int, listing.spans[row])
    try:
        with open(listing.files[shard], "rb", buffering=0) as file:
            image: bytes | memoryview = os.pread(file.fileno(), length, offset)
            text = os.pread(file.fileno(), label_length, label_offset)
    except OSError as error:
        raise DataError(f"{listing.files[shard]} cannot be read ({error})") from error
    try:
        if listing.kind == "tfrecord":
            image, label = _example(memoryview(image))
        else:
            label = int(text)
    except (ValueError, IndexError, KeyError) as error:
        raise DataError(f"{listing.name(row)}: no image with a label ({error})") from error
    if not 0 <= label < len(listing.classes):
        raise DataError(f"{listing.name(row)} has label {label}; there are {len(listing.classes)} classes, from 0")
    return image, label


def _more(all_of_them: Iterable[object]) -> str:
    others = len(list(all_of_them)) - 1
    return f" (and {others} more)" if others else ""


def _folder(root: Path, wanted: tuple[str, ...] | None) -> Listing:
    classes = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir()))
    if not classes:
        raise DataError(f"{root} has no class folders; images belong into {root / 'CLASS'}")
    if wanted is not None and wanted != classes:
        raise DataError(f"{root} has {len(classes)} classes, {classes[0]!r} first; {len(wanted)} others were asked for")
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = [  # in the order of torchvision's ImageFolder
            os.path.join(folder, file)
            for folder, _, names in sorted(os.walk(root / name, followlinks=True))
            for file in sorted(names)
            if file.lower().endswith(IMAGES)
        ]
        if not found:
            raise DataError(f"{root / name} holds no image ({', '.join(IMAGES)}); fill the class folder or remove it")
        files += found
        labels += [label] * len(found)
    return Listing("folder", str(root), classes, tuple(files), np.array(labels, np.int64))


def _fault(file: str) -> str | None:
    """What is wrong with an image file, as far as its first and last bytes tell."""
    try:
        with open(file, "rb", buffering=0) as opened:
            size = os.fstat(opened.fileno()).st_size
            head = os.pread(opened.fileno(), 8, 0)
            tail = os.pread(opened.fileno(), TAIL, max(0, size - TAIL))
    except OSError as error:
        return f"cannot be read ({error})"
    if not head:
        return "is empty"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return None if b"IEND" in tail else "is a PNG that is cut short"
    if not head.startswith(b"\xff\xd8\xff"):
        return f"is no JPEG or PNG: it begins with {head.hex(' ')}"
    return None if END_OF_JPEG in tail else "is a JPEG that is cut short"


def _shards(root: Path, kind: str, classes: tuple[str, ...] | None) -> Listing:
    if classes is None:
        names = next((f for f in (root / "classes.txt", root.parent / "classes.txt") if f.is_file()), None)
        if names is None:
            raise DataError(f"{root / 'classes.txt'} is missing; write the names of the classes into it, one a line")
        classes = tuple(line.strip() for line in names.read_text().splitlines() if line.strip())
        if not classes:
            raise DataError(f"{names} is empty; write the names of the classes into it, one a line")
    # TFRecords are often named train-00000-of-01024, without a suffix.
    files = sorted(
        str(f)
        for f in root.iterdir()
        if f.is_file()
        and (f.suffix == SHARDS[kind] or (kind == "tfrecord" and "-of-" in f.name and f.suffix != ".idx"))
    )
    if not files:
        raise DataError(f"{root} holds no shard (*{SHARDS[kind]})")
    index = _tar_index if kind == "webdataset" else _record_index
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda file: _indexed(file, index), files))
    spans = [np.array([(i, *span) for span in shard], np.int64).reshape(-1, 5) for i, shard in enumerate(found)]
    listed = np.concatenate(spans)
    if len(listed) == 0:
        raise DataError(f"{files[0]}{_more(files)} hold no sample")
    return Listing(kind, str(root), classes, tuple(files), spans=listed)


Span = tuple[int, int, int, int]


def _indexed(file: str, index: Callable[[str, Path], list[Span]]) -> list[Span]:
    """The samples of a shard: from the .idx beside it, or else found by walking through it, which writes nothing."""
    try:
        # Both names are in use: shard.idx and shard.tar.idx.
        beside = (p for p in (Path(file).with_suffix(".idx"), Path(file + ".idx")) if p.is_file())
        spans = index(file, next(beside, Path("")))
        size = os.path.getsize(file)
        if any(offset + length > size or at + more > size for offset, length, at, more in spans):
            raise ValueError("it ends before its last sample")
    except (OSError, ValueError, IndexError, StopIteration, tarfile.TarError, struct.error) as error:
        raise DataError(f"{file} cannot be read ({error}); it may be cut short, or its .idx be another's") from error
    return spans


def _tar_index(file: str, idx: Path) -> list[Span]:
    samples: list[dict[str, tuple[int, int]]] = []
    if idx.name:
        first, *lines = idx.read_text().splitlines()
        version, count = first.split()
        if version not in ("v1.1", "v1.2") or int(count) != len(lines):
            raise ValueError(f"{idx.name} is no index of version v1.1 or v1.2 with {len(lines)} samples")
        width = 3 if version == "v1.1" else 4
        for line in lines:
            words = line.split()
            columns = zip(*(words[i::width] for i in range(3)), strict=True)
            samples.append({extension.lower(): (int(offset), int(length)) for extension, offset, length in columns})
    else:
        last = None
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                key, _, extension = name.partition(".")
                if (folder, key) != last:
                    last = (folder, key)
                    samples.append({})
                samples[-1][extension.lower()] = (member.offset_data, member.size)
    spans = []
    for number, parts in enumerate(samples):
        image = next((parts[e[1:]] for e in IMAGES if e[1:] in parts), None)
        if image is None or "cls" not in parts:
            raise ValueError(f"sample {number} has {', '.join(parts)}; it needs jpg, jpeg or png, and cls")
        spans.append((*image, *parts["cls"]))
    return spans


def _record_index(file: str, idx: Path) -> list[Span]:
    """Records without the 12 bytes before them (length, checksum) and the 4 behind."""
    if idx.name:
        pairs = (map(int, line.split()) for line in idx.read_text().splitlines())
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
    for _, features in _fields(record):
        for _, entry in _fields(features):
            key, feature = (value for _, value in _fields(entry))
            (_, found[bytes(key).decode()]), *_ = _fields(feature)  # a list of bytes, floats or integers
    (_, image), *_ = _fields(found["image/encoded"])
    (_, label), *_ = _fields(found["image/class/label"])
    return image, _varint(label, 0)[0] - FIRST_TFRECORD_LABEL


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of the fields of a protocol buffer; of a varint its own bytes."""
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
            raise ValueError(f"a field of wire type {wire}")
        if at > len(message):
            raise ValueError("a field that ends behind its message")
        yield tag >> 3, message[begin:at]


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        shift, at = shift + 7, at + 1
        if byte < 128:
            return value, at
