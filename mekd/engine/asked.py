"""What the simulation asked about real images: kept with the teacher and the images that the answers belong to.

Each process writes a file of its share; they are found again by the images, however many processes ask later.
"""

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mekd import files
from mekd.engine import parallel
from mekd.engine.account import same_processes
from mekd.engine.checkpoint import check_depends
from mekd.engine.run import Run, StageError
from mekd.oracle.ledger import digests
from mekd.oracle.response import Response, concatenate

BATCH = 256
#: By name, whose images they are, and the setting without which they are not asked about.
PARTS = {"evaluate-test": ("test", "evaluate.ask_teacher"), "evaluate-private": ("local", "evaluate.baseline")}


class Kept(NamedTuple):
    """What was asked before: the files of all shares and what they hold, and the digests of this process's images."""

    paths: list[Path]
    shares: list[dict[str, Any]]
    mine: list[bytes]


def share(run: Run, name: str) -> Path:
    """Where this process keeps its share of what it asks."""
    own = f"-{parallel.rank()}of{parallel.world()}" if parallel.world() > 1 else ""
    return run.checkpoint(f"{name}{own}")


def shares(run: Run, name: str) -> list[Path]:
    """The files of what was asked, one of each process that asked then; none where one of them is missing."""
    alone = run.checkpoint(name)
    if alone.exists():
        return [alone]
    for first in sorted(alone.parent.glob(f"{name}-0of*.pt")):
        count = int(first.stem.rpartition("of")[2])
        paths = [run.checkpoint(f"{name}-{i}of{count}") for i in range(count)]
        if all(path.exists() for path in paths):
            return paths
    return []


def check(run: Run, name: str) -> None:
    """StageError where what was asked are answers of another teacher, or read otherwise."""
    for path in shares(run, name):
        saved = files.load(path)
        if "depends" in saved:
            check_depends(run, path.stem, saved["depends"], run.depends("evaluate"))
        elif _costs(run):
            raise StageError(
                f"{path} is of an earlier version of mekd, which did not keep what was asked: delete it to ask anew, "
                f"or leave it out with --{PARTS[name][1]} false"
            )


def before(run: Run, name: str) -> Kept | None:
    """What was asked about exactly these images; None where they are to be asked about.

    StageError where they are not those that were paid for, or where others were killed while they asked.
    """
    check(run, name)
    paths, (part, setting) = shares(run, name), PARTS[name]
    if not paths:
        if _costs(run):
            same_processes(run, name, "all of them are answered")
        return None
    found = [files.load(path) for path in paths]
    if any("digests" not in saved for saved in found):  # an earlier version's, which cost nothing
        return None
    mine = [one for images, _ in run.data.once(part, BATCH) for one in _each(digests(images))]
    known = {one for saved in found for one in _each(saved["digests"])}
    count, other = map(int, parallel.sum_of(len(mine), sum(one not in known for one in mine)))
    asked = sum(len(saved["digests"]) // 16 for saved in found)
    if not other and count == asked:
        return Kept(paths, found, mine)
    said = f"{paths[0]} is of {asked} images; of the {count} that are there now, {other} were not asked about"
    if _costs(run):
        raise StageError(
            f"{said}. Set data.path and evaluate.path back, or delete that file to ask about all of them anew "
            f"({count} queries), or leave it out with --{setting} false"
        )
    run.log(f"evaluate: {said}: the teacher, which costs nothing, is asked anew")
    return None


def forget(run: Run, name: str) -> None:
    """Delete what is there of earlier answers, and the baseline that learnt from them, before others are asked for."""
    parallel.barrier()  # everybody has looked
    if parallel.rank() == 0:
        own = re.compile(re.escape(name) + r"(-\d+of\d+)?")
        stale = [path for path in run.checkpoint(name).parent.glob(f"{name}*.pt") if own.fullmatch(path.stem)]
        stale += [run.checkpoint("baseline")] if name == "evaluate-private" else []
        for path in stale:
            path.unlink(missing_ok=True)
        for folder in (run.out / "private").glob(f"{name}*"):
            shutil.rmtree(folder)
    parallel.barrier()


def keep(run: Run, name: str, content: dict[str, Any]) -> None:
    """Write this process's share; when this returns, those of all are there."""
    files.save(share(run, name), {"depends": run.depends("evaluate"), **content})
    parallel.barrier()


def in_order(kept: Kept, parts: list[Tensor]) -> Tensor:
    """What the shares hold of each of their images, as this process has the images now."""
    every = [one for saved in kept.shares for one in _each(saved["digests"])]
    where = {digest: row for row, digest in enumerate(every)}
    return torch.cat(parts)[torch.tensor([where[one] for one in kept.mine])]


def audited(run: Run) -> tuple[Tensor, Response] | None:
    """This process's test images (m, ch, S, S) of which the whole answer was kept, and that; None without any."""
    saved = [files.load(path) for path in shares(run, "evaluate-test")]
    saved = [one for one in saved if "digests" in one]
    known = [_each(one["digests"])[row] for one in saved for row in one["rows"].tolist()]
    where = {digest: row for row, digest in enumerate(known)}
    found, rows = [], []
    for images, _ in run.data.once("test", BATCH) if where else ():
        at = [where.get(one, -1) for one in _each(digests(images))]
        found.append(images.cpu()[torch.tensor(at) >= 0])
        rows += [row for row in at if row >= 0]
    if not rows:
        return None
    return torch.cat(found), concatenate([Response(**one["answer"]) for one in saved])[torch.tensor(rows)]


def _each(joined: bytes) -> list[bytes]:
    return [joined[i : i + 16] for i in range(0, len(joined), 16)]


def _costs(run: Run) -> bool:
    """Whether to ask again is paid for, or taken from a budget."""
    return run.config.teacher.remote or run.config.oracle.price is not None or run.config.oracle.budget is not None
