"""Whether the first answers show enough of the teacher's classes to learn from, before more of them are paid."""

import math
from typing import Any

import torch
from torch import Tensor

from mekd.engine.run import Run
from mekd.errors import MekdError
from mekd.oracle.replay import Replay
from mekd.oracle.response import Response

#: Answers that are looked at, at most, and as a share of a store.
MOST, SHARE = 1000, 0.1

_RECIPE = "--deprivatize.d_width, --deprivatize.width, --deprivatize.lr"


class Uncovered(MekdError, RuntimeError):
    """The generator shows the teacher too few of its classes; what was asked is saved."""

    status = 3


def wanted(run: Run) -> int:
    """The answers that are looked at: min(1000, 10 % of the store), and those of the holdout at least."""
    config = run.config.distill
    return max(config.holdout, min(MOST, math.ceil(SHARE * config.replay)) if config.replay else 0)


def require(run: Run, *stores: Replay, rows: int) -> None:
    """Look at the first rows of some stores and write coverage.json; Uncovered below distill.coverage."""
    answers = [store.read(slice(0, count))[1] for store, count in zip(stores, _dealt(stores, rows), strict=True)]
    found = measure(answers, run.num_classes)
    least = run.config.distill.coverage * plausible(found["answers"], found["classes"])
    found |= {"least": round(least, 1), "stopped": found["classes_met"] < least}
    run.write_json("coverage.json", found)
    run.log(f"coverage: {describe(found)}")
    for line in suspicious(found):
        run.log(f"coverage: {line}")
    if found["stopped"]:
        raise Uncovered(
            f"{found['classes_met']} of {found['classes']} classes occur in {found['answers']:,} answers, and "
            f"{math.ceil(least)} are asked for: distill.coverage {run.config.distill.coverage:g} of the "
            f"{plausible(found['answers'], found['classes']):.0f} that so many answers would show of classes that are "
            "all alike. A student would learn no more than these. Nothing more was asked; all is saved. "
            f"{_advice(run)}. If your photos show no more classes than these, --distill.coverage 0 goes on as it is"
        )


def _advice(run: Run) -> str:
    """What may show more classes, of what is not decided by another run or by an epsilon."""
    step1 = run.config.deprivatize
    if step1.generator is not None:  # its recipe is what it was trained with
        return (
            "What helps: another generator than that of deprivatize.generator, of a longer step 1 or of larger images: "
            "the same command with another --deprivatize.generator and another --out. The answers so far stay booked "
            "in this folder"
        )
    if step1.after is not None:  # sizes are those of the first round
        ways = [_longer(step1.steps), "another recipe (--deprivatize.lr)"]
    elif step1.dp is not None:  # the noise lasts for no more steps
        ways = ["larger images (another --data.size)", f"another recipe ({_RECIPE}); each spends deprivatize.dp anew"]
    else:
        ways = [_longer(step1.steps), "larger images (another --data.size)", f"another recipe ({_RECIPE})"]
    return (
        f"What helps: {'; '.join(ways)}. The same command with one of them goes on in this folder: the answers so far "
        "stay booked, and a new store begins"
    )


def _longer(steps: int) -> str:
    return f"a longer step 1 (--deprivatize.steps {2 * steps}), with more photos in the folder if you have them"


def measure(answers: list[Response], classes: int) -> dict[str, Any]:
    """What classes some answers name: how many, the largest share, how sure, and an estimate of those never met.

    The estimate is Chao's (1984), bias-corrected: f1 (f1 - 1) / (2 (f2 + 1)) of f1 classes met once and f2 met twice.
    """
    named = torch.cat([answer.labels.cpu() for answer in answers])
    sure = torch.cat([answer.confidence.cpu() for answer in answers])
    counts = torch.bincount(named[named >= 0], minlength=classes)
    met = int((counts > 0).sum())
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    only_labels = all(answer.kind == "label" for answer in answers)
    return {
        "answers": len(named),
        "classes": classes,
        "classes_met": met,
        "majority_class": int(counts.argmax()),
        "majority_share": round(int(counts.max()) / max(len(named), 1), 6),
        "mean_confidence": None if only_labels else round(float(sure.mean()), 6),
        "alike": not only_labels and _alike(answers),
        "never_met": min(classes - met, round(once * (once - 1) / (2 * (twice + 1)))),
    }


def plausible(answers: int, classes: int) -> float:
    """The classes that so many answers show on the average where all classes are equally frequent."""
    return float(classes * -math.expm1(answers * math.log1p(-1 / classes)))


def describe(found: dict[str, Any]) -> str:
    """The measures in a line."""
    line = (
        f"{found['classes_met']} of {found['classes']} classes in {found['answers']:,} answers, the most frequent in "
        f"{100 * found['majority_share']:.1f} %"
    )
    if found["mean_confidence"] is not None:
        line += f"; mean confidence {found['mean_confidence']:.3f}"
    hidden = found["classes"] - found["classes_met"]
    return line + (f"; about {found['never_met']} more would yet be met (an estimate)" if hidden else "")


def suspicious(found: dict[str, Any]) -> list[str]:
    """What in the measures betrays a mistake, in sentences."""
    lines = []
    chance = 1 / found["classes"]
    if found["mean_confidence"] is not None and found["mean_confidence"] < 1.5 * chance:
        lines.append(
            f"the teacher is hardly ever surer than {chance:.3g}, which is chance: it may take its images on another "
            "scale or in another order of channels. Look at oracle.mean, oracle.std and oracle.output"
        )
    if found["alike"]:
        lines.append(
            "the teacher's answers never change, whatever it is sent: look at oracle.mean and oracle.std, at the "
            "images in samples/, and at what your service does with them"
        )
    return lines


def _alike(answers: list[Response]) -> bool:
    """Whether every answer is the same."""
    rows = [torch.cat(list(column)) for column in zip(*(answer.tensors() for answer in answers), strict=True)]
    return all(bool((_flat(row) == _flat(row)[:1]).all()) for row in rows)


def _flat(row: Tensor) -> Tensor:
    return row.cpu().reshape(len(row), -1)


def _dealt(stores: tuple[Replay, ...], rows: int) -> list[int]:
    """How many rows of each store, the first ones first."""
    counts = []
    for store in stores:
        counts.append(min(len(store), rows))
        rows -= counts[-1]
    return counts
