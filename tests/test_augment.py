"""What D sees with deprivatize.augment: images shifted and cut, the more of them the more D knows by heart."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mekd import cli
from mekd.config import DeprivatizeConfig
from mekd.engine.deprivatize import EVERY, RAMP, adapted, augmented
from mekd.engine.run import Run


@pytest.fixture
def run(tiny: list[str], tmp_path: Path) -> Run:
    parsed = cli.parse([*tiny, "--deprivatize.batch", "200", "--out", str(tmp_path)])
    assert parsed is not None
    return Run(*parsed)


def test_none_all_and_some(run: Run) -> None:
    images = torch.randn(200, 3, 16, 16) + 5
    assert torch.equal(augmented(run, images, 3, "real", 0.0), images)
    every = augmented(run, images, 3, "real", 1.0)
    changed = (every != images).flatten(1).any(1)
    assert changed.float().mean() > 0.9
    some = (augmented(run, images, 3, "real", 0.25) != images).flatten(1).any(1).float().mean()
    assert 0.12 < some < 0.38
    assert torch.equal(every, augmented(run, images, 3, "real", 1.0)), "a function of the step"
    assert not torch.equal(every, augmented(run, images, 3, "fake", 1.0))
    assert not torch.equal(every, augmented(run, images, 4, "real", 1.0))


def test_the_parts_of_two_processes_are_the_whole(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(200, 1, 16, 16)
    whole = augmented(run, images, 3, "real", 0.5)
    for mine in (slice(0, 100), slice(100, 200)):
        monkeypatch.setattr("mekd.engine.parallel.part", lambda count, mine=mine: mine)
        assert torch.equal(augmented(run, images[mine], 3, "real", 0.5), whole[mine])


def test_a_square_is_grey_and_the_rest_is_the_image_shifted(run: Run) -> None:
    image = torch.arange(1.0, 257).view(1, 1, 16, 16).expand(200, 1, 16, 16)
    for one in augmented(run, image, 0, "real", 1.0)[:, 0]:
        rows, columns = (one == 0).any(1).nonzero().flatten(), (one == 0).any(0).nonzero().flatten()
        assert 4 <= len(rows) <= 8 and 4 <= len(columns) <= 8
        assert (one[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == 0).all()
        shown = one[one > 0] - 1
        y, x = shown // 16, shown % 16
        at = (one > 0).nonzero().float()
        for there, here in ((y, at[:, 0]), (x, at[:, 1])):
            inside = (there > 0) & (there < 15)  # elsewhere edges are repeated
            assert len((there - here)[inside].unique()) == 1 and (there - here)[inside].abs().max() <= 2


def test_gradients_go_where_the_pixels_come_from(run: Run) -> None:
    images = torch.randn(200, 1, 16, 16, requires_grad=True)
    seen = augmented(run, images, 0, "fake", 1.0)
    (grad,) = torch.autograd.grad(seen.sum(), images)
    assert grad.sum() == (seen != 0).sum(), "each pixel that is shown counts once"


class Says(nn.Module):
    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, images: torch.Tensor, classes: torch.Tensor | None) -> torch.Tensor:
        assert classes is None
        logits = -torch.ones(len(images))
        logits[: round(self.share * len(images))] = 1.0
        return logits


@pytest.mark.parametrize(
    ("real_share", "before", "change"),
    [(1.0, 0.5, 1), (0.81, 0.5, 1), (0.79, 0.5, -1), (0.0, 0.5, -1), (1.0, 1.0, 0), (0.0, 0.0, 0)],
)
def test_the_share_follows_what_d_takes_for_real(real_share: float, before: float, change: int) -> None:
    """The mean sign is 2 share - 1; 0.6 is a share of 0.8."""
    config = DeprivatizeConfig(batch=100, precision="float32")
    after = adapted(before, Says(real_share), torch.zeros(100, 1, 4, 4), None, config)
    assert after == pytest.approx(before + change * EVERY * 100 / RAMP)


def test_it_is_logged_and_goes_on_where_it_was(tiny: list[str], tmp_path: Path) -> None:
    words = [*tiny, "--deprivatize.augment", "true", "--deprivatize.alpha", "0", "--deprivatize.dropout", "0"]
    words += ["--deprivatize.batch", "64", "--deprivatize.latents", "fresh"]
    assert cli.main(["deprivatize", *words, "--deprivatize.steps", "60", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    shares = [row["augmented"] for row in rows if row["stage"] == "deprivatize"]
    assert shares[0] <= EVERY * 64 / RAMP and all(0 <= share <= 1 for share in shares)
    saved = torch.load(tmp_path / "checkpoints" / "deprivatize.pt", weights_only=True)["state"]["seen"]["share"]
    assert 0 <= saved <= 1
