"""Step 1: a GAN whose generator learns the inverse of the teacher, so that private images can stay at home."""

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mekd import data as datasets
from mekd.config import fingerprint
from mekd.engine.loop import Loop
from mekd.engine.run import Run
from mekd.engine.train import adam
from mekd.losses import DeprivatizationLoss
from mekd.nets import Discriminator, Generator
from mekd.pixels import to_float


class Passes(NamedTuple):
    """What torch.compile takes of a step, each a graph of its own: backward and the optimisers stay outside."""

    draw: Callable[[Tensor], Tensor]
    loss_d: Callable[[Tensor, Tensor], Tensor]
    loss_g: Callable[[Tensor, Tensor | None], Tensor]


def passes(generator: nn.Module, discriminator: nn.Module, loss: DeprivatizationLoss, mode: str = "off") -> Passes:
    """draw(z), loss_d(real, fake) and loss_g(fake, confidence); mode: off, default or reduce-overhead."""

    def draw(z: Tensor) -> Tensor:
        return generator(z)

    def loss_d(real: Tensor, fake: Tensor) -> Tensor:
        return loss.discriminator(discriminator(real), discriminator(fake))

    def loss_g(fake: Tensor, confidence: Tensor | None) -> Tensor:
        return loss(discriminator(fake), confidence)

    if mode == "off":
        return Passes(draw, loss_d, loss_g)
    compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False, mode=mode)
    return Passes(compiled(draw), compiled(loss_d), compiled(loss_g))


def take_step(
    ways: Passes, discriminator: nn.Module, adam_g: torch.optim.Optimizer, adam_d: torch.optim.Optimizer,
    real: Tensor, fake: Tensor, confidence: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    """One step of D and one of G, which share the images that G drew, its graph attached; returns the losses."""
    loss_d = ways.loss_d(real, fake.detach())
    adam_d.zero_grad()
    loss_d.backward()
    adam_d.step()

    discriminator.requires_grad_(False)
    loss_g = ways.loss_g(fake, confidence)
    adam_g.zero_grad()
    loss_g.backward()
    adam_g.step()
    discriminator.requires_grad_(True)
    return {"loss_d": loss_d, "loss_g": loss_g}


def deprivatize(run: Run) -> None:
    """Train G and D on the private images and on the teacher's answers to generated ones (Ma et al., section 3.2)."""
    config = run.config.deprivatize
    data = run.load_data()
    local = datasets.local_images(data, run.config.data.local_fraction, run.config.seed)
    oracle = run.open_oracle("deprivatize", data.image, config.budget)
    # A label says nothing about confidence: y = 1 for every image, and there is nothing to ask for.
    asks = config.alpha > 0 and run.config.oracle.response != "label"

    torch.manual_seed(run.config.seed + 1)
    generator = run.place(Generator(oracle.num_classes, run.config.data.size, data.image[0], config.width))
    discriminator = run.place(Discriminator(run.config.data.size, data.image[0], config.dropout))
    average = copy.deepcopy(generator)
    mode = run.config.engine.compile
    mode = ("default" if run.device.type == "cuda" else "off") if mode == "auto" else mode
    ways = passes(generator, discriminator, DeprivatizationLoss(config.alpha, config.minimax), mode)
    adam_g = adam(generator, config.lr)
    adam_d = adam(discriminator, config.lr)
    state = {
        "generator": generator,
        "discriminator": discriminator,
        "average": average,
        "adam_g": adam_g,
        "adam_d": adam_d,
    }
    depends = fingerprint(run.config, "deprivatize") | {"teacher": run.teacher_digest()}
    with Loop(
        run,
        "deprivatize",
        config.steps,
        state,
        depends,
        batch=config.batch,
        ledger=oracle.ledger,
        queries=(lambda step: config.batch) if asks else None,
    ) as loop:
        for _ in loop:
            torch.compiler.cudagraph_mark_step_begin()
            real = to_float(local[torch.randint(len(local), (config.batch,), device=run.device)])
            fake = ways.draw(torch.randn(config.batch, oracle.num_classes, device=run.device))
            confidence: Tensor | None = None
            if asks:
                with loop.clock("teacher"):
                    confidence = oracle.query(fake).confidence
            losses = take_step(ways, discriminator, adam_g, adam_d, real, fake, confidence)

            if config.ema:
                update_average(average, generator, config.ema)
            loop.log(**losses, **({} if confidence is None else {"confidence": confidence.mean()}))
    oracle.ledger.close()
    run.log(f"deprivatize: {config.steps} steps, {len(local)} private images, {loop.seconds:.0f} s, {oracle.ledger}")


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * module, running statistics too; counters are copied."""
    for mean, new in zip(average.state_dict().values(), module.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(new, 1 - decay)
        else:
            mean.copy_(new)
