"""Bad input is refused by every backend with an error that names the argument, and by the ops themselves."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mekd import extension
from mekd.functional import generator_loss, kd_loss
from op_grid import DEVICES, FUSED, GAN_KINDS, IMAGE_KINDS, IMPLS, KINDS, ROW_KINDS, TOPK_KINDS, Problem, make
from op_schemas import direct

NAN, INF = float("nan"), float("inf")


def refused(problem: Problem, impl: str | None, kind: type[Exception], *parts: str, reduction: str = "mean") -> None:
    """Raise unless the loss does, saying all of this; with gradients and without."""
    for wanted in (False, True):
        leaves = [x.detach().clone() for x in problem.students]
        leaves = [x.requires_grad_() if wanted and x.is_floating_point() else x for x in leaves]
        students = [x.clone() for x in leaves] if problem.kind == "in-place" else leaves
        with pytest.raises(kind) as caught:
            problem.loss(*students, reduction=reduction, impl=impl)
        for part in parts:
            assert part in str(caught.value)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_sequences_of_other_lengths_are_padded_first(layout: torch.layout) -> None:
    rows = [torch.randn(3, 7), torch.randn(5, 7)]
    nested = torch.nested.nested_tensor(rows, layout=layout)
    with pytest.raises(
        TypeError, match=r"student is a nested tensor; pass student\.to_padded_tensor\(0\.0\), and a mask"
    ):
        kd_loss(nested, nested)
    padded, mask = nested.to_padded_tensor(0.0), torch.arange(5) < torch.tensor([[3], [5]])
    teacher = torch.randn(2, 5, 7)
    torch.testing.assert_close(kd_loss(padded, teacher, mask=mask), kd_loss(torch.cat(rows), teacher[mask]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_students_that_are_no_logits(kind: str, impl: str) -> None:
    name = {"discriminator": "d_real"}.get(kind, "d_fake" if kind in GAN_KINDS else "student")
    problem = make(kind, device=DEVICES[impl])
    for dtype in (torch.int64, torch.float8_e4m3fn):
        problem.students[0] = problem.students[0].to(dtype)
        refused(problem, impl, TypeError, name, str(dtype), "floating")
    if kind in ROW_KINDS:
        for shape in ((), (6, 0)):
            problem.students[0] = torch.zeros(shape, device=DEVICES[impl])
            refused(problem, impl, ValueError, "student", "0-d" if shape == () else "at least one class")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("kind", "argument", "name"),
    [
        ("logits", "logits", "logits"),
        ("probs", "probs", "probs"),
        ("dkd", "teacher", "teacher"),
        ("jsd", "teacher", "teacher"),
        ("tanh", "teacher", "teacher"),
        ("in-place", "teacher", "teacher"),
        ("confidence", "confidence", "confidence"),
        ("gan-logits", "logits", "logits"),
        ("gan-probs", "probs", "probs"),
    ],
)
def test_targets_of_another_kind(kind: str, argument: str, name: str, impl: str) -> None:
    good = make(kind, device=DEVICES[impl]).target[argument]
    bad: list[tuple[Tensor, type[Exception], tuple[str, ...]]] = [
        # Another batch's, and one that would broadcast.
        (good[:-1], ValueError, (name, "shape", str(tuple(good[:-1].shape)))),
        (good.unsqueeze(0), ValueError, (name, "shape", str((1, *good.shape)))),
        # Counts, not numbers.
        (good.long(), TypeError, (name, "torch.int64", "floating")),
        # A teacher that is being trained.
        (good.clone().requires_grad_(), ValueError, (name, "requires grad", "detach")),
        # A teacher that is elsewhere.
        (good.to("meta"), ValueError, (name, "meta")),
    ]
    if good.dim() > 1 and not kind.startswith("gan"):
        bad.append((good[:, :-1], ValueError, (name, "shape")))
    for value, error, parts in bad:
        problem = make(kind, device=DEVICES[impl])
        problem.target[argument] = value
        refused(problem, impl, error, *parts)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["labels", "dkd"])
def test_labels(kind: str, impl: str) -> None:
    def with_label(value: int) -> Problem:
        problem = make(kind, device=DEVICES[impl])
        problem.target["labels"][3] = value
        return problem

    # Negative, one too many, far too many: a wild read.
    for value in (-1, 7, 10**12, -(10**12)):
        refused(with_label(value), impl, ValueError, "labels", "0 to 6", str(value) if abs(value) < 10 else "")
    problem = make(kind, device=DEVICES[impl])
    good = problem.target["labels"]
    for bad, error, parts in (
        (good.int(), TypeError, ("labels", "torch.int32", "torch.int64")),
        (good.float(), TypeError, ("labels", "torch.float32")),
        (good[:-1], ValueError, ("labels", "(5,)", "(6,)")),
        (good.unsqueeze(1), ValueError, ("labels", "(6, 1)")),
        (good.to("meta"), ValueError, ("labels", "meta")),
    ):
        problem.target["labels"] = bad
        refused(problem, impl, error, *parts)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", TOPK_KINDS)
def test_topk_answers(kind: str, impl: str) -> None:
    values, indices = make(kind, device=DEVICES[impl]).target["topk"]

    def changed(x: Tensor, value: float) -> Tensor:
        x = x.clone()
        x[3, 1] = value
        return x

    for bad, error, parts in (
        # No class, one too many, a wild write.
        ((values, changed(indices, -2)), ValueError, ("topk indices", "-2", "0 to 6", "-1 is an absent entry")),
        ((values, changed(indices, 7)), ValueError, ("topk indices", "7", "0 to 6")),
        ((values, changed(indices, 10**12)), ValueError, ("topk indices", "0 to 6")),
        # A class named twice.
        ((values, changed(indices, int(indices[3, 0]))), ValueError, ("topk indices", "once")),
        # No probability.
        ((changed(values, -0.25), indices), ValueError, ("topk values", "-0.25", "at least 0")),
        # Shapes, dtypes, devices.
        ((values[:-1], indices[:-1]), ValueError, ("topk values", "(5, 3)")),
        ((values, indices[:, :-1]), ValueError, ("topk indices", "(6, 2)", "(6, 3)")),
        ((values, indices.int()), TypeError, ("topk indices", "torch.int32", "torch.int64")),
        ((values.long(), indices), TypeError, ("topk values", "torch.int64", "floating")),
        ((values.to("meta"), indices), ValueError, ("topk values", "meta")),
        ((values, indices.to("meta")), ValueError, ("topk indices", "meta")),
        ((values.clone().requires_grad_(), indices), ValueError, ("topk values", "requires grad")),
    ):
        problem = make(kind, device=DEVICES[impl])
        problem.target["topk"] = bad
        refused(problem, impl, error, *parts)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("classes", [7, 40, 2500])
def test_negative_probabilities(classes: int, impl: str) -> None:
    # In a vector, in a tail, in the last block; in few classes and in many.
    for column in (0, classes - 1):
        problem = make("probs", (6, classes), device=DEVICES[impl])
        problem.target["probs"][4, column] = -0.125
        refused(problem, impl, ValueError, "probs", "-0.125", "at least 0")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("kind", "argument"), [("gan-probs", "probs"), ("confidence", "confidence")])
def test_negative_confidences(kind: str, argument: str, impl: str) -> None:
    # Weights below 0 would teach the generator to be found out.
    problem = make(kind, device=DEVICES[impl])
    problem.target[argument] = torch.full_like(problem.target[argument], -0.125)
    refused(problem, impl, ValueError, argument, "-0.125")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ROW_KINDS)
def test_temperatures(kind: str, impl: str) -> None:
    for tau in (0.0, -1.0, NAN, INF, -INF):
        for given in (tau, torch.tensor(tau, device=DEVICES[impl])):
            refused(make(kind, device=DEVICES[impl], tau=given), impl, ValueError, "tau", f"{tau:g}", "above 0")
    for given in (torch.ones(1, device=DEVICES[impl]), torch.ones(6, 1, device=DEVICES[impl])):
        refused(make(kind, device=DEVICES[impl], tau=given), impl, ValueError, "tau", "shape", "0-d")
    given = torch.tensor(2.0, device=DEVICES[impl], requires_grad=True)
    refused(make(kind, device=DEVICES[impl], tau=given), impl, ValueError, "tau", "requires grad", "detach")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("dkd", "alpha"), ("dkd", "beta"), ("jsd", "beta"), ("jsd-skew", "skew"), ("gan-probs", "alpha")],
)
def test_a_number_that_somebody_would_learn_is_refused(kind: str, name: str) -> None:
    problem = make(kind, **{name: torch.tensor(0.25, requires_grad=True)})
    refused(problem, None, ValueError, name, "requires grad", f"{name}.detach()")
    problem.options[name] = problem.options[name].detach()
    problem.loss()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", [*ROW_KINDS, *IMAGE_KINDS])
def test_weights_and_masks(kind: str, impl: str) -> None:
    n = make(kind).students[0].shape[0]
    ones = torch.ones(n, device=DEVICES[impl])
    for bad, error, parts in (
        # One too few, one for each element, one for all.
        (ones[:-1], ValueError, (f"({n - 1},)", f"({n},)")),
        (ones.unsqueeze(1), ValueError, (f"({n}, 1)",)),
        (ones[0], ValueError, ("()", f"({n},)")),
        # A mask where weights belong.
        (ones.bool(), TypeError, ("torch.bool", "floating")),
        (ones.long(), TypeError, ("torch.int64", "floating")),
        # Weights that are learnt.
        (ones.clone().requires_grad_(), ValueError, ("requires_grad=True",)),
        (ones.to("meta"), ValueError, ("meta",)),
    ):
        refused(make(kind, device=DEVICES[impl], weights=bad), impl, error, "weights", *parts)
    if kind in IMAGE_KINDS:
        return
    for bad, error, parts in (
        (ones.bool()[:-1], ValueError, (f"({n - 1},)", f"({n},)")),
        (ones.bool().unsqueeze(1), ValueError, (f"({n}, 1)",)),
        # Weights where a mask belongs.
        (ones, ValueError, ("torch.float32", "torch.bool")),
        (ones.to(torch.uint8), ValueError, ("torch.uint8", "torch.bool")),
        (ones.bool().to("meta"), ValueError, ("meta",)),
    ):
        refused(make(kind, device=DEVICES[impl], mask=bad), impl, error, "mask", *parts)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_choices(kind: str, impl: str) -> None:
    refused(make(kind, device=DEVICES[impl]), impl, ValueError, "reduction", "'avg'", reduction="avg")
    if kind in ROW_KINDS:
        refused(make(kind, device=DEVICES[impl], scale="tau3"), impl, ValueError, "scale", "'tau3'", "'tau2'")
    if kind in TOPK_KINDS:
        problem = make(kind, device=DEVICES[impl])
        problem.target["rest"] = "keep"
        refused(problem, impl, ValueError, "rest", "'keep'", "'drop'")
    if kind == "discriminator":
        refused(make(kind, device=DEVICES[impl]), impl, ValueError, "reduction", "'none'", reduction="none")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        # Between its limits, or there is no mixture.
        ("jsd", "beta", (-0.1, 1.1, NAN)),
        # Parts that are not subtracted.
        ("dkd", "alpha", (-0.1, NAN)),
        ("dkd", "beta", (-0.1, NAN)),
        ("gan-logits", "alpha", (-0.1, NAN)),
    ],
)
def test_weights_of_parts(kind: str, name: str, values: tuple[float, ...], impl: str) -> None:
    for value in values:
        problem = make(kind, device=DEVICES[impl])
        problem.options[name] = value
        refused(problem, impl, ValueError, name, str(value))


@pytest.mark.parametrize("kind", KINDS)
def test_backends_by_name(kind: str) -> None:
    refused(make(kind), "cuda", ValueError, "impl", "'cuda'", "'reference', 'cpp'")


@pytest.mark.skipif(extension.LOADED is None, reason=extension.WHY_NOT)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in TOPK_KINDS])
def test_cpp_runs_on_the_cpu_only(kind: str) -> None:
    # An implementation that was named never falls back.
    refused(make(kind, device="meta"), "cpp", ValueError, "impl", "cpp", "CPU", "meta")


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        # Nothing, and too much.
        ("logits", {}),
        ("logits", {"logits": 1, "labels": 1}),
    ],
)
def test_targets_of_kd_loss(kind: str, arguments: dict[str, int]) -> None:
    problem = make(kind)
    problem.target = {name: make(name).target[name] for name in arguments}
    refused(problem, None, ValueError, "exactly one of logits, probs, labels, topk")


# The ops by themselves: whoever calls torch.ops.mekd.NAME has no functional to check for them.


def shorter(x: Tensor) -> Tensor:
    return x[:-1]


def narrower(x: Tensor) -> Tensor:
    return x[..., :-1]


#: Argument by place, and what to do to it.
MISUSES: list[tuple[str, int, Callable[[Tensor], Any]]] = [
    # Targets that end before the student does: every one would be read beyond its end.
    *((kind, 1, change) for kind in ("logits", "probs", "dkd", "jsd", "tanh") for change in (shorter, narrower)),
    *((kind, 1, shorter) for kind in ("labels", "confidence", "gan-logits", "gan-probs")),
    ("dkd", 2, shorter),
    # Values and indices that do not belong together.
    *(("spread", place, change) for place in (1, 2) for change in (shorter, narrower)),
    # Weights and masks that end too early, or are no masks.
    *((kind, place, shorter) for kind, place in (("logits", 3), ("logits", 4), ("labels", 3), ("labels", 4))),
    *((kind, place, shorter) for kind, place in (("dkd", 4), ("dkd", 5), ("jsd", 3), ("jsd", 4), ("tanh", 2))),
    *(("spread", place, shorter) for place in (4, 5)),
    ("logits", 4, Tensor.float),
    ("labels", 4, Tensor.float),
    # Indices of another width: half as many bytes as are read.
    ("labels", 1, Tensor.int),
    ("dkd", 2, Tensor.int),
    ("spread", 2, Tensor.int),
    # A temperature for each row.
    ("logits", 2, lambda tau: tau.expand(6).clone()),
    # Students that are no logits.
    *((kind, 0, change) for kind in ("logits", "labels", "dkd", "jsd") for change in (Tensor.long, Tensor.sum)),
    *((kind, 0, lambda x: x[:, :0]) for kind in ("logits", "labels", "spread", "dkd", "jsd")),
    ("tanh", 0, Tensor.long),
    ("gan-logits", 0, Tensor.long),
    ("discriminator", 1, Tensor.long),
]


@pytest.mark.skipif(not FUSED, reason=extension.WHY_NOT)
@pytest.mark.parametrize(("kind", "place", "change"), MISUSES)
def test_ops_refuse_what_does_not_fit(kind: str, place: int, change: Callable[[Tensor], Any]) -> None:
    n = 4 if kind == "tanh" else 6
    problem = make(kind)
    if kind in ROW_KINDS + IMAGE_KINDS:
        problem.options["weights"] = torch.ones(n)
    if kind in ROW_KINDS:
        problem.options["mask"] = torch.ones(n, dtype=torch.bool)
    for grad in (False, True):
        op, arguments = direct(problem, "mean", grad)
        arguments = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        arguments[place] = change(arguments[place])
        with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)):
            op(*arguments)


@pytest.mark.skipif(not FUSED, reason=extension.WHY_NOT)
def test_the_in_place_op_refuses_before_it_writes() -> None:
    op = torch.ops.mekd.tanh_l1_.default
    a = torch.randn(3, 4)
    before = a.clone()
    for b, weights in ((torch.randn(2, 4), None), (torch.randn(3, 3), None), (torch.randn(3, 4), torch.ones(2))):
        with pytest.raises(ValueError):
            op(a, b, weights, True, False, "mean")
        assert torch.equal(a, before)


@pytest.mark.skipif(not FUSED, reason=extension.WHY_NOT)
def test_the_discriminators_op_has_no_loss_for_each_sample() -> None:
    # Its two batches need not be of one size; the fake kernel promises a loss of shape ().
    for fakes in (1, 3):
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.mekd.gan_discriminator.default(torch.zeros(3), torch.zeros(fakes), "none", False)


def test_a_confidence_is_of_the_discriminator_s_shape() -> None:
    with pytest.raises(ValueError, match=r"confidence has shape \(3,\); it must be \(3, 1\), as d_fake's"):
        generator_loss(torch.randn(3, 1), torch.tensor([0.5, 0.2, 0.3]))


def test_a_dimension_may_be_numpys() -> None:
    student, teacher = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    assert kd_loss(student, teacher, dim=np.int64(1)) == kd_loss(student, teacher, dim=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dim is 1\.0; it must be one of the 3 dimensions of student"):
        kd_loss(student, teacher, dim=1.0)  # type: ignore[arg-type]
