"""mekd doctor --config FILE: what each stage of a run will need, measured in a few small steps before it starts."""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mekd import data
from mekd.config import Config
from mekd.data import TREES
from mekd.engine import deprivatize, distill
from mekd.engine.profile import peak_mb
from mekd.engine.run import Run, read_names
from mekd.engine.train import adam, sgd
from mekd.losses import DeprivatizationLoss, MEKDLoss
from mekd.nets import Discriminator, Generator, build
from mekd.nets.frozen import freeze
from mekd.oracle.export import Classifier
from mekd.oracle.ort import OnnxOracle

SMALL, LARGE, REPEATS = 2, 4, 3
IMAGENET = 1000


@dataclasses.dataclass(frozen=True)
class Need:
    """Of one stage: parameters, MB that it holds whatever the batch, MB and seconds an image, its batch and steps."""

    stage: str
    parameters: int
    held_mb: float
    image_mb: float
    image_s: float
    batch: int
    images: int

    @property
    def step_mb(self) -> float:
        """Memory of a step, an estimate: what is held, and each image of the batch."""
        return self.held_mb + self.batch * self.image_mb

    @property
    def hours(self) -> float:
        """Time of all images, an estimate."""
        return self.images * self.image_s / 3600


def forecast(config: Config) -> int:
    """Print what a run of config needs on this machine; returns 0 if it fits into its memory, else 1."""
    run = Run(config, Path("."))
    classes, image = num_classes(config), (channels(config), config.data.size, config.data.size)
    print(f"\nthis configuration: {config.data.name}, {config.data.size} px, {classes} classes, on {run.device}")
    print(f"measured in steps of {SMALL} and {LARGE} images; MB a step and hours are estimates for one process\n")
    heads = ("parameters", "MB held", "MB/image", "ms/image", "batch", "MB a step", "images", "hours")
    print(f"{'stage':<38}" + "".join(f"{head:>11}" for head in heads), flush=True)
    needs = []
    for need in stages(run, classes, image):
        needs.append(need)
        print(
            f"{need.stage:<38}{need.parameters / 1e6:>9.2f} M{need.held_mb:>11.0f}{need.image_mb:>11.1f}"
            f"{1e3 * need.image_s:>11.1f}{need.batch:>11}{need.step_mb:>11.0f}{need.images:>11,}{need.hours:>11.1f}",
            flush=True,
        )
    print()
    for line in queries(config, classes, image):
        print(line)
    most, there = max(needs, key=lambda need: need.step_mb), memory_mb(run.device)
    fits = most.step_mb < there
    print(
        f"memory: {most.step_mb:.0f} MB for {most.stage}, {there:.0f} MB here: "
        + ("it fits" if fits else "it does NOT fit: choose a smaller batch, or several processes")
    )
    return 0 if fits else 1


