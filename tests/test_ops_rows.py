"""Rows that count, rows that do not, and rows that spoil: weights, masks, ignored labels, -inf and NaN."""

from typing import Any

import pytest
import torch
from torch import Tensor

from op_grid import (
    DEVICES,
    GAN_KINDS,
    IGNORED,
    IMAGE_KINDS,
    IMPLS,
    KERNELS,
    ROW_KINDS,
    Problem,
    check,
    compiled_only,
    make,
    result,
    truth,
    within,
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "dtype",
    [
        # Next to float32 students: nothing may become float64.
        torch.float64,
        # Wider than they need be, and narrower than the loss.
        torch.float32,
        torch.bfloat16,
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [*ROW_KINDS, "tanh", "in-place"])
def test_weights(kind: str, dtype: torch.dtype, impl: str) -> None:
    # 0 and negative ones too.
    values = [0.5, 0.0, 3.0, -1.0, 1.0, 2.0]
    problem = make(kind, (6, 7), device=DEVICES[impl])
    problem.options["weights"] = torch.tensor(values, dtype=dtype, device=DEVICES[impl])
    for reduction in ("none", "mean", "batchmean"):
        check(problem, impl, reduction)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "mask",
    [
        # Some rows count.
        [True, False, True, True, False, False],
        # One does.
        [False, False, False, False, False, True],
        # None does: the loss is 0, not 0 / 0.
        [False] * 6,
        # All do.
        [True] * 6,
    ],
)
@pytest.mark.parametrize("kind", ROW_KINDS)
def test_masks(kind: str, mask: list[bool], impl: str) -> None:
    for reduction in ("none", "mean", "batchmean", "sum"):
        problem = make(kind, device=DEVICES[impl], mask=torch.tensor(mask, device=DEVICES[impl]))
        check(problem, impl, reduction)


