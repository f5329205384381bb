"""What a run will ask of its teacher, said and agreed to before the first of it is paid."""

import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mekd import files, system
from mekd.config import Config
from mekd.data.photos import find
from mekd.engine import parallel, reach
from mekd.engine.preflight import preflight
from mekd.engine.run import ACCOUNTS, Run
from mekd.errors import UsageError
from mekd.fingerprint import asks, default_name
from mekd.oracle.answers import Raw
from mekd.oracle.ledger import totals


def queries_of(config: Config) -> list[tuple[str, int]]:
    """The queries of each step, exactly, but for calls whose fate is unknown."""
    step1, step2 = config.deprivatize, config.distill
    return [
        ("deprivatize", step1.steps * step1.batch if asks(config) else 0),
        ("distill", 0 if step2.store else step2.holdout + (step2.replay or step2.steps * step2.batch)),
        *([("audit", config.audit.budget)] if config.audit.budget and not step2.store else []),
    ]


def _all_queries(run: Run) -> dict[str, int]:
    """The same, and those of the simulation."""
    simulation, found = run.config.evaluate, dict(queries_of(run.config)) | {"evaluate": 0}
    if simulation.enabled:
        found["evaluate"] += run.data.count("test") if simulation.ask_teacher else 0
        found["evaluate"] += run.data.count("local") if simulation.baseline else 0
    return found


def quote(run: Run) -> list[str]:
    """Queries, calls, bytes, price and time of each stage, as lines; DataError where data.path holds no photos."""
    if run.config.data.name == "photos" and run.config.data.path is not None:
        find(run.config.data.path)
    oracle = run.config.oracle
    channels, side, _ = run.image
    remote = run.config.teacher.remote
    if remote:
        reach.check(run)
    batch = reach.calls_of(run) if remote else 1
    side = (reach.side(run) if remote else None) or side
    pixels = channels * side * side * (4 if oracle.transport == "float" else 1)
    almost = {"raw": "", "png": "at most ", "jpeg": "at most "}[oracle.encoding]
    lines = []
    for stage, queries in _all_queries(run).items():
        calls = math.ceil(queries / batch)
        line = f"{stage}: {queries:,} queries"
        if queries:
            line += f", {calls:,} calls" if remote else ""
            line += f", {almost}{queries * pixels / 1e6:,.1f} MB up"
            if oracle.price is not None:
                line += f", price {queries * oracle.price:,.2f}"
            seconds = [n / rate for n, rate in ((calls, oracle.rate), (queries, oracle.image_rate)) if rate]
            if seconds:
                line += f", {_time(max(seconds))} at the given rate"
        lines.append(line)
    most = limit(run)
    line = f"the run: {most:,} queries at most" + ("" if oracle.budget else ", and those whose fate is unknown")
    if oracle.price is not None:
        line += f", price {most * oracle.price:,.2f} at most"
    if remote and (sent := real_images(run)):
        lines.append(
            f"evaluate sends your {' and your '.join(sent)} to the teacher, {default_name(run.config.teacher)}"
        )
    if remote and asks(run.config):
        lines.append("deprivatize sends what the generator draws while it learns from your images (deprivatize.alpha)")
    accounts = [name for stage in ACCOUNTS.values() for name in stage]
    if answered := totals(run.out / "ledger", *accounts)["queries"]:
        line += f"; {answered:,} are answered and not asked again"
    return [*lines, line]


def real_images(run: Run) -> list[str]:
    """Which images of the user's own, and not drawn ones, a run sends to the teacher."""
    simulation = run.config.evaluate
    kinds = {"labelled test images": simulation.ask_teacher, "PRIVATE images": simulation.baseline}
    return [kind for kind, on in kinds.items() if on and simulation.enabled]


def limit(run: Run) -> int:
    """The queries that a run may pay: its budget, or what its stages ask."""
    return run.config.oracle.budget or sum(_all_queries(run).values())


def confirm(run: Run, stages: Sequence[str], agreed: bool) -> None:
    """Before a remote teacher is paid: print the quote, and have it agreed to; UsageError where it is not.

    It is agreed to once, and anew where more may be asked, another teacher is asked, or another kind of images is sent,
    or real ones to another address.
    """
    pays = {"distill", "evaluate", "audit"} | ({"deprivatize"} if asks(run.config) else set())
    if not run.config.teacher.remote or run.config.distill.store or not pays & set(stages):
        return
    path: Path = run.out / "confirmed.json"
    refused = ""
    if parallel.rank() == 0:
        most, sent, kept = limit(run), real_images(run), _agreed_to(path)
        name, address = run.teacher_name, default_name(run.config.teacher)
        # An earlier version kept neither name nor address; a name may stay where the address changes.
        asked = kept.get("queries", 0) if kept.get("teacher", name) == name else 0
        known = kept.get("real_images", []) if kept.get("address") == address else []
        if most > asked or not set(sent) <= set(known):
            for line in quote(run):
                run.log(line)
            if agreed or _says_yes(most):
                agreed_to = {"queries": max(most, asked), "real_images": sorted({*known, *sent})}
                agreed_to |= {"teacher": name, "address": address}
                files.write_text(path, json.dumps(agreed_to) + "\n")
            else:
                refused = "nothing was asked: agree to the quote with --yes" + (
                    "" if _somebody() else ", since there is no terminal to be asked on"
                )
    said = parallel.any_of(bool(refused))
    if any(said):
        raise UsageError(refused or "nothing was asked: the first process did not agree to the quote")


