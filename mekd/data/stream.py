"""Streams of batches: which images a step takes is a function of the seed and the step, so a place is a number."""

import hashlib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mekd.data.arrays import DataError
from mekd.data.listing import Listing

WINDOW = 16  # shards whose samples are shuffled together, so that few files are read at a time


@dataclass(frozen=True)
class Plan:
    """What a stream does; crop is "random", "centre" or, for one pass in the listing's order, "once"."""

    loader: str
    listing: Listing
    batch: int
    size: int
    crop: str
    flip: bool
    resize: int
    seed: int
    dtype: str
    channels_last: bool
    device: torch.device
    rank: int
    world: int
    threads: int
    on_error: str

    @property
    def epoch_batches(self) -> int:
        """Batches of an epoch, on this process."""
        if self.crop == "once":
            return -(-len(self._mine) // self.batch)
        return len(self.listing) // (self.world * self.batch)

    @property
    def _mine(self) -> range:
        count = len(self.listing)
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def steps(self, step: int, left_out: frozenset[int]) -> Iterator[tuple[int, int, np.ndarray]]:
        """Step, epoch and rows (m,) from a step on. In place of a row left out stands the next one; once: nothing."""
        while True:
            epoch, place = divmod(step, max(1, self.epoch_batches))
            if self.crop == "once":
                if step >= self.epoch_batches:
                    return
                mine = self._mine[place * self.batch : (place + 1) * self.batch]
                rows = np.array([row for row in mine if row not in left_out], np.int64)
            else:
                # A run of rows for each process: of shards, each process reads its own.
                begin = (self.rank * self.epoch_batches + place) * self.batch
                rows = self._order(epoch)[begin : begin + self.batch].copy()
                for i in range(len(rows)) if left_out else ():
                    while int(rows[i]) in left_out:
                        rows[i] = (rows[i] + 1) % len(self.listing)
            if len(rows):
                yield step, epoch, rows
            step += 1

    def _order(self, epoch: int) -> np.ndarray:
        return _shuffled(self._shard_sizes, self.seed, epoch)

    @cached_property
    def _shard_sizes(self) -> tuple[int, ...]:
        spans = self.listing.spans
        if spans is None:
            return (len(self.listing),)
        return tuple(np.bincount(spans[:, 0], minlength=len(self.listing.files)).tolist())

    def fingerprint(self) -> str:
        """What must be the same where a stream goes on; neither device nor threads."""
        kept = (self.loader, self.listing.digest(), self.batch, self.size, self.crop, self.flip, self.resize, self.seed)
        return hashlib.sha256(repr((*kept, self.dtype, self.rank, self.world)).encode()).hexdigest()[:16]


@lru_cache(maxsize=4)
def _shuffled(sizes: tuple[int, ...], seed: int, epoch: int) -> np.ndarray:
    """All rows in an order of their own each epoch: shards shuffled, then the samples of each window of shards."""
    random = np.random.default_rng([seed, epoch, 0x0DE4])
    if len(sizes) == 1:
        return random.permutation(sizes[0])
    begins = np.concatenate([[0], np.cumsum(sizes)])
    shards = random.permutation(len(sizes))
    windows = [shards[i : i + WINDOW] for i in range(0, len(shards), WINDOW)]
    rows = [np.concatenate([np.arange(begins[s], begins[s + 1]) for s in window]) for window in windows]
    return np.concatenate([random.permutation(window) for window in rows])


def mixed(seed: int, epoch: int, rows: np.ndarray, draws: int) -> np.ndarray:
    """Random numbers (m, draws) uint64: a function of seed, epoch, row and draw, whoever asks (splitmix64)."""
    key = hashlib.blake2b(repr((seed, epoch)).encode(), digest_size=8).digest()
    x = np.frombuffer(key, np.uint64) + np.arange(draws, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)
    x = x + (rows.astype(np.uint64)[:, None] + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


Running = Iterator[tuple[int, Tensor, Tensor]]


class Stream:
    """Batches: images (m, 3, size, size), uint8 or float32 in [-1, 1], and labels (m,) int64, on the plan's device.

    running(plan, step, left_out) gives step, images and labels from a step on; fault(listing, row) says why an image
    cannot be decoded, or None. Raises DataError naming the image, or leaves it out, as on_error says.
    """

    def __init__(
        self,
        plan: Plan,
        running: Callable[[Plan, int, frozenset[int]], Running],
        fault: Callable[[Listing, list[int]], dict[int, str]],
    ) -> None:
        self.plan, self.epoch_batches = plan, plan.epoch_batches
        self._open, self._fault = running, fault
        self._running: Running | None = None
        self._step, self._left_out = 0, frozenset[int]()

    @property
    def skipped(self) -> int:
        """Images that were left out so far, by this process."""
        return len(self._left_out)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        while True:
            if self._running is None:
                self._running = self._open(self.plan, self._step, self._left_out)
            try:
                step, images, labels = next(self._running)
            except (StopIteration, DataError):
                self.close()
                raise
            except Exception as error:
                # A pipeline that failed is of no more use: another goes on at the same step. Its workers end with its
                # frame, which the error would keep.
                self.close()
                traceback.clear_frames(error.__traceback__)
                self._leave_out(error)
                continue
            self._step = step + 1
            return images, labels

    def _leave_out(self, error: Exception) -> None:
        """Find the images of the step that failed, or of those read ahead of it, that cannot be decoded."""
        for ahead, (_, _, rows) in enumerate(self.plan.steps(self._step, self._left_out)):
            if faults := self._fault(self.plan.listing, sorted(set(rows.tolist()))):
                break
            if ahead == 3:
                raise error
        else:
            raise error
        row, why = next(iter(faults.items()))
        others = f" (and {len(faults) - 1} more of its batch)" if len(faults) > 1 else ""
        if self.plan.on_error == "raise":
            raise DataError(
                f"{self.plan.listing.name(row)} cannot be decoded ({why}){others}; repair or remove it, "
                "or set data.on_error skip"
            ) from error
        self._left_out |= faults.keys()
        if self.plan.crop != "once" and len(self._left_out) == len(self.plan.listing):
            raise DataError(
                f"{self.plan.listing.root}: none of {len(self.plan.listing)} images can be decoded"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, and what was left out before it."""
        left_out = torch.tensor(sorted(self._left_out), dtype=torch.int64)
        return {"stream": self._fingerprint, "step": self._step, "left_out": left_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a place; ValueError for the state of another stream."""
        if state.get("stream") != self._fingerprint:
            raise ValueError(
                f"the state is that of another stream ({state.get('stream')}, this is {self._fingerprint}): files, "
                "loader, batch, size, crop, seed and number of processes must be the same; restore them or begin afresh"
            )
        self.close()
        self._step, self._left_out = int(state["step"]), frozenset(state["left_out"].tolist())

    @cached_property
    def _fingerprint(self) -> str:
        return self.plan.fingerprint()

    def close(self) -> None:
        """End what reads ahead; the next batch starts it again."""
        running, self._running = self._running, None
        if running is not None:
            running.close()  # type: ignore[attr-defined]


def planned(
    loader: str,
    listing: Listing,
    batch: int,
    size: int,
    crop: str,
    flip: bool,
    resize: int | None,
    seed: int,
    dtype: str,
    channels_last: bool,
    device: torch.device | str,
    rank: int,
    world: int,
    threads: int,
    on_error: str,
) -> Plan:
    """A plan whose arguments have been looked at; ValueError and DataError name what does not fit."""
    for name, value, allowed in (
        ("crop", crop, ("random", "centre", "once")),
        ("dtype", dtype, ("uint8", "float32")),
        ("on_error", on_error, ("raise", "skip")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    if batch < 1 or not 0 <= rank < world:
        raise ValueError(f"batch {batch}, rank {rank} of {world}: batch must be at least 1, rank below world")
    resize = round(size * 256 / 224) if resize is None else resize
    if resize < size:
        raise ValueError(f"resize is {resize}; the shorter side must be at least size, {size}")
    if crop != "once" and len(listing) < world * batch:
        raise DataError(
            f"{listing.root} has {len(listing)} images, fewer than the {world * batch} of one batch of all processes "
            f"({world} x {batch}); choose a smaller batch"
        )
    return Plan(
        loader, listing, batch, size, crop, flip, resize, seed, dtype, channels_last,
        torch.device(device), rank, world, threads, on_error,
    )  # fmt: skip
