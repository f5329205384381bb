"""The user's own photos: files of any format, in any folders, without labels."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mekd import files
from mekd.config import Config
from mekd.data import arrays, listing
from mekd.data.arrays import DataError
from mekd.data.names import IMAGES, read_names
from mekd.data.photo_cache import PhotoCache
from mekd.seeds import generator_at

#: What is taken for a photo by its ending, in any case of its letters.
PHOTOS = (*IMAGES, ".heic", ".heif", ".hif")
#: Fewer photos than these are named in the log: D knows them by heart soon.
FEW = 100


def find(root: str | Path) -> tuple[list[str], list[str]]:
    """The photos under a folder, at any depth, in a fixed order; and sentences on what lies there besides.

    Nothing hidden is one, nor what a run drew into its folder, and a link is followed where it leads out of the folder.
    Raises DataError where there are none.
    """
    if not os.path.isdir(root):
        wrong = "which is no folder" if os.path.exists(root) else "no such folder"
        raise DataError(f"data.path is {str(root)!r}; {wrong}. Give the folder of your photos: --data.path FOLDER")
    walk, closed = listing.Walk(root, runs=False), list[str]()
    found = walk.images(str(root), PHOTOS, closed)
    notes = []
    if closed:
        notes.append(f"{len(closed)} folders cannot be read and were left out, {files.shown(closed[0])} first")
    if walk.runs:
        notes.append(f"{len(walk.runs)} folders of runs were left out, {files.shown(walk.runs[0])} first")
    if walk.others:
        there = f"{listing.counted(walk.others)}, {files.shown(walk.others[0])} first"
        notes.append(f"left out as no images by their endings: {there}")
    if walk.links:
        notes.append(files.shown(walk.about_links(root)))
    if not found:
        there = f"; it holds {listing.counted(walk.others)}" if walk.others else ""
        raise DataError(
            f"data.path is {str(root)!r}, which holds no image ({', '.join(PHOTOS)}){there}. Give the folder of your "
            "photos: --data.path FOLDER"
        )
    return found, notes


def _keep_apart(path: str, cache: Path) -> None:
    """DataError where a run would write among the photos: its pictures are none, and its cache may be deleted."""
    photos, own = Path(path).resolve(), cache.resolve()
    if photos == own.parent or photos.is_relative_to(own):
        raise DataError(
            f"data.path is {path!r}, where the run of --out {str(cache.parent)!r} keeps files of its own: move the "
            "photos to a folder of theirs, or say another --out"
        )


class PhotoSource:
    """Photos as mekd.data.sources.Source, all of them private; with evaluate.path, labelled ones for testing beside."""

    def __init__(self, config: Config, device: torch.device, rank: int, world: int, cache: Path | None) -> None:
        settings = config.data
        if settings.path is None:
            raise DataError("data.path is not set: give the folder of your photos with --data.path FOLDER")
        if cache is not None:
            _keep_apart(settings.path, cache)
        self._config, self._device, self._rank, self._world = config, device, rank, world
        self._cached = cache
        self.classes: tuple[str, ...] = ()
        self.image = (3, settings.size, settings.size)
        found, notes = find(settings.path)
        photos = self._open("photos", settings.path, found)
        self._images, self._rows, self._left_out = photos.images, photos.rows, photos.left_out
        assert settings.local_fraction is not None
        chosen = torch.arange(len(self._rows))
        if settings.local_fraction < 1:
            count = max(1, round(settings.local_fraction * len(self._rows)))
            chosen = torch.randperm(len(self._rows), generator=generator_at(config.seed, "local"))[:count]
            self._rows = self._rows[chosen]
        kept, held = arrays.kept_apart(len(self._rows), config.audit.holdout, config.seed)
        self._rows, self._held = self._rows[kept], self._rows[held]
        self._names_held = sorted(os.path.relpath(found[i], settings.path) for i in photos.kept[chosen][held].tolist())
        self._notes = [photos.describe(len(self._rows)), *notes]
        if settings.flip or settings.shift:
            ways = " and ".join(word for word, on in (("mirrored", settings.flip), ("shifted", settings.shift)) if on)
            self._notes.append(
                f"they count as photos {ways} too; where that makes another class of them, --data.flip false "
                "--data.shift false"
            )
        if len(self._rows) < FEW:
            self._notes.append(
                f"{len(self._rows)} photos are few: the generator can do little but repeat them, and what it draws is "
                "sent; some hundreds at least make a student, and samples/sent.png shows how near it comes to yours"
            )
        self._test: tuple[Tensor, Tensor, Tensor] | None = None
        if config.evaluate.enabled:
            self._test = self._labelled()

    def training(self, batch: int) -> Any:
        """Raises DataError: no teacher can be trained."""
        raise DataError("data.name is 'photos', which have no labels: no teacher can be trained with them")

    def local(self, batch: int) -> "_Photos":
        """As Source.local: shifted with data.shift and mirrored with data.flip; labels are 0."""
        return _Photos(self, batch)

    def once(self, part: str, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As Source.once; labels of photos are 0."""
        if part == "test":
            images, rows, labels = self._tested()
        else:
            images, rows = self._images, self._held if part == "held" else self._rows
            labels = torch.zeros(len(rows), dtype=torch.int64)
        mine = slice(len(rows) * self._rank // self._world, len(rows) * (self._rank + 1) // self._world)
        for own, named in zip(rows[mine].split(batch), labels[mine].split(batch), strict=True):
            yield images[own].to(self._device), named.to(self._device)

    def count(self, part: str) -> int:
        """As Source.count."""
        return len(self._tested()[1] if part == "test" else self._held if part == "held" else self._rows)

    def _tested(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._test is None:
            raise DataError(
                "data.name is 'photos', which have no labels: no teacher can be trained or tested with them. Give "
                "yours with --teacher.url ADDRESS, --teacher.onnx FILE or --teacher.python FILE.py:function, and "
                "labelled images, if you have any, with --evaluate.enabled true --evaluate.path FOLDER"
            )
        return self._test

    def held_out(self) -> str:
        """As Source.held_out: of the photos' names."""
        return hashlib.sha256(b"\0".join(map(os.fsencode, self._names_held))).hexdigest()[:16]

    def left_out(self) -> set[str]:
        """Nothing more than what notes() say: all files were decoded before the first step."""
        return set()

    def reasons(self) -> dict[str, str]:
        """The files that could not be read, and why."""
        return self._left_out

    def notes(self) -> list[str]:
        """As Source.notes."""
        return self._notes

    def _open(self, name: str, root: str | Path, found: list[str]) -> PhotoCache:
        settings = self._config.data
        folder = None if self._cached is None else self._cached / f"{name}-{settings.size}"
        return PhotoCache(folder, root, found, settings.size, settings.resize)

    def _labelled(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images, rows and labels of evaluate.path, whose folders have the names of the teacher's classes."""
        path = self._config.evaluate.path
        if path is None:
            raise DataError(
                "evaluate.enabled is true, and photos have no labels: name a folder of class folders with "
                "--evaluate.path FOLDER, or say --evaluate.enabled false"
            )
        if not Path(path).is_dir():
            wrong = "which is no folder" if Path(path).exists() else "no such folder"
            raise DataError(f"evaluate.path is {path!r}; {wrong}. It must be a folder of class folders")
        try:
            listed = listing.read(Path(path).parent, "folder", Path(path).name)
        except DataError as error:
            raise DataError(f"evaluate.path is {path!r}: {error}") from error
        cache = self._open("labelled", path, list(listed.files))
        if cache.left_out:
            self._left_out = self._left_out | {str(Path(path) / name): why for name, why in cache.left_out.items()}
            self._notes.append(f"evaluate.path {path!r}: {cache.describe(len(cache.rows))}")
        labels = torch.from_numpy(listed.labels)[cache.kept]
        self.classes = listed.classes
        names = self._config.oracle.classes
        if names is None:
            if all(name.isdecimal() for name in listed.classes):  # 10 comes after 9
                self.classes = tuple(sorted(listed.classes, key=int))
                labels = torch.tensor([self.classes.index(name) for name in listed.classes])[labels]
            self._notes.append(
                f"evaluate.path {path!r}: without oracle.classes its folders are taken for the teacher's classes in "
                f"this order: {', '.join(self.classes[:3])}, ...; --oracle.classes FILE lists them as the teacher does"
            )
        else:
            self.classes = tuple(read_names(names, "oracle.classes"))
            number = {name: i for i, name in enumerate(self.classes)}
            if strange := [name for name in listed.classes if name not in number]:
                raise DataError(
                    f"evaluate.path {path!r} has the class folder {strange[0]!r}, a name that oracle.classes "
                    f"{names!r} does not list; its folders are named as the teacher's classes"
                )
            labels = torch.tensor([number[name] for name in listed.classes])[labels]
        return cache.images, cache.rows, labels


class _Photos:
    """Batches of photos: which, and how they are moved, are functions of the seed and the step."""

    def __init__(self, source: PhotoSource, batch: int) -> None:
        self._source, self._batch = source, batch

    def take(self, step: int) -> tuple[Tensor, Tensor]:
        source, config = self._source, self._source._config
        generator = generator_at(config.seed, "local", step)
        drawn = torch.randint(len(source._rows), (self._batch,), generator=generator)
        mine = slice(self._batch * source._rank // source._world, self._batch * (source._rank + 1) // source._world)
        moves = arrays.moves(self._batch, source.image[-1], config.data.flip, generator, config.data.shift)
        images = source._images[source._rows[drawn[mine]]].to(source._device)
        return arrays.moved(images, moves[mine]), torch.zeros(len(images), dtype=torch.int64, device=images.device)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
