"""torch.func and forward-mode differentiation: the right derivative, or an error; never silently 0."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from mekd import extension
from mekd.functional import (
    dkd_loss,
    image_l1_loss,
    information_maximization_loss,
    jsd_loss,
    kd_loss,
    logit_standardized_kd_loss,
)
from mekd.linear import linear_kd_loss
from op_grid import DEVICES, IMAGE_KINDS, KINDS, TRITON_RUNS, Problem, make, truth
from op_schemas import direct

Function = Callable[..., Tensor]
BACKENDS = [
    *(["cpp"] if extension.LOADED else []),
    *(["triton"] if TRITON_RUNS else []),
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.func, that it is experimental or slow
        yield


def directions(students: list[Tensor]) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(8)
    return tuple(torch.randn(x.shape, generator=random, dtype=x.dtype) for x in students)


def dual(f: Function, students: list[Tensor], along: tuple[Tensor, ...], wanted: bool = False) -> Tensor | None:
    """The tangent that f passes on; wanted: whether the students require a gradient as well."""
    with forward_ad.dual_level():
        leaves = [x.clone().requires_grad_(wanted) for x in students]
        loss = f(*(forward_ad.make_dual(x * 1, v) for x, v in zip(leaves, along, strict=True)))
        return forward_ad.unpack_dual(loss).tangent


def ways(
    f: Function, students: list[Tensor], along: tuple[Tensor, ...], every: bool = True
) -> Iterator[tuple[str, Tensor | None]]:
    """The derivative of f in a direction by everything that gives one; every: also by what takes long."""
    places, inputs = tuple(range(len(students))), tuple(students)
    yield "jvp", torch.func.jvp(f, inputs, along)[1]
    yield "dual", dual(f, students, along)
    yield "dual of a leaf", dual(f, students, along, wanted=True)
    if not every:
        return
    yield "linearize", torch.func.linearize(f, *inputs)[1](*along)
    for name, jacobian in (
        ("jacfwd", torch.func.jacfwd(f, places)(*inputs)),
        ("grad", torch.func.grad(f, places)(*inputs)),
        ("vjp", torch.func.vjp(f, *inputs)[1](torch.ones((), dtype=inputs[0].dtype))),
    ):
        yield name, torch.stack([(j * v).sum() for j, v in zip(jacobian, along, strict=True)]).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_in_a_direction(kind: str) -> None:
    problem = make(kind, dtype=torch.float64)
    along = directions(problem.students)
    slope = sum((g * v).sum() for g, v in zip(truth(problem, "mean")[1:], along, strict=True))

    def loss(*students: Tensor) -> Tensor:
        # Of a sum of two losses a lost term would show as well.
        return problem.loss(*students, reduction="mean") + sum(x.sum() for x in students)

    for name, got in ways(
        loss, problem.students, along, kind in ("logits", "spread", "dkd", "in-place", "discriminator")
    ):
        assert got is not None, name
        torch.testing.assert_close(got, slope + sum(v.sum() for v in along), msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    "loss",
    [
        # Others that stand on the ops, and each row's loss.
        lambda s, t: logit_standardized_kd_loss(s, t, tau=2.0),
        lambda s, t: information_maximization_loss(s[:, 0], logits=t),
        lambda s, t: (kd_loss(s, t, reduction="none") * torch.arange(4.0, dtype=s.dtype)).sum(),
        # A teacher, a temperature and a whole row's mask in a loss of a student that has a tangent.
        lambda s, t: kd_loss(s, t, tau=torch.tensor(3.0), mask=torch.tensor([True, False, True, True])),
    ],
)
def test_of_other_losses(loss: Function) -> None:
    s, t = directions([torch.empty(4, 5, dtype=torch.float64)] * 2)
    along = directions([s])
    slope = (torch.autograd.grad(loss(leaf := s.clone().requires_grad_(), t), leaf)[0] * along[0]).sum()
    for name, got in ways(lambda x: loss(x, t), [s], along):
        assert got is not None, name
        torch.testing.assert_close(got, slope, msg=lambda m, name=name: f"{name}: {m}")


def test_of_a_teacher_and_a_temperature() -> None:
    # They get no gradient, but a tangent of theirs is not lost.
    s, t, v = directions([torch.empty(4, 5, dtype=torch.float64)] * 3)
    for f, x in (
        (lambda x: kd_loss(s, x, tau=2.0), t),
        (lambda x: kd_loss(s, t, tau=x), torch.tensor(2.0, dtype=torch.float64)),
    ):
        along = v if x.dim() else torch.ones_like(x)
        wanted = (f(x + 1e-5 * along) - f(x - 1e-5 * along)) / 2e-5
        assert wanted.abs() > 1e-3
        torch.testing.assert_close(torch.func.jvp(f, (x,), (along,))[1], wanted, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(dual(f, [x], (along,)), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t, tau: kd_loss(s, t, tau=tau),
        lambda s, t, tau: kd_loss(s, t, tau=3.0, tau_teacher=tau, direction="reverse"),
        lambda s, t, tau: dkd_loss(s, t, torch.tensor([0, 3, 1, 2]), tau=tau),
        lambda s, t, tau: jsd_loss(s, t, tau=tau),
        lambda s, t, tau: linear_kd_loss(s, torch.eye(5, dtype=s.dtype), logits=t, tau=tau),
    ],
    ids=["kd", "tau_teacher", "dkd", "jsd", "linear"],
)
def test_a_temperature_has_a_gradient(loss: Function) -> None:
    s, t = directions([torch.empty(4, 5, dtype=torch.float64)] * 2)
    tau = torch.tensor(2.0, dtype=torch.float64)
    wanted = (loss(s, t, tau + 1e-5) - loss(s, t, tau - 1e-5)) / 2e-5
    assert wanted.abs() > 1e-4
    for derive in (torch.func.grad, torch.func.jacrev):
        torch.testing.assert_close(derive(lambda x: loss(s, t, x))(tau), wanted, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="requires grad, which the losses do not give"):
        loss(s, t, tau.requires_grad_())


def test_second_derivatives() -> None:
    # Those of KL(p || softmax(s)): diag(q) - q q^T.
    s, t = directions([torch.empty(5, dtype=torch.float64)] * 2)
    q = s.softmax(-1)
    for hessian in (torch.func.hessian, lambda f: torch.func.jacfwd(torch.func.jacfwd(f))):
        torch.testing.assert_close(hessian(lambda x: kd_loss(x, t))(s), q.diag() - torch.outer(q, q))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("discriminator", "gan-logits", "gan-probs")])
def test_vmap_over_rows(kind: str) -> None:
    problem = make(kind)
    wanted = problem.loss(reduction="none")

    def one(student: Tensor, *target: Tensor) -> Tensor:
        names = [name for name, value in problem.target.items() if isinstance(value, Tensor)]
        given: dict[str, object] = {name: x[None] for name, x in zip(names, target, strict=False)}
        if "topk" in problem.target:
            given["topk"] = (target[0][None], target[1][None])
        return Problem(kind, [student[None]], {**problem.target, **given}, problem.options).loss(reduction="none")[0]

    target = [x for x in problem.target.values() if isinstance(x, Tensor)]
    target = list(problem.target["topk"]) if "topk" in problem.target else [x for x in target if x.dim()]
    if kind == "minimax":
        problem.target = {"minimax": True}  # a response has rows of its own
        wanted, target = problem.loss(reduction="none"), []
    torch.testing.assert_close(torch.func.vmap(one)(*problem.students, *target), wanted)
    # And a gradient for each sample, as differential privacy wants it.
    got = torch.func.vmap(torch.func.grad(one))(*problem.students, *target)
    leaf = problem.students[0].clone().requires_grad_()
    if kind != "in-place":
        torch.testing.assert_close(got, torch.autograd.grad(problem.loss(leaf, reduction="sum"), leaf)[0])


def test_vmap_over_temperatures() -> None:
    s, t = directions([torch.empty(4, 5)] * 2)
    taus = torch.tensor([0.5, 1.0, 4.0])
    got = torch.func.vmap(lambda tau: kd_loss(s, t, tau=tau))(taus)
    torch.testing.assert_close(got, torch.stack([kd_loss(s, t, tau=tau) for tau in taus]))


def test_a_temperature_is_still_checked() -> None:
    s, t = directions([torch.empty(4, 5)] * 2)
    with pytest.raises(ValueError, match=r"tau is -1\.0; it must be above 0"):
        torch.func.grad(lambda x: kd_loss(x, t, tau=-1.0))(s)


def test_a_batch_of_upstreams() -> None:
    s, t = directions([torch.empty(3, 5)] * 2)
    for reduction in ("none", "mean"):
        plain, mapped = (
            torch.autograd.functional.jacobian(lambda x: kd_loss(x, t, reduction=reduction), s, vectorize=vectorize)  # noqa: B023
            for vectorize in (False, True)
        )
        torch.testing.assert_close(mapped, plain)


@pytest.mark.parametrize("kind", ["dkd", "discriminator"])
def test_compiled(kind: str) -> None:
    torch._dynamo.reset()
    problem = make(kind, dtype=torch.float64)
    along = directions(problem.students)

    def slope(*students: Tensor) -> Tensor:
        return torch.func.jvp(lambda *xs: problem.loss(*xs, reduction="mean"), students, along)[1]

    wanted = sum((g * v).sum() for g, v in zip(truth(problem, "mean")[1:], along, strict=True))
    got = torch.compile(slope, backend="aot_eager", fullgraph=True)(*problem.students)
    torch.testing.assert_close(got, wanted)
    # A compiled loss that is given a tangent is torch's to refuse, since 2.14 at the latest.
    if torch.__version__ < (2, 14):
        return
    compiled = torch.compile(lambda *xs: problem.loss(*xs, reduction="mean"), backend="aot_eager", fullgraph=True)
    for given in (False, True):
        with pytest.raises(Exception, match=r"dual tensor"):
            dual(compiled, problem.students, along, given)
    torch._dynamo.reset()


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("kind", ["logits", "in-place", "discriminator"])
def test_a_backend_that_was_named_never_falls_back(kind: str, impl: str) -> None:
    problem = make(kind, device=DEVICES[impl])
    along = tuple(v.to(DEVICES[impl]) for v in directions(problem.students))
    f = lambda *xs: problem.loss(*xs, reduction="mean", impl=impl)  # noqa: E731
    for attempt in (
        lambda: torch.func.jvp(f, tuple(problem.students), along),
        lambda: dual(f, problem.students, along),
    ):
        with pytest.raises(RuntimeError, match=rf"impl is '{impl}' within torch\.func.*leave impl out"):
            attempt()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in IMAGE_KINDS or kind in ("tanh", "in-place")])
def test_the_ops_themselves_refuse_a_tangent(kind: str) -> None:
    problem = make(kind)
    op, arguments = direct(problem, "mean", grad=False)
    if kind == "in-place":
        op, arguments = torch.ops.mekd.tanh_l1_.default, arguments[:-1]
    n = len(problem.students)
    students, along = [x.clone() for x in problem.students], directions(problem.students)

    def first(*xs: Tensor) -> Tensor:
        results = op(*xs, *arguments[n:])
        return results if isinstance(results, Tensor) else results[0]

    for attempt in (
        lambda: torch.func.jvp(first, tuple(students), along),
        lambda: dual(first, students, along),
        lambda: dual(first, students, along, wanted=True),
    ):
        with pytest.raises(RuntimeError, match=r"ops\.mekd\.\w+ has no forward-mode derivative; mekd\.functional"):
            attempt()
    # Where nothing has a tangent they run.
    with forward_ad.dual_level():
        assert first(*students).isfinite().all()


def test_in_place_makes_way() -> None:
    # A tangent, and a view that torch negates when it reads it, cannot share memory with a gradient.
    a, b = directions([torch.empty(3, 4)] * 2)
    leaf = a.clone().requires_grad_()
    wanted = torch.autograd.grad(image_l1_loss(-leaf, b), leaf)[0]
    loss = image_l1_loss(torch._neg_view(leaf * 1), b, inplace=True)
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], wanted)
