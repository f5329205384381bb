"""What a teacher that defends itself teaches: a student of the same images for each defence, with as many queries.

The answers to a store of images are there (`python -m bench students` asks them); each defence is a function of an
answer, so that it is applied to them, and nobody is asked again. Beside the student: what the defended teacher is worth
to those that it is for, by its answers to the test images.
"""

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import students, tables
from mekd.engine import evaluate
from mekd.engine.checkpoint import stopped_by_signals
from mekd.engine.result import known_names
from mekd.engine.run import Run
from mekd.metrics import accuracy
from mekd.oracle.replay import Replay
from mekd.oracle.response import Response
from mekd.serve.defence import Defence

COLUMNS = ("data", "private", "response", "defence", "queries", "seed", "accuracy", "agreement", "teacher", "changed")
#: What is done to an answer: the decimals it is rounded to, and mekd serve's --noise and --mislead.
DEFENCES: dict[str, tuple[int | None, Defence]] = {
    "none": (None, Defence()),
    "two decimals": (2, Defence()),
    "one decimal": (1, Defence()),
    "noise 0.3": (None, Defence(noise=0.3)),
    "noise 0.7": (None, Defence(noise=0.7)),
    "mislead 0.5": (None, Defence(mislead=0.5)),
    "mislead 0.9": (None, Defence(mislead=0.9)),
}


def main(arguments: Sequence[str]) -> int:
    """Measure what is not in the table yet, and print it."""
    parser = argparse.ArgumentParser(prog="python -m bench defences", description=__doc__)
    parser.add_argument("data", choices=students.CONFIGS)
    parser.add_argument("--private", default="0.1")
    parser.add_argument("--queries", type=int, default=20000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/students"), help="as that of bench students")
    parser.add_argument("--results", type=Path, required=True, help="folder of defences.csv")
    options, words = parser.parse_known_args(arguments)
    table = options.results / "defences.csv"
    with stopped_by_signals():
        for seed in options.seeds:
            for response in ("probs", "label"):
                for name in DEFENCES:
                    if response == "label" and name != "none" and not name.startswith("mislead"):
                        continue  # the best class stays
                    key = (options.data, options.private, response, name, str(options.queries), str(seed))
                    if key not in {tuple(row[column] for column in COLUMNS[:6]) for row in tables.read(table)}:
                        found = measure(options, words, response, name, seed)
                        row = dict(zip(COLUMNS[:6], key, strict=True)) | found
                        tables.append(table, row, COLUMNS)
                        print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    for row in tables.read(table):
        print("| " + " | ".join(row[column] for column in COLUMNS) + " |")
    return 0


def measure(options: argparse.Namespace, words: list[str], response: str, name: str, seed: int) -> dict[str, Any]:
    """A student of defended answers, and the defended teacher on the test images."""
    own = f"--data.local_fraction {options.private} --oracle.response probs --seed {seed}"
    config = students.settings(
        "--config", students.CONFIGS[options.data], *students.QUIET.split(), *words, *own.split()
    )
    place = options.out / options.data
    teacher = students.teacher_of(replace(config, seed=0), place)
    config = replace(config, teacher=replace(config.teacher, onnx=str(teacher.teacher_onnx)))
    asked, config = students.stored(config, place, options.queries)
    decimals, defence = DEFENCES[name]  # a label has no decimals: only what misleads is measured of labels
    changed = Path(f"{asked.out}-{response}-{name.replace(' ', '-')}")
    for part in ("holdout", "replay"):
        count = getattr(config.distill, part)
        images, answer, n = Replay(asked.out / part, count, part=True).read(slice(None))
        if not (changed / part / "replay.json").exists():
            origin = asked.origin_of_answers(known_names(asked))
            origin["answers"] |= {"response": response, "decimals": decimals}
            Replay(changed / part, count, origin=origin).write(
                0, images, given(answer.target["probs"], response, decimals, defence), n
            )
    shutil.copytree(asked.out / "checkpoints", changed / "checkpoints", dirs_exist_ok=True)  # how many are there
    config = replace(
        config,
        oracle=replace(config.oracle, response=response, decimals=decimals),
        distill=replace(config.distill, store=str(changed)),
    )
    run = students.named(config, place, "student", "distill", name)
    student, run = students.learned(run)
    with students.locked(teacher.out):
        labels, answers = evaluate.ask_test(teacher)
    predicted = evaluate.predictions(student, run.data)
    honest = defended_test(teacher, labels, defence)
    return {
        "accuracy": f"{100 * accuracy(predicted, labels):.2f}",
        "agreement": f"{100 * accuracy(predicted, answers):.2f}",
        "teacher": f"{100 * honest:.2f}",
        "changed": f"{100 * changed_share(asked, config.distill.replay or 0, defence):.1f}",
    }


def given(probs: torch.Tensor, response: str, decimals: int | None, defence: Defence) -> Response:
    """What a server that defends itself gives away of probabilities (m, C)."""
    p = defence(probs)
    if response == "label":
        return Response("label", None, p.argmax(1))
    return Response("probs", p if decimals is None else p.round(decimals=decimals), None, decimals)


def defended_test(teacher: Run, labels: torch.Tensor, defence: Defence) -> float:
    """The accuracy of the defended teacher on the labelled test images."""
    with evaluate.asking(teacher, "defence-test") as oracle:
        probs = torch.cat([oracle.query(x).target["probs"].cpu() for x, _ in teacher.data.once("test", 256)])
    return accuracy(defence(probs).argmax(1), labels)


def changed_share(asked: Run, count: int, defence: Defence) -> float:
    """The share of the store's answers whose best class is another one."""
    _, answer, _ = Replay(asked.out / "replay", count, part=True).read(slice(None))
    probs = answer.target["probs"]
    return 1 - accuracy(defence(probs).argmax(1), probs.argmax(1))
