"""What there is to read: class folders of images, or shards (WebDataset's tar files, TFRecords) with their indexes."""

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mekd import files
from mekd.data import parquet, shards
from mekd.data.arrays import DataError, kept_apart
from mekd.data.names import IMAGES, NATIVE, ending, is_hidden, read_names

KINDS = ("folder", *shards.SUFFIXES, "parquet")
END_OF_JPEG = b"\xff\xd9"
MOST_CLASSES = 1 << 20  # that are known by their numbers alone
TAIL = 4096  # bytes at a file's end that are searched for the end of the JPEG: cameras append what they like


@dataclass(frozen=True)
class Listing:
    """Images and their classes, in a fixed order: files of images with labels, or shards with the place of each sample.

    files are images (folder) or shards; labels (n,) int64 of a folder; of shards spans (n, 5) int64: the shard, offset
    and length of the image (tfrecord: of the record), offset and length of the label's text (tfrecord: 0); parquet: the
    row group, the row in it, 0, the label, 0. notes are sentences on what lies there and was not taken. labelled: not
    so of Parquet files without labels, whose only class is a name.
    """

    kind: str
    root: str
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: np.ndarray | None = None
    spans: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    labelled: bool = True

    def __len__(self) -> int:
        return len(self.files if self.spans is None else self.spans)

    def name(self, row: int) -> str:
        """The file of an image, or its shard and its number in it, as it can be printed."""
        if self.spans is None:
            return files.shown(self.files[row])
        shard = self.spans[row, 0]
        return f"{files.shown(self.files[shard])}, sample {row - int(np.searchsorted(self.spans[:, 0], shard))}"

    def digest(self) -> str:
        """A fingerprint of the order of names and labels, wherever the root lies."""
        hashed = hashlib.sha256(repr((self.kind, self.classes, len(self))).encode())
        for file in self.files:
            hashed.update(os.fsencode(os.path.relpath(file, self.root)) + b"\0")
        for array in (self.labels, self.spans):
            hashed.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
        return hashed.hexdigest()[:16]


def read(path: str | Path, kind: str, split: str, classes: tuple[str, ...] | None = None) -> Listing:
    """The images of path/split; kind is one of KINDS; classes are names in place of classes.txt.

    A link to a folder is followed where it leads out of path/split, and no folder is entered twice: what leads to a
    folder of the tree, or to one that holds the link, is passed over. Nothing hidden is an image or a class.
    Raises DataError naming the folder, the class or the shard, and what to do.
    """
    if kind not in KINDS:
        raise DataError(f"data.name is {kind!r}; a tree of files is {', '.join(KINDS)}")
    root = Path(path) / split
    if kind == "parquet":
        return _parquet(Path(path), split, classes)
    if not os.path.isdir(root):
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
    kept = tuple(listing.files[i] for i in chosen)
    if listing.spans is None:
        assert listing.labels is not None
        return dataclasses.replace(listing, files=kept, labels=listing.labels[chosen])
    spans = listing.spans[np.isin(listing.spans[:, 0], chosen)].copy()
    spans[:, 0] = np.searchsorted(chosen, spans[:, 0])
    if len(spans) == 0:
        raise DataError(f"{kept[0]}{_more(kept)} hold no sample; choose a larger data.local_fraction")
    return dataclasses.replace(listing, files=kept, spans=spans)


def apart(private: Listing, held: int, seed: int) -> tuple[Listing, Listing]:
    """The images of a folder, or the samples of shards, that are left, and those that audit.holdout takes away."""
    kept, away = (rows.numpy() for rows in kept_apart(len(private), held, seed))
    if held == 0:
        return private, dataclasses.replace(private, files=(), labels=None, spans=None)

    def of(rows: np.ndarray) -> Listing:
        if private.spans is not None:
            return dataclasses.replace(private, spans=private.spans[rows])
        assert private.labels is not None
        return dataclasses.replace(private, files=tuple(private.files[i] for i in rows), labels=private.labels[rows])

    return of(kept), of(away)


