"""Top-k answers as APIs give them: entries that are absent, rows without any, and a bucket for what is not named."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kl_formula import kl_rows, log_softmax, retemper
from mekd import extension
from mekd.functional import kd_loss
from mekd.reference import fill_topk
from op_grid import DEVICES, DTYPES, IMPLS, Problem, check

HERE = [point for point in IMPLS if point != "reference" or not extension.INTERPRETED]
FEW = settings(max_examples=25, deadline=None, derandomize=True, database=None)
RESTS = ["spread", "drop", "tail"]
NAN, INF = float("nan"), float("inf")


def one_row(student: np.ndarray, entries: dict[int, float], rest: str, tau: float) -> tuple[float, np.ndarray]:
    """Loss and gradient of one row by the formula, one class at a time, in float64."""
    c, log_q = len(student), log_softmax(student / tau)
    others = [j for j in range(c) if j not in entries]
    if not entries and rest != "spread":
        return 0.0, np.zeros(c)
    left = max(0.0, 1 - sum(entries.values()))
    if rest != "tail":
        share = left / len(others) if others and rest == "spread" else 0.0
        p = np.array([entries.get(j, share) for j in range(c)])
        return float(kl_rows(p := retemper(p, tau), student, tau)), (np.exp(log_q) - p) / tau
    weights = {j: p ** (1 / tau) for j, p in entries.items()}
    bucket = len(others) ** (1 - 1 / tau) * left ** (1 / tau) if others else 0.0
    total = sum(weights.values()) + bucket
    p = np.array([weights.get(j, 0.0) / total for j in range(c)])
    loss = sum(p[j] * (math.log(p[j]) - log_q[j]) for j in entries if p[j] > 0)
    grad = np.exp(log_q) - p
    if others:
        log_tail = np.logaddexp.reduce(log_q[others])
        if bucket > 0:
            loss += bucket / total * (math.log(bucket / total) - log_tail)
        grad[others] -= bucket / total * np.exp(log_q[others] - log_tail)
    return float(loss), grad / tau


def by_hand(student: Tensor, topk: tuple[Tensor, Tensor], rest: str, tau: float) -> tuple[Tensor, Tensor]:
    rows = []
    for s, values, indices in zip(student.cpu().double().numpy(), *(x.tolist() for x in topk), strict=True):
        entries = {j: p for p, j in zip(values, indices, strict=True) if j != -1}
        rows.append(one_row(s, entries, rest, tau))
    losses, grads = zip(*rows, strict=True)
    return torch.tensor(losses, dtype=torch.float64), torch.from_numpy(np.stack(grads))


def answered(c: int, k: int, rows: int = 6, share: float = 0.9, seed: int = 0) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A student and an answer of which row i lacks the last i entries, the last row all: each a NaN."""
    random = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(rows, c, generator=random, dtype=torch.float64)
    probs = share * (2 * torch.randn(rows, c, generator=random, dtype=torch.float64)).softmax(-1)
    values, indices = probs.topk(k)
    present = k - torch.arange(rows).clamp_max(k)
    present[-1] = 0
    absent = torch.arange(k) >= present.unsqueeze(-1)
    return student, (values.masked_fill(absent, NAN), indices.masked_fill(absent, -1))


def both(student: Tensor, topk: tuple[Tensor, Tensor], rest: str, impl: str, **others: Any) -> tuple[Tensor, Tensor]:
    s = student.clone().requires_grad_()
    losses = kd_loss(s, topk=topk, rest=rest, impl=impl, **{"reduction": "none", "scale": "one", **others})
    return losses.detach(), torch.autograd.grad(losses.sum(), s)[0]