def stages(run: Run, classes: int, image: tuple[int, int, int]) -> Iterator[Need]:
    """The needs of each stage of a run, measured one after the other."""
    config, device = run.config, run.device

    def images(m: int) -> Tensor:
        return torch.rand(m, *image, device=device) * 2 - 1

    teacher_steps = config.teacher.steps * config.teacher.batch
    if not (config.teacher.onnx or config.teacher.checkpoint):
        net = run.place(_classifier(config, classes, image))
        optimizer = sgd(net, 0.0, 0.0)

        def learn(m: int) -> None:
            loss = F.cross_entropy(net((images(m) + 1) / 2), torch.zeros(m, dtype=torch.int64, device=device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        name = f"teacher, {config.teacher.arch.removeprefix('torchvision:')}"
        yield _need(name, learn, [net], 3, device, config.teacher.batch, teacher_steps)

    step1, step2 = config.deprivatize, config.distill
    generator = run.place(Generator(classes, image[1], image[0], step1.width))
    discriminator = run.place(Discriminator(image[1], image[0], step1.dropout))
    ways = deprivatize.passes(generator, discriminator, DeprivatizationLoss(step1.alpha))
    adams = adam(generator, 0.0), adam(discriminator, 0.0)

    def compete(m: int) -> None:
        fake = ways.draw(torch.randn(m, classes, device=device))
        deprivatize.take_step(ways, discriminator, *adams, images(m), fake, torch.ones(m, device=device))

    nets = [generator, discriminator]
    # Weights, gradients and Adam's two; the average of G is a fifth copy of its weights.
    yield _need("deprivatize, G and D", compete, nets, 5, device, step1.batch, step1.steps * step1.batch)

    asked = sum(count for _, count in asks(config))
    if config.teacher.onnx and Path(config.teacher.onnx).is_file():
        oracle = open_teacher(config, image)

        def ask(m: int) -> None:
            oracle.query(images(m))

        size = sum(p.stat().st_size for p in [Path(config.teacher.onnx)]) / 1e6
        need = _need("the teacher's answers, ONNX Runtime", ask, [], 1, device, 256, asked)
        yield dataclasses.replace(need, held_mb=need.held_mb + size)
    else:
        answering = run.place(_classifier(config, classes, image)).eval()

        @torch.inference_mode()
        def answer(m: int) -> None:
            answering((images(m) + 1) / 2)

        yield _need("the teacher's answers, in torch", answer, [answering], 1, device, 256, asked)

    student = run.place(build(step2.student, classes, image[0]))
    loss = MEKDLoss(generator.eval().requires_grad_(False), **step2.loss_options())
    drawing, optimizer = freeze(generator), sgd(student, 0.0, 0.0)
    target = {"logits": torch.randn(LARGE, classes, device=device)}

    def imitate(m: int) -> None:
        with torch.no_grad():
            drawn = images(m) if step2.replay else drawing(torch.randn(m, classes, device=device))
        wanted = {name: value[:m] for name, value in target.items()}
        distill.take_step(student, optimizer, loss, drawn, wanted, step2.precision)

    name = f"distill, {step2.student.removeprefix('torchvision:')} and G"
    yield _need(name, imitate, [student], 3, device, step2.batch, step2.steps * step2.batch)


def asks(config: Config) -> list[tuple[str, int]]:
    """The queries of each stage, exactly."""
    step1, step2 = config.deprivatize, config.distill
    silent = step1.alpha == 0 or config.oracle.response == "label"
    second = step2.replay or step2.steps * step2.batch
    return [("deprivatize", 0 if silent else step1.steps * step1.batch), ("distill", step2.holdout + second)]


def queries(config: Config, classes: int, image: tuple[int, int, int]) -> list[str]:
    """Queries and bytes by stage, as the ledger will count them, and the budget and the price where they are set."""
    pixel = 1 if config.oracle.transport == "uint8" else 4
    up = pixel * image[0] * image[1] * image[2]
    down = {"label": 8, "topk": 12 * config.oracle.k}.get(config.oracle.response, 4 * classes)
    lines = []
    for (stage, count), budget in zip(asks(config), (config.deprivatize.budget, config.distill.budget), strict=True):
        line = f"{stage}: {count:,} queries, {count * up / 1e9:.2f} GB up, {count * down / 1e9:.2f} GB down"
        if config.oracle.price is not None:
            line += f", cost {count * config.oracle.price:.2f}"
        if budget is not None:
            line += f", budget {budget:,}" + ("" if count <= budget else ": it will NOT reach to the end")
        lines.append(line)
    kept = config.distill.replay * up / 1e9
    return lines + ([f"replay: {kept:.1f} GB of images on the disk"] if kept else [])


def num_classes(config: Config) -> int:
    """The teacher's classes: of its file, else of the data; ImageNet's where a tree is not there yet."""
    settings = config.data
    if config.teacher.onnx:
        return open_teacher(config, (channels(config), settings.size, settings.size)).num_classes
    if settings.name in TREES and not Path(settings.path or "").is_dir():
        print(f"\ndata.path {settings.path!r} is missing: {IMAGENET} classes are assumed, and no file was looked at")
        return IMAGENET
    if settings.name in TREES:
        return look_through(config)
    return len(data.load(settings.name, settings.path, settings.size).classes)


def channels(config: Config) -> int:
    """Of the images."""
    settings = config.data
    if settings.name in TREES:
        return 3
    return data.load(settings.name, settings.path, settings.size).image[0]


def look_through(config: Config) -> int:
    """Print how many files a tree has, and which of them are cut short or no images; returns its classes."""
    from mekd.data import listing

    print()
    classes = 0
    for split in ("train", "val"):
        listed = listing.read(str(config.data.path), config.data.name, split)
        readable, bad = listing.check(listed, "skip")
        classes = len(listed.classes)
        line = f"{split}: {len(listed):,} images in {classes} classes"
        if bad:
            kept = set(readable.files)
            first = next(file for file in listed.files if file not in kept)
            line += f"; {bad} CANNOT be read, {first} first (data.on_error is {config.data.on_error})"
        print(line)
    return classes


def open_teacher(config: Config, image: tuple[int, int, int]) -> OnnxOracle:
    """The user's classifier with an account in memory: what it answers here is no query of a run."""
    settings = config.oracle
    names = None if settings.classes is None else read_names(settings.classes)
    return OnnxOracle(
        str(config.teacher.onnx), settings.response, providers=settings.provider, image=image, classes=names,
        num_classes=None if names is None else len(names), output=settings.output, mean=settings.mean,
        std=settings.std, k=settings.k, decimals=settings.decimals, transport=settings.transport,
        batch=settings.batch, precision=settings.precision,
    )  # fmt: skip


def _classifier(config: Config, classes: int, image: tuple[int, int, int]) -> Classifier:
    settings = config.teacher
    return Classifier(build(settings.arch, classes, image[0]), settings.mean, settings.std, settings.resize)


def _need(
    stage: str, step: Callable[[int], None], nets: list[nn.Module], copies: int, device: torch.device,
    batch: int, images: int,
) -> Need:  # fmt: skip
    """copies: of the weights that a step holds: themselves, gradients, the optimiser's."""
    count = sum(p.numel() for net in nets for p in net.parameters())
    step(SMALL)  # the optimiser's state, and what is chosen at a first call, are no part of a step
    small, large = (peak_mb(lambda m=m: step(m), device) for m in (SMALL, LARGE))  # type: ignore[misc]
    taken = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        step(LARGE)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begun)
    seconds = sorted(taken)[REPEATS // 2] / LARGE
    return Need(stage, count, 4e-6 * copies * count, max(0.0, large - small) / (LARGE - SMALL), seconds, batch, images)


def memory_mb(device: torch.device) -> float:
    """Of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e6
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6
