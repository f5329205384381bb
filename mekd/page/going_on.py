"""How to go on from a finished run, as commands that work as they stand, RUN being its folder."""

import dataclasses
from html import escape

from mekd.engine.run import Run
from mekd.errors import MekdError
from mekd.fingerprint import store_size


def going_on(run: Run) -> str:
    """The commands as HTML."""
    parts = [("Name photos with the student:", "mekd predict RUN/student.onnx PHOTOS --out predictions.csv")]
    parts.append(_another_student(run))
    parts += _more(run)
    listed = "".join(f"<p>{escape(words)}</p><pre>{escape(command)}</pre>" for words, command in parts)
    return (
        "<p>RUN is the run's folder, PHOTOS one with photos; the commands are for the folder that the run was started "
        f"in. README.md in RUN has the lines that load the student with ONNX Runtime and with torch.</p>{listed}"
    )


def _another_student(run: Run) -> tuple[str, str]:
    step2 = run.config.distill
    other = "resnet8" if step2.student == "resnet20" else "resnet20"
    own = " --distill.checkpoint null" if step2.checkpoint is not None else ""
    if step2.replay:
        return (
            "Another student from the answers that are paid; it asks nothing, and this one is kept under its name:",
            f"mekd run --config RUN/config.yaml --out RUN --distill.student {other}{own}",
        )
    return (
        "Another student: this run kept no answers, so that one asks for its own, with the same generator:",
        f"mekd run --config RUN/config.yaml --out ANOTHER {_same(run)} --distill.student {other}{own}",
    )


def _more(run: Run) -> list[tuple[str, str]]:
    """A larger budget, where this run asks at all."""
    config = run.config
    step2, oracle = config.distill, config.oracle
    if step2.store is not None:
        return []
    if not step2.replay:
        paid = "" if step2.budget is None else f" --distill.budget {2 * step2.budget}"
        paid += "" if oracle.budget is None else f" --oracle.budget {2 * oracle.budget}"
        longer = f"mekd run --config RUN/config.yaml --out LONGER {_same(run)} --distill.steps {2 * step2.steps}{paid}"
        return [("More queries: a longer step 2 with the same generator:", longer)]
    size, budget = 2 * step2.replay, ""
    if oracle.budget is not None:
        twice = dataclasses.replace(config, oracle=dataclasses.replace(oracle, budget=2 * oracle.budget))
        try:
            size, budget = store_size(twice), f" --oracle.budget {2 * oracle.budget}"
        except MekdError:  # the audit takes it all, or the like
            return []
    if step2.budget is not None:
        budget += f" --distill.budget {step2.budget + size - step2.replay}"
    return [
        (
            f"More queries: the answers that are there stay, and {size - step2.replay:,} are asked for besides:",
            f"mekd run --config RUN/config.yaml --out RUN --distill.replay {size}{budget}",
        )
    ]


def _same(run: Run) -> str:
    teacher = "" if run.given_teacher else " --teacher.onnx RUN/teacher.onnx"
    own = run.config.deprivatize.generator is None
    return f"--deprivatize.generator RUN{teacher}" if own else teacher.strip()
