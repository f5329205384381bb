"""Both stages' steps and what they are made of, against the plain PyTorch way of doing the same work."""

import argparse
import copy
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench import plain
from bench.timing import interleaved, machine, spread, write_json
from mekd.config import DeprivatizeConfig
from mekd.engine import deprivatize, distill
from mekd.engine.profile import peak_mb
from mekd.engine.train import adam, computed_in, sgd
from mekd.losses import DeprivatizationLoss, MEKDLoss
from mekd.nets import Discriminator, Generator, build
from mekd.nets.frozen import FrozenGenerator, freeze
from mekd.oracle.export import Classifier, export
from mekd.oracle.ort import OnnxOracle

TAU, KL_TAU = 5.0, 4.0
NUISANCE = DeprivatizeConfig.nuisance
WIDE = DeprivatizeConfig.d_width
PRECISIONS = ("float32", "bfloat16")


class Work(NamedTuple):
    """One case: the plain way and ours in each precision, images of a call, and the pieces that ours is made of."""

    case: str
    images: int
    plain: dict[str, Callable[[], object]]
    ours: dict[str, Callable[[], object]]
    pieces: dict[str, Callable[[], object]]


class Setting(NamedTuple):
    """What is distilled: image side and channels, classes, the two networks, and the batches of both stages."""

    size: int
    channels: int
    classes: int
    teacher: str
    student: str
    batch: int
    gan_batch: int


SETTINGS = (
    Setting(32, 3, 10, "resnet32", "resnet8", 128, 64),
    Setting(64, 3, 10, "torchvision:resnet18", "torchvision:resnet18", 32, 32),
)


def trained(size: int, channels: int, classes: int) -> Generator:
    """A generator whose running statistics are its own."""
    generator = Generator(classes, size, channels, nuisance=NUISANCE)
    with torch.no_grad():
        for _ in range(3):
            generator(torch.randn(64, classes))
    return generator


