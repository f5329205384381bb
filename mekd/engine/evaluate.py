"""A simulation for experiments: labels and real images are used here, with an oracle and a ledger of their own.

Nothing of it flows back into the student. It measures what a user of MEKD cannot: accuracy on labelled images,
and the plain baseline, which sends its private images to the teacher.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mekd import files, functional
from mekd.data import Source, arrays
from mekd.engine import asked, parallel
from mekd.engine.account import open_account
from mekd.engine.asked import BATCH
from mekd.engine.checkpoint import Checkpoint, steps
from mekd.engine.pretrain import load_pretrained, pretrain
from mekd.engine.run import Run, StageError
from mekd.engine.runlog import RunLog
from mekd.engine.train import computed_in, predict, set_cosine_lr, sgd
from mekd.metrics import accuracy, confusion
from mekd.nets import build
from mekd.oracle.base import Oracle
from mekd.oracle.ledger import digests
from mekd.oracle.replay import Joined, Replay
from mekd.oracle.response import Response, concatenate, floor_of
from mekd.pixels import to_float
from mekd.seeds import generator_at

#: Test images of which the whole answer is kept, for the audit.
AUDITED = 2000


def evaluate(run: Run) -> None:
    """Compare teacher, student and plain baseline on the labelled test images; writes evaluate.json."""
    config = run.config
    if not config.evaluate.enabled:
        run.log("evaluate: off (it needs labels and sends real images; --evaluate.enabled true for an experiment)")
        return
    data, path = run.data, run.out / "student.pt"
    if not path.exists():
        raise StageError(f"{path} is missing: run `mekd distill` first")
    student = run.place(build(config.distill.student, run.num_classes, data.image[0]))
    student.load_state_dict(files.load(path))
    asks, simulates = bool(config.evaluate.ask_teacher), bool(config.evaluate.baseline)
    labels, answers = ask_test(run) if asks else (labels_of(data), None)
    mine = {"labels": labels, "student": predictions(student, data)}
    mine |= {"teacher": answers} if answers is not None else {}
    mine |= {"baseline": predictions(train_baseline(run), data)} if simulates else {}
    gathered = parallel.gather(mine)
    if gathered:
        found = {name: torch.cat([part[name] for part in gathered]) for name in mine}
        labels, predicted = found.pop("labels"), found["student"]
        named = ("teacher", "student", "baseline")
        result: dict[str, Any] = {
            f"{name}_accuracy": accuracy(found[name], labels) if name in found else None for name in named
        }
        result["agreement"] = accuracy(predicted, found["teacher"]) if asks else None
        shown = ", ".join(f"{name} {100 * accuracy(found[name], labels):.2f}%" for name in named if name in found)
        against = found["teacher"] if asks else labels
        counts = {"test_images": len(labels), "confusion": confusion(against, predicted, run.num_classes).tolist()}
        sent = {f"simulation_{key}": n for key, n in run.asked("evaluate").items()}
        run.write_json("evaluate.json", {**result, **counts, **sent})
        agrees = (
            f"; student = teacher on {100 * result['agreement']:.2f}% of the test images"
            if asks
            else ("; the teacher was asked nothing (evaluate.ask_teacher)")
        )
        run.log(f"evaluate: {shown}{agrees}")
    run.log_skipped()


def labels_of(data: Source) -> Tensor:
    """The labels (n,) of this process's test images."""
    return torch.cat([labels.cpu() for _, labels in data.once("test", BATCH)])


def predictions(model: nn.Module, data: Source) -> Tensor:
    """The classes (n,) that a network gives this process's test images."""
    return torch.cat([predict(model, images, convert=to_float).cpu() for images, _ in data.once("test", BATCH)])


