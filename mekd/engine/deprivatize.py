"""Step 1: a GAN whose generator learns the inverse of the teacher, so that private images can stay at home."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mekd.config import DeprivatizeConfig
from mekd.data import arrays
from mekd.engine import after, dp, parallel, private
from mekd.engine.checkpoint import Checkpoint, steps
from mekd.engine.feeds import Draw, Fresh, Images, Unasked, fresh
from mekd.engine.run import Run
from mekd.engine.runlog import RunLog
from mekd.engine.train import adam, computed_in
from mekd.errors import MekdError
from mekd.fingerprint import asks
from mekd.losses import DeprivatizationLoss
from mekd.nets import Discriminator
from mekd.oracle.ledger import describe
from mekd.pixels import to_float
from mekd.seeds import generator_at

#: The loss of a discriminator that cannot tell real images from drawn ones: 2 log 2.
CHANCE = 2 * math.log(2)
#: The distance to the nearest private image, as a share of that between private images, below which G repeats them:
#: 0.79 where a student came to 57 %, 0.91 and more where it learnt what it could (docs/results.md).
BY_HEART = 0.85
#: The mean sign of D's logits for private images above which it sees more of them augmented, the steps between two
#: looks at it, and the images from none augmented to all.
SURE, EVERY, RAMP = 0.6, 4, 50_000


class Passes(NamedTuple):
    """What torch.compile takes of a step, each a graph of its own: backward and the optimisers stay outside."""

    draw: Callable[[Tensor, Tensor], Tensor]
    loss_d: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
    loss_g: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


class Classes(NamedTuple):
    """The classes (m,) of a step's private, drawn and other drawn images, as take_step has them, for D to judge by."""

    real: Tensor
    fake: Tensor
    other: Tensor | None = None


class _Judge(nn.Module):
    """The loss of D: one forward of both kinds of images, so that DistributedDataParallel sees one a step."""

    def __init__(self, discriminator: nn.Module, loss: DeprivatizationLoss) -> None:
        super().__init__()
        self.discriminator, self.loss = discriminator, loss

    def forward(self, real: Tensor, fake: Tensor, of_real: Tensor | None, of_fake: Tensor | None) -> Tensor:
        return self.loss.discriminator(self.discriminator(real, of_real), self.discriminator(fake, of_fake))


def passes(
    generator: nn.Module, discriminator: nn.Module, loss: DeprivatizationLoss, mode: str = "off",
    precision: str = "float32",
) -> Passes:  # fmt: skip
    """draw(code, n), loss_d(real, fake, of_real, of_fake) and loss_g(fake, confidence, of_fake), all float32 outside.

    of_real, of_fake: the classes of the images, or None.
    mode: off, default or reduce-overhead; precision: of the convolutions, float32 or bfloat16. With several processes
    the gradients of G and of D are averaged over them, each in its own backward.
    """

    def loss_g(fake: Tensor, confidence: Tensor | None, of_fake: Tensor | None) -> Tensor:
        return loss(discriminator(fake, of_fake), confidence)

    def computed(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def in_precision(*arguments: Any) -> Tensor:
            with computed_in(precision, device):
                return call(*arguments).float()

        return in_precision

    device = next(generator.parameters()).device
    compiled: Any = lambda part: part  # noqa: E731
    if mode != "off":
        compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False, mode=mode)
    draw, loss_d = (parallel.data_parallel(compiled(part)) for part in (generator, _Judge(discriminator, loss)))
    return Passes(computed(draw), computed(loss_d), computed(compiled(loss_g)))


