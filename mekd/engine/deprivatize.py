"""Step 1: a GAN whose generator learns the inverse of the teacher, so that private images can stay at home."""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mekd.config import fingerprint
from mekd.engine import parallel
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


class _Judge(nn.Module):
    """The loss of D: one forward of both kinds of images, so that DistributedDataParallel sees one a step."""

    def __init__(self, discriminator: nn.Module, loss: DeprivatizationLoss) -> None:
        super().__init__()
        self.discriminator, self.loss = discriminator, loss

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        return self.loss.discriminator(self.discriminator(real), self.discriminator(fake))


def passes(generator: nn.Module, discriminator: nn.Module, loss: DeprivatizationLoss, mode: str = "off") -> Passes:
    """draw(z), loss_d(real, fake) and loss_g(fake, confidence); mode: off, default or reduce-overhead.

    With several processes the gradients of G and of D are averaged over them, each in its own backward.
    """

    def loss_g(fake: Tensor, confidence: Tensor | None) -> Tensor:
        return loss(discriminator(fake), confidence)

    judge = _Judge(discriminator, loss)
    if mode == "off":
        return Passes(parallel.data_parallel(generator), parallel.data_parallel(judge), loss_g)
    compiled: Any = functools.partial(torch.compile, fullgraph=True, dynamic=False, mode=mode)
    draw, loss_d = parallel.data_parallel(compiled(generator)), parallel.data_parallel(compiled(judge))
    return Passes(draw, loss_d, compiled(loss_g))


def take_step(
    ways: Passes, discriminator: nn.Module, adam_g: torch.optim.Optimizer, adam_d: torch.optim.Optimizer,
    real: Tensor, fake: Tensor, confidence: Tensor | None, other: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """One step of D and one of G, which learns from fake, its graph attached; returns the losses.

    D learns from the same images, or from other ones where they are given.
    """
    loss_d = ways.loss_d(real, fake.detach() if other is None else other)
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
    mine = parallel.share("deprivatize.batch", config.batch)
    data = run.open_data()
    private = data.local(config.batch)
    oracle = run.open_oracle("deprivatize", data.image, config.budget)
    classes = oracle.num_classes
    # A label says nothing about confidence: y = 1 for every image, and there is nothing to ask for.
    asks = config.alpha > 0 and run.config.oracle.response != "label"

    torch.manual_seed(run.config.seed + 1)
    generator = run.place(Generator(classes, run.config.data.size, data.image[0], config.width))
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
    parallel.dropout_apart(run.config.seed)
    with Loop(
        run,
        "deprivatize",
        config.steps,
        state,
        depends,
        batch=config.batch,
        own={"data": private},
        ledger=oracle.ledger,
        queries=(lambda step: mine) if asks else None,
    ) as loop:
        for step in loop:
            torch.compiler.cudagraph_mark_step_begin()
            with loop.clock("data"):
                real = to_float(private.take(step)[0])
            other: Tensor | None = None
            if config.latents == "fresh":
                with torch.no_grad():
                    other = ways.draw(run.latents("discriminator", step, config.batch, classes)).clone()
            fake = ways.draw(run.latents("generator", step, config.batch, classes))
            confidence: Tensor | None = None
            if asks:
                with loop.clock("teacher"):
                    confidence = oracle.query(fake).confidence
            losses = take_step(ways, discriminator, adam_g, adam_d, real, fake, confidence, other)

            if config.ema:
                update_average(average, generator, config.ema)
            loop.log(**losses, **({} if confidence is None else {"confidence": confidence.mean()}))
    oracle.ledger.close()
    run.log(
        f"deprivatize: {config.steps} steps, {data.count('local')} private images, {loop.seconds:.0f} s, "
        f"{parallel.account(oracle.ledger)}"
    )
    run.log_skipped(data)


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * module, running statistics too; counters are copied."""
    for mean, new in zip(average.state_dict().values(), module.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(new, 1 - decay)
        else:
            mean.copy_(new)
