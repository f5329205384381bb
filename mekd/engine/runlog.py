"""What a person sees of a stage: metrics.jsonl, the log, the progress bar, a profile; and the stop at a NaN."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mekd import files
from mekd.engine import parallel
from mekd.engine.feeds import Feed
from mekd.engine.run import Run
from mekd.errors import Diverged


class RunLog:
    """The means of a stage's losses every engine.log_every steps, and where its time goes.

    batch: images a step, of all processes; feeds: what the steps consume; lr: the setting that tames a loss. means:
    those of the last line that was written.
    """

    def __init__(
        self, run: Run, name: str, steps: int, batch: int, feeds: Mapping[str, Feed], lr: str | None = None
    ) -> None:
        self.run, self.name, self.steps, self.batch, self.lr = run, name, steps, batch, lr
        self._feeds = list(feeds.values())
        self.ledger = next((feed.ledger for feed in self._feeds if feed.ledger is not None), None)
        self.step, self.seconds = 0, 0.0
        self.depends: Mapping[str, Any] = {}  # what the losses are a result of
        self._sums: dict[str, Any] = {}
        self._unread: dict[str, Tensor] = {}
        self.means: dict[str, float] = {}
        self._before = self._begun = 0.0
        self._bar: Any = None

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last line."""
        return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in self._sums.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with them."""
        self._sums = dict(state)

    def add(self, **values: Tensor) -> None:
        """Add a step's losses, 0-d, to the means. Raises Diverged; on a GPU a step later, so that nobody waits."""
        self.check()
        self._unread = {name: value.detach() for name, value in values.items()}
        for name, value in self._unread.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._sums["steps"] = self._sums.get("steps", 0) + 1
        if not any(value.is_cuda for value in values.values()):
            self.check()

    def check(self) -> None:
        """Raise Diverged where a loss that was added is no number."""
        unread, self._unread = self._unread, {}
        for name, value in unread.items():
            if not math.isfinite(number := float(value)):
                raise diverged(self.name, f"{name} is {number}", self.step, self.lr)

    def begin(self, step: int, seconds: float) -> None:
        """The first step that is left, and the seconds of those before it."""
        self.step, self.seconds, self._before, self._begun = step, seconds, seconds, time.perf_counter()

    def end_of_step(self, step: int) -> None:
        """So many steps are done: the bar moves, and every so often a line is written."""
        now = time.perf_counter()
        self.seconds, self._begun, self.step = self.seconds + now - self._begun, now, step
        if step % self.run.config.engine.log_every == 0 or step == self.steps:
            self.check()
            self._write_means()
        self._show()

    def write(self, step: int, **values: float) -> None:
        """Write a line of metrics, after that many steps. A number that JSON does not know becomes null."""
        if parallel.rank():
            return
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}
        row = {"stage": self.name, "step": step, **known}
        files.append(self.run.out / "metrics.jsonl", json.dumps(row, allow_nan=False))
        self.run.tracks.metrics(self.name, self.depends, step, known)

    def forget(self, step: int) -> None:
        """Drop the lines of steps that will be taken again."""
        path = self.run.out / "metrics.jsonl"
        if path.exists() and parallel.rank() == 0:
            lines = path.read_text("utf-8", "replace").splitlines(True)
            files.write_text(path, "".join(line for line in lines if self._keeps(line, step)))

    def _keeps(self, line: str, step: int) -> bool:
        try:
            row = json.loads(line)
        except ValueError:  # the line that a kill cut short
            return False
        return row["stage"] != self.name or row["step"] <= step

    def _write_means(self) -> None:
        count = self._sums.pop("steps", 0)
        totals = parallel.sum_of(*(float(total) for total in self._sums.values()))
        means = {
            name: round(total / count / parallel.world(), 6) for name, total in zip(self._sums, totals, strict=True)
        }
        self._sums, self.means = {}, means
        left = {}
        if self.ledger is not None and self.ledger.left is not None:
            left = {"budget_left": int(parallel.sum_of(self.ledger.left)[0])}
        self.write(self.step, **means, **left)
        shares = "".join(f"  {name} {share}" for name, share in self._shares().items())
        text = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        budget = "".join(f"  budget left {n}" for n in left.values())
        rate = self.step * self.batch / max(self.seconds, 1e-9)
        line = f"{self.name} {self.step}/{self.steps}  {text}  {rate:.0f} images/s{shares}{budget}"
        self.run.log(line, screen=self._bar is None)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """With the progress bar, where somebody watches, and the profile, where it was asked for."""
        engine = self.run.config.engine
        with contextlib.ExitStack() as stack:
            self._profiled: Callable[[], object] = stack.enter_context(self.run.profiled(self.name))
            if parallel.rank() == 0 and engine.progress and sys.stderr.isatty():  # a bar in a file helps nobody
                from tqdm import tqdm

                bar = tqdm(total=self.steps, initial=self.step, desc=self.name, unit="step", dynamic_ncols=True)
                self._bar = stack.enter_context(bar)
            yield
        self._bar = None

    def _shares(self) -> dict[str, str]:
        """How much of this process's time the steps waited, by what for."""
        taken = max(self.seconds - self._before, 1e-9)
        return {feed.waits_for: f"{100 * feed.waited / taken:.0f}%" for feed in self._feeds}

    def _show(self) -> None:
        self._profiled()
        if self._bar is None:
            return
        self._bar.update()
        rate = self._bar.format_dict["rate"] or 0.0
        shown = {"images/s": f"{rate * self.batch:.0f}"}
        shown |= self._shares()
        if self.ledger is not None and self.ledger.left is not None:
            shown["budget left"] = str(self.ledger.left)
        self._bar.set_postfix(shown, refresh=False)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole: one may just be written, or was cut short by a kill."""
    rows = []
    lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("stage"), str) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def diverged(stage: str, what: str, step: int, lr: str | None) -> Diverged:
    """The error for what is no number, and what to do about it."""
    less = f" and a smaller --{lr}" if lr else ""
    return Diverged(
        f"{stage} diverged: {what} at step {step}. Its last checkpoint, of before, is kept; the same command would "
        f"come here again: start anew with another --out{less}"
    )
