"""Data sets of any name: the folder they need, and the private local images."""

from pathlib import Path

import pytest
import torch

from mekd.config import Config, DataConfig
from mekd.data import Dataset, arrays, load, local_images, open_source
from mekd.data.arrays import DataError
from mekd.nets.discriminator import WIDTHS
from mekd.nets.generator import STAGES
from mekd.pixels import SIDES

# The folder.


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_the_folder_must_be_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"data.path is not set; {name} needs"):
        load(name, None, 32)
    with pytest.raises(DataError, match=r"data.path is '.*nowhere'; no such folder"):
        load(name, str(tmp_path / "nowhere"), 32)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data.path is '.*file'; no such folder"):
        load(name, str(tmp_path / "file"), 32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is missing"):
        load(name, str(tmp_path / "empty"), 32)


def test_an_unknown_set_is_named() -> None:
    with pytest.raises(ValueError, match=r"data.name is 'mnits'.*digits, mnist, .*, cifar100"):
        load("mnits", None, 32)


# The private local images.


@pytest.fixture(scope="module")
def numbered() -> Dataset:
    """200 training images, each of them told by its pixel; the test images are all 255."""
    images = torch.arange(200, dtype=torch.uint8).view(200, 1, 1, 1)
    return Dataset(
        images,
        torch.zeros(200, dtype=torch.int64),
        torch.full((50, 1, 1, 1), 255, dtype=torch.uint8),
        torch.zeros(50, dtype=torch.int64),
        ("a",),
    )


@pytest.mark.parametrize(
    ("fraction", "count"),
    [
        # The paper's.
        (0.1, 20),
        # Rounded.
        (0.0126, 3),
        # Everything.
        (1.0, 200),
        # Less than one image is one image.
        (0.0, 1),
        (0.001, 1),
    ],
)
def test_local_images_are_part_of_the_training_set(numbered: Dataset, fraction: float, count: int) -> None:
    chosen = local_images(numbered, fraction, 0)
    assert chosen.shape == (count, 1, 1, 1)
    numbers = chosen.flatten().tolist()
    # No image twice, and none of the test images.
    assert len(set(numbers)) == count
    assert max(numbers) < 200


def test_local_images_follow_the_seed_alone(numbered: Dataset) -> None:
    first = local_images(numbered, 0.1, 7).flatten().tolist()
    torch.manual_seed(99)
    torch.rand(5)
    state = torch.get_rng_state()
    assert local_images(numbered, 0.1, 7).flatten().tolist() == first
    # Choosing them draws nothing from the generator that the weights are drawn from.
    assert torch.equal(torch.get_rng_state(), state)
    # They are shuffled, not the first ones.
    assert first != list(range(20))


def test_local_images_differ_between_seeds(numbered: Dataset) -> None:
    chosen = {tuple(local_images(numbered, 0.1, seed).flatten().tolist()) for seed in range(5)}
    assert len(chosen) == 5


def test_a_dataset_moves_as_a_whole(numbered: Dataset) -> None:
    moved = numbered.to(torch.device("meta"))
    tensors = (moved.train_images, moved.train_labels, moved.test_images, moved.test_labels)
    assert all(t.device.type == "meta" for t in tensors)
    assert moved.train_images.shape == (200, 1, 1, 1) and moved.test_labels.shape == (50,)
    assert moved.classes == ("a",)


def test_the_sides_of_images_are_those_that_both_networks_have() -> None:
    assert tuple(STAGES) == tuple(WIDTHS) == SIDES


# Batches in several processes.


def test_the_number_of_processes_changes_no_batch() -> None:
    """Which rows, their shifts and their mirroring; of the test images each once."""
    config = Config(data=DataConfig(name="digits", size=16, flip=True))
    one = open_source(config, torch.device("cpu"))
    for world in (2, 5):  # 5 do not divide 12
        sources = [open_source(config, torch.device("cpu"), rank, world) for rank in range(world)]
        for draw in ("training", "local"):
            images, labels = getattr(one, draw)(12).take(3)
            parts = [getattr(source, draw)(12).take(3) for source in sources]
            assert torch.equal(torch.cat([part for part, _ in parts]), images)
            assert torch.equal(torch.cat([part for _, part in parts]), labels)
        tests = [images for source in sources for images, _ in source.once("test", 50)]
        assert torch.equal(torch.cat(tests), torch.cat([images for images, _ in one.once("test", 50)]))
    # They are moved at all: by as much as an eighth, edges repeated, half of them mirrored.
    picture = torch.arange(16, dtype=torch.uint8).repeat(400, 1, 16, 1)
    how = arrays.moves(400, 16, True, torch.Generator().manual_seed(0))
    rows = arrays.moved(picture, how)[:, 0, 3]
    wanted = {tuple(min(15, max(0, x + right)) for x in range(16)) for right in range(-2, 3)}
    wanted |= {tuple(min(15, max(0, 15 - x + right)) for x in range(16)) for right in range(-2, 3)}
    assert {tuple(row.tolist()) for row in rows} == wanted
    assert 150 < sum(row[0] > row[-1] for row in rows.tolist()) < 250
