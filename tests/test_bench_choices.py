"""Choosing which images are asked about: what each rule keeps, and that the rest of a store stays as it is."""

import pytest
import torch
from torch import Tensor, nn

from bench import choices
from mekd import cli
from mekd.engine.deprivatize import deprivatize
from mekd.engine.run import Run

CLASSES = 10


class Named(nn.Module):
    """Logits that stand in the first pixels."""

    def __init__(self, places: slice) -> None:
        super().__init__()
        self.places, self.last = places, nn.Linear(CLASSES, CLASSES, bias=False)
        self.last.weight.data = torch.eye(CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(images.flatten(1)[:, self.places])
        return logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    words = "--data.name digits --data.size 16 --deprivatize.steps 2 --deprivatize.width 0.125 --oracle.num_classes 10"
    parsed = cli.parse([*words.split(), "--deprivatize.alpha", "0", "--teacher.arch", "resnet8", "--seed", "3"])
    assert parsed is not None
    run = Run(parsed[0], tmp_path_factory.mktemp("choices"))
    deprivatize(run)
    return run


@pytest.fixture
def known(trained: Run) -> choices.Known:
    return choices.Known(trained, Named(slice(0, CLASSES)), 512, Named(slice(CLASSES, 2 * CLASSES)))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 3


def named(images: Tensor) -> Tensor:
    return images.flatten(1)[:, :CLASSES].softmax(1)


def test_as_many_of_each_class_the_surest_first(known: choices.Known, images: Tensor) -> None:
    images.flatten(1)[:40, 0] += 20  # most are of one class
    p = named(images)
    for rule in (choices.balanced, choices.sure):
        kept = rule(known, images, 20)
        counts = p[kept].argmax(1).bincount(minlength=CLASSES)
        there = p.argmax(1).bincount(minlength=CLASSES)
        assert len(kept.unique()) == 20
        assert counts.max() - counts[there > counts].min() <= 1, "none has more where another could have more"
    for number in range(CLASSES):
        of_it, mine = p[p.argmax(1) == number].amax(1), p[kept][p[kept].argmax(1) == number].amax(1)
        assert torch.equal(mine.sort().values, of_it.sort().values[len(of_it) - len(mine) :])


def test_half_of_them_those_that_are_doubted(known: choices.Known, images: Tensor) -> None:
    kept = choices.doubted(known, images, 20)
    top = named(images).topk(2).values
    margin = top[:, 0] - top[:, 1]
    assert kept[:10].tolist() == list(range(10)) and len(kept.unique()) == 20
    others = [row for row in range(10, 64) if row not in kept[10:].tolist()]
    assert margin[kept[10:]].max() <= margin[others].min()


def test_those_on_which_two_students_disagree(known: choices.Known, images: Tensor) -> None:
    images.flatten(1)[:, CLASSES : 2 * CLASSES] = images.flatten(1)[:, :CLASSES]
    images.flatten(1)[[5, 9], CLASSES : 2 * CLASSES] *= -1
    assert sorted(choices.disagreed(known, images, 2).tolist()) == [5, 9]


def test_far_from_what_was_asked_and_from_each_other(known: choices.Known, images: Tensor) -> None:
    known.__dict__["features"] = torch.eye(CLASSES)[:8]
    images.flatten(1)[:, :CLASSES] = torch.eye(CLASSES)[torch.arange(64) % 8]
    images.flatten(1)[[3, 4, 50], :CLASSES] = torch.eye(CLASSES)[[8, 9, 8]]
    assert sorted(choices.far(known, images, 2).tolist()) == [3, 4]


def test_latents_are_moved_to_the_class_and_keep_their_length(trained: Run) -> None:
    """A student that sees a class in the brightness of the image's parts."""

    class Bright(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return 20 * images.flatten(2).mean(1)[:, : 10 * CLASSES].unflatten(1, (CLASSES, 10)).mean(2)

    known = choices.Known(trained, Bright(), 512)
    before = trained.latents("choices", 9, 32, slice(None))
    after = choices.searched(known, before, 9)
    random = choices.generator_at(trained.config.seed, "searched", 9)
    wanted = torch.randint(CLASSES, (32,), generator=random)
    p = [Bright()(known.exact(*latents)).softmax(1)[torch.arange(32), wanted].mean() for latents in (before, after)]
    assert p[1] > p[0]
    for one, other in zip(before, after, strict=True):
        assert torch.allclose(one.norm(dim=1), other.norm(dim=1), rtol=1e-5) and not torch.allclose(one, other)


@pytest.mark.parametrize("rule", ["ask-doubted", "ask-searched"])
def test_the_store_before_it_and_other_draws_stay_as_they_are(trained: Run, known: choices.Known, rule: str) -> None:
    run = choices.Choosing(trained.config, trained.out, rule=rule, known=known)
    for purpose, step in (("replay", 0), ("replay", 1), ("holdout", 7), ("distill", 7)):
        for one, other in zip(trained.latents(purpose, step, 256), run.latents(purpose, step, 256), strict=True):
            assert torch.equal(one, other)
    first, again = (run.latents("replay", 2, 256) for _ in range(2))
    plain = trained.latents("replay", 2, 256)
    assert all(len(part) == 256 and torch.equal(part, same) for part, same in zip(first, again, strict=True))
    assert not torch.equal(first.code, plain.code)
    part = run.latents("replay", 2, 256, slice(3, 7))
    assert torch.equal(part.code, first.code[3:7]) and torch.equal(part.n, first.n[3:7])
