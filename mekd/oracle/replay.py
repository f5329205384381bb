"""Queries asked once and kept on disk, memory-mapped, to be used again in every epoch."""

import functools
import json
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mekd import files, system
from mekd.errors import MekdError
from mekd.oracle.response import KINDS, Response, concatenate

PARTS = ("images", "values", "indices", "nuisance")
CHECKS = "checks"  # a CRC-32 of each row; stores of the first versions have none


class StoreError(MekdError, ValueError):
    """A store of answers is missing, damaged, or another run's."""


class Replay:
    """N images as they were sent and the teacher's answers to them, in a folder.

    Images are uint8 (or float32 where they were sent so) (N, ch, H, W); answers as in Response; and, where there is
    one, the nuisance (N, entries) that G drew each image with. A row that is not what was written is an error. grows: a
    shorter store is made longer. part: of a longer one the first N are read. origin: what the answers are a result of,
    kept with them. The files are allocated in full when the first answer arrives, so that a full disk is known before
    the queries are paid.
    """

    def __init__(
        self, folder: Path, count: int, grows: bool = False, origin: Mapping[str, Any] | None = None,
        part: bool = False,
    ) -> None:  # fmt: skip
        self.folder, self.count, self._origin = folder, count, origin
        self._arrays: dict[str, np.ndarray] = {}
        self._kind: dict[str, Any] = {}
        if (folder / "replay.json").exists():
            self._kind = described(folder)
            for name in self._kind["arrays"]:
                path = folder / f"{name}.npy"
                try:
                    np.load(path, mmap_mode="r", allow_pickle=False)  # "r+" would fill a file that is cut short with 0
                    array = np.load(path, mmap_mode="r+" if os.access(path, os.W_OK) else "r", allow_pickle=False)
                except Exception as error:  # numpy's parser of a header has errors of its own
                    raise StoreError(
                        f"{path} cannot be read ({error}); it is missing or cut short. Put a copy of {folder} back, or "
                        "start anew with another --out"
                    ) from error
                if grows and len(array) < count:
                    array = _grown(path, array, count)
                if part:
                    array = array[:count]
                if len(array) != count:
                    raise StoreError(
                        f"{folder} holds {len(array)} queries, the configuration says {count} (distill.{folder.name}): "
                        "set that back; a store can grow, and does not shrink"
                    )
                self._arrays[name] = array
            self._whole = np.zeros(count, bool)
            if grows and self._kind.get("count") != count:
                self._describe()

    def __len__(self) -> int:
        return self.count

    def write(self, start: int, images: Tensor, response: Response, n: Tensor | None = None) -> None:
        """Keep images (m, ch, H, W), their answer and their nuisance (m, entries) as rows start to start + m."""
        parts = {"images": images, "values": response.values, "indices": response.indices, "nuisance": n}
        rows = {name: part.cpu().numpy() for name, part in parts.items() if part is not None and part.numel()}
        rows[CHECKS] = np.fromiter(_checks(rows), np.uint32, len(images))
        if not self._arrays:
            self._allocate(rows, response)
        elif (response.kind, response.decimals) != (self._kind["kind"], self._kind["decimals"]):
            raise StoreError(
                f"{self.folder} holds answers of kind {self._kind['kind']} with decimals {self._kind['decimals']}, the "
                f"teacher gave {response.kind} with {response.decimals}; start anew with another --out"
            )
        for name in rows.keys() & self._arrays.keys():
            self._arrays[name][start : start + len(images)] = rows[name]
        self._whole[start : start + len(images)] = False

    def read(self, rows: Tensor | slice) -> tuple[Tensor, Response, Tensor]:
        """Images, answers and nuisances of some rows (indices (m,) int64, or a slice), copied out of the map.

        StoreError where one of them is damaged: each row is looked at when it is first read.
        """
        index = rows if isinstance(rows, slice) else rows.numpy()
        copied = {name: np.array(array[index]) for name, array in self._arrays.items()}
        if CHECKS in copied and not self._whole[index].all():
            wrong = np.fromiter(_checks(copied), np.uint32) != copied[CHECKS]
            if wrong.any():
                row = int(np.arange(self.count)[index][wrong][0])
                raise StoreError(
                    f"row {row} of {self.folder} is not what was written: a file of it is damaged. Put a copy of "
                    "the folder back, or start anew with another --out"
                )
            self._whole[index] = True
        parts = {name: torch.from_numpy(part) for name, part in copied.items() if name != CHECKS}
        response = Response(self._kind["kind"], parts.get("values"), parts.get("indices"), self._kind["decimals"])
        images = parts["images"]
        return images, response, parts.get("nuisance", torch.empty(len(images), 0))

    def contents(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The arrays by their names, and the kind and decimals of the answers; StoreError where a row is damaged."""
        for start in range(0, self.count, 4096):
            self.read(slice(start, start + 4096))
        arrays = {name: array for name, array in self._arrays.items() if name != CHECKS}
        return arrays, {name: self._kind[name] for name in ("kind", "decimals")}

    def will_need(self, rows: Tensor) -> None:
        """Tell the system which rows (m,) are read next, so that it has them by then."""
        for array in self._arrays.values():
            will_need(array, rows)

    def flush(self) -> None:
        """Write the maps to the disk."""
        for array in self._arrays.values():
            if isinstance(array, np.memmap):
                array.flush()

    def state_dict(self) -> dict[str, Any]:
        """Whether there are rows yet; they themselves are on the disk then."""
        self.flush()
        return {"begun": bool(self._arrays)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load: rows that a checkpoint does not know of are written again."""
        if state["begun"] and not self._arrays:
            raise StoreError(
                f"{self.folder} is missing, but its checkpoint is there: put it back, or start anew with another --out"
            )

    def _allocate(self, rows: dict[str, np.ndarray], response: Response) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = {name: self.folder / f"{name}.npy" for name in rows}
        arrays: dict[str, np.ndarray] = {}
        for name, part in rows.items():
            path, shape = paths[name], (self.count, *part.shape[1:])
            try:
                arrays[name] = np.lib.format.open_memmap(path, mode="w+", dtype=part.dtype, shape=shape)
                with open(path, "r+b") as file:
                    system.allocate(file, path.stat().st_size)
            except OSError as error:
                for path in paths.values():
                    path.unlink(missing_ok=True)
                size = part[:1].nbytes * self.count / 1e6
                raise files.WriteError(f"{paths[name]} needs {size:.0f} MB ({error}); free some space") from error
        self._arrays, self._whole = arrays, np.zeros(self.count, bool)
        self._kind = {"kind": response.kind, "decimals": response.decimals, "arrays": list(rows)}
        self._kind |= {} if self._origin is None else {"origin": self._origin}
        self._describe()

    def _describe(self) -> None:
        files.write_text(self.folder / "replay.json", json.dumps({**self._kind, "count": self.count}) + "\n")


class Joined:
    """Several stores of answers as one, read as a Replay is."""

    def __init__(self, parts: list[Replay]) -> None:
        self.parts, self.folder = parts, parts[-1].folder

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def read(self, rows: Tensor | slice) -> tuple[Tensor, Response, Tensor]:
        """Images, answers and nuisances of some rows, in their order."""
        rows = torch.arange(len(self))[rows] if isinstance(rows, slice) else rows
        asked = [(part, where) for part, where in self._of(rows) if len(where)]
        found = [part.read(rows[where] - first) for (part, first), where in asked]
        images, answers, nuisances = (list(column) for column in zip(*found, strict=True))
        back = torch.cat([where for _, where in asked]).argsort()
        answer = concatenate(answers)
        values, indices = (None if x is None else x[back] for x in (answer.values, answer.indices))
        return torch.cat(images)[back], replace(answer, values=values, indices=indices), torch.cat(nuisances)[back]

    def will_need(self, rows: Tensor) -> None:
        """Tell the system which rows (m,) are read next."""
        for (part, first), where in self._of(rows):
            part.will_need(rows[where] - first)

    def _of(self, rows: Tensor) -> Iterator[tuple[tuple[Replay, int], Tensor]]:
        """Each part and its first row, and where in rows (m,) its own ones stand."""
        first = 0
        for part in self.parts:
            yield (part, first), ((rows >= first) & (rows < first + len(part))).nonzero().squeeze(1)
            first += len(part)


def write_store(
    folder: Path, arrays: Mapping[str, np.ndarray], kind: Mapping[str, Any], origin: Mapping[str, Any]
) -> None:
    """Write arrays and kind, as Replay.contents() gives them, as a store; StoreError where they are none."""
    images = arrays.get("images", np.empty(0))
    rows = len(images)
    if not (
        {"images"} < set(arrays) <= set(PARTS)
        and images.ndim == 4
        and images.dtype in (np.uint8, np.float32)
        and all(len(x) == rows and x.ndim <= 2 and x.dtype.kind in "fi" for n, x in arrays.items() if n != "images")
    ):
        raise StoreError(f"{folder.name} holds no images and answers to them, as many of both")
    arrays = {**arrays, CHECKS: np.fromiter(_checks(arrays), np.uint32, rows)}
    for name, array in arrays.items():
        files.write(folder / f"{name}.npy", functools.partial(np.save, arr=array, allow_pickle=False))
    told = {"kind": kind.get("kind"), "decimals": kind.get("decimals"), "arrays": list(arrays), "origin": origin}
    files.write_text(folder / "replay.json", json.dumps({**told, "count": rows}) + "\n")
    described(folder)


def mapped(folder: Path, count: int) -> tuple[np.ndarray, Response]:
    """The first images (count, ch, H, W) of a store, memory-mapped, and the answers to them, for who looks alone.

    Nothing is opened for writing, and no row is checked.
    """
    kind = described(folder)
    names = [name for name in kind["arrays"] if name in PARTS[:3]]
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)[:count] for name in names}
    values, indices = (torch.from_numpy(arrays[n].copy()) if n in arrays else None for n in PARTS[1:3])
    return arrays["images"], Response(kind["kind"], values, indices, kind["decimals"])


