"""mekd doctor --config FILE: what each stage of a run will need, from a few steps of the stages themselves."""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mekd import files, system
from mekd.config import Config
from mekd.data import TREES, Batches, listing
from mekd.data.photos import PhotoSource
from mekd.engine.deprivatize import deprivatize
from mekd.engine.distill import train_student
from mekd.engine.profile import peak_mb, peaks_mb
from mekd.engine.quote import queries_of
from mekd.engine.run import Run
from mekd.engine.teacher import classifier, train_teacher
from mekd.oracle.base import Oracle
from mekd.oracle.ledger import Ledger
from mekd.oracle.module import TorchOracle

SMALL, LARGE, STEPS = 4, 8, 2
IMAGENET = 1000


@dataclasses.dataclass(frozen=True)
class Need:
    """Of one stage: weights, MB at most with a small batch, and of its steps MB held whatever the batch, MB an image.

    image_s: seconds an image; batch, images: of a step, and in all.
    """

    stage: str
    weights: int
    once_mb: float
    held_mb: float
    image_mb: float
    image_s: float
    batch: int
    images: int

    @property
    def most_mb(self) -> float:
        """An estimate: what a step holds and each image of its batch, or what is done once, as the folding of G."""
        return max(self.once_mb, self.held_mb + self.batch * self.image_mb)

    @property
    def hours(self) -> float:
        """Time of all images, an estimate."""
        return self.images * self.image_s / 3600


