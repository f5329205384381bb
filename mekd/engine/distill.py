"""Step 2: the generator is frozen, and the student learns to make it draw what the teacher makes it draw."""

from typing import Any

import torch
from torch import Tensor, nn

from mekd import files
from mekd.codes import resolve_code
from mekd.config import fingerprint
from mekd.engine import parallel
from mekd.engine.ahead import Ahead, Asked
from mekd.engine.loop import Loop
from mekd.engine.pictures import Pictures
from mekd.engine.queries import collect
from mekd.engine.run import Run
from mekd.engine.train import predict, set_cosine_lr, sgd
from mekd.losses import MEKDLoss
from mekd.nets import build
from mekd.nets.frozen import freeze
from mekd.oracle.export import Classifier, export
from mekd.oracle.response import floor_of
from mekd.pixels import as_float, to_uint8
from mekd.seeds import generator_at


def take_step(
    student: nn.Module, optimizer: torch.optim.Optimizer, loss: MEKDLoss, images: Tensor, target: dict[str, Any],
    precision: str = "float32", scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """One step of the student on images (m, ch, H, W) and the answer to them; returns the losses.

    precision: of the convolutions of S and G, "float32", "bfloat16" or "float16", which needs a scaler.
    """
    with torch.autocast(images.device.type, getattr(torch, precision), enabled=precision != "float32"):
        image, kl = loss.terms(student(images.contiguous(memory_format=torch.channels_last)), **target)
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
    config = run.config.distill
    mine = parallel.share("distill.batch", config.batch)
    image = run.image
    oracle = run.open_oracle("distill", image, config.budget)
    classes = oracle.num_classes
    generator = run.load_generator(classes, image[0])
    draw = freeze(generator)
    if config.image > 0:  # said before the first query is paid
        resolve_code(config.code, {"label": "labels"}.get(oracle.response, oracle.response), classes)
    seed = run.config.seed
    torch.manual_seed(seed + 4)
    student = build(config.student, classes, image[0])
    if config.checkpoint is not None:
        run.load_weights(student, "distill.checkpoint", config.checkpoint)
    student = run.place(student)
    depends = fingerprint(run.config, "distill") | {
        "teacher": run.teacher_digest(),
        "deprivatize.steps": run.config.deprivatize.steps,
    }
    holdout, asked = collect(run, "holdout", draw, oracle, config.holdout, depends)
    held_images, held_answer = holdout.read(slice(None))
    held_images, held_labels = as_float(held_images.to(run.device)), held_answer.labels.to(run.device)
    if config.replay:
        store, asked = collect(run, "replay", draw, oracle, config.replay, depends, begin_at=asked)

    optimizer = sgd(student, config.lr, config.weight_decay)
    loss = MEKDLoss(generator, floor=floor_of(run.config.oracle.decimals), **config.loss_options())
    pictures = None
    if config.keep != "none":
        with parallel.first_alone():
            pictures = Pictures(store, loss, classes, config.keep, run.device)
    best: dict[str, Any] = {"agreement": -1.0, "step": 0, "weights": None}
    state: dict[str, Any] = {"student": student, "optimizer": optimizer, "best": best}
    scaler = torch.amp.GradScaler(run.device.type) if config.precision == "float16" else None
    if scaler is not None:
        state["scaler"] = scaler
    learner = parallel.data_parallel(student)
    parallel.dropout_apart(seed)

    def drawn(step: int) -> Tensor:
        with torch.no_grad():
            images = draw(run.latents("distill", step, config.batch, classes))
        return to_uint8(images) if oracle.transport == "uint8" else images

    def ask(step: int) -> Asked:
        pixels = drawn(step)
        return pixels, oracle.query(pixels).target

    def may_ask(step: int) -> bool:
        # Not past a checkpoint, which the ledger settles with.
        within = step < config.steps and step % run.config.engine.checkpoint_every != 0
        return within and oracle.ledger.affords(mine)

    ahead = Ahead(ask, may_ask, run.device) if oracle.ahead and not config.replay else None

    def fresh(step: int) -> Asked:
        if ahead is not None:
            with loop.clock("teacher"):
                return ahead.take(step)
        pixels = drawn(step)
        with loop.clock("teacher"):
            return pixels, oracle.query(pixels).target

    def rows(step: int) -> Tensor:
        # Of the step alone, so that those of the next one are known.
        generator = generator_at(seed, "replayed", step)
        return torch.randint(config.replay, (config.batch,), generator=generator)[parallel.part(config.batch)]

    def replayed(step: int) -> Asked:
        with loop.clock("data"):
            now, then = rows(step), rows(step + 1)
            pixels, answer = store.read(now)
            target = answer.to(run.device).target
            store.will_need(then)
            if pictures is not None:
                target["kept"] = pictures.read(now).to(run.device)
                pictures.will_need(then)
            return pixels.to(run.device), target

    def owed(step: int) -> int:
        return 0 if config.replay or (ahead is not None and ahead.has(step)) else mine

    with Loop(
        run,
        "distill",
        config.steps,
        state,
        depends,
        batch=config.batch,
        ledger=oracle.ledger,
        queries=owed,
        begin_at=asked,
        ahead=ahead.answered if ahead is not None else lambda: 0,
    ) as loop:
        finished = loop.done
        for step in loop:
            set_cosine_lr(optimizer, config.lr, step, config.steps)
            pixels, target = replayed(step) if config.replay else fresh(step)
            losses = take_step(learner, optimizer, loss, as_float(pixels), target, config.precision, scaler)
            loop.log(**losses)

            if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
                agreement = float((predict(student, held_images) == held_labels).float().mean())
                if agreement >= best["agreement"]:
                    weights = {name: value.clone() for name, value in student.state_dict().items()}
                    best.update(agreement=agreement, step=step + 1, weights=weights)
                loop.write(step + 1, agreement=round(agreement, 6))
    oracle.ledger.close()
    spent = parallel.account(oracle.ledger)
    if parallel.rank() == 0 and not (finished and (run.out / "student.onnx").exists()):
        student.load_state_dict(best["weights"])
        files.save(run.out / "student.pt", student.state_dict())
        worst = export(Classifier(student), run.out / "student.onnx", image, run.config.oracle.transport)
        run.log(
            f"distill: {config.student} at step {best['step']} of {config.steps} agrees with the teacher on "
            f"{100 * best['agreement']:.2f}% of the holdout, {loop.seconds:.0f} s, {spent}; student.onnx differs "
            f"from torch by {worst:.1e}"
        )
    parallel.barrier()
