"""For experiments: train the classifier that will play the black box, and export it."""

import torch
import torch.nn.functional as F

from mekd import files
from mekd.engine import parallel
from mekd.engine.checkpoint import Checkpoint, steps
from mekd.engine.feeds import Images
from mekd.engine.run import Run, StageError
from mekd.engine.runlog import RunLog
from mekd.engine.train import computed_in, predict, set_cosine_lr, sgd
from mekd.nets import build
from mekd.oracle.export import Classifier, export
from mekd.teacher_config import TeacherConfig


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
    if not (run.given_teacher or run.teacher_onnx.exists()) and parallel.rank() == 0:
        _export_teacher(run, config)
    parallel.barrier()


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
        teacher.net.load_state_dict(saved["state"]["teacher"])
    else:
        raise StageError(
            f"{run.checkpoint('teacher')} is missing: run `mekd teacher` first, or give --teacher.checkpoint FILE"
        )
    worst = export(teacher, run.teacher_onnx, run.image, run.config.oracle.transport)
    run.log(f"export: {run.teacher_onnx}, largest difference from torch {worst:.1e} of the largest logit")


def classifier(config: TeacherConfig, num_classes: int, image: tuple[int, int, int]) -> Classifier:
    """teacher.arch, untrained, behind its preprocessing."""
    return Classifier(build(config.arch, num_classes, image[0]), config.mean, config.std, config.resize)
