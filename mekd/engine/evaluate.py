"""A simulation for experiments: labels and real images are used here, with an oracle and a ledger of their own.

Nothing of it flows back into the student. It measures what a user of MEKD cannot: accuracy on labelled images,
and the plain baseline, which sends its private images to the teacher.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mekd import data as datasets
from mekd import files, functional
from mekd.config import fingerprint
from mekd.engine.loop import Loop
from mekd.engine.run import Run, StageError
from mekd.engine.train import predict, set_cosine_lr, sgd
from mekd.metrics import accuracy, confusion
from mekd.nets import build
from mekd.oracle.base import Oracle
from mekd.oracle.response import Response, concatenate
from mekd.pixels import to_float


def evaluate(run: Run) -> None:
    """Compare teacher, student and plain baseline on the labelled test images; writes evaluate.json."""
    config = run.config
    if not config.evaluate.enabled:
        run.log("evaluate: off (it needs labels and sends real images; --evaluate.enabled true for an experiment)")
        return
    data = run.load_data()
    path = run.out / "student.pt"
    if not path.exists():
        raise StageError(f"{path} is missing: run `mekd distill` first")
    oracle = run.open_oracle("evaluate", data.image)
    if oracle.num_classes != len(data.classes):
        raise StageError(
            f"the teacher has {oracle.num_classes} classes, the data {len(data.classes)}; they cannot be compared"
        )
    answers = run.checkpoint("evaluate")
    teacher, asked = ask_once(oracle, data.test_images, answers.with_name("evaluate-test.pt"))
    student = run.place(build(config.distill.student, oracle.num_classes, data.image[0]))
    student.load_state_dict(files.load(path))
    predicted = predict(student, to_float(data.test_images)).cpu()
    result: dict[str, Any] = {
        "teacher_accuracy": accuracy(teacher.labels, data.test_labels),
        "student_accuracy": accuracy(predicted, data.test_labels),
        "baseline_accuracy": None,
        "agreement": accuracy(predicted, teacher.labels),
        "test_images": len(predicted),
        "confusion": confusion(teacher.labels, predicted, oracle.num_classes).tolist(),
    }
    if config.evaluate.baseline:
        local = datasets.local_images(data, config.data.local_fraction, config.seed)
        private, _ = ask_once(oracle, local, answers.with_name("evaluate-private.pt"), asked)
        result["baseline_accuracy"] = accuracy(train_baseline(run, local, private, data), data.test_labels)
    run.write_json("evaluate.json", {**result, **{f"simulation_{k}": v for k, v in oracle.ledger.totals().items()}})
    oracle.ledger.close()
    shown = (f"{n.removesuffix('_accuracy')} {100 * v:.2f}%" for n, v in result.items() if n.endswith("accuracy") and v)
    run.log(f"evaluate: {', '.join(shown)}; student = teacher on {100 * result['agreement']:.2f}% of the test images")


def train_baseline(run: Run, local: Tensor, answers: Response, data: datasets.Dataset) -> Tensor:
    """The plain baseline: the student trained by KL on the teacher's answers to the private images; its predictions."""
    config = run.config.distill
    steps = run.config.evaluate.baseline_steps or config.steps
    torch.manual_seed(run.config.seed + 4)
    student = run.place(build(config.student, len(data.classes), data.image[0]))
    optimizer = sgd(student, config.lr, config.weight_decay)
    state = {"student": student, "optimizer": optimizer}
    depends = fingerprint(run.config, "baseline") | {"teacher": run.teacher_digest()}
    images, answers = to_float(local), answers.to(run.device)
    batch = min(config.batch, len(local))
    with Loop(run, "baseline", steps, state, depends, batch=batch) as loop:
        for step in loop:
            set_cosine_lr(optimizer, config.lr, step, steps)
            rows = torch.randint(len(local), (batch,), device=run.device)
            loss = functional.kd_loss(student(images[rows]), **answers[rows].target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loop.log(loss=loss)
    return predict(student, to_float(data.test_images))


def ask_once(oracle: Oracle, images: Tensor, path: Path, begin_at: int = 0) -> tuple[Response, int]:
    """The answers to some images, asked once and kept; returns them and the ledger's next request."""
    if path.exists():
        saved = files.load(path)
        if saved["requests"] >= oracle.ledger.settled:
            oracle.ledger.rewind(saved["requests"])
        return Response(saved["kind"], saved["values"], saved["indices"], saved["decimals"]), saved["requests"]
    oracle.ledger.rewind(begin_at)
    response = concatenate([oracle.query(part).to("cpu") for part in images.split(256)])
    files.save(
        path,
        {
            "kind": response.kind,
            "values": response.values,
            "indices": response.indices,
            "decimals": response.decimals,
            "requests": oracle.ledger.next,
        },
    )
    oracle.ledger.settle()
    return response, oracle.ledger.next
