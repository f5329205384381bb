"""Kept pictures: what G draws from the replayed answers, drawn once."""

import os
from pathlib import Path

import pytest
import torch

from mekd.config import Config, DistillConfig, TeacherConfig
from mekd.engine.pictures import Pictures
from mekd.losses import MEKDLoss
from mekd.nets import Generator
from mekd.oracle.replay import Replay, StoreError
from mekd.oracle.response import answer

CLASSES, COUNT = 6, 300
#: Half a step of what a pixel is rounded to.
ROUNDING = {"uint8": 1 / 255, "bfloat16": 2.0**-9}


@pytest.fixture
def store(tmp_path: Path) -> Replay:
    torch.manual_seed(0)
    store = Replay(tmp_path / "replay", COUNT)
    images = torch.randint(0, 256, (COUNT, 3, 16, 16), dtype=torch.uint8)
    store.write(0, images, answer(3 * torch.randn(COUNT, CLASSES), "probs", output="logits", k=3, decimals=None))
    return store


@pytest.fixture
def loss() -> MEKDLoss:
    torch.manual_seed(1)
    return MEKDLoss(Generator(CLASSES, 16, width=0.25))


@pytest.mark.parametrize("keep", ["uint8", "bfloat16"])
def test_the_loss_with_kept_pictures_is_that_of_drawn_ones_to_their_rounding(
    store: Replay, loss: MEKDLoss, keep: str
) -> None:
    pictures = Pictures(store.folder, store, loss, CLASSES, keep, torch.device("cpu"))
    rows = torch.tensor([0, 299, 7, 7, 256])
    store.will_need(rows)
    pictures.will_need(rows)
    _, response, _ = store.read(rows)
    logits = torch.randn(5, CLASSES, requires_grad=True)
    drawn, kl = loss.terms(logits, **response.target)
    kept, same_kl = loss.terms(logits, **response.target, kept=pictures.read(rows))
    assert kept != drawn
    assert abs(kept - drawn) <= ROUNDING[keep]
    assert torch.equal(kl, same_kl)
    assert torch.autograd.grad(kept, logits)[0].abs().max() > 0


def test_they_are_drawn_once(store: Replay, loss: MEKDLoss) -> None:
    first = Pictures(store.folder, store, loss, CLASSES, "uint8", torch.device("cpu")).read(torch.arange(COUNT))
    other = MEKDLoss(Generator(CLASSES, 16, width=0.25))
    again = Pictures(store.folder, store, other, CLASSES, "uint8", torch.device("cpu")).read(torch.arange(COUNT))
    assert torch.equal(first, again)


def test_another_tau_draws_others(store: Replay, loss: MEKDLoss) -> None:
    first = Pictures(store.folder, store, loss, CLASSES, "uint8", torch.device("cpu")).read(torch.arange(COUNT))
    loss.tau = 1.0
    again = Pictures(store.folder, store, loss, CLASSES, "uint8", torch.device("cpu")).read(torch.arange(COUNT))
    assert not torch.equal(first, again)


@pytest.mark.parametrize("damage", [b"", b"no array"], ids=["empty", "text"])
def test_a_damaged_file_says_what_to_do(store: Replay, loss: MEKDLoss, damage: bytes) -> None:
    (store.folder / "uint8-auto-5.npy").write_bytes(damage)
    with pytest.raises(ValueError, match=r"uint8-auto-5\.npy cannot be read .*delete it"):
        Pictures(store.folder, store, loss, CLASSES, "uint8", torch.device("cpu"))


def test_a_file_cut_short_says_what_to_do(store: Replay, loss: MEKDLoss) -> None:
    Pictures(store.folder, store, loss, CLASSES, "uint8", torch.device("cpu"))
    path = store.folder / "uint8-auto-5.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"uint8-auto-5\.npy cannot be read .*delete it"):
        Pictures(store.folder, store, loss, CLASSES, "uint8", torch.device("cpu"))


def test_nothing_to_keep_is_refused() -> None:
    with pytest.raises(ValueError, match=r"distill\.keep is 'uint8'.*distill\.replay"):
        Config(distill=DistillConfig(keep="uint8"))
    Config(teacher=TeacherConfig(url="http://host/v2/models/m"), distill=DistillConfig(keep="uint8"))
    with pytest.raises(ValueError, match=r"distill\.keep is 'png'.*bfloat16"):
        DistillConfig(replay=10, keep="png")


def test_a_picture_that_is_not_what_was_drawn_is_refused(store: Replay, loss: MEKDLoss) -> None:
    device = torch.device("cpu")
    first = Pictures(store.folder, store, loss, CLASSES, "uint8", device).read(torch.arange(COUNT))
    path = store.folder / "uint8-auto-5.npy"
    content = bytearray(path.read_bytes())
    content[-3 * 16 * 16 * 7 - 5] ^= 4  # a bit of the eighth from the end
    path.write_bytes(content)
    os.utime(path, ns=(0, 0))
    damaged = Pictures(store.folder, store, loss, CLASSES, "uint8", device)
    assert torch.equal(damaged.read(torch.arange(COUNT - 8)), first[:-8])
    with pytest.raises(StoreError, match=rf"picture {COUNT - 8} of .*uint8-auto-5.npy is not what was drawn"):
        damaged.read(torch.tensor([3, COUNT - 8]))
    path.unlink()
    assert torch.equal(Pictures(store.folder, store, loss, CLASSES, "uint8", device).read(torch.arange(COUNT)), first)
