"""Synthetic images asked once and kept: the holdout, and the replay store."""

import torch
from torch import nn

from mekd.engine import parallel
from mekd.engine.loop import Loop
from mekd.engine.run import Run
from mekd.oracle.base import Oracle
from mekd.oracle.replay import Replay
from mekd.oracle.response import concatenate
from mekd.pixels import to_uint8


def collect(
    run: Run,
    name: str,
    draw: nn.Module,
    oracle: Oracle,
    count: int,
    fingerprint: dict[str, object],
    *,
    begin_at: int = 0,
) -> tuple[Replay, int]:
    """Ask for count images that draw makes of latents, and keep them in the folder NAME.

    Each process asks for its part of a batch, the first one writes. Returns the store and the ledger's next request.
    """
    batch = min(256, count)
    store = Replay(run.out / name, count)
    depends = {**fingerprint, "count": count}

    def rows(step: int) -> int:
        return min(batch, count - step * batch)

    def mine(step: int) -> int:
        return len(range(rows(step))[parallel.part(rows(step))])

    with Loop(
        run,
        name,
        -(-count // batch),
        {"store": store},
        depends,
        batch=batch,
        ledger=oracle.ledger,
        queries=mine,
        begin_at=begin_at,
    ) as loop:
        for step in loop:
            asked = []
            if mine(step):
                with torch.no_grad():
                    images = draw(run.latents(name, step, rows(step), oracle.num_classes))
                images = to_uint8(images) if oracle.transport == "uint8" else images
                with loop.clock("teacher"):
                    asked = [(images.cpu(), oracle.query(images).to("cpu"))]
            parts = [part for process in parallel.gather(asked) for part in process]
            if parts:
                images, answers = (list(column) for column in zip(*parts, strict=True))
                store.write(step * batch, torch.cat(images), concatenate(answers))
    return (store if parallel.rank() == 0 else Replay(store.folder, count)), loop.requests
