"""Where a stage stands: checkpoints, exact resume, and the steps that are left."""

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from mekd import files
from mekd.engine import parallel
from mekd.engine.account import same_elsewhere, same_processes
from mekd.engine.feeds import Feed
from mekd.engine.run import ACCOUNTS, Run, StageError
from mekd.engine.runlog import RunLog, diverged
from mekd.errors import MekdError
from mekd.fingerprint import differing
from mekd.oracle.ledger import BudgetSpent


class Interrupted(MekdError, RuntimeError):
    """Somebody asked the run to stop; it is saved."""

    status = 130


class Checkpoint:
    """What the steps of a stage change, as a file from which a resumed stage takes exactly the steps that are left.

    state: modules, optimisers and dicts by name, the same in every process; a dict is updated in place. feeds: what the
    steps consume, by name, of which each process has its own. depends: what the state is a result of, by name.
    """

    def __init__(
        self, run: Run, name: str, state: dict[str, Any], feeds: Mapping[str, Feed], depends: dict[str, Any]
    ) -> None:
        self.run, self.name, self.state, self.feeds, self.depends = run, name, state, feeds, depends
        self.path = run.checkpoint(name)
        self.step = 0

    def restore(self, log: RunLog) -> int:
        """Go on from the file if it is there; returns the steps that are done. StageError for another run's file."""
        seconds, log.depends = 0.0, self.depends
        if not self.path.exists():
            for feed in self.feeds.values():
                feed.begin()
                if feed.ledger is not None:
                    same_processes(self.run, feed.ledger.name)
        else:
            saved = files.load(self.path)
            check_depends(self.run, self.name, saved["depends"], self.depends)
            for name, part in self.state.items():
                if isinstance(part, dict):
                    part.update(saved["state"][name])
                else:
                    part.load_state_dict(saved["state"][name])
            self.step, seconds = saved["step"], saved["seconds"]
            parallel.barrier()  # nobody writes while another reads
            processes = saved["processes"]
            if len(processes) == parallel.world():
                self._restore_own(processes[parallel.rank()], log)
            else:
                self.run.log(
                    f"{self.name}: {parallel.world()} processes go on from the checkpoint of {len(processes)}; answers "
                    "that came after it are not used"
                )
                for feed_name, feed in self.feeds.items():
                    feed.load_state_dict(processes[0]["feeds"][feed_name], own=False)
        log.begin(self.step, seconds)
        log.forget(self.step)
        return self.step

    def _restore_own(self, saved: dict[str, Any], log: RunLog) -> None:
        for name, feed in self.feeds.items():
            feed.load_state_dict(saved["feeds"][name])
        log.load_state_dict(saved["log"])
        torch.set_rng_state(saved["rng"])
        if saved["cuda_rng"] is not None and self.run.device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda_rng"], self.run.device)

    def save(self, log: RunLog) -> None:
        """Write the file, then let the feeds forget what it holds. Raises Diverged, and keeps the earlier file."""
        log.check()
        for name, part in self.state.items():
            if isinstance(part, nn.Module) and not all_finite(part.state_dict()):
                raise diverged(self.name, f"the {name} holds NaN or infinity", self.step, log.lr)
        cuda = self.run.device.type == "cuda"
        mine = {
            "feeds": {name: feed.state_dict() for name, feed in self.feeds.items()},
            "log": log.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.run.device) if cuda else None,
        }
        state = {n: dict(p) if isinstance(p, dict) else p.state_dict() for n, p in self.state.items()}
        processes = parallel.gather(mine)
        if parallel.rank() == 0:
            place = {"step": self.step, "seconds": log.seconds, "processes": processes}
            files.save(self.path, {"depends": self.depends, "state": state, **place})
        parallel.barrier()
        for feed in self.feeds.values():
            feed.settle()


def check_depends(run: Run, name: str, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """StageError where a checkpoint is the result of something else, naming what differs."""
    differs = [f"{key} was {was!r} and is {now!r}" for key, (was, now) in differing(saved, wanted).items()]
    if differs:
        # Where nothing was paid for the file itself, it may go.
        kept = name in ("baseline", "pretrain") or (name == "distill" and bool(run.config.distill.replay))
        anew = "; or delete the file, to make it anew from the same answers" if kept else ""
        if name == "teacher":  # the black box is made of it, and may have been asked
            files_of_it = "the file, to make it"
            if run.teacher_onnx.exists():
                files_of_it = f"the file and {run.teacher_onnx}, to make both"
            anew = "" if any(run.asked(*ACCOUNTS).values()) else f"; or delete {files_of_it} anew"
        if name.startswith("evaluate-"):
            anew = "; or delete the file, to ask anew"
        anew += same_elsewhere(run, differing(saved, wanted))
        raise StageError(
            f"{run.checkpoint(name)} is of another configuration: {'; '.join(differs)}. Set that back, or start anew "
            f"with another --out{anew}"
        )


def all_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether every floating number of a state_dict is one."""
    return all(bool(x.isfinite().all()) for x in tensors.values() if isinstance(x, Tensor) and x.is_floating_point())


def steps(checkpoint: Checkpoint, log: RunLog) -> Iterator[int]:
    """The steps that are left, from restore() on; each is begun only where every process can pay what it owes.

    Saved every engine.checkpoint_every steps and at the end; and before it raises Interrupted or BudgetSpent.
    """
    every = checkpoint.run.config.engine.checkpoint_every
    with log.shown():
        while checkpoint.step < log.steps:
            _check_stop(checkpoint, log)
            yield checkpoint.step
            checkpoint.step += 1
            log.end_of_step(checkpoint.step)
            if checkpoint.step % every == 0 or checkpoint.step == log.steps:
                checkpoint.save(log)
    if any(parallel.any_of(_asked_to_stop.is_set())):
        raise Interrupted(f"{checkpoint.name} is finished and saved; the same command goes on with the next stage")


def _check_stop(checkpoint: Checkpoint, log: RunLog) -> None:
    paying = next((feed for feed in checkpoint.feeds.values() if feed.ledger is not None), None)
    needs = paying.owes(checkpoint.step) if paying is not None else 0
    spent = needs > 0 and paying is not None and paying.ledger is not None and not paying.ledger.affords(needs)
    spent, stop = parallel.any_of(spent, _asked_to_stop.is_set())
    if not spent and not stop:
        return
    checkpoint.save(log)
    place = f"step {checkpoint.step} of {log.steps}, saved"
    if stop:
        raise Interrupted(f"{checkpoint.name} stopped at {place}; the same command goes on")
    assert paying is not None and paying.ledger is not None
    ledger = paying.ledger
    total, needed = map(int, parallel.sum_of(ledger.spent, needs))
    raise BudgetSpent(
        f"{ledger.setting} is {ledger.budget} queries and {total + ledger.elsewhere} are spent; the next step of "
        f"{checkpoint.name} needs {needed}. It stands at {place}. To go on, run the same command with a larger "
        f"--{ledger.setting}"
        + (
            f", or accept the generator as it is with --deprivatize.steps {checkpoint.step}"
            if checkpoint.name == "deprivatize" and checkpoint.step
            else ""
        )
    )


_asked_to_stop = threading.Event()


def asked_to_stop() -> bool:
    """Whether somebody asked the run to stop."""
    return _asked_to_stop.is_set()


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM stop after the step in hand, saved; asked twice, at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        if _asked_to_stop.is_set():  # at the price of the steps since the last checkpoint
            raise KeyboardInterrupt
        _asked_to_stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _asked_to_stop.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
