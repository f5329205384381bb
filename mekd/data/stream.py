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

CPU = torch.device("cpu")
WINDOW = 16  # shards whose samples are shuffled together, so that few files are read at a time


@dataclass(frozen=True)
class Plan:
    """What a stream does, the same in all of its processes but for rank.

    Args:
        listing: the images
        batch: images of a step over all processes together; crop "once": of one process
        size: side of the pictures in pixels
        crop: of an endless stream of shuffled batches, the tail of each epoch dropped, "random" (a share of 0.08 to 1
            of the image at a ratio of 3/4 to 4/3) or "centre"; "once": each image once, in the listing's order, centre
        flip: whether half of the images are mirrored; not with "once"
        resize: the shorter side in pixels before the centre is cropped; null for size * 256 / 224
        seed: of the order, the crops and the flips
        dtype: uint8, or float32 in [-1, 1]
        channels_last: how the pixels lie in memory
        device: of the batches
        rank, world: this process, of how many
        threads: threads (DALI, at least 1) or worker processes (torchvision) that decode
        on_error: an image that cannot be decoded: "raise" or "skip"
    """

    listing: Listing
    batch: int
    size: int
    crop: str = "random"
    flip: bool = False
    resize: int | None = None
    seed: int = 0
    dtype: str = "uint8"
    channels_last: bool = False
    device: torch.device = CPU
    rank: int = 0
    world: int = 1
    threads: int = 2
    on_error: str = "raise"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("crop", self.crop, ("random", "centre", "once")),
            ("dtype", self.dtype, ("uint8", "float32")),
            ("on_error", self.on_error, ("raise", "skip")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        least = 1 if self.crop == "once" else self.world
        if self.batch < least or not 0 <= self.rank < self.world:
            raise ValueError(
                f"batch {self.batch}, rank {self.rank} of {self.world}: batch must be {least} or more, rank below world"
            )
        if self.shorter < self.size:
            raise ValueError(f"resize is {self.resize}; the shorter side must be at least size, {self.size}")
        if self.crop != "once" and len(self.listing) < self.batch:
            raise DataError(
                f"{self.listing.root} has {len(self.listing)} images, fewer than the {self.batch} of a batch; choose a "
                "smaller batch"
            )

    @property
    def shorter(self) -> int:
        """The shorter side in pixels before the centre is cropped."""
        return round(self.size * 256 / 224) if self.resize is None else self.resize

    @property
    def epoch_batches(self) -> int:
        """Batches of an epoch."""
        if self.crop == "once":
            mine = self._mine(len(self.listing))
            return -(-(mine.stop - mine.start) // self.batch)
        return len(self.listing) // self.batch

    @property
    def most(self) -> int:
        """Images of this process in a step, at most."""
        return self.batch if self.crop == "once" else -(-self.batch // self.world)

    def steps(self, step: int, left_out: frozenset[int]) -> Iterator[tuple[int, int, np.ndarray]]:
        """Step, epoch and this process's rows (m,) from a step on: its part of the rows that all take together.

        In place of a row left out stands the next one; once: nothing.
        """
        while True:
            epoch, place = divmod(step, max(1, self.epoch_batches))
            if self.crop == "once":
                if step >= self.epoch_batches:
                    return
                mine = self._mine(len(self.listing))
                begin = mine.start + place * self.batch
                rows = np.arange(begin, min(begin + self.batch, mine.stop))
                rows = rows[[row not in left_out for row in rows.tolist()]]
            else:
                batch = self._order(epoch)[place * self.batch : (place + 1) * self.batch]
                rows = batch[self._mine(self.batch)].copy()
                for i in range(len(rows)) if left_out else ():
                    while int(rows[i]) in left_out:
                        rows[i] = (rows[i] + 1) % len(self.listing)
            if len(rows):
                yield step, epoch, rows
            step += 1

    def _mine(self, count: int) -> slice:
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def _order(self, epoch: int) -> np.ndarray:
        return _shuffled(self._shard_sizes, self.seed, epoch)

    @cached_property
    def _shard_sizes(self) -> tuple[int, ...]:
        spans = self.listing.spans
        if spans is None:
            return (len(self.listing),)
        return tuple(np.bincount(spans[:, 0], minlength=len(self.listing.files)).tolist())

    def fingerprint(self, loader: str) -> str:
        """What must be the same where a stream goes on; neither device nor threads, nor the number of processes."""
        kept = (loader, self.listing.digest(), self.batch, self.size, self.crop, self.flip, self.shorter, self.seed)
        place = (self.rank, self.world) if self.crop == "once" else ()
        return hashlib.sha256(repr((*kept, self.dtype, *place)).encode()).hexdigest()[:16]


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

    running(plan, step, left_out) gives step, images and labels from a step on; faults(listing, rows) says which images
    cannot be decoded, and why. Raises DataError naming the image, or leaves it out, as on_error says.
    """

    def __init__(
        self,
        loader: str,
        plan: Plan,
        running: Callable[[Plan, int, frozenset[int]], Running],
        faults: Callable[[Listing, list[int]], dict[int, str]],
    ) -> None:
        self.plan, self.epoch_batches = plan, plan.epoch_batches
        self._loader, self._open, self._faults = loader, running, faults
        self._running: Running | None = None
        self._step, self._left_out = 0, frozenset[int]()
        self.left_out: set[str] = set()  # the names of the images that were left out so far, by this process

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
            if faults := self._faults(self.plan.listing, sorted(set(rows.tolist()))):
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
        self.left_out |= {self.plan.listing.name(row) for row in faults}
        if self.plan.crop != "once" and len(self._left_out) == len(self.plan.listing):
            raise DataError(
                f"{self.plan.listing.root}: none of {len(self.plan.listing)} images can be decoded"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, and what was left out before it."""
        left_out = torch.tensor(sorted(self._left_out), dtype=torch.int64)
        return {"stream": self._fingerprint, "step": self._step, "left_out": left_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a place, of whichever process and of however many; DataError for the state of another stream."""
        if state.get("stream") != self._fingerprint:
            raise DataError(
                f"the place in {self.plan.listing.root} is that of another stream ({state.get('stream')}, this is "
                f"{self._fingerprint}): files, loader, batch, size, crop and seed must be the same; restore them or "
                "begin afresh with another --out"
            )
        self.close()
        self._step, self._left_out = int(state["step"]), frozenset(state["left_out"].tolist())
        self.left_out |= {self.plan.listing.name(row) for row in self._left_out}

    @cached_property
    def _fingerprint(self) -> str:
        return self.plan.fingerprint(self._loader)

    def close(self) -> None:
        """End what reads ahead; the next batch starts it again."""
        running, self._running = self._running, None
        if running is not None:
            running.close()  # type: ignore[attr-defined]
