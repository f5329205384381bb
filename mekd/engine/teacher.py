"""For experiments: train the classifier that will play the black box, and export it."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mekd import files
from mekd.config import TeacherConfig, fingerprint
from mekd.data import Dataset
from mekd.engine.loop import Loop
from mekd.engine.run import Run, StageError
from mekd.engine.train import augment, predict, set_cosine_lr, sgd
from mekd.metrics import accuracy
from mekd.nets import build
from mekd.oracle.export import Classifier, export


def train_teacher(run: Run) -> None:
    """Train teacher.arch on all training images and their labels."""
    config = run.config.teacher
    if config.onnx or config.checkpoint:
        return
    data = run.load_data()
    torch.manual_seed(run.config.seed)
    teacher = run.place(_classifier(config, data))
    optimizer = sgd(teacher, config.lr, config.weight_decay)
    state = {"teacher": teacher.net, "optimizer": optimizer}
    with Loop(run, "teacher", config.steps, state, fingerprint(run.config, "teacher"), batch=config.batch) as loop:
        for step in loop:
            set_cosine_lr(optimizer, config.lr, step, config.steps)
            rows = torch.randint(len(data.train_images), (config.batch,), device=run.device)
            images = augment(data.train_images[rows] / 255, run.config.data.flip)
            loss = F.cross_entropy(teacher(images), data.train_labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loop.log(loss=loss)
    score = accuracy(predict(teacher, data.test_images), data.test_labels)
    run.log(f"teacher: {config.arch}, {100 * score:.2f}% of the test images, {loop.seconds:.0f} s")


def export_teacher(run: Run) -> None:
    """Write the teacher as teacher.onnx, preprocessing inside; from then on it can only be asked."""
    config = run.config.teacher
    if config.onnx or run.teacher_onnx.exists():
        return
    data = run.load_data()
    teacher = _classifier(config, data)
    if config.checkpoint:
        weights = _own_weights(config.checkpoint)
    elif run.checkpoint("teacher").exists():
        saved = files.load(run.checkpoint("teacher"))
        if saved["step"] < config.steps:
            raise StageError(
                f"the teacher stands at step {saved['step']} of {config.steps}: run `mekd teacher` to finish it"
            )
        weights = saved["state"]["teacher"]
    else:
        raise StageError(
            f"{run.checkpoint('teacher')} is missing: run `mekd teacher` first, or give --teacher.checkpoint FILE"
        )
    try:
        teacher.net.load_state_dict(weights)
    except RuntimeError as error:
        raise StageError(f"the weights do not fit teacher.arch {config.arch!r}: {error}") from error
    worst = export(teacher, run.teacher_onnx, data.image, run.config.oracle.transport)
    run.log(f"export: {run.teacher_onnx}, largest difference from torch {worst:.1e} of the largest logit")


def _classifier(config: TeacherConfig, data: Dataset) -> Classifier:
    net = build(config.arch, len(data.classes), data.image[0])
    return Classifier(net, config.mean, config.std, config.resize)


def _own_weights(path: str) -> dict[str, Any]:
    try:
        return files.load(Path(path))
    except FileNotFoundError as error:
        raise StageError(f"teacher.checkpoint is {path!r}; no such file") from error