def check(listing: Listing, on_error: str = "raise") -> tuple[Listing, int]:
    """The listing without the files whose beginning or end is no image's, and how many those are.

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
    kept = tuple(file for file, fault in zip(listing.files, faults, strict=True) if not fault)
    return dataclasses.replace(listing, files=kept, labels=listing.labels[keep]), len(bad)


def sample(listing: Listing, row: int) -> tuple[bytes | memoryview, int]:
    """The bytes of an image as its file holds them, and its label.

    Raises OSError or ValueError where this image cannot be read; DataError where its label is that of no class, which
    is the mistake of all of them.
    """
    if listing.spans is None:
        assert listing.labels is not None
        return Path(listing.files[row]).read_bytes(), int(listing.labels[row])
    shard, offset, length, label_offset, label_length = map(int, listing.spans[row])
    if listing.kind == "parquet":
        return parquet.sample(listing.files[shard], offset), label_offset
    image, label = shards.sample(listing.kind, listing.files[shard], (offset, length, label_offset, label_length))
    if not 0 <= label < len(listing.classes):
        first = shards.FIRST_TFRECORD_LABEL if listing.kind == "tfrecord" else 0
        raise DataError(
            f"{listing.name(row)} has label {label + first}; there are {len(listing.classes)} classes, from {first}"
        )
    return image, label


def _more(all_of_them: Iterable[object]) -> str:
    others = len(list(all_of_them)) - 1
    return f" (and {others} more)" if others else ""


class Walk:
    """Goes through the folders under a root, into none twice, and keeps what it passed over.

    others: files that are no images by their endings; links: to folders that are listed already, or around them; runs:
    folders of runs, where they are passed over, as their pictures are no photos.
    """

    def __init__(self, root: str | Path, runs: bool = True) -> None:
        self._top, self._entered, self._into_runs = os.path.realpath(root), {os.path.realpath(root)}, runs
        self.others: list[str] = []
        self.links: list[str] = []
        self.runs: list[str] = []

    def enters(self, entry: "os.DirEntry[str]") -> bool:
        """Whether the walk goes into a folder."""
        real = os.path.realpath(entry.path)
        around = entry.is_symlink() and _leads_back(real, self._top, os.path.dirname(entry.path))
        if real in self._entered or around:
            self.links.append(entry.path)
            return False
        if not self._into_runs and _is_run(real):
            self.runs.append(entry.path)
            return False
        self._entered.add(real)
        return True

    def images(self, folder: str, wanted: tuple[str, ...] = IMAGES, closed: list[str] | None = None) -> list[str]:
        """The files under a folder that end with one of wanted, in the order of torchvision's ImageFolder.

        closed: where a list is given, folders that cannot be read go there. Raises DataError for one otherwise.
        """
        found, ahead = [], [folder]
        while ahead:
            folder = ahead.pop()
            here = []
            try:
                entries = _entries(folder)
            except DataError:
                if closed is None:
                    raise
                closed.append(folder)
                continue
            for entry in entries:
                if _is_folder(entry):
                    if self.enters(entry):
                        ahead.append(entry.path)
                elif entry.name.lower().endswith(wanted) and (entry.is_symlink() or entry.is_file()):
                    here.append(entry.path)
                else:
                    self.others.append(entry.path)
            found.append((os.fsencode(folder), here))
        return [file for _, here in sorted(found) for file in here]

    def about_links(self, root: str | Path) -> str:
        """The links that were not followed, in a sentence."""
        return (
            f"{root}: {len(self.links)} links lead to a folder that is listed already, or to one around them, and were "
            f"not followed, {self.links[0]} first"
        )


def _folder(root: Path, wanted: tuple[str, ...] | None) -> Listing:
    walk = Walk(root)
    entries = _entries(str(root))
    beside = [entry.path for entry in entries if not _is_folder(entry)]
    folders = [entry.path for entry in entries if _is_folder(entry) and walk.enters(entry)]
    classes = tuple(files.shown(os.path.basename(folder)) for folder in folders)
    if not classes:
        raise DataError(f"{root} has no class folders; images belong into {root / 'CLASS'}")
    if wanted is not None and wanted != classes:
        raise DataError(f"{root} has {len(classes)} classes, {classes[0]!r} first; {len(wanted)} others were asked for")
    listed: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        before = len(walk.others)
        found = walk.images(folder)
        if not found:
            there = f"; it holds {counted(walk.others[before:])}" if walk.others[before:] else ""
            raise DataError(f"{folder} holds no image ({', '.join(IMAGES)}){there}. Fill the class folder or remove it")
        listed += found
        labels += [label] * len(found)
    notes = []
    if walk.others:
        notes.append(f"{root}: left out as no images by their endings: {counted(walk.others)}, {walk.others[0]} first")
    if beside:
        notes.append(f"{root}: left out as they lie in no class folder: {counted(beside)}, {beside[0]} first")
    if walk.links:
        notes.append(walk.about_links(root))
    return Listing("folder", str(root), classes, tuple(listed), np.array(labels, np.int64), None, _shown(notes))


def _is_run(folder: str) -> bool:
    return all(os.path.exists(os.path.join(folder, name)) for name in ("config.yaml", "checkpoints"))


def _leads_back(real: str, top: str, beside: str) -> bool:
    """Whether a link leads into the tree, to a folder around it, or to one around the link."""
    around = (top, os.path.realpath(beside))
    return f"{real}/".startswith(f"{top}/") or any(f"{one}/".startswith(f"{real.rstrip('/')}/") for one in around)


def _entries(folder: str) -> list["os.DirEntry[str]"]:
    """What lies in a folder and is not hidden, in the order of its names' bytes, which no locale changes."""
    try:
        with os.scandir(folder) as found:
            return sorted((e for e in found if not is_hidden(e.name)), key=lambda e: os.fsencode(e.name))
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); remove it, or let it be read") from error


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def counted(paths: list[str]) -> str:
    """How many files there are of each ending: 3 files (.txt 2, .heic 1)."""
    counts = Counter(ending(path) for path in paths).most_common()
    return f"{len(paths)} files (" + ", ".join(f"{suffix} {count}" for suffix, count in counts) + ")"


