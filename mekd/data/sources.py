"""Where a stage gets its images: a data set in memory, or a tree of JPEGs or shards that is read as it goes."""

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mekd.config import Config
from mekd.data import arrays, listing, parquet
from mekd.data.arrays import Dataset
from mekd.data.listing import Listing
from mekd.data.photos import PhotoSource
from mekd.data.stream import Plan, Stream
from mekd.seeds import generator_at

TREES = ("folder", "webdataset", "tfrecord", "parquet")


class Batches(Protocol):
    """Endless batches of a process: images (m, ch, S, S), uint8, and labels (m,) int64; its place is its state."""

    def take(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step; steps are taken in order."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The place in the data."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a place."""
        ...


class Source(Protocol):
    """What the stages need of a data set; batch is that of all processes together, each gets its part."""

    classes: tuple[str, ...]

    @property
    def image(self) -> tuple[int, int, int]:
        """(ch, H, W)."""
        ...

    def training(self, batch: int) -> Batches:
        """All training images, shuffled, with labels."""
        ...

    def local(self, batch: int) -> Batches:
        """The private images, shuffled; their labels are not to be used."""
        ...

    def once(self, part: str, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Each image of "local", of "held" (audit.holdout) or of "test" once, over all processes."""
        ...

    def count(self, part: str) -> int:
        """The images of "training", "local", "held" or "test"."""
        ...

    def held_out(self) -> str:
        """A fingerprint of which images audit.holdout keeps apart: others, once files were added or removed."""
        ...

    def left_out(self) -> set[str]:
        """Their names; with several processes an image may be in the set of more than one."""
        ...

    def notes(self) -> list[str]:
        """Sentences on files and links that lie there and were not taken."""
        ...


def open_source(
    config: Config, device: torch.device, rank: int = 0, world: int = 1, cache: Path | None = None
) -> Source:
    """The data set of the configuration; cache: the folder where photos are kept decoded, beside their run.

    Raises DataError naming the file or the folder, and what to do.
    """
    config = replace(config, data=config.data.decided())
    if config.data.name is None:
        raise arrays.DataError(
            "data.path is not set: give the folder of your photos with --data.path FOLDER, or try everything with "
            "--data.name digits"
        )
    if config.data.name == "photos":
        return PhotoSource(config, device, rank, world, cache)
    if config.data.name in TREES:
        return TreeSource(config, device, rank, world)
    data = arrays.load(config.data.name, config.data.path, config.data.size).to(device)
    return ArraySource(data, config, rank, world)


class ArraySource:
    """A data set in memory: the rows of a batch, and how they are augmented, are functions of the seed and the step."""

    def __init__(self, data: Dataset, config: Config, rank: int, world: int) -> None:
        self.data, self.classes, self.image = data, data.classes, data.image
        self._config, self._rank, self._world = config, rank, world
        assert config.data.local_fraction is not None
        private = arrays.local_images(data, config.data.local_fraction, config.seed)
        kept, held = arrays.kept_apart(len(private), config.audit.holdout, config.seed)
        self._local, self._held = (private[rows.to(private.device)] for rows in (kept, held))
        self._unlabelled = torch.zeros(len(self._local), dtype=torch.int64, device=self._local.device)

    def training(self, batch: int) -> Batches:
        """As Source.training: shifted by up to an eighth, mirrored where data.flip says so."""
        return _Rows(self, self.data.train_images, self.data.train_labels, batch, "training")

    def local(self, batch: int) -> Batches:
        """As Source.local, shifted with data.shift and mirrored with data.flip; labels are 0."""
        return _Rows(self, self._local, self._unlabelled, batch, "local")

    def once(self, part: str, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As Source.once; labels of private images are 0."""
        images, labels = self.data.test_images, self.data.test_labels
        if part != "test":
            images = self._held if part == "held" else self._local
            labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        mine = self._mine(len(images))
        yield from zip(images[mine].split(batch), labels[mine].split(batch), strict=True)

    def count(self, part: str) -> int:
        """As Source.count."""
        data, own = self.data, {"local": self._local, "held": self._held}
        return len({"training": data.train_images, "test": data.test_images, **own}[part])

    def held_out(self) -> str:
        """As Source.held_out: of a data set that does not change."""
        return f"{len(self._held)} of {len(self.data.train_images)}"

    def left_out(self) -> set[str]:
        """Nothing is ever left out."""
        return set()

    def notes(self) -> list[str]:
        """Nothing is ever left out."""
        return []

    def _mine(self, count: int) -> slice:
        return slice(count * self._rank // self._world, count * (self._rank + 1) // self._world)


class _Rows:
    def __init__(self, source: ArraySource, images: Tensor, labels: Tensor, batch: int, name: str) -> None:
        self._source, self._images, self._labels, self._batch, self._name = source, images, labels, batch, name

    def take(self, step: int) -> tuple[Tensor, Tensor]:
        config, mine = self._source._config, self._source._mine(self._batch)
        generator = generator_at(config.seed, self._name, step)
        rows = torch.randint(len(self._images), (self._batch,), generator=generator)
        own = rows[mine].to(self._images.device)
        images, labels = self._images[own], self._labels[own]
        shift = self._name != "local" or config.data.shift
        moves = arrays.moves(self._batch, self._source.image[-1], config.data.flip, generator, shift)
        return arrays.moved(images, moves[mine]), labels

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class TreeSource:
    """A folder of class folders, or shards, under train/ and val/: decoded as they are needed, by data.loader."""

    def __init__(self, config: Config, device: torch.device, rank: int, world: int) -> None:
        settings = config.data
        if settings.path is None:
            raise arrays.DataError(f"data.path is not set; {settings.name} needs the folder that holds train/")
        assert settings.name is not None and settings.local_fraction is not None
        if settings.shift:
            raise arrays.DataError(
                f"data.shift is true, which data.name {settings.name!r} does not do: --data.shift false"
            )
        self._config, self._settings, self._device, self._rank, self._world = config, settings, device, rank, world
        # Both are imported by name alone: a loader that is missing is an error and not another loader.
        self._loader = importlib.import_module(
            {"dali": "mekd.data.dali_loader", "torchvision": "mekd.data.torchvision_loader"}[settings.loader]
        )
        self._training = listing.read(settings.path, settings.name, "train")
        labelled = Path(config.evaluate.path or Path(settings.path) / "val")
        self._test = None  # only evaluate reads it
        if config.evaluate.enabled:
            self._require_labels()
        beside = settings.name == "parquet" and bool(parquet.find(labelled.parent, labelled.name))
        if config.evaluate.enabled or beside or labelled.is_dir():
            self._test = listing.read(labelled.parent, settings.name, labelled.name)
            listing.same_classes(self._training, self._test)
        self._loader.check(self._training)
        private = listing.part(self._training, settings.local_fraction, config.seed)
        self._local, self._held = listing.apart(private, config.audit.holdout, config.seed)
        self.classes, self.image = self._training.classes, (3, settings.size, settings.size)
        self._left_out: set[str] = set()

    def training(self, batch: int) -> Batches:
        """As Source.training: random-resized crops, mirrored where data.flip says so."""
        return _Streamed(self._opened(self._part("training"), batch, "random"))

    def local(self, batch: int) -> Batches:
        """As Source.local: resized and cropped in the centre."""
        return _Streamed(self._opened(self._local, batch, "centre"))

    def once(self, part: str, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As Source.once: resized and cropped in the centre."""
        stream = self._opened(self._part(part), batch, "once")
        yield from stream
        stream.close()

    def count(self, part: str) -> int:
        """As Source.count."""
        return len(self._part(part))

    def _part(self, part: str) -> Listing:
        found = {"training": self._training, "local": self._local, "held": self._held, "test": self._test}[part]
        if part in ("training", "test"):
            self._require_labels()
        if found is None:
            raise arrays.DataError(
                f"{Path(str(self._settings.path)) / 'val'} is missing: labelled images belong there, or give their "
                "folder with --evaluate.path FOLDER"
            )
        return found

    def _require_labels(self) -> None:
        if not self._training.labelled:
            raise arrays.DataError(
                f"{self._training.root} has images without labels: no teacher can be trained or tested with them. Give "
                "yours with --teacher.url ADDRESS, --teacher.onnx FILE or --teacher.python FILE.py:function, and leave "
                "evaluate.enabled false"
            )

    def held_out(self) -> str:
        """As Source.held_out."""
        return self._held.digest()

    def left_out(self) -> set[str]:
        """As Source.left_out."""
        return self._left_out

    def notes(self) -> list[str]:
        """As Source.notes."""
        return [*self._training.notes, *(self._test.notes if self._test is not None else ())]

    def _opened(self, listed: Listing, batch: int, crop: str) -> Stream:
        settings, shuffled = self._settings, crop != "once"
        plan = Plan(
            listed, batch, settings.size, crop, bool(settings.flip) and shuffled, settings.resize,
            seed=self._config.seed if shuffled else 0, device=self._device, rank=self._rank, world=self._world,
            threads=settings.workers, on_error=settings.on_error,
        )  # fmt: skip
        stream = self._loader.open(plan)
        stream.left_out = self._left_out  # one set for all; the threads of a stream end with its last user
        return stream


class _Streamed:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.state_dict, self.load_state_dict = stream.state_dict, stream.load_state_dict

    def take(self, step: int) -> tuple[Tensor, Tensor]:
        return next(self._stream)