def _agreed_to(path: Path) -> dict[str, Any]:
    """What was agreed to before; nothing where that cannot be read, so that it is asked about anew."""
    try:
        kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except ValueError:
        return {}
    return kept if isinstance(kept, dict) else {}


def confirm_images(run: Run, agreed: bool) -> None:
    """On a terminal, have what will be sent looked at before the first image goes; UsageError where it shall not.

    Before step 1 is at its end nothing can be looked at, and the question says so.
    """
    sheet, refused = run.out / "samples" / "sent.png", False
    instead = (
        "Where they come too near to yours, start anew with another --out: more photos or a shorter step 1 "
        "(--deprivatize.steps) help"
    )
    if parallel.rank() == 0 and not agreed and _somebody():
        path = run.checkpoint("deprivatize")
        if not path.exists() or files.load(path)["step"] < run.config.deprivatize.steps:
            shown = "that the generator draws while it learns from yours, and that nobody can look at before,"
            instead = "With --deprivatize.alpha 0 step 1 asks nothing, and what step 2 sends can be looked at"
        elif sheet.exists():
            shown = f"such as in {sheet}"
        else:
            shown = "that samples/sent.png would show with matplotlib and data"
        refused = not _yes(f"images {shown} will be sent to {run.teacher_name}; send them?")
    if any(parallel.any_of(refused)):
        raise UsageError(f"nothing was asked: the images were not agreed to. The same command asks again. {instead}")


def agree(question: str, agreed: bool, refused: str) -> None:
    """On a terminal, have a question answered with yes; UsageError, beginning with refused, where it is not."""
    if agreed or (_somebody() and _yes(question)):
        return
    raise UsageError(
        f"{refused}: agree with --yes" + ("" if _somebody() else ", since there is no terminal to be asked on")
    )


def dry_run(run: Run, stages: Sequence[str]) -> None:
    """Go through the stages, a few steps each, in a folder that is thrown away; a remote teacher is made up."""
    config = run.config
    few: dict[str, Any] = {"steps": 2, "budget": None}
    step2: dict[str, Any] = {
        "holdout": min(config.distill.holdout, 16),
        "replay": min(config.distill.replay or 0, 64),
        "eval_every": 2,
        "pretrain": min(config.distill.pretrain, 2),
        "coverage": 0.0,
    }
    short = dataclasses.replace(
        config,
        teacher=dataclasses.replace(config.teacher, steps=2),
        oracle=dataclasses.replace(config.oracle, budget=None, rate=None, image_rate=None),
        deprivatize=dataclasses.replace(config.deprivatize, **few),
        distill=dataclasses.replace(config.distill, **few, **step2),
        evaluate=dataclasses.replace(config.evaluate, baseline_steps=2),
        engine=dataclasses.replace(config.engine, track=[]),
    )
    from mekd.engine.stages import STAGES

    with tempfile.TemporaryDirectory() as folder:
        about = run.about_teacher if config.teacher.remote else None
        service = None if about is None else MadeUp(about.classes, config.oracle.response)
        if about is not None:
            reach.check(run)  # as it is: the trial has no rate
        trial = Run(short, Path(folder), service=service)
        preflight(trial, stages)
        for stage in stages:
            STAGES[stage](trial)
    system.say("dry run: every stage went through" + ("" if service is None else "; the teacher was asked nothing"))


class MadeUp:
    """A service that answers what looks like answers: one class is likely, by the sum of the bytes."""

    def __init__(self, classes: int, response: str) -> None:
        self._classes, self._response = classes, response

    def call(self, images: "list[bytes] | Tensor") -> tuple[Raw, int]:
        sums = [sum(x) if isinstance(x, bytes) else int(x.float().sum()) for x in images]
        best = np.array([total % self._classes for total in sums])
        if self._response == "label":
            return Raw(indices=best), 0
        scores = np.full((len(best), self._classes), 0.1 / max(self._classes - 1, 1), dtype=np.float32)
        scores[np.arange(len(best)), best] = 0.9
        return Raw(scores=np.log(scores) if self._response == "logits" else scores), 0

    def close(self) -> None:
        pass


def _somebody() -> bool:
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def _says_yes(most: int) -> bool:
    return _somebody() and _yes(f"ask up to {most:,} queries?")


def _yes(question: str) -> bool:
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        print()
        return False


def _time(seconds: float) -> str:
    for most, divisor, unit in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < most:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"
