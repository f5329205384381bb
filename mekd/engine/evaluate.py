"""A simulation for experiments: labels and real images are used here, with an oracle and a ledger of their own.

Nothing of it flows back into the student. It measures what a user of MEKD cannot: accuracy on labelled images,
and the plain baseline, which sends its private images to the teacher.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mekd import files, functional
from mekd.config import fingerprint
from mekd.data import Source
from mekd.engine import parallel
from mekd.engine.loop import Loop
from mekd.engine.run import Run, StageError
from mekd.engine.train import predict, set_cosine_lr, sgd
from mekd.metrics import accuracy, confusion
from mekd.nets import build
from mekd.oracle.base import Oracle
from mekd.oracle.replay import Replay
from mekd.oracle.response import floor_of
from mekd.pixels import to_float
from mekd.seeds import generator_at

BATCH = 256


def evaluate(run: Run) -> None:
    """Compare teacher, student and plain baseline on the labelled test images; writes evaluate.json."""
    config = run.config
    if not config.evaluate.enabled:
        run.log("evaluate: off (it needs labels and sends real images; --evaluate.enabled true for an experiment)")
        return
    data = run.open_data()
    path = run.out / "student.pt"
    if not path.exists():
        raise StageError(f"{path} is missing: run `mekd distill` first")
    oracle = run.open_oracle("evaluate", data.image)
    classes = oracle.num_classes
    if classes != len(data.classes):
        raise StageError(f"the teacher has {classes} classes, the data {len(data.classes)}; they cannot be compared")
    student = run.place(build(config.distill.student, classes, data.image[0]))
    student.load_state_dict(files.load(path))
    labels, answers, asked = ask_test(run, data, oracle)
    mine = [labels, answers, predictions(student, data)]
    if config.evaluate.baseline:
        mine.append(predictions(train_baseline(run, data, oracle, asked), data))
    sent = parallel.totals(oracle.ledger)
    oracle.ledger.close()
    columns = [torch.cat(parts) for parts in zip(*parallel.gather(mine), strict=True)]
    if columns:
        labels, answers, predicted, *baseline = columns
        result: dict[str, Any] = {
            "teacher_accuracy": accuracy(answers, labels),
            "student_accuracy": accuracy(predicted, labels),
            "baseline_accuracy": accuracy(baseline[0], labels) if baseline else None,
            "agreement": accuracy(predicted, answers),
        }
        shown = ", ".join(
            f"{name.split('_')[0]} {100 * v:.2f}%" for name, v in result.items() if name != "agreement" and v
        )
        counts = {"test_images": len(labels), "confusion": confusion(answers, predicted, classes).tolist()}
        run.write_json("evaluate.json", {**result, **counts, **{f"simulation_{key}": n for key, n in sent.items()}})
        run.log(f"evaluate: {shown}; student = teacher on {100 * result['agreement']:.2f}% of the test images")
    run.log_skipped(data)


def predictions(model: nn.Module, data: Source) -> Tensor:
    """The classes (n,) that a network gives this process's test images."""
    return torch.cat([predict(model, to_float(images)).cpu() for images, _ in data.once("test", BATCH)])


def ask_test(run: Run, data: Source, oracle: Oracle) -> tuple[Tensor, Tensor, int]:
    """Labels (n,) of this process's test images, the teacher's, asked once, and the ledger's next request."""
    path = _kept(run, "evaluate-test")
    if path.exists():
        saved = files.load(path)
        if saved["requests"] >= oracle.ledger.settled:
            oracle.ledger.rewind(saved["requests"])
        return saved["labels"], saved["answers"], saved["requests"]
    oracle.ledger.rewind(0)
    pairs = [(labels.cpu(), oracle.query(images).labels.cpu()) for images, labels in data.once("test", BATCH)]
    labels, answers = (torch.cat(column) for column in zip(*pairs, strict=True))
    files.save(path, {"labels": labels, "answers": answers, "requests": oracle.ledger.next})
    oracle.ledger.settle()
    return labels, answers, oracle.ledger.next


def ask_private(run: Run, data: Source, oracle: Oracle, begin_at: int) -> tuple[Replay, int]:
    """This process's private images and the teacher's answers to them, asked once; and how many there are."""
    path = _kept(run, "evaluate-private")
    store = Replay(run.out / "private" / path.stem, -(-data.count("local") // parallel.world()))
    if path.exists():
        return store, files.load(path)["count"]
    oracle.ledger.rewind(begin_at)
    count = 0
    for images, _ in data.once("local", BATCH):
        store.write(count, images, oracle.query(images))
        count += len(images)
    store.state_dict()
    files.save(path, {"count": count})
    oracle.ledger.settle()
    return store, count


def train_baseline(run: Run, data: Source, oracle: Oracle, begin_at: int) -> nn.Module:
    """The plain baseline: the student trained by KL on the teacher's answers to the private images."""
    config = run.config.distill
    steps = run.config.evaluate.baseline_steps or config.steps
    store, count = ask_private(run, data, oracle, begin_at)
    torch.manual_seed(run.config.seed + 4)
    student = run.place(build(config.student, len(data.classes), data.image[0]))
    optimizer = sgd(student, config.lr, config.weight_decay)
    state = {"student": student, "optimizer": optimizer}
    depends = fingerprint(run.config, "baseline") | {"teacher": run.teacher_digest()}
    batch = min(config.batch // parallel.world(), count)
    learner = parallel.data_parallel(student)
    parallel.dropout_apart(run.config.seed)
    with Loop(run, "baseline", steps, state, depends, batch=batch * parallel.world()) as loop:
        for step in loop:
            set_cosine_lr(optimizer, config.lr, step, steps)
            rows = torch.randint(
                count, (batch,), generator=generator_at(run.config.seed, "baseline", step, parallel.rank())
            )
            images, answers = store.read(rows)
            target = answers.to(run.device).target
            logits = learner(to_float(images.to(run.device)))
            loss = functional.kd_loss(logits, **target, floor=floor_of(run.config.oracle.decimals))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loop.log(loss=loss)
    return student


def _kept(run: Run, name: str) -> Path:
    """Where this process keeps what it asked: with another number of processes, its images are others."""
    share = f"-{parallel.rank()}of{parallel.world()}" if parallel.world() > 1 else ""
    return run.checkpoint(f"{name}{share}")
