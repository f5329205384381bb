"""The accounts of a run: one budget for all processes, and what the answers that no checkpoint holds are of."""

import json
from collections.abc import Mapping
from typing import Any

from mekd import files
from mekd.engine import parallel
from mekd.engine.run import ACCOUNTS, Run, StageError
from mekd.fingerprint import asks, differing
from mekd.oracle import ledger
from mekd.oracle.ledger import Ledger
from mekd.oracle.ledger_file import pending
from mekd.settings import read_saved


def open_account(run: Run, stage: str, name: str) -> Ledger:
    """This process's account NAME, with its share of what all accounts have left, of the stage's budget and the run's.

    The tighter of the two is the account's. StageError where what it holds would be mixed with other answers.
    """
    same_answers(run, name)
    account = Ledger(name, run.ledger, None, rank=parallel.rank())
    (own,) = map(int, parallel.sum_of(account.spent))  # all are open now, and nobody has asked
    limits = [
        (budget, setting, _spent(run, *stages))
        for budget, setting, stages in (
            (getattr(getattr(run.config, stage), "budget", None), f"{stage}.budget", (stage,)),
            (run.config.oracle.budget, "oracle.budget", tuple(ACCOUNTS)),
        )
        if budget is not None
    ]
    account.elsewhere = _spent(run, stage) - own
    unsettled = pending(run.ledger, name)
    parallel.barrier()
    if parallel.rank() == 0 and not unsettled:
        files.write_text(run.ledger / f"{name}.answers", json.dumps(_answers_of(run), indent=1) + "\n")
    if limits:
        account.budget, account.setting, everywhere = min(limits, key=lambda limit: limit[0] - limit[2])
        account.elsewhere = everywhere - own
        account.reserved = account.budget - account.spent - max(0, account.budget - everywhere) // parallel.world()
    return account


def accounts_of(run: Run, stage: str) -> list[str]:
    """Those of a stage's accounts that it asks with, as the run is configured."""
    config = run.config
    step2, simulation = config.distill, config.evaluate
    on = {
        "deprivatize": asks(config),
        "holdout": step2.store is None,
        "replay": step2.store is None and bool(step2.replay),
        "distill": step2.store is None and not step2.replay,
        "evaluate-test": simulation.enabled and bool(simulation.ask_teacher),
        "evaluate-private": simulation.enabled and bool(simulation.baseline),
        "audit": step2.store is None and config.audit.budget > 0 and config.audit.enabled is not False,
    }
    return [name for name in ACCOUNTS.get(stage, ()) if on[name]]


def same_answers(run: Run, name: str) -> None:
    """StageError where an account holds answers that no checkpoint holds, of another teacher or read otherwise.

    With one, the checkpoint says so; the images are held against their digests as they are asked about again.
    """
    path = run.ledger / f"{name}.answers"
    if not path.exists() or not (paid := pending(run.ledger, name)):  # an earlier version kept no such file
        return
    try:
        saved = dict(json.loads(path.read_text("utf-8")))
    except ValueError as error:
        raise files.DamagedError(
            f"{path} is damaged ({error}): put a copy back; or delete it, if the teacher and the settings that begin "
            "with oracle are those that the run was begun with"
        ) from error
    differs = differing(saved, _answers_of(run))
    if differs:
        said = "; ".join(f"{key} was {was!r} and is {now!r}" for key, (was, now) in differs.items())
        raise StageError(
            f"{name} has {paid} answers that no checkpoint holds yet, and they are of another configuration: {said}. "
            f"Set that back, or start anew with another --out{same_elsewhere(run, differs)}"
        )


def same_elsewhere(run: Run, differs: Mapping[str, Any]) -> str:
    """What to say where a remote teacher is another one, and may be the same at another address."""
    known = read_saved(run.out / "config.yaml").get("teacher.name")
    if "teacher" not in differs or not run.config.teacher.remote or not known:
        return ""
    return f"; or say --teacher.name {known}, if it is the same teacher at another address"


def _answers_of(run: Run) -> dict[str, Any]:
    """What an answer depends on, whatever it is asked for, as JSON has it."""
    return dict(json.loads(json.dumps(run.depends("evaluate"))))


def same_processes(run: Run, name: str, saved: str = "it has saved (engine.checkpoint_every)") -> None:
    """Keep how many processes ask with the account NAME before what was saved tells; StageError where others began.

    What is in a process's account is its part of each step, in which another number of processes does not find its own.
    """
    path = run.ledger / f"{name}.processes"
    paid = ledger.totals(run.ledger, name)["queries"] - ledger.totals(run.ledger, f"{name}@*")["queries"]
    kept = path.read_text("utf-8").strip() if path.exists() else ""
    parallel.barrier()  # all have looked, and nobody has asked
    if paid and kept.isdecimal() and int(kept) != parallel.world():
        begun = f"{kept} processes" if int(kept) > 1 else "one process"
        how = f"under torchrun --nproc-per-node {kept}" if int(kept) > 1 else "without torchrun"
        raise StageError(
            f"{name} was begun with {begun}, {paid} queries are paid and nothing that was saved holds them yet: with "
            f"another number, {parallel.world()}, their answers would not be found again. Go on with {begun} ({how}); "
            f"once {saved}, any number goes on from there"
        )
    if parallel.rank() == 0 and not paid:
        files.write_text(path, f"{parallel.world()}\n")


def _spent(run: Run, *stages: str) -> int:
    counts = run.asked(*stages)
    return counts["queries"] + counts["uncertain"]
