"""Which images are asked about, and how replayed ones are moved."""

from pathlib import Path

import pytest
import torch

from mekd import cli
from mekd.data import arrays
from mekd.engine.feeds import Replayed
from mekd.engine.run import Run
from mekd.nets.frozen import freeze
from mekd.oracle.replay import Replay
from mekd.pixels import to_uint8

WORDS = (
    "--deprivatize.alpha", "0", "--distill.replay", "40", "--distill.augment", "true", "--data.flip", "true",
    "--data.shift", "true",
)  # fmt: skip


@pytest.fixture
def trained(tiny: list[str], tmp_path: Path) -> Run:
    """A run whose step 1 is done."""
    words = [*tiny, *WORDS, "--out", str(tmp_path)]
    assert cli.main(["deprivatize", *words]) == 0
    parsed = cli.parse(words)
    assert parsed is not None
    return Run(*parsed)


def test_replayed_images_are_moved_and_their_answers_stay(tiny: list[str], trained: Run) -> None:
    assert cli.main(["distill", *tiny, *WORDS, "--out", str(trained.out)]) == 0
    store = Replay(trained.out / "replay", 40)
    feed = Replayed(trained, store, 8, None)
    images, answers, _ = store.read(feed._rows(5))
    asked = feed.take(5)
    assert asked.answer is not None and answers.values is not None and asked.answer.values is not None
    assert torch.equal(asked.answer.values, answers.values)
    moved = 0
    for was, now in zip(images, asked.images, strict=True):
        ways = [
            (down, right, mirrored) for down in range(-2, 3) for right in range(-2, 3) for mirrored in (0, 1)
            if torch.equal(arrays.moved(was[None], torch.tensor([[down, right, mirrored]]))[0], now)
        ]  # fmt: skip
        assert ways, "shifted by up to an eighth of 16, or mirrored"
        moved += (0, 0, 0) not in ways
    assert moved >= 4
    assert torch.equal(feed.take(5).images, asked.images), "a function of the step"


def test_what_is_asked_is_what_g_draws(tiny: list[str], trained: Run) -> None:
    assert cli.main(["distill", *tiny, *WORDS, "--out", str(trained.out)]) == 0
    with torch.no_grad():
        images = freeze(trained.load_generator())(*trained.latents("replay", 0, 256, slice(None)))
    kept, _, _ = Replay(trained.out / "replay", 40).read(slice(None))
    assert torch.equal(kept, to_uint8(images)[:40])
