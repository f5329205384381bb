"""Step 2: the generator is frozen, and the student learns to make it draw what the teacher makes it draw."""

import contextlib
import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mekd.engine import after, again, coverage, parallel
from mekd.engine.checkpoint import Checkpoint, steps
from mekd.engine.collect import collect, draw_images
from mekd.engine.feeds import Feed, Fresh, Replayed, fresh
from mekd.engine.pictures import Pictures
from mekd.engine.pretrain import load_pretrained, pretrain
from mekd.engine.result import STUDENT, write_student
from mekd.engine.run import Run
from mekd.engine.runlog import RunLog
from mekd.engine.train import computed_in, predict, set_cosine_lr, sgd
from mekd.losses import MEKDLoss
from mekd.nets import build
from mekd.nets.frozen import freeze
from mekd.oracle.ledger import describe
from mekd.oracle.replay import Joined, Replay
from mekd.oracle.response import floor_of
from mekd.pixels import as_float


def take_step(
    student: nn.Module, optimizer: torch.optim.Optimizer, loss: MEKDLoss, images: Tensor, target: dict[str, Any],
    precision: str = "float32", scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """One step of the student on images (m, ch, H, W) and the answer to them; returns the losses.

    precision: of the student's convolutions, "float32", "bfloat16" or "float16", which needs a scaler; the generator in
    loss has its own.
    """
    with computed_in(precision, images.device):
        logits = student(images.contiguous(memory_format=torch.channels_last)).float()
    image, kl = loss.terms(logits, **target)
    total = loss.image * image + loss.beta * kl
    optimizer.zero_grad()
    if scaler is None:
        total.backward()
        optimizer.step()
    else:
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
    return {"loss": total, "image": image, "kl": kl}


def distill(run: Run) -> None:
    """Train distill.student on generated images and the teacher's answers to them (Ma et al., section 3.3)."""
    student, best, news = train_student(run)
    if parallel.rank() == 0 and (news or not all((run.out / name).exists() for name in STUDENT)):
        student.load_state_dict(best["weights"])
        worst = write_student(run, student)
        run.log(
            f"distill: {run.config.distill.student} at step {best['step']} of {run.config.distill.steps} agrees with "
            f"the teacher on {100 * best['agreement']:.2f}% of the holdout, {describe(run.asked('distill'))}; "
            f"student.onnx differs from torch by {worst:.1e}"
        )
    parallel.barrier()


def train_student(run: Run) -> tuple[nn.Module, dict[str, Any], bool]:
    """The student after its last step, the best one's agreement, step and weights, and whether a step was taken."""
    config = run.config.distill
    pretrain(run)
    exact = freeze(run.load_generator())  # draws what is asked once, and kept for other students
    draw = copy.deepcopy(exact).to(getattr(torch, config.precision))
    loss = MEKDLoss(draw, floor=floor_of(run.config.oracle.decimals), **config.loss_options())
    if config.store is None:
        if run.config.teacher.remote and not again.was_asked(run):
            run.agree_to_send(run)
        holdout = collect(run, "holdout", exact, config.holdout)
        require_coverage(run, holdout, exact)
    else:
        holdout = Replay(run.store("holdout"), config.holdout)
    held_images, held_answer, _ = holdout.read(slice(None))
    student = new_student(run)
    optimizer = sgd(student, config.lr, config.weight_decay)
    best: dict[str, Any] = {"agreement": -1.0, "step": 0, "weights": None}
    state: dict[str, Any] = {"student": student, "optimizer": optimizer, "best": best}
    scaler = torch.amp.GradScaler(run.device.type) if config.precision == "float16" else None
    if scaler is not None:
        state["scaler"] = scaler
    learner = parallel.data_parallel(student)

    with answers(run, exact, draw, loss) as feed:
        feeds: dict[str, Feed] = {"answers": feed}
        log = RunLog(run, "distill", config.steps, config.batch, feeds, lr="distill.lr")
        checkpoint = Checkpoint(run, "distill", state, feeds, run.depends("distill"))
        done = checkpoint.restore(log)
        for step in steps(checkpoint, log):
            set_cosine_lr(optimizer, config.lr, step, config.steps)
            asked = feed.take(step)
            images = as_float(asked.images)
            log.add(**take_step(learner, optimizer, loss, images, asked.target, config.precision, scaler))

            if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
                named = predict(student, held_images, device=run.device, convert=as_float).cpu()
                agreement = float((named == held_answer.labels).float().mean())
                if agreement >= best["agreement"]:
                    weights = {name: value.clone() for name, value in student.state_dict().items()}
                    best.update(agreement=agreement, step=step + 1, weights=weights)
                log.write(step + 1, agreement=round(agreement, 6))
    return student, best, done < config.steps


def require_coverage(run: Run, holdout: Replay, exact: nn.Module) -> None:
    """Ask for the first answers of the store, so far as the holdout is too few, and have their classes looked at."""
    rows, stores = coverage.wanted(run), [holdout]
    if rows > len(holdout):
        stores.append(collect(run, "replay", exact, run.config.distill.replay or 0, until=rows - len(holdout)))
    coverage.require(run, *stores, rows=rows)


def new_student(run: Run) -> nn.Module:
    """distill.student as it begins, on the run's device."""
    torch.manual_seed(run.config.seed + 4)
    student = build(run.config.distill.student, run.num_classes, run.image[0])
    if run.config.distill.checkpoint is not None:
        run.load_weights(student, "distill.checkpoint", run.config.distill.checkpoint)
    if run.config.distill.pretrain:
        load_pretrained(run, student)
    parallel.dropout_apart(run.config.seed)
    return run.place(student)


@contextlib.contextmanager
def answers(run: Run, exact: nn.Module, draw: nn.Module, loss: MEKDLoss) -> Iterator[Fresh | Replayed]:
    """What step 2 consumes: images that draw makes, asked about at each step; with distill.replay exact's, once."""
    config = run.config.distill
    mine = parallel.share("distill.batch", config.batch)
    if config.replay:
        if config.store is None:
            store = collect(run, "replay", exact, config.replay)
        else:
            store = Replay(run.store("replay"), config.replay, part=True)
        earlier = after.stores(run.config.deprivatize.after)
        paid = Joined([*earlier, store]) if earlier else store
        pictures = None
        if config.keep != "none":
            with parallel.first_alone():
                pictures = Pictures(run.out / "pictures", paid, loss, run.num_classes, config.keep, run.device)
        yield Replayed(run, paid, config.batch, pictures)
        return

    drawn = partial(draw_images, run, draw, "distill", count=config.batch)
    with fresh(run, "distill", "distill", config.steps, drawn, lambda step: mine, ahead=True) as feed:
        yield feed
