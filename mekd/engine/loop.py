"""The steps of a stage, between them: checkpoints, exact resume, the log, the progress bar, Ctrl-C."""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from mekd import files
from mekd.engine import parallel
from mekd.engine.run import Run, StageError, is_terminal
from mekd.oracle.ledger import BudgetSpent, Ledger
from mekd.errors import MekdError


class Interrupted(MekdError, RuntimeError):
    """Somebody asked the run to stop; it is saved."""

    status = 130


class Loop:
    """Iterate over the steps that a stage has left, from its last checkpoint on.

    state: the modules, optimisers and dicts that the steps change, by name; a checkpoint holds them and the
    random states, so that a resumed stage takes exactly the steps that an undisturbed one would. A dict is
    updated in place. own: what each process has for itself, such as its place in the data; with another number of
    processes it is left as it is. queries(step): what a step asks of this process's budget; a step that one of them
    cannot pay is not begun. begin_at: the requests that the ledger knew of before the stage. ahead(): the answers
    that the ledger has got for steps to come.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        steps: int,
        state: dict[str, Any],
        fingerprint: dict[str, Any],
        *,
        batch: int,
        own: dict[str, Any] | None = None,
        ledger: Ledger | None = None,
        queries: Callable[[int], int] | None = None,
        begin_at: int = 0,
        ahead: Callable[[], int] = lambda: 0,
    ) -> None:
        self.run, self.name, self.steps, self.state, self.own = run, name, steps, state, own or {}
        self.fingerprint, self.batch, self.ledger, self.queries = fingerprint, batch, ledger, queries
        self.ahead = ahead
        self.path = run.checkpoint(name)
        self.step, self.seconds, self.requests = 0, 0.0, begin_at
        self._sums: dict[str, Any] = {}
        self._clocks: dict[str, float] = {}
        self._stop = False
        self._restore()

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.steps

    def _restore(self) -> None:
        if self.path.exists():
            saved = files.load(self.path)
            differing = [
                f"{key} was {saved['fingerprint'].get(key)!r} and is {self.fingerprint.get(key)!r}"
                for key in sorted(saved["fingerprint"].keys() | self.fingerprint.keys())
                if saved["fingerprint"].get(key) != self.fingerprint.get(key)
            ]
            if differing:
                raise StageError(
                    f"{self.path} is of another configuration: {'; '.join(differing)}. Set that back, or start anew "
                    "with another --out"
                )
            for name, part in self.state.items():
                if isinstance(part, dict):
                    part.update(saved["state"][name])
                else:
                    part.load_state_dict(saved["state"][name])
            self.step, self.seconds = saved["step"], saved["seconds"]
            parallel.barrier()  # nobody writes while another reads
            self._restore_own(saved["processes"])
        if not self.done:
            if self.ledger is not None:
                self.ledger.rewind(self.requests)
            self._forget_metrics()
        self.run.save_config()

    def _restore_own(self, processes: list[dict[str, Any]]) -> None:
        if len(processes) != parallel.world():
            self.run.log(
                f"{self.name}: {parallel.world()} processes go on from the checkpoint of {len(processes)}; the data's "
                "epoch begins anew"
            )
            if self.ledger is not None:
                self.ledger.pass_over()
            self.save()
            return
        saved = processes[parallel.rank()]
        for name, part in self.own.items():
            part.load_state_dict(saved["own"][name])
        self.requests, self._sums = saved["requests"], saved["sums"]
        torch.set_rng_state(saved["rng"])
        if saved["cuda_rng"] is not None and self.run.device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda_rng"], self.run.device)

    def save(self) -> None:
        """Write a checkpoint, then let the ledger forget the answers that it contains."""
        asked_ahead = self.ahead()
        if self.ledger is not None:
            self.requests = self.ledger.next - asked_ahead
        cuda = self.run.device.type == "cuda"
        mine = {
            "own": {name: part.state_dict() for name, part in self.own.items()},
            "requests": self.requests,
            "sums": {n: v.cpu() if isinstance(v, Tensor) else v for n, v in self._sums.items()},
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.run.device) if cuda else None,
        }
        state = {n: dict(p) if isinstance(p, dict) else p.state_dict() for n, p in self.state.items()}
        processes = parallel.gather(mine)
        if parallel.rank() == 0:
            files.save(
                self.path,
                {
                    "fingerprint": self.fingerprint,
                    "state": state,
                    "step": self.step,
                    "seconds": self.seconds,
                    "processes": processes,
                },
            )
        parallel.barrier()
        if self.ledger is not None and not asked_ahead:  # an answer ahead is found in the journal again
            self.ledger.settle()

    def __enter__(self) -> "Loop":
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._ask_to_stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if self._stop:  # asked twice: at once, at the price of the steps since the last checkpoint
            raise KeyboardInterrupt
        self._stop = True

    def __iter__(self) -> Iterator[int]:
        every = self.run.config.engine
        with self._bar() as bar, self._profiled() as stepped:
            begun = time.perf_counter()
            while not self.done:
                self._check_stop()
                yield self.step
                stepped()
                self.step += 1
                now = time.perf_counter()
                self.seconds, begun = self.seconds + now - begun, now
                if self.step % every.log_every == 0 or self.done:
                    self._write_metrics()
                if self.step % every.checkpoint_every == 0 or self.done:
                    self.save()
                self._show(bar, now)
        if any(parallel.any_of(self._stop)):
            raise Interrupted(f"{self.name} is finished and saved; the same command goes on with the next stage")

    def _check_stop(self) -> None:
        asked = self.queries(self.step) if self.queries is not None else 0
        spent = self.ledger is not None and asked > 0 and not self.ledger.affords(asked)
        spent, stop = parallel.any_of(spent, self._stop)
        if not spent and not stop:
            return
        self.save()
        if stop:
            raise Interrupted(
                f"{self.name} stopped at step {self.step} of {self.steps}, saved; the same command goes on"
            )
        assert self.ledger is not None
        (total, needed) = map(int, parallel.sum_of(self.ledger.spent, asked))
        raise BudgetSpent(
            f"{self.ledger.stage}.budget is {self.ledger.budget} queries and {total} are spent; the next "
            f"step of {self.name} needs {needed}. It stands at step {self.step} of {self.steps}, saved. To go "
            f"on, run the same command with a larger --{self.ledger.stage}.budget"
            + (
                f", or accept the generator as it is with --deprivatize.steps {self.step}"
                if self.name == "deprivatize" and self.step
                else ""
            )
        )

    # -- what a person sees --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Count the time within as spent on name ("data" or "teacher"), for the progress bar and the log."""
        begun = time.perf_counter()
        yield
        self._clocks[name] = self._clocks.get(name, 0.0) + time.perf_counter() - begun

    def log(self, **values: Tensor) -> None:
        """Add 0-d tensors to the means that are written every engine.log_every steps; the device is not stopped."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()
        self._sums["steps"] = self._sums.get("steps", 0) + 1

    def write(self, step: int, **values: float) -> None:
        """Write a line of metrics, after that many steps."""
        if parallel.rank():
            return
        self.run.out.mkdir(parents=True, exist_ok=True)
        with open(self.run.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"stage": self.name, "step": step, **values}) + "\n")

    def _write_metrics(self) -> None:
        count = self._sums.pop("steps", 0)
        totals = parallel.sum_of(*(float(total) for total in self._sums.values()))
        means = {
            name: round(total / count / parallel.world(), 6) for name, total in zip(self._sums, totals, strict=True)
        }
        self._sums = {}
        left = {}
        if self.ledger is not None and self.ledger.left is not None:
            left = {"budget_left": int(parallel.sum_of(self.ledger.left)[0])}
        self.write(self.step, **means, **left)
        shares = "".join(f"  {name} {100 * s / max(self.seconds, 1e-9):.0f}%" for name, s in self._clocks.items())
        text = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        budget = "".join(f"  budget left {n}" for n in left.values())
        rate = self.step * self.batch / max(self.seconds, 1e-9)
        line = f"{self.name} {self.step}/{self.steps}  {text}  {rate:.0f} images/s{shares}{budget}"
        self._silent_log(line)

    def _silent_log(self, line: str) -> None:
        if parallel.rank():
            return
        if is_terminal() and self.run.config.engine.progress:
            with open(self.run.out / "log.txt", "a") as file:
                file.write(line + "\n")
        else:
            self.run.log(line)

    def _forget_metrics(self) -> None:
        """Drop the lines of steps that will be taken again."""
        path = self.run.out / "metrics.jsonl"
        if path.exists() and parallel.rank() == 0:
            kept = [line for line in path.read_text().splitlines(True) if self._keeps(line)]
            files.write_text(path, "".join(kept))

    def _keeps(self, line: str) -> bool:
        try:
            row = json.loads(line)
        except ValueError:  # the line that a kill cut short
            return False
        return row["stage"] != self.name or row["step"] <= self.step

    def _profiled(self) -> Any:
        if parallel.rank() or not self.run.config.engine.profile:
            return contextlib.nullcontext(lambda: None)
        from mekd.engine.profile import profiled

        return profiled(self.name, self.run.out / "profile", self.run.log)

    def _bar(self) -> Any:
        if parallel.rank() or not (is_terminal() and self.run.config.engine.progress):
            return contextlib.nullcontext()
        from tqdm import tqdm

        return tqdm(total=self.steps, initial=self.step, desc=self.name, unit="step", dynamic_ncols=True)

    def _show(self, bar: Any, now: float) -> None:
        if bar is None:
            return
        bar.update()
        rate = bar.format_dict["rate"] or 0.0
        shown = {"images/s": f"{rate * self.batch:.0f}"}
        shown |= {name: f"{100 * s / max(self.seconds, 1e-9):.0f}%" for name, s in self._clocks.items()}
        if self.ledger is not None and self.ledger.left is not None:
            shown["budget left"] = str(self.ledger.left)
        bar.set_postfix(shown, refresh=False)
