"""Synthetic images asked once and kept: the holdout, and the replay store."""

import torch
from torch import Tensor, nn

from mekd.engine import parallel
from mekd.engine.checkpoint import Checkpoint, finished, steps
from mekd.engine.feeds import fresh
from mekd.engine.run import Run
from mekd.engine.runlog import RunLog
from mekd.oracle.replay import Replay
from mekd.oracle.response import concatenate

BATCH = 256


def collect(run: Run, name: str, draw: nn.Module, count: int) -> Replay:
    """Ask for count images that draw makes of latents, and keep them in the folder NAME; nothing if they are there.

    Each process asks for its part of a batch, the first one writes.
    """
    batch = min(BATCH, count)
    store = Replay(run.out / name, count)

    def rows(step: int) -> int:
        return min(batch, count - step * batch)

    def mine(step: int) -> int:
        return len(range(rows(step))[parallel.part(rows(step))])

    def drawn(step: int) -> tuple[Tensor, Tensor]:
        code, n = run.latents(name, step, rows(step))
        with torch.no_grad():
            return draw(code, n), n

    count_steps = -(-count // batch)
    if not finished(run, name, count_steps):
        with fresh(run, "distill", name, count_steps, drawn, mine) as feed:
            log = RunLog(run, name, count_steps, batch, {"queries": feed})
            checkpoint = Checkpoint(run, name, {"store": store}, {"queries": feed}, run.depends(name))
            checkpoint.restore(log)
            for step in steps(checkpoint, log):
                asked = []
                if mine(step):
                    images, answer, n, _ = feed.take(step)
                    assert answer is not None
                    asked = [(images.cpu(), answer.to("cpu"), n.cpu())]
                parts = [part for process in parallel.gather(asked) for part in process]
                if parts:
                    sent, answers, nuisances = (list(column) for column in zip(*parts, strict=True))
                    store.write(step * batch, torch.cat(sent), concatenate(answers), torch.cat(nuisances))
    return store if parallel.rank() == 0 else Replay(store.folder, count)