def spoiled(value: Any, row: int) -> Any:
    """A target whose row holds what no target may hold: NaN, or a class that does not exist."""
    if isinstance(value, tuple):
        return tuple(spoiled(x, row) for x in value)
    if not isinstance(value, Tensor):
        return value
    value = value.clone()
    value[row] = NAN if value.is_floating_point() else 999
    return value


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("classes", "filling"), [(10, NAN), (10, INF), (10, -INF), (2500, NAN)])
@pytest.mark.parametrize("kind", ROW_KINDS)
def test_masked_rows_may_hold_anything(kind: str, classes: int, filling: float, impl: str) -> None:
    clean = make(kind, (3, classes), device=DEVICES[impl], mask=torch.tensor([True, False, True]))
    clean.options["mask"] = clean.options["mask"].to(DEVICES[impl])
    dirty = Problem(kind, [clean.students[0].clone()], dict(clean.target), clean.options)
    dirty.students[0][1] = filling
    dirty.target = {name: spoiled(value, 1) for name, value in dirty.target.items()}
    for reduction in ("none", "batchmean"):
        wanted, got = (result(problem, impl, reduction) for problem in (clean, dirty))
        assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
        assert not got[1][1].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        # Padding that is no probability.
        ("probs", -1.0),
        ("topk values", -1.0),
        # Padding that is no class.
        ("topk indices", -2),
        # The same class again and again.
        ("topk indices", 0),
    ],
)
def test_masked_rows_may_hold_padding(name: str, value: float, impl: str) -> None:
    kind = "probs" if name == "probs" else "spread"
    problem = make(kind, device=DEVICES[impl], mask=torch.tensor([True, True, True, True, True, False]))
    problem.options["mask"] = problem.options["mask"].to(DEVICES[impl])
    wanted = result(problem, impl)
    if kind == "probs":
        problem.target["probs"][-1] = value
    else:
        problem.target["topk"][name == "topk indices"][-1] = value
    assert all(torch.equal(x, y) for x, y in zip(result(problem, impl), wanted, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ROW_KINDS)
def test_the_weight_of_a_masked_row_may_be_anything(kind: str, impl: str) -> None:
    mask = torch.tensor([True, False, True, True, True, True], device=DEVICES[impl])
    weights = torch.ones(6, device=DEVICES[impl]).masked_fill(~mask, NAN)
    for reduction in ("none", "batchmean"):
        wanted = result(make(kind, device=DEVICES[impl], mask=mask), impl, reduction)
        got = result(make(kind, device=DEVICES[impl], mask=mask, weights=weights), impl, reduction)
        assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "ignored",
    [
        # The default, no class.
        IGNORED,
        # A class.
        2,
        # Above the classes, as in segmentation sets.
        255,
    ],
)
@pytest.mark.parametrize("kind", ["labels", "dkd"])
def test_ignored_labels(kind: str, ignored: int, impl: str) -> None:
    problem = make(kind, device=DEVICES[impl], ignore_index=ignored)
    labels = problem.target["labels"]
    labels[labels == ignored] = 0
    labels[[1, 4]] = ignored
    problem.students[0][1] = NAN
    if kind == "dkd":
        problem.target["teacher"][4] = NAN
    for mask in (None, torch.tensor([True, True, False, True, True, True], device=DEVICES[impl])):
        problem.options["mask"] = mask
        for reduction in ("none", "mean", "batchmean", "sum"):
            check(problem, impl, reduction)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize(
    "masked",
    [
        # Some classes of one block.
        (7, [2, 5]),
        # All classes but two.
        (7, [0, 1, 2, 4, 5]),
        # A whole vector of floats.
        (20, list(range(8, 16))),
        # The whole first block: an online softmax has no finite maximum yet.
        (2500, list(range(1024))),
        # The block in the middle, and the last one.
        *compiled_only((2500, list(range(1024, 2048))), (2500, list(range(2048, 2500)))),
        # All but a few at the end.
        (2500, list(range(2490))),
    ],
    ids=lambda x: f"{len(x[1])}of{x[0]}from{x[1][0]}",
)
@pytest.mark.parametrize("kind", ["logits", "probs", "labels", "drop", "dkd", "jsd", "jsd-forward", "jsd-reverse"])
def test_masked_classes(kind: str, masked: tuple[int, list[int]], impl: str) -> None:
    classes, gone = masked
    left = [c for c in range(classes) if c not in set(gone)]
    whole, few = (make(kind, (2 if n > 100 else 4, n), device=DEVICES[impl]) for n in (classes, len(left)))
    loss, grad = result(_without(few, whole, gone, left), impl)
    # The same as if these classes did not exist.
    (exact, exact_grad), (plain, plain_grad) = truth(few), truth(few, dtype=torch.float32)
    within(loss, exact, plain, "loss")
    within(grad[:, left], exact_grad, plain_grad, "gradient")
    assert not grad[:, gone].any()


def _without(few: Problem, whole: Problem, gone: list[int], left: list[int]) -> Problem:
    """The problem of few classes, as part of one of more classes whose logits are -inf."""
    places = torch.tensor(left, device=few.students[0].device)

    def among(x: Tensor, filling: float) -> Tensor:
        return x.new_full((len(x), len(left) + len(gone)), filling).index_copy(1, places, x)

    target = dict(whole.target)
    for name, value in few.target.items():
        if name in ("logits", "teacher"):
            target[name] = among(value, -INF)
        elif name == "probs":
            target[name] = among(value, 0.0)
        elif name == "labels":
            target[name] = places[value]
        elif name == "topk":
            target[name] = (value[0], places[value[1]])
    return Problem(few.kind, [among(few.students[0], -INF)], target, few.options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["logits", "probs", "dkd", "jsd", "jsd-forward"])
def test_a_first_block_that_only_the_teacher_masks(kind: str, impl: str) -> None:
    problem = make(kind, (4, 2500), device=DEVICES[impl])
    if kind == "dkd":
        problem.target["labels"] = problem.target["labels"].clamp_min(1024)
    name = {"logits": "logits", "probs": "probs"}.get(kind, "teacher")
    problem.target[name][:, :1024] = 0.0 if kind == "probs" else -INF
    if kind == "probs":
        problem.target[name] /= problem.target[name].sum(-1, keepdim=True)
    check(problem, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "low",
    [
        # The mask of whoever wants no infinities.
        -1e4,
        # The lowest number there is.
        torch.finfo(torch.float32).min,
    ],
)
@pytest.mark.parametrize("kind", ["logits", "dkd", "jsd", "jsd-forward"])
def test_a_first_block_that_one_masks_with_inf_and_one_with_a_number(kind: str, low: float, impl: str) -> None:
    # p underflows to 0 even in float64: what the student thinks of these classes counts nothing.
    problem = make(kind, (4, 2500), device=DEVICES[impl])
    if kind == "dkd":
        problem.target["labels"] = problem.target["labels"].clamp_min(1024)
    problem.students[0][:, :1024] = -INF
    problem.target["logits" if kind == "logits" else "teacher"][:, :1024] = low
    check(problem, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["gan-logits", "gan-probs"])
