"""kd_loss: values, gradients, dtypes and errors of the tempered KL, for every kind of target."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kl_formula import KINDS, Rows, close, kl_rows, make, retemper, softmax
from mekd.functional import kd_loss
from mekd.reference import fill_topk

SCALES = ["tau2", "tau", "one"]
REDUCTIONS = ["none", "mean", "rowmean", "sum"]


def factor_of(scale: str, tau: float) -> float:
    return {"tau2": tau**2, "tau": tau, "one": 1.0}[scale]


def reduced(losses: Rows, kept: Rows, num_classes: int, reduction: str) -> Rows:
    if reduction == "none":
        return losses
    divisor = {"sum": 1, "mean": losses.size * num_classes, "rowmean": kept.sum()}[reduction]
    return losses.sum() / divisor


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_value_is_the_formula(kind: str, scale: str, reduction: str) -> None:
    student, target, p, kept = make(kind, tau=3.0)
    losses = kl_rows(p, student.numpy(), 3.0) * kept * factor_of(scale, 3.0)
    got = kd_loss(student, **target, tau=3.0, scale=scale, reduction=reduction)
    close(got, reduced(losses, kept, 7, reduction))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_difference_of_probabilities(kind: str, scale: str) -> None:
    student, target, p, kept = make(kind, tau=3.0)
    student.requires_grad_()
    kd_loss(student, **target, tau=3.0, scale=scale).backward()
    q = softmax(student.detach().numpy() / 3.0)
    assert student.grad is not None
    close(student.grad, factor_of(scale, 3.0) / 3.0 * (q - p) * kept[:, None] / kept.sum())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, reduction: str) -> None:
    student, target, _, _ = make(kind, tau=2.0, lead=(3,), num_classes=5)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: kd_loss(s, **target, tau=2.0, reduction=reduction), (student,))


@pytest.mark.parametrize(
    "tau",
    [
        # Plain cross-entropies and KLs, no temperature.
        1.0,
        # The paper's.
        5.0,
        # Below 1: sharpens instead of softening.
        0.5,
        # A Python int.
        2,
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_temperature_is_a_number_or_a_0d_tensor(kind: str, tau: float) -> None:
    student, target, p, kept = make(kind, tau)
    wanted = reduced(kl_rows(p, student.numpy(), tau) * kept * tau**2, kept, 7, "rowmean")
    close(kd_loss(student, **target, tau=tau), wanted)
    close(kd_loss(student, **target, tau=torch.tensor(float(tau))), wanted)
    # A 0-d float64 tensor does not widen a float32 loss.
    got = kd_loss(student.float(), **make(kind, tau, dtype=torch.float32)[1], tau=torch.tensor(tau).double())
    assert got.dtype == torch.float32


@pytest.mark.parametrize(
    "lead",
    [
        # One row without a batch.
        (),
        # One row with a batch.
        (1,),
        # The usual batch.
        (6,),
        # Tokens of a language model.
        (2, 3),
        # More leading dimensions than anyone has names for.
        (2, 1, 3),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_leading_shapes_are_rows(kind: str, lead: tuple[int, ...]) -> None:
    student, target, p, kept = make(kind, tau=3.0, lead=lead)
    losses = kl_rows(p, student.numpy().reshape(-1, 7), 3.0) * kept * 9
    rows = kd_loss(student, **target, tau=3.0, reduction="none")
    assert rows.shape == lead
    close(rows.reshape(-1), losses)
    for reduction in ("mean", "rowmean", "sum"):
        got = kd_loss(student, **target, tau=3.0, reduction=reduction)
        assert got.shape == ()
        close(got, reduced(losses, kept, 7, reduction))


# torch warns that its "mean" divides by all elements, which is what is held against here.
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_logits_agree_with_torch_kl_div(reduction: str) -> None:
    student, target, _, _ = make("logits", 4.0)
    log_q, log_p = (F.log_softmax(x / 4.0, -1) for x in (student, target["logits"]))
    wanted = F.kl_div(log_q, log_p, log_target=True, reduction=reduction)
    torch.testing.assert_close(kd_loss(student, **target, tau=4.0, scale="one", reduction=reduction), wanted)


@pytest.mark.parametrize(
    "ignore_index",
    [
        # The default, outside the classes.
        -100,
        # A class of its own, as segmentation sets have it.
        2,
        # A value above the classes, as in Cityscapes: looking it up would be out of bounds.
        255,
    ],
)
def test_labels_agree_with_torch_cross_entropy(ignore_index: int) -> None:
    student, _, _, _ = make("labels", 4.0)
    labels = torch.tensor([0, 2, 1, 6, ignore_index, 4])
    wanted = F.cross_entropy(student / 4.0, labels, ignore_index=ignore_index)
    got = kd_loss(student, labels=labels, tau=4.0, scale="one", ignore_index=ignore_index)
    torch.testing.assert_close(got, wanted)


def test_probabilities_of_logits_are_the_logits() -> None:
    student, target, _, _ = make("logits", 4.0)
    from_logits = kd_loss(student, **target, tau=4.0, reduction="none")
    from_probs = kd_loss(student, probs=target["logits"].softmax(-1), tau=4.0, reduction="none")
    torch.testing.assert_close(from_probs, from_logits)


@pytest.mark.parametrize("kind", ["logits", "probs"])
def test_student_like_the_teacher_has_no_loss_and_no_gradient(kind: str) -> None:
    teacher = make("logits", 1.0)[1]["logits"]
    # A constant per row is no difference.
    student = (teacher + torch.arange(6.0).unsqueeze(1)).requires_grad_()
    loss = kd_loss(student, **{kind: teacher if kind == "logits" else teacher.softmax(-1)}, tau=3.0)
    loss.backward()
    assert student.grad is not None
    assert abs(loss.item()) < 1e-14
    assert student.grad.abs().max() < 1e-14


# Top-k.


@pytest.mark.parametrize(
    ("rest", "wanted"),
    [
        # Two of four classes named, 0.2 missing: 0.1 for each other class.
        ("spread", [0.1, 0.5, 0.1, 0.3]),
        # The same mass left out: the two named ones are scaled up to one.
        ("drop", [0.0, 0.625, 0.0, 0.375]),
    ],
)
def test_the_missing_mass_is_spread_or_dropped(rest: str, wanted: list[float]) -> None:
    values, indices = torch.tensor([[0.5, 0.3]]), torch.tensor([[1, 3]])
    torch.testing.assert_close(fill_topk(values, indices, 4, rest), torch.tensor([wanted]))
    student = torch.tensor([[0.3, -1.0, 2.0, 0.1]], dtype=torch.float64)
    got = kd_loss(student, topk=(values.double(), indices), rest=rest, tau=2.0, scale="one")
    close(got, kl_rows(retemper(np.array([wanted]), 2.0), student.numpy(), 2.0)[0], rtol=1e-7)


@pytest.mark.parametrize("rest", ["spread", "drop", "tail"])
def test_all_classes_named_is_the_dense_case(rest: str) -> None:
    student, target, _, _ = make("probs", 3.0)
    indices = torch.stack([torch.randperm(7, generator=torch.Generator().manual_seed(i)) for i in range(6)])
    values = target["probs"].gather(-1, indices)
    dense = kd_loss(student, **target, tau=3.0, reduction="none")
    got = kd_loss(student, topk=(values, indices), rest=rest, tau=3.0, reduction="none")
    torch.testing.assert_close(got, dense)


@pytest.mark.parametrize(
    "values",
    [
        # Rounded up by the API, the sum is 1.01: nothing is missing, nothing becomes negative.
        [0.66, 0.35],
        # Rounded to exactly one.
        [0.6, 0.4],
    ],
)
@pytest.mark.parametrize("rest", ["spread", "drop"])
def test_rounded_values_are_normalised(rest: str, values: list[float]) -> None:
    student = torch.tensor([[0.3, -1.0, 2.0, 0.1]], dtype=torch.float64)
    p = np.array([[0.0, values[0], 0.0, values[1]]]) / sum(values)
    answer = (torch.tensor([values], dtype=torch.float64), torch.tensor([[1, 3]]))
    close(kd_loss(student, topk=answer, rest=rest, floor=0.005), kl_rows(p, student.numpy(), 1.0)[0])


# Dtypes and strides.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(kind: str, dtype: torch.dtype) -> None:
    student, target, _, _ = make(kind, tau=3.0, dtype=dtype)
    wide = {name: value.float() if name in ("logits", "probs") else value for name, value in target.items()}
    if "topk" in target:
        wide["topk"] = (target["topk"][0].float(), target["topk"][1])
    student.requires_grad_()
    loss = kd_loss(student, **target, tau=3.0)
    loss.backward()
    exact = student.detach().float().requires_grad_()
    wanted = kd_loss(exact, **wide, tau=3.0)
    wanted.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=0, atol=0)
    assert student.grad is not None and exact.grad is not None
    assert student.grad.dtype == dtype
    torch.testing.assert_close(student.grad, exact.grad.to(dtype), rtol=0, atol=0)


def test_the_students_dtype_decides() -> None:
    student, target, _, _ = make("logits", 1.0)
    teacher = target["logits"]
    assert kd_loss(student, teacher.float()).dtype == torch.float64
    assert kd_loss(student.bfloat16(), teacher).dtype == torch.float32
    assert kd_loss(student.float(), probs=teacher.softmax(-1)).dtype == torch.float32


def test_float16_logits_at_the_edge_of_their_range() -> None:
    student = torch.tensor([[6e4, -6e4]], dtype=torch.float16, requires_grad=True)
    loss = kd_loss(student, -student.detach(), tau=0.5, scale="one")
    loss.backward()
    assert loss.item() == pytest.approx(240_000, rel=1e-3)
    assert student.grad is not None and student.grad.tolist() == [[2.0, -2.0]]


@pytest.mark.parametrize(
    "arrange",
    [
        # Classes along the rows in memory.
        lambda x: x.t().contiguous().t(),
        # Every second column of a wider tensor.
        lambda x: torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0],
        # A storage offset: the rest of a buffer.
        lambda x: torch.cat([torch.full_like(x, float("nan")), x])[len(x) :],
    ],
)
@pytest.mark.parametrize("kind", ["logits", "probs", "spread"])
def test_strides_and_offsets_are_not_the_value(kind: str, arrange: Callable[[Tensor], Tensor]) -> None:
    student, target, _, _ = make(kind, tau=3.0)
    wanted = kd_loss(student, **target, tau=3.0, reduction="none")
    moved: dict[str, Any] = {}
    if kind == "spread":
        moved["topk"] = tuple(arrange(x.double()).to(x.dtype) for x in target["topk"])
    else:
        moved[kind] = arrange(target[kind])
    got = kd_loss(arrange(student), **moved, tau=3.0, reduction="none")
    torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-14)


def test_inputs_are_left_alone() -> None:
    student, target, _, _ = make("probs", 3.0)
    before = student.clone(), target["probs"].clone()
    kd_loss(student, **target, tau=3.0)
    assert torch.equal(student, before[0]) and torch.equal(target["probs"], before[1])


# Errors.

S = torch.zeros(4, 5)
LABELS = torch.zeros(4, dtype=torch.int64)
TOPK = (torch.full((4, 2), 0.4), torch.tensor([[0, 1]] * 4))


@pytest.mark.parametrize(
    ("arguments", "kind", "parts"),
    [
        # No teacher.
        ({}, ValueError, ["none", "exactly one", "logits, probs, labels, topk"]),
        # Two teachers.
        ({"logits": S, "labels": LABELS}, ValueError, ["logits, labels", "exactly one"]),
        # The teacher is still in the graph of its own weights.
        ({"logits": S.clone().requires_grad_()}, ValueError, ["logits", "requires grad", "detach"]),
        ({"probs": S.clone().requires_grad_()}, ValueError, ["probs", "requires grad", "detach"]),
        (
            {"topk": (TOPK[0].clone().requires_grad_(), TOPK[1])},
            ValueError,
            ["topk values", "requires grad", "detach"],
        ),
        # Broadcasting would make a loss of another size.
        ({"logits": torch.zeros(1, 5)}, ValueError, ["logits", "(1, 5)", "(4, 5)"]),
        ({"probs": torch.zeros(4, 6)}, ValueError, ["probs", "(4, 6)", "(4, 5)"]),
        ({"labels": torch.zeros(4, 1, dtype=torch.int64)}, ValueError, ["labels", "(4, 1)", "(4,)"]),
        ({"topk": (torch.zeros(3, 2), TOPK[1][:3])}, ValueError, ["topk values", "(3, 2)", "(4, 'K')", "5"]),
        ({"topk": (TOPK[0], TOPK[1][:, :1])}, ValueError, ["topk indices", "(4, 1)", "(4, 2)"]),
        # More classes named than there are.
        (
            {"topk": (torch.zeros(4, 6), torch.zeros(4, 6, dtype=torch.int64))},
            ValueError,
            ["topk values", "(4, 6)", "5"],
        ),
        # No class named.
        (
            {"topk": (torch.zeros(4, 0), torch.zeros(4, 0, dtype=torch.int64))},
            ValueError,
            ["topk values", "(4, 0)", "5"],
        ),
        # int32 labels, and probabilities of classes where labels belong.
        ({"labels": LABELS.int()}, TypeError, ["labels", "torch.int32", "torch.int64"]),
        ({"labels": torch.zeros(4)}, TypeError, ["labels", "torch.float32", "torch.int64"]),
        ({"topk": (TOPK[0], TOPK[1].int())}, TypeError, ["topk indices", "torch.int32", "torch.int64"]),
        # Integers where logits belong.
        ({"logits": S.long()}, TypeError, ["logits", "torch.int64", "floating"]),
        ({"probs": S.long()}, TypeError, ["probs", "torch.int64", "floating"]),
        ({"topk": (TOPK[0].long(), TOPK[1])}, TypeError, ["topk values", "torch.int64", "floating"]),
        ({"student": S.long(), "logits": S}, TypeError, ["student", "torch.int64", "floating"]),
        # Not even one row.
        ({"student": torch.tensor(1.0), "logits": torch.tensor(1.0)}, ValueError, ["student", "0-d"]),
        # Choices, each with its name, its value and what it may be.
        ({"logits": S, "scale": "tau3"}, ValueError, ["scale", "'tau3'", "'tau2', 'tau', 'one'"]),
        (
            {"logits": S, "reduction": "avg"},
            ValueError,
            ["reduction", "'avg'", "'none', 'mean', 'batchmean', 'sum'"],
        ),
        ({"topk": TOPK, "rest": "keep"}, ValueError, ["rest", "'keep'", "'spread', 'drop', 'tail'"]),
        # Temperatures that divide by nothing, turn the classes around, or are no number.
        ({"logits": S, "tau": 0.0}, ValueError, ["tau", "0.0", "above 0"]),
        ({"logits": S, "tau": -1.0}, ValueError, ["tau", "-1.0", "above 0"]),
        ({"logits": S, "tau": float("nan")}, ValueError, ["tau", "nan", "above 0"]),
        ({"logits": S, "tau": torch.tensor(-2.0)}, ValueError, ["tau", "-2", "above 0"]),
        # A temperature per row would broadcast along the classes.
        ({"logits": S, "tau": torch.ones(5)}, ValueError, ["tau", "(5,)", "0-d"]),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], kind: type[Exception], parts: list[str]) -> None:
    with pytest.raises(kind) as caught:
        kd_loss(**{"student": S, **arguments})
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("label", [5, -1])
def test_a_label_outside_the_classes_is_refused(label: int) -> None:
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        kd_loss(S, labels=torch.tensor([0, 1, 2, label]))
