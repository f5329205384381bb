"""Photos decoded once, by Pillow in several processes, into a memory-mapped file that outlives the run."""

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from mekd import files, system
from mekd.data.arrays import DataError
from mekd.data.names import ending
from mekd.data.upright import VERSION, decode

#: Fewer files than these are decoded by this process itself: others take longer to begin.
HERE = 64
BATCH = 16  # files that a process decodes before it hands them over


class PhotoCache:
    """Square photos (n, 3, size, size), uint8, in a folder: each is decoded again only where its file has changed.

    images is the whole map, of which rows (m,) int64 are the photos of found that can be read, in that order, and kept
    (m,) their places in found; left_out: the other ones, and why. A photo is known by its path under root, its length
    and the time of its last change. folder: None for one that is thrown away.

    The folder holds pixels.u8, a photo after the other, and index.jsonl, a line a photo: the last line of a name
    counts, and a line is written when its pixels are.
    """

    def __init__(
        self, folder: Path | None, root: str | Path, found: list[str], size: int, resize: int | None = None
    ) -> None:
        self._temporary = None
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory()
            folder = Path(self._temporary.name)
        with files.told(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._pixels, self._index = folder / "pixels.u8", folder / "index.jsonl"
        self._size, self._resize, self._bytes = size, resize, 3 * size * size
        stamps = {_under(root, file): (file, _stamp(file)) for file in found}
        known = self._load()
        current = {n: known[n] for n, (_, stamp) in stamps.items() if n in known and known[n]["stamp"] == stamp}
        changed = {"changed": [n for n in stamps if n in known and known[n]["stamp"] and n not in current]}
        changed["removed"] = [n for n in known if n not in stamps]
        missing = {n: stamps[n] for n in stamps if n not in current}
        if len(current) < len(known):  # their rows are written anew: no line may claim them
            files.write_text(self._index, "".join(_line(n, entry) for n, entry in current.items()))
        if missing:
            with files.told(self._pixels):
                current |= self._decode(missing, current)
        changed["new"] = [n for n in missing if known and n not in known and "row" in current[n]]
        self.changed = {what: len(names) for what, names in changed.items() if names}
        entries = [current[n] for n in stamps]
        self.kept = torch.tensor([i for i, entry in enumerate(entries) if "row" in entry], dtype=torch.int64)
        self.rows = torch.tensor([entry["row"] for entry in entries if "row" in entry], dtype=torch.int64)
        self.left_out = {
            files.shown(n): entry["fault"] for n, entry in zip(stamps, entries, strict=True) if "fault" in entry
        }
        if not len(self.rows):
            reason = next(iter(self.left_out.values()))
            raise DataError(f"none of the {len(found)} photos under {root} can be read; the first: {reason}")
        count = self._pixels.stat().st_size // self._bytes
        pixels = np.memmap(self._pixels, np.uint8, "c", shape=(count, 3, size, size))
        self.images: Tensor = torch.from_numpy(pixels)

    def describe(self, used: int) -> str:
        """How many photos there are, and what was left out, in a line."""
        parts = [
            f"{used:,} photo{'s' * (used != 1)}" if used == len(self.rows) else f"{used:,} of {len(self.rows):,} photos"
        ]
        heif = Counter(ending(n) for n, why in self.left_out.items() if "pillow-heif" in why)
        parts += [
            f"{n} {suffix} not readable without pillow-heif (pip install pillow-heif)" for suffix, n in heif.items()
        ]
        damaged = len(self.left_out) - sum(heif.values())
        if damaged:
            parts.append(f"{damaged} damaged: named in the report")
        if self.changed:
            parts.append("since they were last read " + ", ".join(f"{n} {what}" for what, n in self.changed.items()))
        return "; ".join(parts)

    def _load(self) -> dict[str, dict[str, Any]]:
        """The photos that are there, by name; an entry that no longer counts says so with a stamp of None."""
        if not self._index.exists() or not self._pixels.exists():
            return {}
        rows = self._pixels.stat().st_size // self._bytes
        known: dict[str, dict[str, Any]] = {}
        for line in self._index.read_text("utf-8", "replace").split("\n"):
            try:
                name, entry = json.loads(line)
                row, fault = entry.get("row", 0), entry.get("fault", "")
                whole = type(row) is int and row >= 0 and isinstance(fault, str) and {"stamp", "how"} <= entry.keys()
                if whole:
                    known[name] = entry
            except (ValueError, TypeError, AttributeError):  # the last line of a process that was killed, or damage
                continue
        for entry in known.values():
            cut = entry.get("row", 0) >= rows
            lacked = "pip install" in entry.get("fault", "")  # which may be there by now
            if cut or lacked or entry["how"] != [self._size, self._resize, VERSION]:
                entry["stamp"] = None
        return known

    def _decode(self, missing: dict[str, tuple[str, list[int]]], current: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Decode files into the rows that nobody has."""
        taken = {entry["row"] for entry in current.values() if "row" in entry}
        free = iter(row for row in range(len(taken) + len(missing)) if row not in taken)
        done: dict[str, dict[str, Any]] = {}
        names = list(missing)
        with open(self._pixels, "r+b" if self._pixels.exists() else "w+b") as pixels:
            self._allocate(pixels, len(taken) + len(missing))
            with open(self._index, "a", encoding="utf-8") as index:
                decoded = _decoded([missing[n][0] for n in names], self._size, self._resize)
                for i, result in _shown(decoded, len(names)):
                    entry: dict[str, Any] = {"stamp": missing[names[i]][1], "how": [self._size, self._resize, VERSION]}
                    if isinstance(result, str):
                        entry["fault"] = result
                    else:
                        entry["row"] = next(free)
                        pixels.seek(entry["row"] * self._bytes)
                        pixels.write(result.tobytes())
                        pixels.flush()
                    index.write(_line(names[i], entry))
                    index.flush()
                    done[names[i]] = entry
        return done

    def _allocate(self, pixels: BinaryIO, count: int) -> None:
        """Take the room of all photos at once: a full disk is known before the first is decoded."""
        size = count * self._bytes
        if os.fstat(pixels.fileno()).st_size >= size:
            return
        try:
            system.allocate(pixels, size)
        except OSError as error:
            raise files.WriteError(
                f"{self._pixels} needs {size / 1e6:.0f} MB ({error}); free some space, or give --out another disk"
            ) from error


class _Files(torch.utils.data.Dataset[tuple[int, "np.ndarray | str"]]):
    """A file's place in a list, and its pixels or what is wrong with it."""

    def __init__(self, found: list[str], size: int, resize: int | None) -> None:
        self._found, self._size, self._resize = found, size, resize

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, i: int) -> "tuple[int, np.ndarray | str]":
        try:
            return i, decode(self._found[i], self._size, self._resize)
        except DataError as error:
            return i, str(error)


def _decoded(found: list[str], size: int, resize: int | None) -> "Iterator[tuple[int, np.ndarray | str]]":
    workers = 0 if len(found) < HERE else min(16, system.cores())
    loader = torch.utils.data.DataLoader(_Files(found, size, resize), BATCH, num_workers=workers, collate_fn=list)
    for batch in loader:
        yield from batch


def _shown(decoded: "Iterator[tuple[int, np.ndarray | str]]", count: int) -> "Iterator[tuple[int, np.ndarray | str]]":
    """The same behind a progress bar, on a terminal."""
    if count < HERE or not sys.stderr.isatty():
        yield from decoded
        return
    from tqdm import tqdm

    yield from tqdm(decoded, total=count, desc="photos", unit=" photos")


def _line(name: str, entry: dict[str, Any]) -> str:
    return json.dumps([name, entry]) + "\n"


def _under(root: str | Path, file: str) -> str:
    return os.path.relpath(file, root)


def _stamp(file: str) -> list[int]:
    try:
        found = os.stat(file)
    except OSError:  # a link to nothing
        return [0, 0]
    return [found.st_size, found.st_mtime_ns]
