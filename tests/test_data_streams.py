"""Streams of both loaders: what they give, in which order, from any place on, and what bad files do to them."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jpeg_tree import grey_tree, numbers, opened
from mekd.data import listing
from mekd.data.arrays import DataError
from mekd.data.listing import Listing

COUNTS = {"train": {"a": 6, "b": 5, "c": 12}, "val": {"a": 3, "b": 3, "c": 4}}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return grey_tree(tmp_path / "tree", COUNTS)


@pytest.fixture
def train(tree: Path) -> Listing:
    return listing.read(tree, "folder", "train")


def take(stream: Any, count: int) -> list[tuple[Tensor, Tensor]]:
    return [next(stream) for _ in range(count)]


def same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_gives_each_image_once_and_in_order(loader: Any, tree: Path, world: int) -> None:
    val = listing.read(tree, "folder", "val")
    seen, labels = [], []
    for rank in range(world):
        stream = opened(loader, val, 3, 16, rank=rank, world=world, crop="once")
        batches = list(stream)
        assert len(batches) == stream.epoch_batches
        assert all(len(images) == 3 for images, _ in batches[:-1])
        seen += [n for images, _ in batches for n in numbers(images)]
        labels += [label for _, batch in batches for label in batch.tolist()]
    assert seen == list(range(10))
    assert labels == [0] * 3 + [1] * 3 + [2] * 4


def test_an_epoch_has_no_image_twice_and_drops_its_tail(loader: Any, train: Listing) -> None:
    stream = opened(loader, train, 5, 16, seed=5)
    assert stream.epoch_batches == 23 // 5
    epochs = []
    for _ in range(3):
        seen = []
        for images, labels in take(stream, stream.epoch_batches):
            assert labels.tolist() == [0 if n < 6 else 1 if n < 11 else 2 for n in numbers(images)]
            seen += numbers(images)
        assert len(seen) == len(set(seen)) == 20
        epochs.append(seen)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])


def test_the_number_of_processes_changes_no_pixel(loader: Any, tmp_path: Path) -> None:
    """Which images a step takes, how each is cropped and whether it is mirrored; and one goes on where two were."""
    train = photo_listing(tmp_path)
    how = {"flip": True, "seed": 3}
    one = take(opened(loader, train, 6, 32, **how), 5)  # an epoch has 2 batches
    for world in (2, 4):  # 4 do not divide 6
        streams = [opened(loader, train, 6, 32, rank=rank, world=world, **how) for rank in range(world)]
        parts = zip(*(take(stream, 5) for stream in streams), strict=True)
        together = [tuple(torch.cat(column) for column in zip(*step, strict=True)) for step in parts]
        assert same(together, one)  # type: ignore[arg-type]
    alone = opened(loader, train, 6, 32, **how)
    first = opened(loader, train, 6, 32, rank=1, world=2, **how)
    take(first, 3)
    alone.load_state_dict(first.state_dict())
    assert same(take(alone, 2), one[3:])


def test_tensors_are_what_was_asked_for_and_stay_valid(loader: Any, train: Listing) -> None:
    kept = []
    for dtype, last in (("uint8", False), ("float32", True)):
        stream = opened(loader, train, 4, 16, dtype=dtype, channels_last=last)
        batches = take(stream, 12)
        copies = [(images.clone(), labels.clone()) for images, labels in batches]
        take(stream, 12)
        assert same(batches, copies)
        images, labels = batches[0]
        assert images.shape == (4, 3, 16, 16) and images.dtype == getattr(torch, dtype) and labels.dtype == torch.int64
        assert images.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        kept.append(batches)
    for (pixels, _), (values, _) in zip(*kept, strict=True):
        torch.testing.assert_close(values, pixels / 127.5 - 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("crop", ["random", "centre"])
def test_a_stream_goes_on_where_it_stopped(loader: Any, tmp_path: Path, crop: str) -> None:
    train = photo_listing(tmp_path)
    how = {"crop": crop, "flip": True, "seed": 3}
    whole = opened(loader, train, 4, 32, **how)
    batches = take(whole, 9)
    for at in (0, 1, 4, 7):  # an epoch has 3 batches
        first = opened(loader, train, 4, 32, **how)
        take(first, at)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = opened(loader, train, 4, 32, **how)
        take(second, 2)
        second.load_state_dict(torch.load(file, weights_only=True))
        assert same(take(second, 9 - at), batches[at:])
        assert same(take(first, 9 - at), batches[at:])
    assert not same(batches[:3], batches[3:6])
    assert not same(batches[:3], take(opened(loader, train, 4, 32, **{**how, "seed": 4}), 3))


def test_batches_do_not_depend_on_the_number_of_threads(loader: Any, tmp_path: Path) -> None:
    train = photo_listing(tmp_path)
    few, many = (opened(loader, train, 4, 32, flip=True, threads=n) for n in (1, 3))
    before = torch.random.get_rng_state()
    assert same(take(few, 5), take(many, 5))
    assert torch.equal(torch.random.get_rng_state(), before)  # the program's own random numbers are left alone
    many.close()


def test_the_state_of_another_stream_is_refused(loader: Any, train: Listing) -> None:
    state = opened(loader, train, 4, 16).state_dict()
    for other in ({"batch": 5}, {"size": 32}, {"seed": 1}, {"flip": True}, {"crop": "centre"}):
        arguments = {"batch": 4, "size": 16, **other}
        with pytest.raises(DataError, match=r"another stream.*another --out"):
            opened(loader, train, **arguments).load_state_dict(state)
    opened(loader, train, 4, 16, threads=2).load_state_dict(state)


def test_arguments_that_do_not_fit(loader: Any, train: Listing) -> None:
    with pytest.raises(DataError, match=r"23 images, fewer than the 24"):
        opened(loader, train, 24, 16, world=2)
    with pytest.raises(ValueError, match="batch 1, rank 0 of 2"):
        opened(loader, train, 1, 16, world=2)
    with pytest.raises(ValueError, match="crop is 'middle'"):
        opened(loader, train, 4, 16, crop="middle")
    with pytest.raises(ValueError, match="resize is 15"):
        opened(loader, train, 4, 16, resize=15, crop="once")


BAD = {3: lambda raw: raw[: len(raw) // 2], 4: lambda raw: b"hello", 17: lambda raw: b"", 22: lambda raw: raw[:-2]}


def spoil(train: Listing) -> None:
    for row, damage in BAD.items():
        file = Path(train.files[row])
        file.write_bytes(damage(file.read_bytes()))


def test_bad_files_are_named(loader: Any, train: Listing) -> None:
    spoil(train)
    stream = opened(loader, train, 4, 16, crop="once")
    with pytest.raises(DataError, match=r"03\.jpg cannot be decoded.*data\.on_error skip"):
        list(stream)
    Path(train.files[3]).unlink()
    with pytest.raises(DataError, match=r"03\.jpg"):
        list(opened(loader, train, 4, 16, crop="once"))


def test_bad_files_are_left_out_and_counted(loader: Any, train: Listing) -> None:
    spoil(train)
    stream = opened(loader, train, 4, 16, on_error="skip", crop="once")
    assert [n for images, _ in stream for n in numbers(images)] == [n for n in range(23) if n not in BAD]
    assert len(stream.left_out) == 4
    how = {"crop": "centre", "on_error": "skip"}
    stream = opened(loader, train, 4, 16, **how)
    batches = take(stream, 12)
    assert len(stream.left_out) == 4
    assert not {n for images, _ in batches for n in numbers(images)} & BAD.keys()
    assert all(len(images) == 4 for images, _ in batches)
    # From a place before the failures, and from one behind them.
    for at in (0, 7):
        first = opened(loader, train, 4, 16, **how)
        take(first, at)
        second = opened(loader, train, 4, 16, **how)
        second.load_state_dict(first.state_dict())
        assert same(take(second, 12 - at), batches[at:])


def test_nothing_but_bad_files_is_an_error_and_no_hang(loader: Any, train: Listing) -> None:
    for file in train.files:
        Path(file).write_bytes(b"hello")
    with pytest.raises(DataError, match="none of 23 images"):
        next(opened(loader, train, 8, 16, on_error="skip"))
    stream = opened(loader, train, 8, 16, on_error="skip", crop="once")
    assert list(stream) == [] and len(stream.left_out) == 23


def photo_listing(tmp_path: Path) -> Listing:
    """14 pieces of noise that is smooth, so that each crop of each differs."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for i in range(14):
        (tmp_path / "train" / "x").mkdir(parents=True, exist_ok=True)
        small = torch.randint(0, 256, (6, 8, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(small.numpy()).resize((80 - 3 * i, 60 + i)).save(tmp_path / "train" / "x" / f"{i:02}.jpg")
    return listing.read(tmp_path, "folder", "train")