def same(got: Tensor, wanted: Tensor, atol: float = 1e-11) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=atol)


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("tau", [1.0, 0.5, 4.3, 20.0])
@pytest.mark.parametrize("rest", RESTS)
def test_absent_entries(rest: str, tau: float, impl: str) -> None:
    # One class, all classes, less than a vector, a vector and a tail, a block of the kernels and one more class.
    for c, k in ((1, 1), (2, 1), (2, 2), (7, 3), (7, 7), (10, 4), (33, 5), (100, 40), (1025, 5)):
        student, topk = answered(c, k)
        for got, wanted in zip(
            both(student, topk, rest, impl, tau=tau), by_hand(student, topk, rest, tau), strict=True
        ):
            same(got, wanted)


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("rest", RESTS)
def test_absent_entries_in_every_dtype(rest: str, impl: str) -> None:
    for dtype in DTYPES:
        for c, k in ((10, 5), (1000, 5), (2500, 40)):
            student, (values, indices) = answered(c, k)
            problem = Problem(
                "spread" if rest == "spread" else rest, [student.to(DEVICES[impl], dtype)], {}, {"tau": 3.0}
            )
            problem.target = {"topk": (values.to(DEVICES[impl], dtype), indices.to(DEVICES[impl])), "rest": rest}
            for reduction in ("none", "rowmean", "mean") if dtype == torch.float64 else ("none",):
                check(problem, impl, reduction)


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("rest", RESTS)
def test_rows_without_an_entry_are_like_rows_that_are_ignored(rest: str, impl: str) -> None:
    student, (values, indices) = answered(10, 5)
    indices[1] = -1
    student[[1, 5]] = student[[1, 5]] if rest == "spread" else NAN  # what does not count may be anything
    losses, grad = both(student, (values, indices), rest, impl, tau=2.0)
    mean, _ = both(student, (values, indices), rest, impl, tau=2.0, reduction="rowmean")
    if rest == "spread":
        uniform = kd_loss(student[[1, 5]], torch.zeros(2, 10), tau=2.0, scale="one", reduction="none")
        same(losses[[1, 5]], uniform)
        same(mean, losses.mean())
        return
    assert not losses[[1, 5]].any() and not grad[[1, 5]].any()
    same(mean, losses.sum() / 4)
    # With a mask beside, and with none left at all.
    mask = torch.tensor([True, True, False, True, True, True])
    mean, _ = both(student, (values, indices), rest, impl, tau=2.0, reduction="rowmean", mask=mask)
    same(mean, losses[mask].sum() / 3)
    for reduction in ("rowmean", "mean", "sum"):
        loss, grad = both(student, (values, torch.full_like(indices, -1)), rest, impl, reduction=reduction)
        assert loss == 0 and not grad.any()


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("rest", RESTS)
def test_where_an_absent_entry_stands_is_nothing(rest: str, impl: str) -> None:
    student, (values, indices) = answered(10, 4)
    wanted = both(student, (values, indices), rest, impl, tau=3.0)
    for got, x in zip(both(student, (values.flip(-1), indices.flip(-1)), rest, impl, tau=3.0), wanted, strict=True):
        same(got, x)
    wide = (torch.cat([values, values], -1), torch.cat([indices, torch.full_like(indices, -1)], -1))
    for got, x in zip(both(student, wide, rest, impl, tau=3.0), wanted, strict=True):
        same(got, x)


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("rest", RESTS)
def test_memory_in_any_order(rest: str, impl: str) -> None:
    student, (values, indices) = answered(10, 3)
    wanted = both(student, (values, indices), rest, impl)
    moved = both(student.T.contiguous().T, (values.T.contiguous().T, indices.T.contiguous().T), rest, impl)
    s, v, i = (torch.stack([x, x], 1)[:, 0] for x in (student, values, indices))
    classes_first = both(student.T.contiguous(), (values.T, indices.T), rest, impl, dim=0)
    for got in (moved, both(s, (v, i), rest, impl), (classes_first[0], classes_first[1].T)):
        for x, y in zip(got, wanted, strict=True):
            same(x, y)


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("rest", RESTS)
def test_absent_entries_are_still_checked_beside(rest: str, impl: str) -> None:
    student, (values, indices) = answered(10, 4)
    for row, column, index, value, parts in (
        (1, 3, -2, 0.1, ("topk indices", "-2", "-1 is an absent entry")),
        (1, 3, 10, 0.1, ("topk indices", "10", "-1 is an absent entry")),
        (1, 3, int(indices[1, 0]), 0.01, ("topk indices", "once")),
        (1, 0, int(indices[1, 0]), 1.2, ("topk values", "1 at most")),
        (1, 0, int(indices[1, 0]), -0.2, ("topk values", "at least 0")),
    ):
        bad = values.clone(), indices.clone()
        bad[0][row, column], bad[1][row, column] = value, index
        with pytest.raises(ValueError) as caught:
            kd_loss(student, topk=bad, rest=rest, impl=impl)
        assert all(part in str(caught.value) for part in parts), caught.value
    # A value without a class is no value, whatever it is.
    for value in (NAN, INF, -3.0, 99.0):
        assert kd_loss(
            student, topk=(values.masked_fill(indices == -1, value), indices), rest=rest, impl=impl
        ).isfinite()