def ask_test(run: Run) -> tuple[Tensor, Tensor]:
    """Labels (n,) of this process's test images and the teacher's, asked once."""
    name = "evaluate-test"
    kept = asked.before(run, name)
    with asking(run, name) as oracle:
        if kept is None:
            asked.forget(run, name)
            found = [(labels.cpu(), digests(x), query(oracle, x)) for x, labels in run.data.once("test", BATCH)]
            labels, own, answers = zip(*found, strict=True)
            answer = concatenate(list(answers))
            rows = torch.arange(0, len(answer), -(-len(answer) // AUDITED))
            audited = {"rows": rows, "answer": vars(answer[rows])}
            oracle.ledger.flush()  # what is kept is in the books
            asked.keep(run, name, {"digests": b"".join(own), "answers": answer.labels, **audited})
        oracle.ledger.settle()
    if kept is None:
        return torch.cat(labels), answer.labels
    return labels_of(run.data), asked.in_order(kept, [share["answers"] for share in kept.shares])


def ask_private(run: Run) -> tuple[Replay | Joined, int]:
    """The private images and the teacher's answers to them, asked once, by all processes; and how many there are."""
    name = "evaluate-private"
    kept, most = asked.before(run, name), -(-run.data.count("local") // parallel.world())
    with asking(run, name) as oracle:
        if kept is None:
            asked.forget(run, name)
            own, store = b"", Replay(_private(run, asked.share(run, name)), most)
            for images, _ in run.data.once("local", BATCH):
                store.write(len(own) // 16, images, query(oracle, images))
                own += digests(images)
            store.flush()
            oracle.ledger.flush()  # as above
            asked.keep(run, name, {"digests": own})
        oracle.ledger.settle()
    counts = {path: len(files.load(path)["digests"]) // 16 for path in asked.shares(run, name)}
    stores = [Replay(_private(run, path), count, part=True) for path, count in counts.items() if count]
    return (stores[0] if len(stores) == 1 else Joined(stores)), sum(counts.values())


def _private(run: Run, share: Path) -> Path:
    """The folder of the images and answers of a share."""
    return run.out / "private" / share.stem


def query(oracle: Oracle, images: Tensor) -> Response:
    """The answer, on the CPU, to real images (m, ch, S, S), uint8, which go up as the oracle transports them."""
    return oracle.query(to_float(images) if oracle.transport == "float" else images).to("cpu")


@contextlib.contextmanager
def asking(run: Run, name: str) -> Iterator[Oracle]:
    """The oracle with the account NAME, which has no budget of its own: what was answered before is found there."""
    account, oracle = open_account(run, "evaluate", name), None
    try:
        with parallel.first_alone():
            oracle = run.open_oracle(account)
        yield oracle
    finally:
        (oracle or account).close()


def train_baseline(run: Run) -> nn.Module:
    """The plain baseline: a student of the teacher's answers to the private images."""
    return train_plain(run, *ask_private(run))


def train_plain(run: Run, store: Replay | Joined, count: int) -> nn.Module:
    """The student trained by KL on the first count images of a store and the teacher's answers to them.

    Augmented: it sees them shifted, and mirrored where data.flip says so, with the answer to the original.
    """
    config = run.config.distill
    count_steps = run.config.evaluate.baseline_steps or config.steps
    torch.manual_seed(run.config.seed + 4)
    student = build(config.student, run.num_classes, run.image[0])
    if config.pretrain:  # as MEKD's begins
        pretrain(run)
        load_pretrained(run, student)
    student = run.place(student)
    optimizer = sgd(student, config.lr, config.weight_decay)
    batch = -(-min(config.batch, count) // parallel.world()) * parallel.world()  # of all processes together
    learner, mine = parallel.data_parallel(student), parallel.part(batch)
    parallel.dropout_apart(run.config.seed)
    log = RunLog(run, "baseline", count_steps, batch, {}, lr="distill.lr")
    checkpoint = Checkpoint(run, "baseline", {"student": student, "optimizer": optimizer}, {}, run.depends("baseline"))
    checkpoint.restore(log)
    for step in steps(checkpoint, log):
        set_cosine_lr(optimizer, config.lr, step, count_steps)
        generator = generator_at(run.config.seed, "baseline", step, 0)  # of all processes, as of the first
        images, answers, _ = store.read(torch.randint(count, (batch,), generator=generator)[mine])
        images = arrays.moved(images, arrays.moves(batch, run.image[-1], run.config.data.flip, generator)[mine])
        target = answers.to(run.device).target
        with computed_in(config.precision, run.device):
            logits = learner(to_float(images.to(run.device)))
        loss = functional.kd_loss(logits.float(), **target, floor=floor_of(run.config.oracle.decimals))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.add(loss=loss)
    return student
