"""What a code and a nuisance are worth: shares of variance, classes alike, and the discriminator at chance."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flat_settings import replaced
from mekd.config import Config
from mekd.data.arrays import Dataset
from mekd.data.sources import ArraySource
from mekd.engine.deprivatize import CHANCE, _say_chance
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


@pytest.mark.parametrize("flip", [True, False])
def test_private_images_are_mirrored_where_data_flip_says_so(flip: bool) -> None:
    pixels = torch.arange(4 * 64, dtype=torch.uint8).view(4, 1, 8, 8)
    data = Dataset(pixels, torch.zeros(4, dtype=torch.long), pixels, torch.zeros(4, dtype=torch.long), ("a",))
    config = replaced("data.flip", flip, replaced("data.local_fraction", 1.0))
    whole = ArraySource(data, config, 0, 1).local(64).take(3)[0]
    known = {image.numpy().tobytes() for image in pixels}
    mirrored = {image.flip(2).numpy().tobytes() for image in pixels}
    kinds = np.array([image.contiguous().numpy().tobytes() in known for image in whole])
    assert all(x.contiguous().numpy().tobytes() in known | mirrored for x in whole)
    assert 16 < kinds.sum() < 48 if flip else kinds.all()
    # The parts of two processes are the whole.
    parts = [ArraySource(data, config, rank, 2).local(64).take(3)[0] for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), whole)
