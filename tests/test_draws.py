"""Which of the images that G draws are asked about, and how replayed ones are moved."""

from pathlib import Path

import pytest
import torch

from mekd import cli, files
from mekd.data import arrays
from mekd.engine.draws import draws, trained_discriminator
from mekd.engine.feeds import Replayed
from mekd.engine.run import Run
from mekd.nets.frozen import freeze
from mekd.oracle.replay import Replay
from mekd.pixels import to_uint8

WORDS = (
    "--distill.candidates", "3", "--deprivatize.alpha", "0", "--distill.replay", "40", "--distill.augment", "true",
    "--data.flip", "true", "--data.shift", "true",
)  # fmt: skip


@pytest.fixture
def trained(tiny: list[str], tmp_path: Path) -> Run:
    """A run of 3 candidates whose step 1 is done."""
    words = [*tiny, *WORDS, "--out", str(tmp_path)]
    assert cli.main(["deprivatize", *words]) == 0
    parsed = cli.parse(words)
    assert parsed is not None
    return Run(*parsed)


def test_the_image_that_d_takes_most_for_real_is_asked_about(trained: Run) -> None:
    exact, judge = freeze(trained.load_generator()), trained_discriminator(trained)
    images, n = draws(trained, exact)("replay", 2, 8, slice(None))
    code, nuisance = trained.latents("replay", 2, 24, slice(None))
    candidates = exact(code, nuisance)
    scores = judge(candidates).view(8, 3)
    assert len(set(scores.argmax(1).tolist())) > 1, "another one than the first of each is chosen"
    rows = scores.argmax(1) + 3 * torch.arange(8)
    torch.testing.assert_close(images, candidates[rows], rtol=0, atol=1e-5)
    assert torch.equal(n, nuisance[rows])


def test_an_image_depends_on_its_own_candidates_alone(trained: Run) -> None:
    drawn = draws(trained, freeze(trained.load_generator()))
    whole, _ = drawn("replay", 0, 8, slice(None))
    part, _ = drawn("replay", 0, 8, slice(3, 6))
    torch.testing.assert_close(part, whole[3:6], rtol=0, atol=1e-5)


def test_what_is_asked_and_shown_first_are_chosen_images(tiny: list[str], trained: Run) -> None:
    assert cli.main(["distill", *tiny, *WORDS, "--out", str(trained.out)]) == 0
    kept, _, _ = Replay(trained.out / "replay", 40).read(slice(None))
    images, _ = draws(trained, freeze(trained.load_generator()))("replay", 0, 256, slice(None))
    assert torch.equal(kept, to_uint8(images)[:40])
    # Other candidates are other images, which were not paid.
    assert cli.main(["distill", *tiny, *WORDS, "--distill.candidates", "2", "--out", str(trained.out)]) == 2
    assert torch.equal(kept, Replay(trained.out / "replay", 40).read(slice(None))[0])


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


def test_one_candidate_is_what_g_draws(tiny: list[str], tmp_path: Path) -> None:
    words = [*tiny, "--deprivatize.alpha", "0", "--distill.replay", "40", "--out", str(tmp_path)]
    assert cli.main(["deprivatize", *words]) == 0 and cli.main(["distill", *words]) == 0
    parsed = cli.parse(words)
    assert parsed is not None
    run = Run(*parsed)
    with torch.no_grad():
        images = freeze(run.load_generator())(*run.latents("replay", 0, 256, slice(None)))
    kept, _, _ = Replay(tmp_path / "replay", 40).read(slice(None))
    assert torch.equal(kept, to_uint8(images)[:40])
    assert files.load(run.checkpoint("replay"))["depends"]["distill.candidates"] == 1
