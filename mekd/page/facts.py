"""What a page shows of a run: read from the files of its folder, whether it is finished, at work or not yet begun."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mekd import files
from mekd.config import DeprivatizeConfig
from mekd.engine import dp
from mekd.engine.result import audit_of
from mekd.engine.run import ACCOUNTS, Run
from mekd.engine.runlog import read_metrics
from mekd.fingerprint import asks
from mekd.nets import Generator
from mekd.nets.frozen import freeze
from mekd.oracle import ledger
from mekd.oracle.replay import mapped
from mekd.oracle.response import Response
from mekd.pixels import to_uint8
from mekd.plots import Confusion, evaluated, occurring
from mekd.seeds import generator_at
from mekd.settings import flatten

#: Images of a class that are shown, and images of a generator that nobody was asked about yet.
COLUMNS, DRAWN = 10, 40


@dataclass(frozen=True)
class Class:
    """A class as the teacher names it: how many held-out answers name it, and images (k, ch, S, S), surest first."""

    name: str
    count: int
    images: Tensor


@dataclass(frozen=True)
class Facts:
    """A run as its files tell it; what is None or empty is not there (yet).

    names: of the classes; shown: those of a table; accounts: queries, calls, bytes and uncertain by account; answers:
    how many were held out; drawn: images (k, ch, S, S) of the generator as it is, before anything was asked; log: the
    last lines of the log.
    """

    run: Run
    names: Sequence[str]
    metrics: Sequence[dict[str, Any]]
    accounts: dict[str, dict[str, int]]
    summary: dict[str, Any] | None
    coverage: dict[str, Any] | None
    audit: dict[str, Any] | None
    noise: dict[str, Any] | None
    shown: Sequence[int]
    classes: Sequence[Class]
    answers: int
    confusion: Confusion | None
    drawn: Tensor | None
    log: Sequence[str]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings by dotted name."""
        return dict(flatten(dataclasses.asdict(self.run.config)))

    @property
    def finished(self) -> bool:
        """Whether the student is there, and all that was asked of the run."""
        return self.summary is not None


def gather(
    run: Run, names: Sequence[str], summary: dict[str, Any] | None = None, confusion: Confusion | None = None,
    moving: bool = False, log: Sequence[str] = (),
) -> Facts:  # fmt: skip
    """Read what there is. Nothing is asked, computed anew, locked or written.

    names: of the classes, numbers where there are none yet; confusion: where evaluate.json does not hold it; moving:
    also what the generator draws by now, where no answer is there yet; log: lines of the log to show.
    """
    answer = None
    if run.config.distill.store is not None or (run.out / "coverage.json").exists():  # all of them are there
        images, answer = mapped(run.store("holdout"), run.config.distill.holdout)
    shown: list[int] = []
    classes = []
    if answer is not None:
        covered = run.read_json("coverage.json") or {"classes": 0}
        known = max(len(names), covered["classes"], 1 + int(answer.labels.max()))
        names = [*names, *(str(i) for i in range(len(names), known))]
        shown = occurring(answer.labels, known)
        counts = torch.bincount(answer.labels[answer.labels >= 0], minlength=known)
        classes = [Class(names[i], int(counts[i]), _surest(images, answer, i)) for i in shown]
    return Facts(
        run=run,
        names=names,
        metrics=read_metrics(run.out / "metrics.jsonl"),
        accounts={name: ledger.totals(run.ledger, name) for stage in ACCOUNTS.values() for name in stage},
        summary=summary,
        coverage=run.read_json("coverage.json"),
        audit=audit_of(run),
        noise=dp.told(run),
        shown=shown,
        classes=classes,
        answers=0 if answer is None else len(answer),
        confusion=confusion or evaluated(run),
        drawn=_drawn(run) if moving and answer is None else None,
        log=log,
    )


def queries_before(run: Run, stage: str) -> tuple[int, int]:
    """The queries that a run has paid before the first step of a stage, and those of each step."""
    step1, step2 = run.config.deprivatize, run.config.distill
    each = step1.batch if asks(run.config) else 0
    if stage == "deprivatize":
        return 0, each
    if stage != "distill" or step2.store is not None:
        return 0, 0
    return each * step1.steps + step2.holdout, 0 if step2.replay else step2.batch


def _surest(images: np.ndarray, answer: Response, number: int) -> Tensor:
    """Of a class the images (k, ch, S, S) that the teacher is surest of, uint8."""
    found = (answer.labels == number).nonzero().squeeze(1)
    found = found[answer.confidence[found].argsort(descending=True, stable=True)][:COLUMNS]
    picked = torch.from_numpy(images[found.numpy()])
    return picked if picked.dtype == torch.uint8 else to_uint8(picked)


def _drawn(run: Run) -> Tensor | None:
    """What the generator of the last checkpoint draws of some codes, always the same ones."""
    path = run.checkpoint("deprivatize")
    if not path.exists():
        return None
    return _drawn_by(path, path.stat().st_mtime_ns, run.config.deprivatize, run.config.data.size)


@functools.lru_cache(maxsize=1)
@torch.no_grad()
def _drawn_by(path: Path, written: int, settings: DeprivatizeConfig, side: int) -> Tensor:
    """The same, of the checkpoint that was written then."""
    state = files.load(path)["state"]
    weights = state["generator"]
    if settings.ema:
        weights = {name: state["average"][f"module.{name}"] for name in weights}
    channels, inputs = weights["last.weight"].shape[0], weights["linear.weight"].shape[1]
    classes = inputs - settings.nuisance
    generator = Generator(classes, side, channels, settings.width, settings.nuisance)
    generator.load_state_dict(weights)
    random = generator_at("page")
    code, n = (torch.randn(DRAWN, size, generator=random) for size in (classes, settings.nuisance))
    return to_uint8(freeze(generator.eval())(code, n))
