"""A run of seconds whose teacher is behind an address, and what its accounts say together."""

from pathlib import Path

from mekd.engine.run import ACCOUNTS
from mekd.oracle.ledger import totals

#: 200 queries: 20 held out, 10 in reserve, twice the 4 calls of one image that are in flight, 170 to learn from.
SETTINGS = {
    "data.name": "digits", "data.size": 16, "teacher.name": "the-same",
    "deprivatize.steps": 3, "deprivatize.batch": 8, "deprivatize.width": 0.1,
    "oracle.batch": 8, "oracle.concurrency": 4, "oracle.budget": 200,
    "distill.student": "resnet8", "distill.steps": 6, "distill.batch": 8, "distill.holdout": 20, "distill.coverage": 0,
    # Not auto: which one is faster is measured as a run begins, and a busy machine may say another one to the next run.
    "deprivatize.precision": "float32", "distill.precision": "float32",
    "distill.eval_every": 3, "engine.checkpoint_every": 2, "engine.log_every": 2, "engine.device": "cpu",
}  # fmt: skip


def words(url: str, out: Path, *more: object, stage: str = "run", **settings: object) -> list[str]:
    """The command line; a setting's . is __ here."""
    chosen = SETTINGS | ({"teacher.url": f"{url}/v2/models/teacher"} if url else {})
    chosen |= {key.replace("__", "."): value for key, value in settings.items()}
    return [stage, *(str(word) for key, value in chosen.items() for word in (f"--{key}", value)), "--out", str(out),
            *map(str, more)]  # fmt: skip


def total(out: Path) -> dict[str, int]:
    """The counts of all accounts of a run."""
    return totals(out / "ledger", *(name for stage in ACCOUNTS.values() for name in stage))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