class _Noise:
    """A data set of noise, of a shape that another one has."""

    def __init__(self, classes: int, image: tuple[int, int, int], device: torch.device) -> None:
        self.classes, self.image, self._device = tuple(map(str, range(classes))), image, device

    def training(self, batch: int) -> Batches:
        return _NoiseBatches(batch, self.image, self._device)

    local = training

    def once(self, part: str, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield _NoiseBatches(SMALL, self.image, self._device).take(0)

    def count(self, part: str) -> int:
        return SMALL

    def held_out(self) -> str:
        return ""

    def left_out(self) -> set[str]:
        return set()


class _NoiseBatches:
    def __init__(self, batch: int, image: tuple[int, int, int], device: torch.device) -> None:
        self._shape, self._device = (batch, *image), device

    def take(self, step: int) -> tuple[Tensor, Tensor]:
        images = torch.randint(0, 256, self._shape, dtype=torch.uint8, device=self._device)
        return images, torch.zeros(len(images), dtype=torch.int64, device=self._device)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class _Trial(Run):
    """A run over noise that says nothing; a teacher that is not there yet is played by an untrained one."""

    #: A stage, and what it calls after each step.
    marked: tuple[str, Callable[[], None]] = "", lambda: None

    @contextlib.contextmanager
    def profiled(self, stage: str) -> Iterator[Callable[[], object]]:
        yield self.marked[1] if stage == self.marked[0] else lambda: None

    @property
    def data(self) -> Any:
        return _Noise(self.num_classes, self.image, self.device)

    @property
    def teacher_digest(self) -> str:
        return super().teacher_digest if self.teacher_onnx.is_file() else "untrained"

    def open_oracle(self, account: Ledger, look: bool = False) -> Oracle:
        if self.teacher_onnx.is_file():
            return super().open_oracle(account, look)
        settings = self.config.oracle
        net = self.place(classifier(self.config.teacher, self.num_classes, self.image))
        return TorchOracle(
            _FromPixels(net), self.image, self.num_classes, settings.response, k=settings.k,
            decimals=settings.decimals, transport=settings.transport, ledger=account,
        )  # fmt: skip

    def log(self, line: str, screen: bool = True) -> None:
        pass


class _FromPixels(torch.nn.Module):
    """A network of pixels in [0, 1] behind images in [-1, 1]."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images + 1) / 2)


def forecast(config: Config, out: Path) -> int:
    """Print what a run of config needs on this machine; returns 0 if it fits into its memory and its data is there.

    out: the folder of the run; photos are decoded into it, for the run to find, and nothing else is written there.
    """
    with tempfile.TemporaryDirectory() as nowhere:  # no teacher lies there that was not given
        return _forecast(Run(config, Path(nowhere)), out)


def _forecast(run: Run, out: Path) -> int:
    config = run.config
    looked = print_data(run, out)
    if looked and not (run.given_teacher or config.teacher.checkpoint):
        run.data.count("test")  # of photos none is trained, and a tree needs val for it
    image = (3, config.data.size, config.data.size) if not looked else run.image
    given = run.teacher_onnx.is_file() or config.teacher.remote or run.origin is not None
    classes = run.num_classes if given else len(run.data.classes) if looked else IMAGENET
    print(f"\nthis configuration: {config.data.name}, {config.data.size} px, {classes} classes, on {run.device}")
    print(f"measured in steps of {SMALL} and {LARGE} images; MB at most and hours are estimates for one process\n")
    heads = ("weights", "MB once", "MB held", "MB/image", "ms/image", "batch", "MB at most", "images", "hours")
    print(f"{'stage':<38}" + "".join(f"{head:>11}" for head in heads), flush=True)
    needs = []
    for need in stages(run, classes, image):
        needs.append(need)
        print(
            f"{need.stage:<38}{need.weights / 1e6:>9.2f} M{need.once_mb:>11.0f}{need.held_mb:>11.0f}"
            f"{need.image_mb:>11.1f}{1e3 * need.image_s:>11.1f}{need.batch:>11}{need.most_mb:>11.0f}"
            f"{need.images:>11,}{need.hours:>11.1f}",
            flush=True,
        )
    print()
    for line in queries(config, classes, image):
        print(line)
    most, there = max(needs, key=lambda need: need.most_mb), memory_mb(run.device)
    fits = most.most_mb < there
    print(
        f"memory: {most.most_mb:.0f} MB for {most.stage}, {there:.0f} MB here: "
        + ("it fits" if fits else "it does NOT fit: choose a smaller batch, or several processes")
        + ("" if looked else f"; but data.path {config.data.path!r} was NOT looked at: it is not there")
    )
    return 0 if fits and looked else 1


def stages(run: Run, classes: int, image: tuple[int, int, int]) -> Iterator[Need]:
    """The needs of each stage of a run, measured one after the other."""
    config = run.config
    if not (run.given_teacher or config.teacher.checkpoint):
        name = f"teacher, {config.teacher.arch.removeprefix('torchvision:')}"
        yield _measured(run, classes, image, name, "teacher", ("teacher",), train_teacher)
    pair = ("generator", "discriminator")
    yield _measured(run, classes, image, "deprivatize, G and D", "deprivatize", pair, deprivatize)
    name = f"distill, {config.distill.student.removeprefix('torchvision:')} and G"
    yield _measured(run, classes, image, name, "distill", ("student",), train_student)
    asked = sum(count for _, count in queries_of(config))
    with tempfile.TemporaryDirectory() as folder:
        trial = _trial(run, Path(folder), classes, image, LARGE, STEPS)
        oracle = trial.open_oracle(Ledger("query"))

        def ask(m: int) -> None:
            oracle.query(torch.randint(0, 256, (m, *image), dtype=torch.uint8).to(run.device))

        ask(SMALL)
        small, large = (peak_mb(lambda m=m: ask(m), run.device) for m in (SMALL, LARGE))  # type: ignore[misc]
        begun = time.perf_counter()
        ask(LARGE)
        seconds = (time.perf_counter() - begun) / LARGE
    yield Need("of both, the teacher's answers", 0, 0.0, 0.0, (large - small) / (LARGE - SMALL), seconds, 256, asked)


def _measured(
    run: Run, classes: int, image: tuple[int, int, int], name: str, stage: str, parts: tuple[str, ...],
    work: Callable[[Run], object],
) -> Need:  # fmt: skip
    """A stage itself, for a few steps in a folder that is thrown away; parts: whose weights are counted."""

    def taken(batch: int, steps: int, memory: bool = False) -> tuple[tuple[float, float], dict[str, Any]]:
        """MB at most and within the steps, but for the first, where memory is looked at; and what the stage saved."""
        with tempfile.TemporaryDirectory() as folder:
            trial = _trial(run, Path(folder), classes, image, batch, steps, stage)
            if stage == "distill":
                deprivatize(trial)

            def marking(mark: Callable[[], None]) -> None:
                trial.marked = stage, mark
                work(trial)

            peaks = (0.0, 0.0)
            if memory:
                peaks = peaks_mb(marking, run.device)
            else:
                work(trial)
            return peaks, files.load(trial.checkpoint(stage))

    # The folding of G, which is no part of a step, may hold more than the steps of a small batch.
    ((_, small), _), ((once, large), saved) = (taken(batch, STEPS, memory=True) for batch in (SMALL, LARGE))
    few, many = (taken(LARGE, steps)[1]["seconds"] for steps in (STEPS, 2 * STEPS))
    image_mb = max(0.0, large - small) / (LARGE - SMALL)
    weights = sum(
        value.numel()
        for part in parts
        for key, value in saved["state"][part].items()
        if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))
    )
    settings = getattr(run.config, stage)
    images = settings.steps * settings.batch
    # Other work may make the fewer steps the slower ones: then the more of them are taken whole, which is too much.
    per_image = (many - few if many > few else many / 2) / STEPS / LARGE
    held = max(0.0, small - SMALL * image_mb)
    return Need(name, weights, once, held, image_mb, per_image, settings.batch, images)


def _trial(
    run: Run, out: Path, classes: int, image: tuple[int, int, int], batch: int, steps: int, stage: str = "query"
) -> _Trial:
    """The run with few steps of few images: everything else is as it will be."""
    config = run.config
    short: dict[str, Any] = {"batch": batch, "steps": steps}
    first = short if stage == "deprivatize" else {"batch": 2, "steps": 1}  # step 2 needs a generator, of any quality
    distilled: dict[str, Any] = {"holdout": batch, "eval_every": steps, "budget": None, "checkpoint": None}
    distilled |= {"replay": batch if config.distill.replay else 0, "coverage": 0.0, "store": None}
    teacher = None if config.teacher.onnx is None else str(Path(config.teacher.onnx).resolve())
    trial = _Trial(
        dataclasses.replace(
            config,
            teacher=dataclasses.replace(config.teacher, onnx=teacher, checkpoint=None, **short),
            deprivatize=dataclasses.replace(config.deprivatize, budget=None, generator=None, **first),
            distill=dataclasses.replace(config.distill, **short, **distilled),
            engine=dataclasses.replace(config.engine, progress=False, profile=False, track=[]),
        ),
        out,
    )
    trial.__dict__.update(num_classes=classes, image=image)
    return trial


def queries(config: Config, classes: int, image: tuple[int, int, int]) -> list[str]:
    """Queries and bytes by stage, as the ledger will count them, and the budget and the price where they are set."""
    pixel = 1 if config.oracle.transport == "uint8" else 4
    up = pixel * image[0] * image[1] * image[2]
    down = {"label": 8, "topk": 12 * config.oracle.k}.get(config.oracle.response, 4 * classes)
    lines = []
    for stage, count in queries_of(config):
        budget = getattr(config, stage).budget
        line = f"{stage}: {count:,} queries, {count * up / 1e9:.2f} GB up, {count * down / 1e9:.2f} GB down"
        if config.oracle.price is not None:
            line += f", cost {count * config.oracle.price:.2f}"
        if budget is not None:
            line += f", budget {budget:,}" + ("" if count <= budget else ": it will NOT reach to the end")
        lines.append(line)
    kept = (config.distill.replay or 0) * up / 1e9
    return lines + ([f"replay: {kept:.1f} GB of images on the disk"] if kept else [])


def print_data(run: Run, out: Path) -> bool:
    """Look through the data and print what is wrong with it; returns whether it is there."""
    settings = run.config.data
    if settings.name == "photos":
        photos = PhotoSource(run.config, run.device, 0, 1, out / "photos")
        run.__dict__["data"] = photos
        print("\n" + "\n".join(photos.notes()))
        for _, why in sorted(photos.reasons().items()):
            print(f"left out: {why}")
        return True
    if settings.name not in TREES:
        _ = run.data
        return True
    if not Path(settings.path or "").is_dir():
        print(f"\ndata.path {settings.path!r} is missing: {IMAGENET} classes are assumed, and no file was looked at")
        return False
    print()
    for split in ("train", *(("val",) if (Path(str(settings.path)) / "val").is_dir() else ())):
        listed = listing.read(str(settings.path), settings.name, split)
        readable, bad = listing.check(listed, "skip")
        line = f"{split}: {len(listed):,} images in {len(listed.classes)} classes"
        if bad:
            kept = set(readable.files)
            first = next(file for file in listed.files if file not in kept)
            line += f"; {bad} CANNOT be read, {files.shown(first)} first (data.on_error is {settings.on_error})"
        print(line)
    return True


def memory_mb(device: torch.device) -> float:
    """Of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e6
    return system.memory() / 1e6
