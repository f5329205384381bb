"""The last linear layer and the loss in one: what the layer, and the loss after it, give."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from mekd import functional, linear
from mekd.functional import dkd_loss, jsd_loss, kd_loss
from mekd.linear import PARTS, linear_dkd_loss, linear_jsd_loss, linear_kd_loss

N, H, C = 13, 6, 37  # no multiple of the parts, and more rows than parts


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(dtype: torch.dtype, bias: bool = True, rows: tuple[int, ...] = (N,)) -> list[Tensor | None]:
    made = [numbers(*rows, H, seed=1, dtype=dtype), numbers(C, H, seed=2, dtype=dtype), numbers(C, seed=3, dtype=dtype)]
    return [x.requires_grad_() for x in made[: 2 + bias]] + [None] * (not bias)


def targets(dtype: torch.dtype) -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any]]]:
    logits, labels = numbers(N, C, seed=4, dtype=dtype), torch.arange(N) * 3 % C
    probs = logits.softmax(-1)
    values, indices = probs.topk(5)
    some = labels.where(labels % 4 != 0, -100)
    absent = indices.where(torch.rand(N, 5, generator=torch.Generator().manual_seed(5)) > 0.3, -1)
    return {
        "logits": (linear_kd_loss, kd_loss, {"logits": logits, "tau": 2.0}),
        "probs": (linear_kd_loss, kd_loss, {"probs": probs, "tau": 2.0}),
        "labels": (linear_kd_loss, kd_loss, {"labels": some}),
        "spread": (linear_kd_loss, kd_loss, {"topk": (values, indices), "tau": 3.0}),
        "drop": (linear_kd_loss, kd_loss, {"topk": (values, absent), "rest": "drop"}),
        "tail": (linear_kd_loss, kd_loss, {"topk": (values, absent), "rest": "tail", "tau": 2.0}),
        "dkd": (linear_dkd_loss, dkd_loss, {"teacher": logits, "labels": some}),
        "jsd": (linear_jsd_loss, jsd_loss, {"teacher": logits, "beta": 0.3}),
    }


KINDS = list(targets(torch.float64))


def gradients(loss: Tensor, parts: list[Tensor | None]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x for x in parts if x is not None]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", linear.REDUCTIONS)
def test_the_same_as_one_after_the_other(kind: str, bias: bool, reduction: str) -> None:
    ours, theirs, target = targets(torch.float64)[kind]
    weights, mask = numbers(N, seed=6).abs(), torch.arange(N) % 5 != 2
    for more in ({}, {"weights": weights}, {"mask": mask}, {"weights": weights * (weights > 0.5), "mask": mask}):
        parts = layer(torch.float64, bias)
        loss = ours(*parts, **target, **more, reduction=reduction)
        other = theirs(F.linear(*parts), **target, **more, reduction=reduction)  # type: ignore[arg-type]
        torch.testing.assert_close(loss, other)
        # Upstream is not 1 here.
        for mine, plain in zip(gradients(3 * loss, parts), gradients(3 * other, parts), strict=True):
            torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("kind", ["logits", "dkd", "jsd"])
def test_a_teacher_as_its_own_layer(kind: str) -> None:
    ours, theirs, target = targets(torch.float64)[kind]
    hidden, weight, bias = numbers(N, 9, seed=7), numbers(C, 9, seed=8), numbers(C, seed=9)
    target = {key: value for key, value in target.items() if key not in ("logits", "teacher")}
    parts = layer(torch.float64)
    for head in ((hidden, weight), (hidden, weight, bias), (hidden, weight, None)):
        loss = ours(*parts, teacher=head, **target)
        made = {"logits" if kind == "logits" else "teacher": F.linear(*head)}  # type: ignore[arg-type]
        other = theirs(F.linear(*parts), **made, **target)  # type: ignore[arg-type]
        torch.testing.assert_close(loss, other)
        for mine, plain in zip(gradients(loss, parts), gradients(other, parts), strict=True):
            torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("rows", [(0,), (1,), (9,), (11,), (2, 5, 3), ()])
def test_any_leading_shape(rows: tuple[int, ...]) -> None:
    parts, target = layer(torch.float64, rows=rows), numbers(*rows, C, seed=4)
    for reduction in linear.REDUCTIONS:
        loss = linear_kd_loss(*parts, logits=target, reduction=reduction)
        other = kd_loss(F.linear(*parts), target, reduction=reduction)  # type: ignore[arg-type]
        torch.testing.assert_close(loss, other)
        for mine, plain in zip(gradients(loss, parts), gradients(other, parts), strict=True):
            torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_are_as_near_to_the_truth_as_one_after_the_other(dtype: torch.dtype) -> None:
    for kind in KINDS:
        ours, theirs, _ = targets(dtype)[kind]
        target = targets(dtype)[kind][2]
        wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in target.items()}
        if "topk" in target:
            wide["topk"] = (target["topk"][0].double(), target["topk"][1])
        parts = layer(dtype)
        exact = [x.detach().double().requires_grad_() for x in parts]  # type: ignore[union-attr]
        truth = theirs(F.linear(*exact), **wide, impl="reference")
        loss, other = ours(*parts, **target), theirs(F.linear(*parts), **target)  # type: ignore[arg-type]
        assert loss.dtype == torch.float32
        assert abs(loss - truth) <= 2 * abs(other - truth) + 1e-6 * abs(truth)
        found = zip(gradients(loss, parts), gradients(other, parts), gradients(truth, exact), strict=True)
        for mine, plain, right in found:
            assert mine.dtype == dtype
            # The weight's is a sum over parts that is rounded after each.
            off, theirs_off = (float((x - right).detach().norm() / right.norm()) for x in (mine, plain))
            assert off <= 1.5 * theirs_off + (1e-6 if dtype == torch.float32 else 4e-3), (kind, off, theirs_off)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    ours, _, target = targets(torch.float64)[kind]
    parts = layer(torch.float64)
    torch.autograd.gradcheck(lambda *layer: ours(*layer, **target), parts)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _, target = targets(torch.float32)[kind]
    found: list[tuple[Any, ...]] = []
    op = torch.ops.mekd.linear_loss.default

    class Seen:
        def linear_loss(self, *arguments: Any) -> Any:
            found.append(arguments)
            return op(*arguments)

        def __getattr__(self, name: str) -> Any:
            return getattr(torch.ops.mekd, name)

    parts = layer(torch.float32)
    real = torch.ops.mekd
    monkeypatch.setattr(torch.ops, "mekd", Seen())
    ours(*parts, **target)
    monkeypatch.setattr(torch.ops, "mekd", real)
    torch.library.opcheck(op, found[0])


@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_in_one_graph(kind: str) -> None:
    ours, _, target = targets(torch.float32)[kind]
    parts = layer(torch.float32)
    compiled = torch.compile(lambda *layer: ours(*layer, **target), fullgraph=True, backend="aot_eager")
    loss, plain = compiled(*parts), ours(*parts, **target)
    torch.testing.assert_close(loss, plain)
    for mine, other in zip(gradients(loss, parts), gradients(plain, parts), strict=True):
        torch.testing.assert_close(mine, other)


def test_a_weight_that_changes_stays_in_one_graph() -> None:
    # From its second value on torch.compile takes a number for a variable.
    (hidden, weight, bias), (_, _, target) = layer(torch.float32), targets(torch.float32)["dkd"]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda alpha: linear_dkd_loss(hidden, weight, bias, **target, alpha=alpha), fullgraph=True, backend="aot_eager"
    )
    for alpha in (0.5, 0.25, 1 / 3):
        torch.testing.assert_close(compiled(alpha), linear_dkd_loss(hidden, weight, bias, **target, alpha=alpha))


@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_for_any_shape(kind: str) -> None:
    ours, _, target = targets(torch.float32)[kind]
    parts = layer(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *layer: ours(*layer, **target), fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(*parts), ours(*parts, **target))


def test_rows_that_count_for_nothing_may_hold_anything() -> None:
    hidden, weight, bias = (x.detach() for x in layer(torch.float32))  # type: ignore[union-attr]
    mask, weights = torch.arange(N) % 3 != 0, (torch.arange(N) % 4 != 1).float()
    stray = hidden.masked_fill((~mask | (weights == 0)).unsqueeze(-1), float("nan"))
    target = numbers(N, C, seed=4, dtype=torch.float32)
    found = []
    for x in (hidden, stray):
        parts = [t.clone().requires_grad_() for t in (x, weight, bias)]
        loss = linear_kd_loss(*parts, logits=target, mask=mask, weights=weights)
        found.append([loss, *gradients(loss, parts)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["labels", "dkd"])
def test_one_row_has_one_label(kind: str) -> None:
    ours, theirs, target = targets(torch.float64)[kind]
    hidden, weight, bias = (x.detach() for x in layer(torch.float64))  # type: ignore[union-attr]
    one = {k: x[1] if isinstance(x, Tensor) else x for k, x in target.items()}
    torch.testing.assert_close(ours(hidden[1], weight, bias, **one), theirs(F.linear(hidden[1], weight, bias), **one))


def test_a_label_of_weight_0_may_be_any() -> None:
    parts, labels, weights = layer(torch.float32), torch.arange(N), (torch.arange(N) % 4 != 1).float()
    found, expected = (
        linear_kd_loss(*parts, labels=x, weights=weights) for x in (labels.where(weights != 0, 10**9), labels)
    )
    assert torch.equal(found, expected)


def test_gradients_lie_as_the_fake_kernel_says() -> None:
    # A weight that is turned, and hidden states out of the middle of something.
    hidden, weight, bias = numbers(N, 2 * H)[:, ::2], numbers(H, C).t(), numbers(2 * C)[::2]
    arguments = (
        hidden, weight, bias, [torch.zeros(N, dtype=torch.long)], [], torch.tensor(1.0), None, None,
        "tempered_kl_labels", ["-100", "tau2"], None, [True, True, True],
    )  # fmt: skip
    found = torch.ops.mekd.linear_loss(*arguments)
    with FakeTensorMode() as mode:
        promised = torch.ops.mekd.linear_loss(*tree_map_only(Tensor, mode.from_tensor, arguments))
    assert [(x.shape, x.stride()) for x in found] == [(x.shape, x.stride()) for x in promised]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["rowmean", "mean"])
def test_narrow_weights_are_not_divided_in_their_own_dtype(dtype: torch.dtype, reduction: str) -> None:
    rows = 2**16  # a share of 2^-16 is no normal float16
    hidden, weight = numbers(rows, 2, dtype=torch.float32), numbers(3, 2, dtype=torch.float32)
    weights = torch.full((rows,), 0.01, dtype=dtype)
    how: dict[str, Any] = {"labels": torch.arange(rows) % 3, "weights": weights, "reduction": reduction}
    torch.testing.assert_close(linear_kd_loss(hidden, weight, **how), kd_loss(F.linear(hidden, weight), **how))


def test_a_frozen_teacher_may_be_float16() -> None:
    parts = layer(torch.float32)
    head = numbers(N, 4, seed=8).half(), numbers(C, 4, seed=9).half(), numbers(C, seed=7).half()
    logits = F.linear(*head)
    for ours, theirs in (
        (linear_kd_loss(*parts, teacher=head), kd_loss(F.linear(*parts), logits)),  # type: ignore[arg-type]
        (linear_jsd_loss(*parts, teacher=head), jsd_loss(F.linear(*parts), logits)),  # type: ignore[arg-type]
    ):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradients(ours, parts), gradients(theirs, parts))


def test_without_memory() -> None:
    hidden, weight = torch.empty(N, H, device="meta", requires_grad=True), torch.empty(C, H, device="meta")
    loss = linear_kd_loss(hidden, weight, logits=torch.empty(N, C, device="meta"))
    assert loss.is_meta and loss.shape == ()


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    hidden, weight, _ = layer(torch.float32)
    assert hidden is not None and weight is not None
    with torch.no_grad():
        assert not linear_kd_loss(hidden, weight, labels=torch.zeros(N, dtype=torch.long)).requires_grad


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3))[1:])
@pytest.mark.parametrize("compiled", [False, True])
def test_of_what_is_frozen_no_gradient_is_made(wanted: tuple[bool, ...], compiled: bool) -> None:
    """As for a frozen head under adapters, whose gradient would be as large as the head."""
    parts, target = layer(torch.float64), numbers(N, C, seed=4)
    whole = gradients(linear_kd_loss(*parts, logits=target), parts)  # type: ignore[arg-type]
    given = [x.detach().requires_grad_(w) for x, w in zip(parts, wanted, strict=True)]  # type: ignore[union-attr]
    ours = torch.compile(linear_kd_loss, fullgraph=True, backend="aot_eager") if compiled else linear_kd_loss
    loss = ours(*given, logits=target)
    assert compiled or len(loss.grad_fn.saved_tensors) == sum(wanted)
    loss.backward()
    for x, w, expected in zip(given, wanted, whole, strict=True):
        assert (x.grad is not None) == w
        if w:
            torch.testing.assert_close(x.grad, expected)


def test_under_autocast_as_linear_is() -> None:
    parts, target = layer(torch.float32), numbers(N, C, seed=4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, other = linear_kd_loss(*parts, logits=target), kd_loss(F.linear(*parts), target)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, other)
    for mine, plain in zip(gradients(loss, parts), gradients(other, parts), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, plain, rtol=0.02, atol=1e-3)
    wide, target = layer(torch.float64), numbers(N, C, seed=4)  # which it leaves alone
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(linear_kd_loss(*wide, logits=target), kd_loss(F.linear(*wide), target))  # type: ignore[arg-type]


def test_within_torch_func_the_formula_runs() -> None:
    hidden, weight, bias = (x.detach() for x in layer(torch.float64))  # type: ignore[union-attr]
    target = numbers(N, C, seed=4)

    def loss(w: Tensor) -> Tensor:
        return linear_kd_loss(hidden, w, bias, logits=target, tau=2.0)

    parts = [weight.clone().requires_grad_()]
    torch.testing.assert_close(torch.func.grad(loss)(weight), gradients(loss(parts[0]), parts)[0])
    second = torch.func.jvp(torch.func.grad(loss), (weight,), (numbers(C, H, seed=5),))[1]
    assert torch.isfinite(second).all() and second.abs().max() > 0


def test_second_derivatives_are_refused() -> None:
    parts = layer(torch.float64)
    loss = linear_kd_loss(*parts, labels=torch.zeros(N, dtype=torch.long))
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss, [x for x in parts if x is not None], create_graph=True)


def test_what_it_needs_is_a_part_of_the_logits() -> None:
    rows, classes = 240, 4000
    hidden, weight = numbers(rows, 16, dtype=torch.float32).requires_grad_(), numbers(classes, 16, dtype=torch.float32)
    made: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = op(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape[-1:] == (classes,):
                made.append(out.numel())
            return out

    labels = torch.zeros(rows, dtype=torch.long)
    with Sizes():
        found = torch.ops.mekd.linear_loss(
            hidden, weight, None, [labels], [], torch.tensor(1.0), None, None, "tempered_kl_labels", ["-100", "tau2"],
            "reference", [True, True, False],
        )  # fmt: skip
    assert found[2].shape == weight.shape
    parts = torch.nn.functional.linear(hidden[: -(-rows // PARTS[4])], weight).numel()
    assert not made or max(made) <= parts


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"reduction": "none"}, ValueError, "reduction is 'none'; it must be one of 'rowmean', 'mean'"),
        ({"hidden": torch.zeros(N, H, dtype=torch.float16)}, TypeError, "hidden has dtype torch.float16"),
        ({"hidden": torch.zeros(N, H, dtype=torch.float8_e4m3fn)}, TypeError, "hidden has dtype torch.float8_e4m3fn"),
        ({"hidden": torch.zeros(N, H, dtype=torch.bfloat16)}, ValueError, "the weight of hidden is torch.float32"),
        ({"weight": torch.zeros(C, H + 1)}, ValueError, r"hidden has shape \(13, 6\), its weight \(37, 7\)"),
        ({"bias": torch.zeros(C + 1)}, ValueError, r"the bias of hidden has shape \(38,\); it must be \(37,\)"),
        ({"teacher": (torch.zeros(N, H), torch.zeros(C, H))}, ValueError, "teacher and another target are given"),
        ({"logits": torch.zeros(N, C + 1)}, ValueError, r"logits has shape \(13, 38\); it must be \(13, 37\)"),
        ({"logits": None}, ValueError, "targets given: none"),
        ({"tau": 0.0}, ValueError, "tau is 0.0; it must be above 0"),
        ({"logits": None, "labels": torch.full((N,), C)}, ValueError, "labels hold 37; classes are 0 to 36"),
        (
            {"logits": None, "teacher": (torch.zeros(N, H, requires_grad=True), torch.zeros(C, H))},
            ValueError,
            "teacher requires grad",
        ),
        (
            {"logits": None, "teacher": (torch.zeros(N, 4), torch.zeros(C + 2, 4))},
            ValueError,
            r"logits has shape \(13, 39\)",
        ),
        # Other things where tensors and layers belong.
        ({"hidden": [[0.0] * H] * N}, TypeError, "hidden is a list; it must be a tensor"),
        ({"weight": torch.nn.Linear(H, C)}, TypeError, "weight is a Linear; it must be a tensor"),
        ({"bias": 0.0}, TypeError, "bias is a float; it must be a tensor"),
        ({"logits": None, "teacher": torch.zeros(N, C)}, TypeError, r"teacher is a Tensor; .*its logits are logits="),
        ({"logits": None, "teacher": torch.nn.Linear(H, C)}, TypeError, "teacher is a Linear; it must be its last"),
        (
            {"logits": None, "teacher": (torch.zeros(N, H),)},
            TypeError,
            r"teacher is a tuple of 1; .*\(hidden, weight\)",
        ),
        ({"logits": None, "teacher": (torch.zeros(N, H), None)}, TypeError, "teacher's weight is None"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    right = {"hidden": torch.zeros(N, H), "weight": torch.zeros(C, H), "logits": torch.zeros(N, C)}
    with pytest.raises(error, match=said):
        linear_kd_loss(**{**right, **arguments})


@pytest.mark.parametrize("ours", [linear_dkd_loss, linear_jsd_loss])
@pytest.mark.parametrize("teacher", [None, torch.nn.Linear(H, C)])
def test_what_is_neither_a_layer_nor_its_logits_is_named(ours: Any, teacher: Any) -> None:
    labels = {"labels": torch.zeros(N, dtype=torch.long)} if ours is linear_dkd_loss else {}
    with pytest.raises(TypeError, match=r"teacher is a (NoneType|Linear); it must be its last layer, .*or its logits"):
        ours(torch.zeros(N, H), torch.zeros(C, H), teacher=teacher, **labels)


def test_it_is_found_where_the_losses_are() -> None:
    assert functional.__doc__ and "mekd.linear" in functional.__doc__