def test_a_confidence_among_masked_classes(kind: str, impl: str) -> None:
    for gone in (slice(0, 1024), slice(1024, 2048), slice(2048, 2500), slice(3, 5)):
        problem = make(kind, (4, 2500), device=DEVICES[impl])
        name = kind.removeprefix("gan-")
        problem.target[name][:, gone] = -INF if name == "logits" else 0.0
        if name == "probs":
            problem.target[name] /= problem.target[name].sum(-1, keepdim=True)
        check(problem, impl)


NANS = [
    # What arithmetic makes.
    0x7FC00000,
    # What x86 makes of 0 / 0.
    -0x400000,
    # One with a payload, as some tools mark missing values.
    0x7FC00001,
]


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize(
    ("classes", "column", "bits"),
    [
        # The only class.
        (1, 0, NANS[0]),
        # In a tail.
        *((10, 9, bits) for bits in NANS),
        # In the first block, and in the last.
        (2500, 3, NANS[1]),
        (2500, 2499, NANS[0]),
    ],
)
@pytest.mark.parametrize("kind", ROW_KINDS)
def test_nan_spoils_its_row_alone(kind: str, classes: int, column: int, bits: int, impl: str) -> None:
    for where in ("student", "target"):
        problem = make(kind, (3, classes), device=DEVICES[impl])
        clean = result(problem, impl)
        spoilt, at = problem.students[0], column
        if where == "target":
            spoilt = next(iter(problem.target.values()))
            if isinstance(spoilt, tuple):
                spoilt, at = spoilt[0], 0
            if not spoilt.is_floating_point():
                continue  # a label is never NaN
        spoilt.view(torch.int32)[1, at] = bits
        loss, grad = result(problem, impl)
        assert loss[1].isnan(), where
        # Of log-probabilities each is on its own, and KL(p || q) is linear in log q.
        assert grad[1].isnan().any() or kind == "jsd-log", where
        for i in (0, 2):
            assert torch.equal(loss[i], clean[0][i]) and torch.equal(grad[i], clean[1][i]), where


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("bits", NANS)
@pytest.mark.parametrize("kind", ["tanh", "finished", "images", "confidence", "gan-logits", "gan-probs", "gan-label"])
def test_nan_spoils_its_sample_alone(kind: str, bits: int, impl: str) -> None:
    for where in ("student", "target"):
        problem = make(kind, (3, 20), device=DEVICES[impl])
        clean = result(problem, impl)
        spoilt = problem.students[0] if where == "student" else next(iter(problem.target.values()), None)
        if spoilt is None:
            continue  # a label is no number
        spoilt.view(torch.int32)[1 if spoilt.dim() == 1 else (1, 3)] = bits
        loss, grad = result(problem, impl)
        assert loss[1].isnan(), where
        if kind in GAN_KINDS:
            assert grad[1].isnan(), where
        for i in (0, 2):
            assert torch.equal(loss[i], clean[0][i]) and torch.equal(grad[i], clean[1][i])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("stray", [NAN, INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_an_image_of_weight_0_may_hold_anything(kind: str, dtype: torch.dtype, stray: float, impl: str) -> None:
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0], device=DEVICES[impl])
    problem = make(kind, dtype=dtype, device=DEVICES[impl], weights=weights)
    for reduction in ("mean", "none"):
        clean = result(problem, impl, reduction)
        spoilt = make(kind, dtype=dtype, device=DEVICES[impl], weights=weights)
        for x in (spoilt.students[0], spoilt.target["teacher"]):
            x[weights == 0] = stray
        for got, wanted in zip(result(spoilt, impl, reduction), clean, strict=True):
            assert torch.equal(got, wanted)
