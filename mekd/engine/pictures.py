"""What the generator draws from the teacher's answers in a replay store: drawn once, kept beside it, memory-mapped."""

import functools
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from mekd import files
from mekd.losses import MEKDLoss
from mekd.nets import Generator
from mekd.nets.frozen import freeze
from mekd.oracle.replay import Joined, Replay, StoreError, checksums, will_need
from mekd.pixels import to_float, to_uint8
from mekd.seeds import generator_at

#: How a picture is kept, and numpy's type of the same width.
DTYPES = {"uint8": np.dtype(np.uint8), "bfloat16": np.dtype(np.int16)}


class Pictures:
    """One picture (ch, H, W) for each row of a store, rounded to 256 values or to bfloat16.

    They are drawn and written in full into a folder when they are not there yet, under the name of the code and the tau
    that they are drawn with, with a checksum of each beside them; a file that does not fit, or a picture that is not
    what was drawn, is an error that says so.
    """

    def __init__(
        self, folder: Path, store: Replay | Joined, loss: MEKDLoss, num_classes: int, keep: str, device: torch.device
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{keep}-{loss.code}-{loss.tau:g}.npy"
        if not path.exists():
            _draw(path, store, loss, num_classes, keep, device)
        try:
            self._array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise StoreError(f"{path} cannot be read ({error}); delete it, and it is drawn again") from error
        if len(self._array) != len(store) or self._array.dtype != DTYPES[keep]:
            raise StoreError(
                f"{path} holds {len(self._array)} pictures, {store.folder} {len(store)} answers; delete it"
            )
        self._path, beside = path, path.with_suffix(".checks.npy")
        if not beside.exists() or beside.stat().st_mtime_ns < path.stat().st_mtime_ns:
            sums = np.fromiter(checksums([self._array]), np.uint32, len(self._array))
            files.write(beside, functools.partial(np.save, arr=sums, allow_pickle=False))
        try:
            self._checks, self._whole = np.load(beside, allow_pickle=False), np.zeros(len(self._array), bool)
        except (ValueError, EOFError) as error:
            raise StoreError(f"{beside} cannot be read ({error}); delete it, and it is made again") from error

    def will_need(self, rows: Tensor) -> None:
        """Tell the system which rows (m,) are read next."""
        will_need(self._array, rows)

    def read(self, rows: Tensor) -> Tensor:
        """The pictures of some rows (m,), in [-1, 1], copied out of the map."""
        index = rows.numpy()
        copied = self._array[index]
        if not self._whole[index].all():
            wrong = np.fromiter(checksums([copied]), np.uint32) != self._checks[index]
            if wrong.any():
                raise StoreError(
                    f"picture {int(index[wrong][0])} of {self._path} is not what was drawn: the file is damaged. "
                    "Delete it, and it is drawn again"
                )
            self._whole[index] = True
        picked = torch.from_numpy(copied)
        return to_float(picked) if picked.dtype == torch.uint8 else picked.view(torch.bfloat16).float()


@torch.no_grad()
def families(generator: Generator, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pictures (rows, columns, ch, S, S) of a code a row, n varied, and of a nuisance a row, the code varied."""
    random, draw = generator_at("families", device=device), freeze(generator)
    drawn = []
    for fixed in ("code", "n"):
        inputs = {}
        for name, entries in (("code", generator.num_classes), ("n", generator.nuisance)):
            count = 1 if name == fixed else columns
            values = torch.randn(rows, count, entries, generator=random, device=device)
            inputs[name] = values.expand(rows, columns, entries).flatten(0, 1)
        parts = zip(*(values.split(64) for values in inputs.values()), strict=True)  # at 224 px not all at once
        drawn.append(torch.cat([draw(code, n) for code, n in parts]).unflatten(0, (rows, columns)))
    return drawn[0], drawn[1]


def _draw(
    path: Path, store: Replay | Joined, loss: MEKDLoss, num_classes: int, keep: str, device: torch.device
) -> None:
    def fill(file: BinaryIO) -> None:
        for start in range(0, len(store), 256):
            _, answer, n = store.read(slice(start, min(start + 256, len(store))))
            own = {"n": n.to(device)} if n.shape[1] else {}
            drawn = loss.teacher_image(num_classes, **own, **answer.to(device).target).float().cpu().contiguous()
            rows = (to_uint8(drawn) if keep == "uint8" else drawn.bfloat16().view(torch.int16)).numpy()
            if start == 0:
                shape = (len(store), *rows.shape[1:])
                header = {"descr": np.lib.format.dtype_to_descr(rows.dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(rows.tobytes())

    files.write(path, fill)
