"""Probabilities that are none are refused, by every backend and compiled too; what rounding explains is not."""

import pytest
import torch
from torch import Tensor

from mekd.checks import SLACK, slack_of
from mekd.functional import dkd_loss, generator_loss, information_maximization_loss, kd_loss
from op_grid import DEVICES, DTYPES, IMPLS

NAN = float("nan")
CLASSES = [
    # One tile of rows.
    7,
    # One block of the kernels and a tail.
    100,
    # Several blocks.
    2500,
]


@pytest.fixture(autouse=True)
def looking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEKD_CHECK", "1")  # a GPU's values are looked at when it is asked for


def distribution(classes: int, impl: str, rows: int = 4) -> Tensor:
    random = torch.Generator().manual_seed(classes)
    logits = torch.randn(rows, classes, generator=random, dtype=torch.float64)
    return logits.softmax(-1).to(DEVICES[impl], torch.float32)


def refused(loss, *parts: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError) as caught:
        loss()
    for part in parts:
        assert part in str(caught.value), caught.value


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("classes", CLASSES)
def test_rows_that_sum_to_something_else(classes: int, impl: str) -> None:
    probs = distribution(classes, impl)
    student = torch.zeros_like(probs).requires_grad_()
    d = torch.zeros(len(probs), device=probs.device)
    for factor, said in ((50.0, "50"), (0.5, "0.5"), (1.02, "1.02"), (0.98, "0.98"), (0.0, "0")):
        wrong = probs.clone()
        wrong[2] *= factor
        kept = torch.tensor([True, True, False, True], device=probs.device)
        text = ("probs", f"sum to {said}", "sums to 1, give or take 0.01")
        refused(lambda wrong=wrong: kd_loss(student, probs=wrong, impl=impl), *text, "floor, half their step")
        refused(lambda wrong=wrong: generator_loss(d, probs=wrong, impl=impl), *text, "as confidence")
        refused(lambda wrong=wrong: information_maximization_loss(d, probs=wrong, impl=impl), *text)
        # In a row that does not count it may be.
        masked, clean = (kd_loss(student, probs=p, mask=kept, impl=impl) for p in (wrong, probs))
        assert torch.equal(masked, clean)
    # Within what is allowed, and NaN spoils its row without being called a sum.
    for factor in (1.009, 0.991, NAN):
        near = probs.clone()
        near[2] *= factor
        assert kd_loss(student, probs=near, reduction="none", impl=impl)[[0, 1, 3]].isfinite().all()
        generator_loss(d, probs=near, impl=impl)
    # Negative ones are said to be that, be their sum what it may.
    wrong = probs.clone()
    wrong[1, classes - 1] = -3.0
    refused(lambda: kd_loss(student, probs=wrong, impl=impl), "probs", "-3", "at least 0")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rest", ["spread", "drop"])
def test_values_that_are_no_parts_of_one(rest: str, impl: str) -> None:
    device = DEVICES[impl]
    student, indices = torch.zeros(2, 6, device=device), torch.tensor([[0, 1], [4, 2]], device=device)

    def loss(values: list[float], **others: object) -> Tensor:
        topk = (torch.tensor([[0.5, 0.25], values], device=device), indices)
        return kd_loss(student, topk=topk, rest=rest, impl=impl, **others)  # type: ignore[arg-type]

    for values, said in (([99.1, 0.5], "99.6"), ([0.9, 0.9], "1.8"), ([1.02, 0.0], "1.02")):
        refused(lambda v=values: loss(v), "topk values", f"sum to {said}", "1 at most, give or take 0.01", "floor")
        assert loss(values, mask=torch.tensor([True, False], device=device)).isfinite()
    for values in ([0.6, 0.4], [0.605, 0.4], [0.3, 0.1], [0.0, 0.1]):
        assert loss(values).isfinite()
    # Nothing at all: spread, it is a uniform answer; dropped, it is none.
    if rest == "spread":
        assert loss([0.0, 0.0]).isfinite()
    else:
        refused(lambda: loss([0.0, 0.0]), "topk values", "sum to 0", "above 0")
    refused(lambda: loss([-0.25, 0.5]), "topk values", "-0.25", "at least 0")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("classes", [3, 40], ids=["in the kernel", "in memory"])
def test_all_classes_named_with_nothing(classes: int, impl: str) -> None:
    # Even spread there is nobody who could get the rest.
    order = torch.arange(classes, device=DEVICES[impl]).expand(2, classes)
    values, student = torch.zeros(2, classes, device=DEVICES[impl]), torch.zeros(2, classes, device=DEVICES[impl])
    values[0] = 1 / classes
    refused(lambda: kd_loss(student, topk=(values, order), impl=impl), "topk values", "sum to 0", "above 0")


@pytest.mark.parametrize("impl", IMPLS)
def test_confidences(impl: str) -> None:
    d = torch.zeros(3, device=DEVICES[impl])
    for value in (1.5, 99.0, 1.02, -0.125):
        y = torch.tensor([0.5, value, 0.2], device=DEVICES[impl])
        for loss in (generator_loss, information_maximization_loss):
            refused(lambda y=y, loss=loss: loss(d, y, impl=impl), "confidence", f"{value:g}", "between 0 and 1")
    assert generator_loss(d, torch.tensor([0.0, 1.0, 1.005], device=DEVICES[impl]), impl=impl).isfinite()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("decimals", [1, 2, 4])
