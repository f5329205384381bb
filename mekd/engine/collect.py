"""Synthetic images asked once and kept: the holdout, and the replay store, which may grow."""

from typing import Any

import torch
from torch import Tensor, nn

from mekd import files
from mekd.engine import parallel
from mekd.engine.checkpoint import Checkpoint, check_depends, steps
from mekd.engine.feeds import fresh
from mekd.engine.result import known_names
from mekd.engine.run import Run
from mekd.engine.runlog import RunLog
from mekd.oracle.replay import Replay
from mekd.oracle.response import concatenate

BLOCK = 256  # latents are drawn in whole blocks, so that an image does not depend on how many there are
REMOTE = 4  # blocks a step where calls overlap: the last of a step wait for each other


@torch.no_grad()
def draw_images(
    run: Run, draw: nn.Module, purpose: str, step: int, count: int, rows: slice | None = None
) -> tuple[Tensor, Tensor]:
    """Some rows of a step's count images (m, ch, S, S), this process's where none are named, and their nuisance."""
    code, n = run.latents(purpose, step, count, rows)
    return draw(code, n), n


def collect(run: Run, name: str, draw: nn.Module, count: int, until: int | None = None) -> Replay:
    """Ask for count images that draw makes of latents, and keep them in the folder NAME; what is there is not asked.

    Each process asks for its part of a step, the first one writes. until: of count rows, these are asked for now.
    """
    end = count if until is None else min(until, count)
    path, depends = run.checkpoint(name), run.depends(name)
    stands, taken = 0, 0
    if path.exists():
        saved = files.load(path)
        check_depends(run, name, saved["depends"], depends)
        stands, taken = saved["state"]["place"]["rows"], saved["step"]
    with parallel.first_alone():
        origin = run.origin_of_answers(known_names(run))
        store = Replay(run.out / name, count, grows=parallel.rank() == 0, origin=origin)
    if stands >= end:
        return store
    per_step = min(BLOCK * (REMOTE if run.config.teacher.remote else 1), count)
    bounds = [stands, *range((stands // per_step + 1) * per_step, end, per_step), end]

    def rows(step: int) -> tuple[int, int]:
        """The rows of a step that this process asks for."""
        first, last = bounds[step - taken], bounds[step - taken + 1]
        mine = parallel.part(last - first)
        return first + mine.start, first + mine.stop

    def drawn(step: int) -> tuple[Tensor, Tensor]:
        first, end = rows(step)
        parts: list[tuple[Tensor, Tensor]] = []
        for block in range(first // BLOCK, -(-end // BLOCK)):
            begin = block * BLOCK
            mine = slice(max(first - begin, 0), end - begin)
            images, n = draw_images(run, draw, name, block, BLOCK, slice(None))
            parts.append((images[mine], n[mine]))
        sent, nuisances = (list(column) for column in zip(*parts, strict=True))
        return torch.cat(sent), torch.cat(nuisances)

    place: dict[str, Any] = {"rows": stands}
    total = taken + len(bounds) - 1
    stage = "audit" if name == "audit" else "distill"
    with fresh(run, stage, name, total, drawn, lambda step: rows(step)[1] - rows(step)[0]) as feed:
        log = RunLog(run, name, total, per_step, {"queries": feed})
        checkpoint = Checkpoint(run, name, {"store": store, "place": place}, {"queries": feed}, depends)
        checkpoint.restore(log)
        for step in steps(checkpoint, log):
            asked = []
            first, last = rows(step)
            if last > first:
                images, answer, n, _ = feed.take(step)
                assert answer is not None
                asked = [(images.cpu(), answer.to("cpu"), n.cpu())]
            parts = [part for process in parallel.gather(asked) for part in process]
            if parts:
                sent, answers, nuisances = (list(column) for column in zip(*parts, strict=True))
                store.write(bounds[step - taken], torch.cat(sent), concatenate(answers), torch.cat(nuisances))
            place["rows"] = bounds[step - taken + 1]
    return store if parallel.rank() == 0 else Replay(store.folder, count)
