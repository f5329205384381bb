"""Both stages' steps and what they are made of, against the plain PyTorch way of doing the same work."""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench import plain
from bench.timing import interleaved, machine, spread, write_json
from mekd.engine import deprivatize, distill
from mekd.engine.profile import peak_mb
from mekd.engine.train import adam, sgd
from mekd.losses import DeprivatizationLoss, MEKDLoss
from mekd.nets import Discriminator, Generator, build
from mekd.nets.frozen import freeze
from mekd.oracle.export import Classifier, export
from mekd.oracle.ort import OnnxOracle

TAU, KL_TAU = 5.0, 4.0
QUICK = ("generator-32", "distil-fresh-32", "distil-replay-32", "gan-32")


class Work(NamedTuple):
    """One case: the plain way and ours, how many images a call takes, and the pieces that ours is made of."""

    case: str
    images: int
    plain: Callable[[], object]
    ours: Callable[[], object]
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
    generator = Generator(classes, size, channels)
    with torch.no_grad():
        for _ in range(3):
            generator(torch.randn(64, classes))
    return generator


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
    z = torch.randn(m, classes)

    slow = plain.PlainGenerator(copy.deepcopy(generator)).eval().requires_grad_(False)
    frozen = freeze(generator)
    leaf = z.clone().requires_grad_()

    def pull(draw: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(draw(leaf).sum(), leaf)

    yield Work(f"generator-{size}", m, pull(slow), pull(frozen), {"forward": torch.no_grad()(lambda: frozen(z))})

    oracle = oracle_of(teacher, image, folder)
    student = build(setting.student, classes, channels)
    theirs = copy.deepcopy(student)
    slow = plain.PlainGenerator(copy.deepcopy(generator)).eval()  # its parameters require grad, as one leaves them
    optimizer, their_optimizer = sgd(student, 0.01, 5e-4), sgd(theirs, 0.01, 5e-4)
    student = student.to(memory_format=torch.channels_last)
    loss = MEKDLoss(generator, TAU, kl_tau=KL_TAU)
    draw = freeze(generator)

    def by_hand() -> None:
        plain.distill_step(slow, teacher, theirs, their_optimizer, torch.randn(m, classes), TAU, KL_TAU)

    def drawn() -> Tensor:
        with torch.no_grad():
            return draw(torch.randn(m, classes))

    def fresh() -> None:
        images = drawn()
        distill.take_step(student, optimizer, loss, images, oracle.query(images).target)

    images = drawn()
    target = oracle.query(images).target
    logits = student(images).detach()

    def only_student() -> None:
        optimizer.zero_grad()
        student(images).backward(torch.ones_like(logits))
        optimizer.step()

    def only_loss() -> None:
        a, b = loss.terms(logits.clone().requires_grad_(), **target)
        (a + b).backward()

    pieces = {"student": only_student, "pictures and losses": only_loss}
    yield Work(
        f"distil-fresh-{size}", m, by_hand, fresh,
        {"draw": drawn, "teacher": lambda: oracle.query(images), **pieces},
    )  # fmt: skip
    kept = loss.teacher_image(classes, **target)
    yield Work(
        f"distil-replay-{size}", m, by_hand,
        lambda: distill.take_step(student, optimizer, loss, images, {**target, "kept": kept}), pieces,
    )  # fmt: skip

    count = setting.gan_batch
    real = torch.rand(count, *image) * 2 - 1
    sides = []
    for make in (lambda g: plain.PlainGenerator(g), lambda g: g):
        g, d = make(copy.deepcopy(generator).requires_grad_(True).train()), Discriminator(size, channels)
        adams = [adam(net, 2e-4) for net in (g, d)]
        sides.append((g, d, *adams))
    (slow_g, slow_d, slow_adam_g, slow_adam_d), (g, d, adam_g, adam_d) = sides
    compute = deprivatize.passes(g, d, DeprivatizationLoss())

    def slow_gan() -> None:
        latents = torch.randn(count, classes)
        plain.gan_step(slow_g, slow_d, teacher, slow_adam_g, slow_adam_d, real, latents)

    def gan() -> None:
        fake = compute.draw(torch.randn(count, classes))
        deprivatize.take_step(compute, d, adam_g, adam_d, real, fake, oracle.query(fake).confidence)

    def pull_g() -> None:
        g(torch.randn(count, classes)).sum().backward()

    fake = torch.rand(count, *image) * 2 - 1
    yield Work(
        f"gan-{size}", count, slow_gan, gan,
        {"generator": pull_g, "teacher": lambda: oracle.query(fake), "discriminator": lambda: d(fake).sum().backward()},
    )  # fmt: skip


def oracle_224(folder: Path) -> Work:
    """ResNet-18 at 224 px, batch 8: ONNX Runtime against eager PyTorch in channels_last."""
    net = build("torchvision:resnet18", 1000, 3).eval()
    image = (3, 224, 224)
    oracle = oracle_of(net, image, folder)
    pixels = torch.rand(8, *image) * 2 - 1
    net = net.to(memory_format=torch.channels_last)
    last = pixels.contiguous(memory_format=torch.channels_last)
    return Work("oracle-resnet18-224", 8, torch.inference_mode()(lambda: net(last)), lambda: oracle.query(pixels), {})


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
    print(
        f"{'case':<21}{'plain ms':>9}{'ours ms':>9}{'faster':>8}{'images/s':>10}{'plain MB':>10}{'ours MB':>9}  shares"
    )
    with tempfile.TemporaryDirectory() as folder:
        for work in cases(options.quick, Path(folder)):
            taken = interleaved({"plain": work.plain, "ours": work.ours, **work.pieces}, options.repeats)
            median = {name: spread(seconds)["median_s"] for name, seconds in taken.items()}
            shares = {name: round(median[name] / median["ours"], 3) for name in work.pieces}
            peak = {"plain": peak_mb(work.plain), "ours": peak_mb(work.ours)}
            for impl in ("plain", "ours"):
                rows.append({
                    "case": work.case, "impl": impl, **spread(taken[impl]), "images_s": work.images / median[impl],
                    "vs_plain": median["plain"] / median[impl], "peak_mb": peak[impl],
                    "shares": shares if impl == "ours" else {},
                })  # fmt: skip
            split = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
            print(f"{work.case:<21}{1e3 * median['plain']:9.1f}{1e3 * median['ours']:9.1f}"
                  f"{median['plain'] / median['ours']:7.2f}x{work.images / median['ours']:10.0f}"
                  f"{peak['plain']:10.0f}{peak['ours']:9.0f}  {split}", flush=True)  # fmt: skip
    if options.json:
        write_json(options.json, rows)
    print(f"{time.perf_counter() - begun:.0f} s; shares: a piece alone, as a share of our step")
    return 0


def cases(quick: bool, folder: Path) -> Iterator[Work]:
    """All of them, or the quick ones."""
    for setting in SETTINGS[:1] if quick else SETTINGS:
        yield from of(setting, folder)
    if not quick:
        yield oracle_224(folder)