@pytest.mark.parametrize("classes", [10, 1000])
def test_what_an_api_rounds_is_taken_once_it_is_said(classes: int, decimals: int, impl: str) -> None:
    step = 10.0**-decimals
    # All values are rounded to the same side: the most that rounding can be off.
    low = torch.full((2, classes), 0.0, device=DEVICES[impl])
    low[:, 0], low[:, 1] = 1 - 0.49 * step * (classes - 1), 0.0
    low[:, 0] = low[:, 0].clamp_min(step)
    student = torch.zeros_like(low)
    assert kd_loss(student, probs=low, floor=0.5 * step, impl=impl).isfinite()
    if (1 - low[0].sum()) > SLACK:
        refused(lambda: kd_loss(student, probs=low, impl=impl), "probs", "floor, half their step")
    # Per cent are no rounding.
    most = 1 + SLACK + 0.5 * step * classes
    high = low * (1.5 * most / low.sum(-1, keepdim=True))
    refused(lambda: kd_loss(student, probs=high, floor=0.5 * step, impl=impl), "probs", "sum to")
    values, indices = torch.full((2, 5), 0.2 + 0.5 * step, device=DEVICES[impl]), torch.arange(5).expand(2, 5)
    topk = (values, indices.to(DEVICES[impl]))
    assert kd_loss(student, topk=topk, floor=0.5 * step, impl=impl).isfinite()


def test_floors_that_are_none() -> None:
    x = torch.zeros(2, 3)
    for floor in (-0.1, 1.0, NAN):
        refused(lambda floor=floor: kd_loss(x, x, floor=floor), "floor", str(floor), "below 1")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sharpness",
    [
        # Every value as small as it can be ...
        0.0,
        # ... some as a network gives them ...
        1.0,
        # ... and one that is nearly all.
        8.0,
    ],
)
def test_half_precision_is_a_distribution(sharpness: float, dtype: torch.dtype, impl: str) -> None:
    logits = sharpness * torch.randn(2, 21841, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probs = logits.softmax(-1).to(DEVICES[impl], dtype)
    student = torch.zeros_like(probs)
    assert kd_loss(student, probs=probs, impl=impl).isfinite()
    assert generator_loss(student[:, 0], probs=probs, impl=impl).isfinite()


def test_float16_of_very_many_classes_has_room_for_what_vanishes() -> None:
    # 2^-25 a class, half of the least number there is, are more than a hundredth in all from here on.
    probs = torch.full((1, 610_303), 1 / 610_303, dtype=torch.float64).half()
    off = (1 - probs.float().sum(-1)).abs().item()
    assert SLACK < off < slack_of(probs, 0.0)
    assert kd_loss(torch.zeros(1, 610_303), probs=probs).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_compiled_they_are_refused_too(dtype: torch.dtype) -> None:
    student = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    indices = torch.tensor([[0], [1]])
    loss = torch.compile(lambda s, **target: kd_loss(s, **target), fullgraph=True, backend="aot_eager")
    good = torch.full((2, 3), 1 / 3, dtype=dtype)
    assert loss(student, probs=good).isfinite() and loss(student, topk=(good[:, :1], indices)).isfinite()
    refused(lambda: loss(student, probs=50 * good), "probs", "sum to 50")
    refused(lambda: loss(student, topk=(99 * good[:, :1], indices)), "topk values", "sum to 33")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("left_out", ["mask", "weights"])
@pytest.mark.parametrize("classes", CLASSES)
def test_a_row_that_adds_nothing_is_not_looked_at(classes: int, left_out: str, impl: str) -> None:
    probs = distribution(classes, impl)
    on = torch.tensor([True, False, True, True], device=probs.device)
    kept = {left_out: on if left_out == "mask" else on.float(), "impl": impl}
    values, indices = (0.9 * probs).topk(3)
    labels = indices[:, 0]
    empty, minus = (probs.where(on[:, None], x) for x in (0.0, -1.0))
    cases = [
        (kd_loss, {"labels": labels}, [{"labels": labels.where(on, at)} for at in (classes, 10**9, -5)]),
        (kd_loss, {"probs": probs}, [{"probs": empty}, {"probs": minus}]),
        (dkd_loss, {"teacher": probs, "labels": labels}, [{"teacher": probs, "labels": labels.where(on, 10**9)}]),
        *(
            (
                kd_loss,
                {"topk": (values, indices), "rest": rest},
                [
                    {"topk": (values.where(on[:, None], 9.0), indices), "rest": rest},
                    {"topk": (values, indices.where(on[:, None], 10**9)), "rest": rest},
                    {"topk": (values, indices.where(on[:, None], 1)), "rest": rest},
                ],
            )
            for rest in ("spread", "drop", "tail")
        ),
    ]
    for loss, good, strange in cases:
        found = []
        for target in (good, *strange):
            student = torch.zeros_like(probs).requires_grad_()
            value = loss(student, **target, **kept)  # type: ignore[operator]
            found.append((value.detach(), *torch.autograd.grad(value, student)))
        for value, grad in found[1:]:
            assert torch.equal(value, found[0][0]) and torch.equal(grad, found[0][1])
