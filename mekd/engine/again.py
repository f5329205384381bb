"""What an earlier try in a run's folder left, kept under another name when something begins anew there."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mekd import files
from mekd.engine import parallel
from mekd.engine.run import Run
from mekd.errors import UsageError
from mekd.fingerprint import differing, store_size
from mekd.oracle import ledger

#: The stores of step 2, whose images are those of one generator.
STORES = ("holdout", "replay")


def another_generator(run: Run) -> bool:
    """Whether the coverage of this generator's answers stopped the run, and the settings ask for another one now."""
    found, path = run.read_json("coverage.json"), run.checkpoint("deprivatize")
    if not found or not found["stopped"] or run.config.deprivatize.generator is not None or not path.exists():
        return False
    saved = files.load(path)
    return saved["step"] < run.config.deprivatize.steps or bool(differing(saved["depends"], run.depends("deprivatize")))


def was_asked(run: Run) -> bool:
    """Whether the teacher got images of this generator: those of earlier generations were others."""
    earlier = ledger.totals(run.ledger, *(f"{name}@*" for name in STORES))
    return run.asked("distill")["calls"] > earlier["calls"]


def set_aside_generation(run: Run) -> None:
    """Keep stores, accounts and, unless step 1 goes on, the generator as those of generation N."""
    number = 1 + len(list(run.out.glob("coverage@*.json")))
    checkpoint = run.checkpoint("deprivatize")
    goes_on = not differing(files.load(checkpoint)["depends"], run.depends("deprivatize"))
    if parallel.rank() == 0:
        for name in STORES:
            moved = [run.out / name, run.checkpoint(name), *run.ledger.glob(f"{name}.*")]
            for path in moved:
                if path.exists():
                    path.rename(path.with_name(path.name.replace(name, f"{name}@{number}", 1)))
        if not goes_on:
            checkpoint.rename(checkpoint.with_stem(f"deprivatize@{number}"))
        # coverage.json is last: while it is there, a run that was killed here begins this again.
        for found in (run.out / "samples" / "sent.png", run.out / "sent.json", run.out / "coverage.json"):
            if found.exists():
                found.rename(found.with_stem(f"{found.stem}@{number}"))
    parallel.barrier()
    run.log(
        f"generation {number}: its answers stay booked and kept ({', '.join(f'{name}@{number}' for name in STORES)}); "
        + ("step 1 goes on" if goes_on else "step 1 begins anew")
        + ", and a new store is asked for"
    )


def fit_store(run: Run, anew: bool) -> None:
    """Make the store as large as oracle.budget still allows once earlier generations are paid; UsageError for none.

    anew: the stores that lie there become an earlier generation.
    """
    config = run.config
    earlier = [f"{name}@*" for name in STORES] + (list(STORES) if anew else [])
    counts = ledger.totals(run.ledger, *earlier)
    spent = counts["queries"] + counts["uncertain"]
    if not spent or config.oracle.budget is None or not config.distill.replay:
        return
    left = store_size(config) - spent
    if left < config.distill.batch:
        raise UsageError(
            f"oracle.budget is {config.oracle.budget}, of which earlier generations took {spent}: {max(left, 0)} are "
            f"left to learn from; it must be at least {config.oracle.budget + config.distill.batch - left}"
        )
    if left < config.distill.replay:
        object.__setattr__(run, "config", replace(config, distill=replace(config.distill, replay=left)))


def another_student(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """What a student's paid answers are used for anew, in words, where all that changed is how they are learnt from.

    None where nothing changed, and where the answers would be others.
    """
    changed = differing(saved, wanted)
    if (
        not changed
        or not wanted.get("distill.replay")
        or not all(key.startswith(("distill.", "student", "data.")) for key in changed)
    ):
        return None
    before, now = saved.get("distill.replay"), wanted.get("distill.replay")
    if "distill.holdout" in changed:
        return None
    if before != now and not (before and now and now > before):
        return None
    if before != now:
        return f"the store grows from {before:,} answers to {now:,}; those that are there stay"
    return f"{', '.join(changed)} changed; the answers stay"


def set_aside_student(run: Run, saved: Mapping[str, Any], why: str) -> None:
    """Let the student begin anew; the earlier one stays under its own name."""
    grown = saved["distill.replay"] != run.config.distill.replay
    name = str(saved["distill.replay"]) if grown else re.sub(r"[^\w.]+", "-", saved["distill.student"])
    names = [name, *(f"{name}-{i}" for i in range(2, 1000))]
    label = next(n for n in names if not run.checkpoint(f"distill-{n}").exists())
    if parallel.rank() == 0:
        results = [run.out / f"student.{suffix}" for suffix in ("pt", "onnx", "safetensors")]
        measured = [run.checkpoint("baseline"), run.out / "evaluate.json", run.out / "README.md"]  # a card of its own
        # The checkpoint is last: while it is there, a run that was killed here begins this again.
        for path in (*results, *measured, run.checkpoint("pretrain"), run.checkpoint("distill")):
            if path.exists():
                path.rename(path.with_stem(f"{path.stem}-{label}"))
    parallel.barrier()
    run.log(f"distill: {why}, and the student begins anew. The earlier one is kept as student-{label}")
