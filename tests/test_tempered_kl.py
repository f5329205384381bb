"""kd_loss: values, gradients, edges and errors of the tempered KL, for every kind of target."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mekd.functional import kd_loss
from mekd.reference import fill_topk

Rows = np.ndarray
IGNORED = -100
NEG_INF = float("-inf")
#: DESIGN section 6: what a float32 result may be off by where nothing else is known of it.
FLOAT32_ERROR = 2.0**-22

KINDS = [
    # A teacher that shows its logits: the textbook loss.
    "logits",
    # An API that answers probabilities: they are tempered again.
    "probs",
    # An API that answers a label: one-hot, never softened, and one row is ignored.
    "labels",
    # An API that answers its best classes: the rest of the mass is shared among the others ...
    "spread",
    # ... or left out, which makes classes of probability exactly 0.
    "drop",
]
SCALES = ["tau2", "tau", "one"]
REDUCTIONS = ["none", "mean", "batchmean", "sum"]


def softmax(x: Rows) -> Rows:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(x: Rows) -> Rows:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def retemper(p: Rows, tau: float) -> Rows:
    """p^(1 / tau), normalised."""
    powered = p ** (1 / tau)
    return powered / powered.sum(-1, keepdims=True)


def kl_rows(p: Rows, student: Rows, tau: float) -> Rows:
    """sum p log(p / q) with q = softmax(student / tau) and 0 log 0 = 0, per row."""
    log_q = log_softmax(student / tau)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * (np.log(p) - log_q), 0.0).sum(-1)


def fill(values: Rows, indices: Rows, num_classes: int, rest: str) -> Rows:
    """The full distribution of a top-k answer, one class at a time."""
    filled = np.zeros((len(values), num_classes))
    for row, (vs, ks) in enumerate(zip(values, indices, strict=True)):
        others = [c for c in range(num_classes) if c not in ks]
        for c in others:
            filled[row, c] = (1 - vs.sum()) / len(others) if rest == "spread" else 0.0
        for v, k in zip(vs, ks, strict=True):
            filled[row, k] = v
        filled[row] /= filled[row].sum()
    return filled


def make(
    kind: str,
    tau: float,
    lead: tuple[int, ...] = (6,),
    num_classes: int = 7,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, dict[str, Any], Rows, Rows]:
    """Student logits, the target as kd_loss takes it, its tempered probabilities (N, C), who counts (N,)."""
    random = np.random.default_rng(seed)
    n, c = int(np.prod(lead, dtype=int)), num_classes
    student = torch.from_numpy(3 * random.standard_normal((*lead, c))).to(dtype)
    teacher = torch.from_numpy(3 * random.standard_normal((n, c))).to(dtype)
    exact = teacher.double().numpy()
    kept = np.ones(n, dtype=bool)
    if kind == "logits":
        return student, {"logits": teacher.reshape(*lead, c)}, softmax(exact / tau), kept
    if kind == "labels":
        labels = random.integers(0, c, n)
        onehot = np.eye(c)[labels]
        if n > 1:
            labels[1], kept[1] = IGNORED, False
        return student, {"labels": torch.from_numpy(labels.reshape(lead))}, onehot, kept
    probs = torch.from_numpy(softmax(exact)).to(dtype)
    if kind == "probs":
        return student, {"probs": probs.reshape(*lead, c)}, retemper(probs.double().numpy(), tau), kept
    values, indices = probs.topk(min(3, c))
    p = fill(values.double().numpy(), indices.numpy(), c, kind)
    k = values.shape[-1]
    topk = (values.reshape(*lead, k), indices.reshape(*lead, k))
    return student, {"topk": topk, "rest": kind}, retemper(p, tau), kept


def factor_of(scale: str, tau: float) -> float:
    return {"tau2": tau**2, "tau": tau, "one": 1.0}[scale]


def reduced(losses: Rows, kept: Rows, num_classes: int, reduction: str) -> Rows:
    if reduction == "none":
        return losses
    divisor = {"sum": 1, "mean": losses.size * num_classes, "batchmean": kept.sum()}[reduction]
    return losses.sum() / divisor


def close(got: Tensor, wanted: Rows, rtol: float = 1e-12, atol: float = 1e-13) -> None:
    np.testing.assert_allclose(got.detach().double().numpy(), wanted, rtol=rtol, atol=atol)


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
    wanted = reduced(kl_rows(p, student.numpy(), tau) * kept * tau**2, kept, 7, "batchmean")
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
    for reduction in ("mean", "batchmean", "sum"):
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


@pytest.mark.parametrize("rest", ["spread", "drop"])
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
        # Rounded up by the API, the sum is 1.02: nothing is missing, nothing becomes negative.
        [0.67, 0.35],
        # Rounded to exactly one.
        [0.6, 0.4],
    ],
)
@pytest.mark.parametrize("rest", ["spread", "drop"])
def test_rounded_values_are_normalised(rest: str, values: list[float]) -> None:
    student = torch.tensor([[0.3, -1.0, 2.0, 0.1]], dtype=torch.float64)
    p = np.array([[0.0, values[0], 0.0, values[1]]]) / sum(values)
    answer = (torch.tensor([values], dtype=torch.float64), torch.tensor([[1, 3]]))
    close(kd_loss(student, topk=answer, rest=rest), kl_rows(p, student.numpy(), 1.0)[0])


# Edges.


@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum"])
@pytest.mark.parametrize(
    "lead",
    [
        # A last batch without a row.
        (0,),
        # Sequences of length 0.
        (2, 0),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_costs_nothing(kind: str, lead: tuple[int, ...], reduction: str) -> None:
    student, target, _, _ = make(kind, tau=3.0, lead=lead)
    student.requires_grad_()
    loss = kd_loss(student, **target, tau=3.0, reduction=reduction)
    if reduction == "none":
        assert loss.shape == lead
        loss = loss.sum()
    assert loss.item() == 0.0
    loss.backward()
    assert student.grad is not None and student.grad.shape == (*lead, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_one_class_leaves_nothing_to_learn(kind: str) -> None:
    student, target, _, _ = make(kind, tau=3.0, num_classes=1)
    student.requires_grad_()
    loss = kd_loss(student, **target, tau=3.0, reduction="none")
    loss.sum().backward()
    assert student.grad is not None
    close(loss, np.zeros(6))
    close(student.grad, np.zeros((6, 1)))


def test_a_batch_of_ignored_rows_costs_nothing() -> None:
    student = make("labels", 1.0)[0].requires_grad_()
    loss = kd_loss(student, labels=torch.full((6,), IGNORED), reduction="batchmean")
    loss.backward()
    assert student.grad is not None
    assert loss.item() == 0.0
    assert not student.grad.any()


@pytest.mark.parametrize(
    ("own_mask", "teacher_mask"),
    [
        # The teacher rules a class out, the student does not know: 0 log 0.
        ([], [2]),
        # Both mask the same classes: 0 * (-inf - -inf), in the value and in the gradient.
        ([0, 2], [0, 2]),
        # The teacher masks more than the student.
        ([4], [1, 4]),
        # One class is left: both are certain.
        ([0, 1, 2, 3], [0, 1, 2, 3]),
    ],
)
@pytest.mark.parametrize("kind", ["logits", "probs", "drop"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_masked_logits(kind: str, own_mask: list[int], teacher_mask: list[int], dtype: torch.dtype) -> None:
    student, target, _, _ = make("logits", 2.0, num_classes=5, dtype=dtype)
    teacher = target["logits"].index_fill(1, torch.tensor(teacher_mask, dtype=torch.int64), NEG_INF)
    student = student.index_fill(1, torch.tensor(own_mask, dtype=torch.int64), NEG_INF).requires_grad_()
    probs = teacher.softmax(-1)
    answer = {
        "logits": {"logits": teacher},
        "probs": {"probs": probs},
        "drop": {"topk": probs.topk(5 - len(teacher_mask)), "rest": "drop"},
    }[kind]
    losses = kd_loss(student, **answer, tau=2.0, reduction="none", scale="one")
    losses.sum().backward()

    known = [c for c in range(5) if c not in own_mask]
    p = softmax(teacher.double().numpy() / 2.0)
    exact = student.detach().double().numpy()[:, known]
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
    close(losses, kl_rows(p[:, known], exact, 2.0), **tolerance)
    gradient = np.zeros_like(p)
    gradient[:, known] = (softmax(exact / 2.0) - p[:, known]) / 2.0
    assert student.grad is not None
    close(student.grad, gradient, **tolerance)


def test_a_student_that_rules_out_the_truth_is_infinitely_wrong() -> None:
    student = torch.tensor([[NEG_INF, 0.0, 1.0]])
    assert kd_loss(student, torch.zeros(1, 3)).item() == float("inf")
    assert kd_loss(student, labels=torch.tensor([0])).item() == float("inf")


def test_masked_logits_beside_labels() -> None:
    student = torch.tensor([[NEG_INF, 0.5, 1.0], [NEG_INF, 2.0, 1.0]], requires_grad=True)
    # The ignored row's stand-in class must not be looked up as a loss of inf.
    loss = kd_loss(student, labels=torch.tensor([2, IGNORED]))
    loss.backward()
    assert student.grad is not None
    q = softmax(np.array([0.5, 1.0]))
    close(loss, -np.log(q[1]), rtol=1e-6)
    close(student.grad, np.array([[0, q[0], q[1] - 1], [0, 0, 0]]), rtol=1e-6, atol=1e-7)


def test_zero_log_zero() -> None:
    student = torch.tensor([[1.0, 2.0, 3.0], [3000.0, -3000.0, 0.0]], requires_grad=True)
    probs = torch.tensor([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]])
    losses = kd_loss(student, probs=probs, reduction="none")
    losses.sum().backward()
    exact = student.detach().double().numpy()
    assert student.grad is not None
    close(losses, kl_rows(probs.double().numpy(), exact, 1.0), atol=1e-6)
    close(student.grad, softmax(exact) - probs.double().numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        # The student is sure of the wrong class.
        ([600.0, 0.0, 0.0], [0.0, 600.0, 0.0]),
        # The teacher is sure, the student cannot decide.
        ([0.0, 0.0, 0.0], [-600.0, 600.0, -600.0]),
        # The student is sure, the teacher cannot decide: q underflows to 0.
        ([600.0, 0.0, -600.0], [0.0, 0.1, 0.2]),
        # Both are sure of the same class.
        ([600.0, 0.0, -600.0], [599.0, 0.0, -600.0]),
    ],
)
@pytest.mark.parametrize(
    "tau",
    [
        # The gaps as they are.
        1.0,
        # Twice as wide: exp underflows in float64 too.
        0.5,
        # The paper's.
        5.0,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaps_of_600(student: list[float], teacher: list[float], tau: float, dtype: torch.dtype) -> None:
    s = torch.tensor([student], dtype=dtype, requires_grad=True)
    t = torch.tensor([teacher], dtype=dtype)
    loss = kd_loss(s, t, tau=tau, scale="one")
    loss.backward()
    exact_s, exact_t = s.detach().double().numpy(), t.double().numpy()
    # log p as such: p is 0 in float64 where log p is -1200.
    log_p, log_q = log_softmax(exact_t / tau), log_softmax(exact_s / tau)
    wanted = (np.exp(log_p) * (log_p - log_q)).sum(-1)[0]
    assert s.grad is not None
    np.testing.assert_allclose(loss.item(), wanted, rtol=FLOAT32_ERROR, atol=FLOAT32_ERROR)
    close(s.grad, (np.exp(log_q) - np.exp(log_p)) / tau, atol=FLOAT32_ERROR)


def test_gaps_of_600_beside_labels_and_probabilities() -> None:
    student = torch.tensor([[600.0, 0.0, -600.0]], requires_grad=True)
    by_label = kd_loss(student, labels=torch.tensor([2]))
    by_probs = kd_loss(student, probs=torch.tensor([[0.0, 0.0, 1.0]]))
    by_topk = kd_loss(student, topk=(torch.tensor([[1.0]]), torch.tensor([[2]])))
    for loss in (by_label, by_probs, by_topk):
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.item() == 1200.0
        torch.testing.assert_close(gradient, torch.tensor([[1.0, 0.0, -1.0]]))


@pytest.mark.parametrize(
    ("spread", "offset"),
    [
        # A student at the end of its training: the KL is the small difference of large terms.
        (3.0, 0.0),
        # All classes alike, p = 1 / C: so is every term of the sum.
        (1e-3, 0.0),
        # The same far from 0, where float32 has few digits left behind the point.
        (1e-3, 1000.0),
    ],
)
@pytest.mark.parametrize("noise", [1e-2, 1e-3])
def test_near_equal_logits_in_float32(spread: float, offset: float, noise: float) -> None:
    random = np.random.default_rng(3)
    teacher = torch.from_numpy(offset + spread * random.standard_normal((8, 100))).float()
    student = teacher + torch.from_numpy(noise * random.standard_normal((8, 100))).float()
    student.requires_grad_()
    losses = kd_loss(student, teacher, reduction="none")
    losses.sum().backward()
    exact, p = student.detach().double().numpy(), softmax(teacher.double().numpy())
    wanted = kl_rows(p, exact, 1.0)
    assert student.grad is not None
    # What plain float32 arithmetic loses bounds what may be lost.
    eager = F.kl_div(student.detach().log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)
    allowed = 2 * np.abs(eager.double().numpy() - wanted).max() + FLOAT32_ERROR
    assert np.abs(losses.detach().double().numpy() - wanted).max() <= allowed
    close(student.grad, softmax(exact) - p, rtol=0, atol=FLOAT32_ERROR)


def test_near_equal_logits_in_float64() -> None:
    teacher = torch.from_numpy(np.random.default_rng(4).standard_normal((8, 100)))
    step = torch.from_numpy(np.random.default_rng(5).standard_normal((8, 100)))
    p = softmax(teacher.numpy())
    # The second-order expansion of the KL, exact to 1e-12 here: half the variance of the step under p.
    mean = (p * step.numpy()).sum(-1, keepdims=True)
    wanted = 0.5 * (p * (step.numpy() - mean) ** 2).sum(-1) * 1e-8
    close(kd_loss(teacher + 1e-4 * step, teacher, reduction="none"), wanted, rtol=1e-3)


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
        ({"topk": TOPK, "rest": "keep"}, ValueError, ["rest", "'keep'", "'spread', 'drop'"]),
        # Temperatures that divide by nothing, turn the classes around, or are no number.
        ({"logits": S, "tau": 0.0}, ValueError, ["tau", "0.0", "above 0"]),
        ({"logits": S, "tau": -1.0}, ValueError, ["tau", "-1.0", "above 0"]),
        ({"logits": S, "tau": float("nan")}, ValueError, ["tau", "nan", "above 0"]),
        ({"logits": S, "tau": torch.tensor(-2.0)}, ValueError, ["tau", "-2.0", "above 0"]),
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
