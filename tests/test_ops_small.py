"""Small losses, as at the end of a training: for their size they are as exact as plain arithmetic makes them.

The grid of test_ops_values.py allows 2^-22 where a loss is below 1, and such a loss may be less than that as a whole.
"""

import pytest
import torch
from torch import Tensor

from op_grid import (
    DEVICES,
    GAN_KINDS,
    IMAGE_KINDS,
    IMPLS,
    KINDS,
    TOPK_KINDS,
    Problem,
    compiled_only,
    make,
    result,
    truth,
)

#: Kinds whose kernels sum what is small from the start: digits are left where plain arithmetic has none.
EXACT = ["jsd", "jsd-skew", "jsd-skew-reverse"]


def small(kind: str, classes: int, seed: int, device: str) -> Problem:
    """A problem whose loss is as small as its kind can be."""
    shape = (4, 3, classes) if kind in IMAGE_KINDS else (6, classes)
    problem = make(kind, shape, values="near", device=device, seed=seed)
    random = torch.Generator().manual_seed(seed)
    if kind in TOPK_KINDS:
        # What a top-k answer means is known at tau 1: the student says nearly the same.
        best, indices = (0.9 * (3 * torch.randn(shape, generator=random)).softmax(-1)).topk(3)
        others = 0.0 if kind == "drop" else (1 - best.sum(-1, keepdim=True)) / (classes - 3)
        meant = torch.zeros(shape).add(others).scatter(-1, indices, best)
        students = (meant + 1e-30).log() + 1e-3 * torch.randn(shape, generator=random)
        answer = best.to(device), indices.to(device)
        return Problem(kind, [students.to(device)], {"topk": answer, "rest": kind}, {"tau": 1.0})
    if kind == "labels":
        problem.students[0].scatter_(-1, problem.target["labels"][..., None], 50.0)
    if kind in GAN_KINDS:
        sure = [12 + 8 * torch.rand(len(x), generator=random).to(device) for x in problem.students]
        problem.students = [-x if i or kind == "minimax" else x for i, x in enumerate(sure)]
    return problem


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "reference"])
@pytest.mark.parametrize("classes", [7, 64, *compiled_only(1000)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_small_loss_is_as_exact_as_plain_arithmetic(kind: str, classes: int, impl: str) -> None:
    reduction = "sum" if kind == "discriminator" else "none"
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = []
    for seed in range(4):
        problem = small(kind, classes, seed, DEVICES[impl])
        exact, plain = truth(problem, reduction), truth(problem, reduction, torch.float32)
        found.append(list(zip(result(problem, impl, reduction), exact, plain, strict=True)))
    for name, parts in zip(("loss", "gradient", "other gradient"), zip(*found, strict=True), strict=False):
        # Of four problems together: what plain arithmetic loses in one is luck.
        lost, off, size = (
            max(float((a - b).abs().max()) for a, b in pairs)
            for pairs in (
                [(plain.double(), exact) for _, exact, plain in parts],
                [(got.cpu().double(), exact) for got, exact, _ in parts],
                [(exact, torch.zeros_like(exact)) for _, exact, _ in parts],
            )
        )
        allowed = 1e-3 * size if name == "loss" and kind in EXACT else 3 * lost + 2**-21 * size
        assert off <= allowed, f"{name}: {off:.3g} off where {allowed:.3g} is allowed, of {size:.3g}"
