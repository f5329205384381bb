"""A step of distillation: the same losses as the plain way, in every precision, and a peak of memory below it."""

import copy

import pytest
import torch
import torch.nn.functional as F

from bench import plain
from mekd.engine.distill import take_step
from mekd.engine.profile import peak_mb
from mekd.engine.train import sgd
from mekd.losses import MEKDLoss
from mekd.nets import Generator, build
from mekd.nets.frozen import freeze

TAU, KL_TAU, BATCH, CLASSES, NUISANCE = 5.0, 4.0, 8, 6, 9


@pytest.fixture
def generator() -> Generator:
    torch.manual_seed(0)
    generator = Generator(CLASSES, 16, width=0.25, nuisance=NUISANCE)
    with torch.no_grad():
        for _ in range(3):
            generator(torch.randn(16, CLASSES))
    return generator.eval()


def test_fifty_steps_have_the_losses_of_the_plain_way(generator: Generator) -> None:
    teacher, student = build("resnet8", CLASSES, 3).eval(), build("resnet8", CLASSES, 3)
    theirs, slow = copy.deepcopy(student), plain.PlainGenerator(copy.deepcopy(generator)).eval()
    student = student.to(memory_format=torch.channels_last)
    loss = MEKDLoss(generator, TAU, kl_tau=KL_TAU, image=1.0)
    optimizer, their_optimizer = sgd(student, 0.01, 5e-4), sgd(theirs, 0.01, 5e-4)
    ours, expected = [], []
    for _ in range(50):
        z, n = torch.randn(BATCH, CLASSES), torch.randn(BATCH, NUISANCE)
        expected.append(plain.distill_step(slow, teacher, theirs, their_optimizer, z, n, TAU, KL_TAU).item())
        with torch.no_grad():
            images = slow(z, n)
            logits = teacher(images)
        ours.append(take_step(student, optimizer, loss, images, {"logits": logits, "n": n})["loss"].item())
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert max(expected) > 1.01 * min(expected)


@pytest.mark.parametrize(("precision", "near"), [("bfloat16", 3e-2), ("float16", 1e-2)])
def test_lower_precisions_are_near(generator: Generator, precision: str, near: float) -> None:
    torch.manual_seed(1)
    student = build("resnet8", CLASSES, 3)
    images = torch.rand(BATCH, 3, 16, 16) * 2 - 1
    target = {"logits": 3 * torch.randn(BATCH, CLASSES), "n": torch.randn(BATCH, NUISANCE)}
    scaler = torch.amp.GradScaler("cpu") if precision == "float16" else None
    found = {}
    for name in ("float32", precision):
        copied, loss = copy.deepcopy(student), MEKDLoss(freeze(generator).to(getattr(torch, name)), TAU, image=1.0)
        optimizer = sgd(copied, 0.01, 0.0)
        losses = take_step(copied, optimizer, loss, images, target, name, scaler if name == "float16" else None)
        moved = torch.cat([(a - b).flatten() for a, b in zip(copied.parameters(), student.parameters(), strict=True)])
        found[name] = losses["loss"].detach(), moved.detach()
    torch.testing.assert_close(found[precision][0], found["float32"][0], rtol=near, atol=0)
    assert F.cosine_similarity(found[precision][1], found["float32"][1], dim=0) > 0.97


def test_a_step_takes_no_more_memory_than_the_plain_way(generator: Generator) -> None:
    teacher, student = build("resnet8", CLASSES, 3).eval(), build("resnet8", CLASSES, 3)
    loss, optimizer = MEKDLoss(generator, TAU), sgd(student, 0.01, 5e-4)
    slow = plain.PlainGenerator(copy.deepcopy(generator)).eval().requires_grad_(True)
    z, n = torch.randn(64, CLASSES), torch.randn(64, NUISANCE)
    with torch.no_grad():
        images = generator(z, n)
        logits = teacher(images)
    theirs = peak_mb(lambda: plain.distill_step(slow, teacher, student, optimizer, z, n, TAU, KL_TAU))
    assert 0 < peak_mb(lambda: take_step(student, optimizer, loss, images, {"logits": logits, "n": n})) < theirs
