"""Synthetic images asked once and kept: the holdout, and the replay store."""

import torch
from torch import nn

from mekd.engine.loop import Loop
from mekd.engine.run import Run
from mekd.oracle.base import Oracle
from mekd.oracle.replay import Replay
from mekd.pixels import to_uint8


def collect(
    run: Run,
    name: str,
    draw: nn.Module,
    oracle: Oracle,
    count: int,
    fingerprint: dict[str, object],
    *,
    seed: int,
    begin_at: int = 0,
) -> tuple[Replay, int]:
    """Ask for count images that draw makes of latents, and keep them in the folder NAME.

    Returns the store and the ledger's next request.
    """
    batch = min(256, count)
    store = Replay(run.out / name, count)
    depends = {**fingerprint, "count": count}

    def rows(step: int) -> int:
        return min(batch, count - step * batch)

    torch.manual_seed(seed)
    with Loop(
        run,
        name,
        -(-count // batch),
        {"store": store},
        depends,
        batch=batch,
        ledger=oracle.ledger,
        queries=rows,
        begin_at=begin_at,
    ) as loop:
        for step in loop:
            with torch.no_grad():
                images = draw(torch.randn(rows(step), oracle.num_classes, device=run.device))
            images = to_uint8(images) if oracle.transport == "uint8" else images
            with loop.clock("teacher"):
                store.write(step * batch, images, oracle.query(images))
    return store, loop.requests
