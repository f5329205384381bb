"""Which images are asked about, of the many that G draws at home: by what a student of some answers makes of them.

A first student has learnt from a quarter of the queries, of images drawn at random. By a rule it chooses what the
others are of: of each block of images as many as the block shall hold, among POOL times as many.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.pools import margins
from mekd.audit import load_discriminator
from mekd.engine.collect import BLOCK, draw_images
from mekd.engine.run import Latents, Run
from mekd.nets.frozen import freeze
from mekd.pixels import as_float, to_uint8
from mekd.seeds import generator_at

#: Images that are drawn for each that is asked about.
POOL = 8
#: Of a latent that is searched: steps of Adam, their size.
STEPS, LR = 20, 0.1


@dataclass(frozen=True)
class Known:
    """What a choice may know: a student of so many answers, another one of the same, generator and discriminator."""

    run: Run
    student: nn.Module
    asked: int
    other: nn.Module | None = None

    def __post_init__(self) -> None:
        for network in filter(None, (self.student, self.other)):
            network.eval().requires_grad_(False)

    @functools.cached_property
    def exact(self) -> nn.Module:
        """The generator, as it draws what is sent."""
        return freeze(self.run.load_generator())

    @functools.cached_property
    def discriminator(self) -> nn.Module:
        """Step 1's, as it was at the end."""
        return load_discriminator(self.run)

    @functools.cached_property
    def features(self) -> Tensor:
        """The student's features (n, F) of what was asked about at random."""
        blocks = range(self.asked // BLOCK)
        drawn = [draw_images(self.run, self.exact, "replay", block, BLOCK, slice(None))[0] for block in blocks]
        return features(self.student, as_float(to_uint8(torch.cat(drawn))))


def probabilities(network: nn.Module, images: Tensor) -> Tensor:
    """(n, C) of images (n, ch, S, S)."""
    return torch.cat([network(part).softmax(1) for part in images.split(BLOCK)])


def features(network: nn.Module, images: Tensor) -> Tensor:
    """What the last linear layer gets (n, F), each of length 1."""
    got: list[Tensor] = []
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    hook = last.register_forward_pre_hook(lambda module, inputs: got.append(inputs[0]))
    probabilities(network, images)
    hook.remove()
    return F.normalize(torch.cat(got), dim=1)


def evenly(classes: Tensor, value: Tensor, count: int) -> Tensor:
    """count rows, as many of each class (n,) as there are, those of the largest value (n,) first."""
    order = value.argsort(descending=True)
    rank = torch.empty_like(order)
    for number in classes.unique():
        of_it = order[classes[order] == number]
        rank[of_it] = torch.arange(len(of_it))
    return order[rank[order].argsort(stable=True)][:count]


# Each rule: which rows of images (n, ch, S, S), count of them, shall be asked about; they come in no order.


def balanced(known: Known, images: Tensor, count: int) -> Tensor:
    """As many of each class, as the student names them."""
    return evenly(probabilities(known.student, images).argmax(1), -torch.arange(len(images)), count)


def sure(known: Known, images: Tensor, count: int) -> Tensor:
    """As many of each class, those of which the student is most certain."""
    found = probabilities(known.student, images).max(1)
    return evenly(found.indices, found.values, count)


def doubted(known: Known, images: Tensor, count: int) -> Tensor:
    """Half as they come, and those of the smallest margin: the difference of the two largest probabilities."""
    half = count // 2
    return torch.cat([torch.arange(half), half + margins(known.student, images[half:]).argsort()[: count - half]])


def disagreed(known: Known, images: Tensor, count: int) -> Tensor:
    """Those on which two students disagree most, by the distance of their probabilities."""
    assert known.other is not None
    distance = (probabilities(known.student, images) - probabilities(known.other, images)).abs().sum(1)
    return distance.argsort(descending=True)[:count]


def far(known: Known, images: Tensor, count: int) -> Tensor:
    """Those farthest from what was asked at random, and from each other, in the student's features (k-centre)."""
    here = features(known.student, images)
    near = torch.cat([1 - (part @ known.features.T).max(1).values for part in here.split(BLOCK)])
    kept = []
    for _ in range(count):
        kept.append(int(near.argmax()))
        near = torch.minimum(near, 1 - here @ here[kept[-1]])
        near[kept[-1]] = -1
    return torch.tensor(kept)


#: This one needs another student; and this one moves the latents themselves.
OF_TWO = "ask-disagreed"
SEARCH = "ask-searched"
RULES: dict[str, Callable[[Known, Tensor, int], Tensor]] = {
    "ask-balanced": balanced,
    "ask-sure": sure,
    "ask-doubted": doubted,
    OF_TWO: disagreed,
    "ask-far": far,
}


def searched(known: Known, latents: Latents, step: int) -> Latents:
    """Latents that were moved, their lengths kept, until the student names a class drawn at random and D says real."""
    random = generator_at(known.run.config.seed, "searched", step)
    wanted = torch.randint(known.run.num_classes, (len(latents.code),), generator=random)
    moved = [part.clone().requires_grad_() for part in latents]
    lengths = [part.norm(dim=1, keepdim=True) for part in latents]
    adam = torch.optim.Adam(moved, LR)
    with torch.enable_grad():
        for _ in range(STEPS):
            images = known.exact(*moved)
            named = F.cross_entropy(known.student(images), wanted, reduction="sum")
            adam.zero_grad()
            (named + F.softplus(-known.discriminator(images)).sum()).backward()
            adam.step()
            with torch.no_grad():
                for part, length in zip(moved, lengths, strict=True):
                    part.mul_(length / part.norm(dim=1, keepdim=True))
    return Latents(*(part.detach() for part in moved))


@torch.no_grad()
def chosen(rule: str, known: Known, latents: Latents, step: int) -> Latents:
    """The latents of a block, of POOL times as many."""
    count = len(latents.code) // POOL
    if rule == SEARCH:
        return searched(known, Latents(*(part[:count] for part in latents)), step)
    parts = [known.exact(*part) for part in zip(*(x.split(BLOCK) for x in latents), strict=True)]
    kept = RULES[rule](known, as_float(to_uint8(torch.cat(parts))), count)
    return Latents(*(part[kept] for part in latents))


@dataclass(frozen=True)
class Choosing(Run):
    """A run whose store is of images chosen by a rule, but for the blocks that the first student has learnt from."""

    rule: str = field(kw_only=True)
    known: Known = field(kw_only=True)

    def latents(self, purpose: str, step: int, count: int, rows: slice | None = None) -> Latents:
        if purpose != "replay" or step * count < self.known.asked:
            return super().latents(purpose, step, count, rows)
        found = chosen(self.rule, self.known, super().latents("choices", step, POOL * count, slice(None)), step)
        return found if rows is None else Latents(*(part[rows] for part in found))
