"""What a code and a nuisance are worth: shares of variance, classes alike, and the discriminator at chance."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.breadth import classes_apart
from flat_settings import replaced
from mekd.config import Config, DataConfig, DeprivatizeConfig, EngineConfig
from mekd.data.arrays import Dataset
from mekd.data.sources import ArraySource
from mekd.engine.deprivatize import CHANCE, _say_chance, deprivatize
from mekd.engine.pictures import families
from mekd.engine.run import Run
from mekd.metrics import explained_by_rows, same_class
from mekd.nets import Discriminator, Generator


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_the_variance_that_a_row_explains(share: float) -> None:
    random = torch.Generator().manual_seed(0)
    rows, each = (torch.randn(500, m, 4, 5, generator=random) for m in (1, 8))
    found = explained_by_rows(share**0.5 * rows + (1 - share) ** 0.5 * each)
    assert found == pytest.approx(share, abs=0.02)


def test_how_often_two_of_a_row_are_alike() -> None:
    classes = torch.tensor([[0, 0, 1], [2, 2, 2]])
    # Two of three in the first row: 1 pair of 3; all of the second.
    assert same_class(classes) == (pytest.approx((1 / 3 + 1) / 2), 0.0)
    assert same_class(torch.zeros(4, 3, dtype=torch.long)) == (1.0, 1.0)
    random = torch.randint(5, (300, 20), generator=torch.Generator().manual_seed(0))
    assert same_class(random) == (pytest.approx(0.2, abs=0.01), pytest.approx(0.2, abs=0.01))


def test_the_classes_that_answers_tell_apart() -> None:
    assert classes_apart(torch.eye(5).repeat(3, 1)) == pytest.approx(5)
    assert classes_apart(torch.full((6, 5), 0.2)) == pytest.approx(1)
    assert classes_apart(torch.eye(5)[[0, 0, 0]]) == pytest.approx(1), "sure of one class alone"
    assert classes_apart(torch.eye(5)[[0, 1]]) == pytest.approx(2)


def test_a_family_is_of_one_code_or_of_one_nuisance() -> None:
    torch.manual_seed(0)
    generator = Generator(4, 16, 1, width=0.25, nuisance=3).eval()
    with torch.no_grad():
        generator.linear.weight[:, 4:] = 0.0  # the nuisance changes nothing
    of_code, of_n = families(generator, 5, 6, torch.device("cpu"))
    assert of_code.shape == of_n.shape == (5, 6, 1, 16, 16)
    torch.testing.assert_close(of_code, of_code[:, :1].expand_as(of_code), rtol=0, atol=1e-6)
    assert explained_by_rows(of_code) == pytest.approx(1.0) and explained_by_rows(of_n) < 0.3


def test_the_width_multiplies_the_discriminators_channels() -> None:
    convs = [x.out_channels for x in Discriminator(32, width=4.0).features if isinstance(x, torch.nn.Conv2d)]
    assert convs == [64, 128, 256, 512]
    assert [x.out_channels for x in Discriminator(32, width=0.1).features if isinstance(x, torch.nn.Conv2d)] == [
        8, 8, 8, 13,
    ]  # fmt: skip


@pytest.mark.parametrize(("loss", "said"), [(CHANCE, True), (1.36, True), (1.2, False), (0.3, False)])
def test_a_discriminator_at_chance_is_spoken_of(
    loss: float, said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _say_chance(Run(Config(), tmp_path), 100, loss)
    assert ("chance" in capsys.readouterr().out) == said
    if said:
        text = (tmp_path / "log.txt").read_text()
        assert f"{loss:.3f}" in text and "--deprivatize.d_width" in text and "another --out" in text


def test_chance_is_told_of_once_after_two_thirds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step1 = DeprivatizeConfig(steps=12, batch=8, width=0.1, alpha=0.0, lr=1e-7)
    data, engine = DataConfig(name="digits", size=16), EngineConfig(log_every=2)
    deprivatize(Run(Config(data=data, deprivatize=step1, engine=engine), tmp_path / "run"))
    told = [line for line in capsys.readouterr().out.splitlines() if "is chance" in line]
    assert len(told) == 1 and "at step 8 " in told[0]


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("flip", [True, False])
def test_private_images_are_mirrored_and_shifted_where_the_data_says_so(flip: bool, shift: bool) -> None:
    pixels = torch.arange(4 * 64, dtype=torch.uint8).view(4, 1, 8, 8)
    data = Dataset(pixels, torch.zeros(4, dtype=torch.long), pixels, torch.zeros(4, dtype=torch.long), ("a",))
    config = replaced("data.shift", shift, replaced("data.flip", flip, replaced("data.local_fraction", 1.0)))
    whole = ArraySource(data, config, 0, 1).local(200).take(3)[0]
    # By at most an eighth of 8 pixels, edges repeated: every place in an image with a border of one pixel.
    known: dict[bytes, bool] = {}
    for image in pixels:
        for mirrored in (False, True):
            wide = np.pad(np.flip(image[0].numpy(), 1) if mirrored else image[0].numpy(), 1, mode="edge")
            known |= {wide[i : i + 8, j : j + 8].tobytes(): mirrored for i in range(3) for j in range(3)}
    kinds = [known[image.contiguous().numpy().tobytes()] for image in whole]
    assert 60 < sum(kinds) < 140 if flip else not any(kinds)
    found = len({image.contiguous().numpy().tobytes() for image in whole})
    assert found > 4 * (1 + flip) if shift else found == 4 * (1 + flip)
    # The parts of two processes are the whole.
    parts = [ArraySource(data, config, rank, 2).local(200).take(3)[0] for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), whole)
