"""For experiments: train the classifier that will play the black box, and export it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mekd import files
from mekd.engine import parallel
from mekd.engine.checkpoint import Checkpoint, steps
from mekd.engine.feeds import Images
from mekd.engine.run import ACCOUNTS, Run, StageError
from mekd.engine.runlog import RunLog
from mekd.engine.train import computed_in, predict, set_cosine_lr, sgd
from mekd.fingerprint import differing
from mekd.nets import build
from mekd.oracle import identity
from mekd.oracle.export import Classifier, export
from mekd.teacher_config import TeacherConfig

#: Beside teacher.onnx: what it was made of.
EXPORTED = "exported.json"


def train_teacher(run: Run) -> None:
    """Train teacher.arch on all training images and their labels."""
    config = run.config.teacher
    if run.given_teacher or config.checkpoint:
        return
    data = run.data
    torch.manual_seed(run.config.seed)
    teacher = run.place(classifier(config, len(data.classes), data.image))
    optimizer = sgd(teacher, config.lr, config.weight_decay)
    learner, batches = parallel.data_parallel(teacher), Images(data.training(config.batch))
    log = RunLog(run, "teacher", config.steps, config.batch, {"data": batches}, lr="teacher.lr")
    state = {"teacher": teacher.net, "optimizer": optimizer}
    checkpoint = Checkpoint(run, "teacher", state, {"data": batches}, run.depends("teacher"))
    checkpoint.restore(log)
    for step in steps(checkpoint, log):
        set_cosine_lr(optimizer, config.lr, step, config.steps)
        images, labels = batches.take(step)
        with computed_in(config.precision, run.device):
            logits = learner(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.add(loss=loss)
    right = seen = 0
    for images, labels in data.once("test", 256):
        right += int((predict(teacher, images) == labels).sum())
        seen += len(labels)
    right, seen = map(int, parallel.sum_of(right, seen))
    run.log(f"teacher: {config.arch}, {100 * right / seen:.2f}% of {seen} test images, {log.seconds:.0f} s")
    run.log_skipped()


def export_teacher(run: Run) -> None:
    """Write the teacher as teacher.onnx, preprocessing inside; from then on it can only be asked."""
    config = run.config.teacher
    if not run.given_teacher and parallel.rank() == 0:
        if run.teacher_onnx.exists():
            unknown = "" if _known(run) else ", and nobody knows what it was made of; delete it to export it anew"
            run.log(f"export: {run.teacher_onnx} is there{unknown}")
        else:
            _export_teacher(run, config)
    parallel.barrier()


def check_exported(run: Run, stages: Sequence[str]) -> None:
    """StageError where teacher.onnx was made here of something else than the settings say now."""
    if run.given_teacher or not run.teacher_onnx.exists() or (saved := _known(run)) is None:
        return
    now, makes = _made_of(run), bool({"teacher", "export"} & set(stages))
    # A checkpoint that is gone cannot be held against the one that was exported.
    now.setdefault("teacher.checkpoint", saved["teacher.checkpoint"] or run.config.teacher.checkpoint)
    names = [name for name in saved if name in now and (makes or name.startswith("teacher."))]
    changed = differing(*({name: tree[name] for name in names} for tree in (saved, now)))
    if changed:
        differs = "; ".join(f"{name} was {was!r} and is {is_!r}" for name, (was, is_) in changed.items())
        spent = run.asked(*ACCOUNTS)
        asked = spent["queries"] + spent["uncertain"]
        anew = f". {asked} answers are of it" if asked else ", or delete it to export it anew: it was asked nothing yet"
        raise StageError(
            f"{run.teacher_onnx} is of another configuration: {differs}. Set that back, or start anew with another "
            f"--out{anew}"
        )


def _made_of(run: Run) -> dict[str, Any]:
    """What teacher.onnx is a result of if it is exported now; a given checkpoint is known by its content."""
    found, path = run.depends("teacher"), run.config.teacher.checkpoint
    found = {name: value for name, value in found.items() if not name.startswith("engine.")}
    if path is not None:
        found = {f"teacher.{name}": found[f"teacher.{name}"] for name in ("arch", "mean", "std", "resize")}
        if Path(path).is_file():
            found["teacher.checkpoint"] = files.digest(path)
    return dict(json.loads(json.dumps(found)))


def _known(run: Run) -> dict[str, Any] | None:
    """What the teacher.onnx that lies there was made of; None where that was not written down for this file."""
    kept = run.read_json(EXPORTED)
    return kept["of"] if kept is not None and kept["file"] == identity.digest(run.teacher_onnx) else None


def _export_teacher(run: Run, config: TeacherConfig) -> None:
    teacher = classifier(config, run.trained_classes, run.image)
    if config.checkpoint:
        run.load_weights(teacher.net, "teacher.checkpoint", config.checkpoint)
    elif run.checkpoint("teacher").exists():
        saved = files.load(run.checkpoint("teacher"))
        if saved["step"] < config.steps:
            raise StageError(
                f"the teacher stands at step {saved['step']} of {config.steps}: run `mekd teacher` to finish it"
            )
        load_trained(run, teacher.net)
    else:
        raise StageError(
            f"{run.checkpoint('teacher')} is missing: run `mekd teacher` first, or give --teacher.checkpoint FILE"
        )
    worst = export(teacher, run.teacher_onnx, run.image, run.config.oracle.transport)
    run.write_json(EXPORTED, {"file": identity.digest(run.teacher_onnx), "of": _made_of(run)})
    run.log(f"export: {run.teacher_onnx}, largest difference from torch {worst:.1e} of the largest logit")


def load_trained(run: Run, net: nn.Module) -> None:
    """Give teacher.arch the weights that were trained here; StageError where they do not fit it."""
    path, meta = run.checkpoint("teacher"), any(x.is_meta for x in net.parameters())
    try:
        net.load_state_dict(files.load(path)["state"]["teacher"], assign=meta)
    except RuntimeError as error:
        raise StageError(
            f"{path} does not fit teacher.arch {run.config.teacher.arch!r} with {run.trained_classes} classes and "
            f"{run.image[0]} channels: say what it was trained with ({str(error).splitlines()[-1].strip()})"
        ) from error


def classifier(config: TeacherConfig, num_classes: int, image: tuple[int, int, int]) -> Classifier:
    """teacher.arch, untrained, behind its preprocessing."""
    return Classifier(build(config.arch, num_classes, image[0]), config.mean, config.std, config.resize)