def take_step(
    compute: Passes, discriminator: nn.Module, adam_g: torch.optim.Optimizer, adam_d: torch.optim.Optimizer,
    real: Tensor, fake: Tensor, confidence: Tensor | None, other: Tensor | None = None,
    classes: Classes | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """One step of D and one of G, which learns from fake, its graph attached; returns the losses.

    D learns from the same images, or from other ones where they are given.
    """
    of_real, of_fake, of_other = classes or (None, None, None)
    if other is None:
        other, of_other = fake.detach(), of_fake
    loss_d = compute.loss_d(real, other, of_real, of_other)
    adam_d.zero_grad()
    loss_d.backward()
    adam_d.step()
    return {"loss_d": loss_d, "loss_g": step_generator(compute, discriminator, adam_g, fake, confidence, of_fake)}


def step_generator(
    compute: Passes, discriminator: nn.Module, adam_g: torch.optim.Optimizer, fake: Tensor,
    confidence: Tensor | None, of_fake: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One step of G, which learns from fake, its graph attached; returns the loss."""
    discriminator.requires_grad_(False)
    loss_g = compute.loss_g(fake, confidence, of_fake)
    adam_g.zero_grad()
    loss_g.backward()
    adam_g.step()
    discriminator.requires_grad_(True)
    return loss_g


def deprivatize(run: Run) -> None:
    """Train G and D on the private images and on the teacher's answers to generated ones (Ma et al., section 3.2)."""
    config = run.config.deprivatize
    if config.generator is not None:
        run.log(f"deprivatize: the generator of {config.generator}, {config.steps} steps, {run.image[-1]} px")
        if run.config.distill.store is None:
            with contextlib.suppress(MekdError):  # without private images there is nothing to show beside
                _show_what_is_sent(run)
            parallel.barrier()
        return
    images = Images(run.data.local(config.batch))  # with deprivatize.dp unused: there each image is drawn by chance
    noisy = None if config.dp is None else dp.Noisy(run)
    torch.manual_seed(run.config.seed + 1)
    generator = run.place(run.new_generator())
    known = 0 if config.after is None else run.num_classes
    discriminator = run.place(Discriminator(run.config.data.size, run.image[0], config.dropout, config.d_width, known))
    loss = DeprivatizationLoss(config.alpha, config.minimax)
    compute = passes(generator, discriminator, loss, run.config.engine.compile, config.precision)
    adam_g, adam_d = adam(generator, config.lr), adam(discriminator, config.lr)
    state = {"generator": generator, "discriminator": discriminator, "adam_g": adam_g, "adam_d": adam_d}
    if config.ema:
        average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
        state["average"] = average
    seen: dict[str, Any] = {"share": 0.0}  # of the images that D sees augmented
    if config.augment:
        state["seen"] = seen
    if noisy is not None:
        state["dp"] = noisy.state
    namer = None if config.after is None else after.begin(run, state)
    parallel.dropout_apart(run.config.seed)

    def drawn(step: int) -> tuple[Tensor, Tensor]:
        code, n = run.latents("generator", step, config.batch)
        return compute.draw(code, n), n

    def named(purpose: str, step: int) -> Tensor:
        """The classes of drawn images: their codes' largest entries."""
        return run.latents(purpose, step, config.batch).code.argmax(1)

    with answers(run, drawn) as feed:
        feeds = {"data": images, "answers": feed}
        log = RunLog(run, "deprivatize", config.steps, config.batch, feeds, lr="deprivatize.lr")
        checkpoint = Checkpoint(run, "deprivatize", state, feeds, run.depends("deprivatize"))
        done = checkpoint.restore(log)
        if noisy is not None:
            noisy.check(run)
        if run.config.audit.holdout and done < config.steps:
            _keep_what_is_held(run, done)
        for step in steps(checkpoint, log):
            # A narrow D may stand at chance for half of the steps, and leave it: the digits' does.
            if step == max(2 * config.steps // 3, run.config.engine.log_every):
                _say_chance(run, step, log.means.get("loss_d", 0.0))
            torch.compiler.cudagraph_mark_step_begin()
            private_images = None if noisy is not None else images.take(step)[0]  # before anything is paid
            other: Tensor | None = None
            if config.latents == "fresh":
                with torch.no_grad():
                    other = compute.draw(*run.latents("discriminator", step, config.batch)).clone()
            asked = feed.take(step)
            fake, share = asked.images, seen["share"]
            if private_images is None:
                assert noisy is not None
                judged = fake.detach() if other is None else other
                losses = {"loss_d": noisy.step_discriminator(run, discriminator, adam_d, judged, step)}
                losses["loss_g"] = step_generator(compute, discriminator, adam_g, fake, asked.confidence)
            else:
                real, classes = to_float(private_images), None
                if namer is not None:
                    of_other = None if other is None else named("discriminator", step)
                    classes = Classes(namer(private_images), named("generator", step), of_other)
                if config.augment:
                    real, fake = (augmented(run, x, step, kind, share) for x, kind in ((real, "real"), (fake, "fake")))
                    if other is not None:
                        other = augmented(run, other, step, "other", share)
                losses = take_step(compute, discriminator, adam_g, adam_d, real, fake, asked.confidence, other, classes)
                if config.augment:
                    losses["augmented"] = torch.tensor(share)
                    if step % EVERY == 0:
                        of_real = None if classes is None else classes.real
                        seen["share"] = adapted(share, discriminator, real, of_real, config)

            if config.ema:
                average.update_parameters(generator)
            log.add(**losses, **({} if asked.confidence is None else {"confidence": asked.confidence.mean()}))
    run.log(
        f"deprivatize: {config.steps} steps, {run.data.count('local')} private images, {log.seconds:.0f} s, "
        f"{describe(run.asked('deprivatize'))}"
        + ("" if noisy is None else f"; (epsilon, delta) = {dp.words(noisy.spent, config.steps)}")
    )
    if noisy is not None:
        run.write_json("dp.json", noisy.about(config.steps))
    else:
        _show_what_is_sent(run)
    parallel.barrier()
    run.log_skipped()


def _keep_what_is_held(run: Run, done: int) -> None:
    """Keep in held.json which images stay away from the steps to come, for the audit; others may have been before."""
    before, now = (run.read_json("held.json") or {"held": []})["held"] if done else [], run.data.held_out()
    if before and now not in before:
        run.log(
            "deprivatize: files of data.path were added or removed, so that audit.holdout keeps other images from step "
            "1 than it did before: the audit will say nothing of membership"
        )
    run.write_json("held.json", {"held": [*before, *([] if now in before else [now])]})


def augmented(run: Run, images: Tensor, step: int, kind: str, share: float) -> Tensor:
    """This process's images (m, ch, S, S) of a batch, a share of them shifted, and without a square of half the side.

    Edges are repeated. With gradients, and for real and drawn images alike: differentiable augmentation (Zhao et al.,
    2020).
    """
    size, batch = images.shape[-1], run.config.deprivatize.batch
    generator, mine = generator_at(run.config.seed, f"augment-{kind}", step), parallel.part(batch)
    how = arrays.moves(batch, size, False, generator)[mine]
    corner = torch.randint(-(size // 4), size - size // 4 + 1, (2, batch, 1), generator=generator)[:, mine]
    chosen = torch.rand(batch, generator=generator)[mine] < share
    rows, columns = ((span >= 0) & (span < size // 2) for span in torch.arange(size) - corner)
    kept = ~(rows[:, :, None] & columns[:, None, :] & chosen[:, None, None])
    return arrays.moved(images, how * chosen[:, None]) * kept[:, None].to(images.device)


@torch.no_grad()
def adapted(
    share: float, discriminator: nn.Module, real: Tensor, of_real: Tensor | None, config: DeprivatizeConfig
) -> float:
    """The next share of augmented images: more where D takes too many of the private ones (m, ch, S, S) for real.

    of_real: their classes (m,), where D is told them. A D that does so knows the images by heart: adaptive
    discriminator augmentation (Karras et al., 2020), whose heuristic is the mean sign of D's logits.
    """
    with computed_in(config.precision, real.device):
        signs = discriminator(real, of_real).sign().sum()
    total, count = parallel.sum_of(float(signs), len(real))
    change = EVERY * config.batch / RAMP
    return min(1.0, max(0.0, share + (change if total / count > SURE else -change)))


def _show_what_is_sent(run: Run) -> None:
    """Draw samples/sent.png, once for each generator: a longer step 1 makes another one."""
    if parallel.rank() or (run.read_json("sent.json") or {}).get("generator") == run.generator_digest:
        return
    found = private.show_what_is_sent(run)
    among = found.get("private_to_private")
    run.log(
        f"deprivatize: what will be sent is {found['sent_to_private']:.2f} from the nearest private image (median; 0 "
        "is the same picture, 1.4 has nothing in common)"
        + ("" if among is None else f", private images {among:.2f} from the nearest other one")
        + ("; samples/sent.png shows both" if (run.out / "samples" / "sent.png").exists() else "")
    )
    if among is not None and found["sent_to_private"] < BY_HEART * among:
        instead = "a narrower --deprivatize.d_width" if run.config.deprivatize.augment else "--deprivatize.augment true"
        run.log(
            "deprivatize: that is nearer than private images are to each other: the generator seems to know them by "
            "heart, draws little else, and shows them to the teacher. Start anew with another --out and fewer "
            f"--deprivatize.steps, or with {instead}"
        )


def _say_chance(run: Run, step: int, loss: float) -> None:
    """Say where D is no better than chance: G learns nothing from it, and a student nothing from G."""
    if loss < CHANCE - 0.04:
        return
    run.log(
        f"deprivatize: at step {step} the discriminator's loss is {loss:.3f}, and {CHANCE:.3f} is chance: it teaches "
        "the generator next to nothing. It may yet leave it; where it does not, start anew with another --out and a "
        "wider --deprivatize.d_width, --deprivatize.dropout 0 or a larger --deprivatize.lr"
    )


@contextlib.contextmanager
def answers(run: Run, draw: Draw) -> Iterator[Fresh | Unasked]:
    """The images that G learns from, and what the teacher says of them where that says more than a label."""
    config = run.config.deprivatize
    mine = parallel.share("deprivatize.batch", config.batch)
    if not asks(run.config):
        yield Unasked(draw)
        return
    if run.config.teacher.remote and not run.asked("deprivatize")["calls"]:
        run.agree_to_send(run)
    with fresh(run, "deprivatize", "deprivatize", config.steps, draw, lambda step: mine) as feed:
        yield feed