@pytest.mark.parametrize("impl", HERE)
def test_nothing_but_zeros(impl: str) -> None:
    # The bucket holds all; where every class is named there is none.
    student = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    zeros, order = torch.zeros(2, 4, dtype=torch.float64), torch.arange(4).expand(2, 4)
    for got, x in zip(both(student, (zeros[:, :2], order[:, :2]), "tail", impl, tau=2.0),
                      by_hand(student, (zeros[:, :2], order[:, :2]), "tail", 2.0), strict=True):  # fmt: skip
        same(got, x)
    with pytest.raises(ValueError, match="sum to 0"):
        kd_loss(student, topk=(zeros, order), rest="tail", impl=impl)


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("tau", [1.0, 4.3])
def test_a_tail_of_nothing_adds_nothing(tau: float, impl: str) -> None:
    student, (_, indices) = answered(10, 4, rows=2)
    # Exactly 1, and what an API rounds to more.
    for last in (0.125, 0.13):
        topk = torch.tensor([[0.5, 0.25, 0.125, last]] * 2, dtype=torch.float64), indices[:1].expand(2, 4)
        tail, drop = (both(student, topk, rest, impl, tau=tau) for rest in ("tail", "drop"))
        for got, wanted in zip(tail, drop, strict=True):
            same(got, wanted)


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("c", [7, 100, 2500])
def test_masked_classes_among_named_and_unnamed(c: int, impl: str) -> None:
    student, (values, indices) = answered(c, 3)
    values, indices = values[:3].nan_to_num(), indices[:3]
    for gone in (slice(0, 2), slice(c // 2, None)):
        s = student[:3].clone()
        s[:, gone] = -INF
        s.scatter_(1, indices[:, :1], 0.5)
        values = values * (s.gather(1, indices.clamp_min(0)) > -INF)  # the teacher says nothing for what is masked
        losses, grad = both(s, (values, indices), "tail", impl, tau=2.0)
        assert losses.isfinite().all() and not grad[s == -INF].any()
        for got, x in zip((losses, grad), by_hand(s, (values, indices), "tail", 2.0), strict=True):
            same(got, x)


@pytest.mark.parametrize("impl", HERE)
def test_all_of_the_others_masked(impl: str) -> None:
    student = torch.tensor([[1.0, 2.0, -INF, -INF]] * 2, dtype=torch.float64)
    topk = (torch.tensor([[0.6, 0.4], [0.6, 0.2]], dtype=torch.float64), torch.tensor([[0, 1]] * 2))
    losses, grad = both(student, topk, "tail", impl)
    # Nothing is left to hold against them, or something that the student calls impossible.
    dense = both(student[:1, :2], (topk[0][:1], topk[1][:1]), "drop", impl)
    same(losses[0], dense[0][0])
    same(grad[0, :2], dense[1][0])
    assert losses[1] == INF and not grad[:, 2:].any() and grad.isfinite().all()


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("rest", RESTS)
def test_gradients_by_differences(rest: str, impl: str) -> None:
    student, topk = answered(7, 3, rows=4)
    for reduction in ("none", "rowmean"):
        assert torch.autograd.gradcheck(
            lambda s, r=reduction: kd_loss(s, topk=topk, rest=rest, tau=2.5, reduction=r, impl=impl),
            student.clone().requires_grad_(),
        )


@st.composite
def answers(draw: st.DrawFn) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    c = draw(st.integers(1, 40))
    random = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    width, share = draw(st.sampled_from([0.1, 3.0, 30.0])), draw(st.sampled_from([0.0, 0.3, 0.9, 1.0, 1.005]))
    student = width * torch.randn(4, c, generator=random, dtype=torch.float64)
    probs = (width * torch.randn(4, c, generator=random, dtype=torch.float64)).softmax(-1)
    values, indices = probs.topk(draw(st.integers(1, c)))
    values = (share or 1e-3) * values / values.sum(-1, keepdim=True)
    absent = torch.rand(values.shape, generator=random) < draw(st.sampled_from([0.0, 0.3]))
    return student, (values, indices.masked_fill(absent, -1))


@pytest.mark.parametrize("impl", HERE)
@FEW
@given(drawn=answers(), tau=st.sampled_from([1.0, 0.5, 4.0, 20.0]))
def test_a_tail_lies_between_nothing_and_spread(impl: str, drawn: tuple[Tensor, Any], tau: float) -> None:
    student, topk = drawn
    silent = (topk[1] == -1).all(-1)
    for dtype, eps in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        s, given_ = student.to(dtype), (topk[0].to(dtype), topk[1])
        tail, spread = (both(s, given_, rest, impl, tau=tau)[0] for rest in ("tail", "spread"))
        assert (tail >= 0).all() and not tail[silent].any()
        assert (tail <= spread + eps * (1 + spread)).all()


@pytest.mark.parametrize("impl", HERE)
@FEW
@given(drawn=answers())
def test_without_a_temperature_it_is_the_kl_of_the_grouped_probabilities(impl: str, drawn: tuple[Tensor, Any]) -> None:
    student, (values, indices) = drawn
    losses = both(student, (values, indices), "tail", impl)[0]
    for s, v, i, loss in zip(student, values, indices, losses, strict=True):
        v, i = v[i >= 0], i[i >= 0]
        if not len(i):
            continue
        q, rest = s.softmax(-1), torch.ones(len(s), dtype=torch.bool).scatter(0, i, False)
        p = torch.cat([v, (1 - v.sum()).clamp_min(0).unsqueeze(0)]) if rest.any() else v
        q = torch.cat([q[i], q[rest].sum().unsqueeze(0)]) if rest.any() else q[i]
        p = p / p.sum()
        torch.testing.assert_close(loss, torch.special.xlogy(p, p / q).sum().clamp_min(0), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("impl", HERE)
@FEW
@given(drawn=answers(), tau=st.sampled_from([1.0, 0.5, 4.0]))
def test_a_student_that_gives_the_same_shares_has_nothing_to_learn(
    impl: str, drawn: tuple[Tensor, Any], tau: float
) -> None:
    # What spread makes of the answer, and anything else that the bucket does not tell from it.
    filled = fill_topk(*drawn[1], drawn[0].shape[-1]).clamp_min(1e-30)
    losses, grad = both(filled.log(), drawn[1], "tail", impl, tau=tau)
    assert losses.abs().max() < 1e-6 and grad.abs().max() < 1e-5