def autocast(call: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """A call as it is, and within torch.autocast."""

    def narrow() -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return call()

    return {"float32": call, "bfloat16": narrow}


def oracle_of(net: nn.Module, image: tuple[int, int, int], folder: Path) -> OnnxOracle:
    """The network as the oracle that mekd would ask."""
    path = folder / "teacher.onnx"
    export(Classifier(copy.deepcopy(net)), path, image, "float")
    return OnnxOracle(path, "logits", image=image, transport="float")


def of(setting: Setting, folder: Path) -> Iterator[Work]:
    """The cases of one setting; both ways begin with the same weights."""
    size, channels, classes, *_ = setting
    m, image = setting.batch, (channels, size, size)
    teacher = build(setting.teacher, classes, channels).eval().requires_grad_(False)
    generator = trained(size, channels, classes)
    leaf, n = torch.randn(m, classes, requires_grad=True), torch.randn(m, NUISANCE)
    frozen = freeze(generator)
    drawers = {name: copy.deepcopy(frozen).to(getattr(torch, name)) for name in PRECISIONS}

    def pull(draw: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(draw(leaf, n).float().sum(), leaf)

    slow = plain.PlainGenerator(copy.deepcopy(generator)).eval().requires_grad_(False)
    yield Work(
        f"generator-{size}", m, autocast(pull(slow)), {name: pull(draw) for name, draw in drawers.items()},
        {"forward": torch.no_grad()(lambda: drawers["bfloat16"](leaf, n))},
    )  # fmt: skip
    oracle = oracle_of(teacher, image, folder)
    yield from distillation(setting, generator, drawers, teacher, oracle)
    for width in (1.0, WIDE):
        yield gan(setting, generator, width)


def distillation(
    setting: Setting, generator: Generator, drawers: dict[str, FrozenGenerator], teacher: nn.Module, oracle: OnnxOracle
) -> Iterator[Work]:
    """A step of the student with fresh queries, and one with replayed queries and kept pictures."""
    size, channels, classes, *_ = setting
    m = setting.batch
    theirs = build(setting.student, classes, channels)
    student = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
    slow = plain.PlainGenerator(copy.deepcopy(generator)).eval()  # its parameters require grad, as one leaves them
    optimizer, their_optimizer = sgd(student, 0.01, 5e-4), sgd(theirs, 0.01, 5e-4)
    losses = {name: MEKDLoss(draw, TAU, kl_tau=KL_TAU) for name, draw in drawers.items()}

    def latents() -> tuple[Tensor, Tensor]:
        return torch.randn(m, classes), torch.randn(m, NUISANCE)

    def by_hand() -> None:
        plain.distill_step(slow, teacher, theirs, their_optimizer, *latents(), TAU, KL_TAU)

    def drawn(precision: str) -> tuple[Tensor, Tensor]:
        code, n = latents()
        with torch.no_grad():
            return drawers[precision](code, n), n

    def fresh(precision: str) -> None:
        images, n = drawn(precision)
        target = {"n": n, **oracle.query(images).target}
        distill.take_step(student, optimizer, losses[precision], images, target, precision)

    images, n = drawn("float32")
    target = {"n": n, **oracle.query(images).target}
    kept = losses["float32"].teacher_image(classes, **target)

    def replayed(precision: str) -> None:
        distill.take_step(student, optimizer, losses[precision], images, {**target, "kept": kept}, precision)

    def only_student() -> None:
        with computed_in("bfloat16", images.device):
            logits = student(images)
        optimizer.zero_grad()
        logits.sum().backward()
        optimizer.step()

    logits = student(images).detach()

    def only_loss() -> None:
        a, b = losses["bfloat16"].terms(logits.clone().requires_grad_(), **target)
        (a + b).backward()

    pieces = {"student": only_student, "pictures and losses": only_loss}
    asked = {"draw": lambda: drawn("bfloat16"), "teacher": lambda: oracle.query(images)}
    for case, step, own in (("fresh", fresh, {**asked, **pieces}), ("replay", replayed, pieces)):
        ours = {name: functools.partial(step, name) for name in PRECISIONS}
        yield Work(f"distil-{case}-{size}", m, autocast(by_hand), ours, own)


def gan(setting: Setting, generator: Generator, width: float) -> Work:
    """A step of D, width times as wide as the paper's, and of G, without the information term: the shipped recipe."""
    size, channels, classes, *_ = setting
    count = setting.gan_batch
    real = torch.rand(count, channels, size, size) * 2 - 1
    sides = []
    for make in (plain.PlainGenerator, lambda g: g.to(memory_format=torch.channels_last)):
        g = make(copy.deepcopy(generator).requires_grad_(True).train())
        d = Discriminator(size, channels, 0.0, width)
        sides.append((g, d, *(adam(net, 2e-4) for net in (g, d))))
    (slow_g, slow_d, slow_adam_g, slow_adam_d), (g, d, adam_g, adam_d) = sides
    d.to(memory_format=torch.channels_last)
    compute = {name: deprivatize.passes(g, d, DeprivatizationLoss(0.0), precision=name) for name in PRECISIONS}

    def latents() -> tuple[Tensor, Tensor]:
        return torch.randn(count, classes), torch.randn(count, NUISANCE)

    def by_hand() -> None:
        plain.gan_step(slow_g, slow_d, None, slow_adam_g, slow_adam_d, real, *latents(), alpha=0.0)

    def step(precision: str) -> None:
        fake = compute[precision].draw(*latents())
        deprivatize.take_step(compute[precision], d, adam_g, adam_d, real, fake, None)

    fake = torch.rand(count, channels, size, size) * 2 - 1
    pieces = {
        "generator": lambda: compute["bfloat16"].draw(*latents()).sum().backward(),
        "discriminator": lambda: compute["bfloat16"].loss_d(real, fake).backward(),
    }
    ours = {name: functools.partial(step, name) for name in PRECISIONS}
    return Work(f"gan-{size}" + (f"-D{width:g}" if width != 1 else ""), count, autocast(by_hand), ours, pieces)


def oracle_224(folder: Path) -> Work:
    """ResNet-18 at 224 px, batch 8: ONNX Runtime against eager PyTorch in channels_last."""
    net = build("torchvision:resnet18", 1000, 3).eval()
    image = (3, 224, 224)
    oracle = oracle_of(net, image, folder)
    pixels = torch.rand(8, *image) * 2 - 1
    net = net.to(memory_format=torch.channels_last)
    last = pixels.contiguous(memory_format=torch.channels_last)
    eager = torch.inference_mode()(lambda: net(last))
    return Work("oracle-resnet18-224", 8, {"float32": eager}, {"float32": lambda: oracle.query(pixels)}, {})


def main(arguments: Sequence[str]) -> int:
    """Measure, print a line for each case, and write JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench steps", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="32 px alone, and without the oracle at 224 px")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    begun, rows = time.perf_counter(), []
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print("times in ms; faster: than the plain way in float32; shares: a piece of our bfloat16 step alone")
    print(f"{'case':<18}{'plain':>8}{'bf16':>8}{'ours':>8}{'bf16':>8}{'faster':>9}{'bf16':>8}{'images/s':>10}"
          f"{'plain MB':>10}{'ours MB':>9}  shares")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for work in cases(options.quick, Path(folder)):
            calls = {(who, p): call for who in ("plain", "ours") for p, call in getattr(work, who).items()}
            taken = interleaved({**calls, **work.pieces}, options.repeats)
            median = {name: spread(seconds)["median_s"] for name, seconds in taken.items()}
            base = median["plain", "float32"]
            narrowest = list(work.ours)[-1]
            shares = {name: round(median[name] / median["ours", narrowest], 3) for name in work.pieces}
            peak = {key: peak_mb(call) for key, call in calls.items()}
            for who, precision in calls:
                rows.append({
                    "case": work.case, "impl": who, "precision": precision, **spread(taken[who, precision]),
                    "images_s": work.images / median[who, precision], "vs_plain": base / median[who, precision],
                    "peak_mb": peak[who, precision],
                    "shares": shares if (who, precision) == ("ours", narrowest) else {},
                })  # fmt: skip
            times = {key: f"{1e3 * seconds:8.1f}" for key, seconds in median.items() if isinstance(key, tuple)}
            cells = [times.get((who, p), " " * 8) for who in ("plain", "ours") for p in PRECISIONS]
            faster = [f"{base / median['ours', p]:.2f}x" if p in work.ours else "" for p in PRECISIONS]
            split = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
            print(f"{work.case:<18}{''.join(cells)}{faster[0]:>9}{faster[1]:>8}"
                  f"{work.images / median['ours', narrowest]:10.0f}{peak['plain', 'float32']:10.0f}"
                  f"{max(mb for (who, _), mb in peak.items() if who == 'ours'):9.0f}  {split}", flush=True)  # fmt: skip
    if options.json:
        write_json(options.json, rows)
    print(f"{time.perf_counter() - begun:.0f} s")
    return 0


def cases(quick: bool, folder: Path) -> Iterator[Work]:
    """All of them, or the quick ones."""
    for setting in SETTINGS[:1] if quick else SETTINGS:
        yield from of(setting, folder)
    if not quick:
        yield oracle_224(folder)