def _shown(notes: list[str]) -> tuple[str, ...]:
    return tuple(map(files.shown, notes))


def _fault(file: str) -> str | None:
    """What is wrong with an image file, as far as its first and last bytes tell."""
    try:
        with open(file, "rb", buffering=0) as opened:
            size = os.fstat(opened.fileno()).st_size
            head = os.pread(opened.fileno(), 12, 0)
            tail = os.pread(opened.fileno(), TAIL, max(0, size - TAIL))
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not head:
        return "is empty"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return None if b"IEND" in tail else "is a PNG that is cut short"
    if head.startswith(b"\xff\xd8\xff"):
        return None if END_OF_JPEG in tail else "is a JPEG that is cut short"
    if head.startswith(b"RIFF") and head.endswith(b"WEBP"):
        return None if size >= int.from_bytes(head[4:8], "little") + 8 else "is a WebP that is cut short"
    if file.lower().endswith(NATIVE):
        return f"is no JPEG, PNG or WebP: it begins with {head[:8].hex(' ')}"
    return None


def _shards(root: Path, kind: str, classes: tuple[str, ...] | None) -> Listing:
    if classes is None:
        names = next((f for f in (root / "classes.txt", root.parent / "classes.txt") if f.is_file()), None)
        if names is None:
            raise DataError(f"{root / 'classes.txt'} is missing; write the names of the classes into it, one a line")
        classes = tuple(read_names(names, "classes.txt", least=1))
    entries = [entry for entry in _entries(str(root)) if not _is_folder(entry)]
    found = [entry.path for entry in entries if shards.is_shard(kind, entry.name)]
    if not found:
        raise DataError(f"{root} holds no shard (*{', *'.join(shards.SUFFIXES[kind])})")
    beside = ("classes.txt", ".idx")
    others = [e.path for e in entries if not (shards.is_shard(kind, e.name) or e.name.lower().endswith(beside))]
    spans = shards.index(kind, found)
    if len(spans) == 0:
        raise DataError(f"{found[0]}{_more(found)} hold no sample")
    notes = [f"{root}: left out as no shards by their endings: {counted(others)}, {others[0]} first"] if others else []
    return Listing(kind, str(root), classes, tuple(found), spans=spans, notes=_shown(notes))


def _parquet(path: Path, split: str, classes: tuple[str, ...] | None) -> Listing:
    found = parquet.find(path, split)
    if not found:
        raise DataError(
            f"{path} holds no Parquet file of {split}: they lie in {path / split}, or their names begin with {split}"
        )
    names, groups, spans = parquet.read(found)
    if names is None:
        classes, spans[:, 3] = ("unlabelled",), 0
    else:
        wanted = classes or names or _listed(path)
        most = int(spans[:, 3].max()) + 1
        if not wanted and most > MOST_CLASSES:
            raise DataError(
                f"{found[0]}: a label is {most - 1:,}, and no class has a name; classes are numbered from 0. Where the "
                "column label is something else, call it otherwise"
            )
        classes = wanted or tuple(map(str, range(most)))
        if most > len(classes):
            raise DataError(f"{found[0]}: a label is {most - 1}, and there are {len(classes)} classes, from 0")
    return Listing("parquet", str(path), classes, tuple(groups), spans=spans, labelled=names is not None)


def _listed(path: Path) -> tuple[str, ...]:
    file = path / "classes.txt"
    return tuple(read_names(file, "classes.txt", least=1)) if file.is_file() else ()