def described(folder: Path) -> dict[str, Any]:
    """What replay.json says; StoreError where it is damaged."""
    path = folder / "replay.json"
    try:
        kind = json.loads(path.read_text("utf-8"))
        decimals = kind["decimals"]
        known = kind["kind"] in KINDS and set(kind["arrays"]) <= {*PARTS, CHECKS}
        if not known or not isinstance(decimals, int | None):
            raise ValueError("it names no answers")
        return dict(kind)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(
            f"{path} is damaged ({error}). Put a copy of {folder} back, or start anew with another --out"
        ) from error


def _checks(rows: Mapping[str, np.ndarray]) -> Iterable[int]:
    return checksums([np.ascontiguousarray(rows[name]) for name in PARTS if name in rows])


def checksums(parts: Sequence[np.ndarray]) -> Iterable[int]:
    """A CRC-32 of each row of some arrays, of as many rows each."""
    for row in range(len(parts[0])):
        crc = 0
        for part in parts:
            crc = zlib.crc32(part[row].tobytes(), crc)
        yield crc


def _grown(path: Path, array: np.ndarray, count: int) -> np.ndarray:
    """The array of a file with more rows, the old ones first, in a new file of that name."""
    beside = path.with_suffix(".growing")
    try:
        larger = np.lib.format.open_memmap(beside, mode="w+", dtype=array.dtype, shape=(count, *array.shape[1:]))
        with open(beside, "r+b") as file:
            system.allocate(file, beside.stat().st_size)
        for start in range(0, len(array), 4096):
            part = array[start : start + 4096]
            larger[start : start + len(part)] = part
        larger.flush()
    except OSError as error:
        beside.unlink(missing_ok=True)
        size = array[:1].nbytes * count / 1e6
        raise files.WriteError(f"{path} needs {size:.0f} MB to grow ({error}); free some space") from error
    os.replace(beside, path)
    return larger


def will_need(array: np.ndarray, rows: Tensor) -> None:
    """Ask for rows (m,) of a memory map ahead of their use; where the system cannot, nothing happens."""
    if not isinstance(array, np.memmap) or not hasattr(mmap, "MADV_WILLNEED"):
        return
    pages: mmap.mmap = array._mmap  # type: ignore[attr-defined]
    width = array[:1].nbytes
    for row in rows.tolist():
        first = array.offset + row * width
        start = first // mmap.PAGESIZE * mmap.PAGESIZE
        pages.madvise(mmap.MADV_WILLNEED, start, first + width - start)
