"""What a backward does with the stored gradient: nothing where it can, and nothing that a second one would see."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from op_grid import DEVICES, IMPLS, KINDS, TRITON_RUNS, make

GPU = DEVICES["triton"]
TRITON = pytest.mark.skipif(
    not TRITON_RUNS, reason="no GPU here: interpreted alone, with TRITON_INTERPRET=1, as make test does"
)


class Seen(TorchDispatchMode):
    """The names of the operators of PyTorch that run, and no kernels of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.name().removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


@contextmanager
def seen() -> Iterator[list[str]]:
    with Seen() as mode:
        yield mode.names


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "in-place"])
def test_backward_passes_agree_and_leave_what_was_given_alone(kind: str, dtype: torch.dtype, impl: str) -> None:
    problem = make(kind, dtype=dtype, device=DEVICES[impl])
    students = [x.requires_grad_() for x in problem.students]
    loss = problem.loss(reduction="sum", impl=impl)

    def backward(upstream: float, kept: bool) -> list[Tensor]:
        above = torch.full_like(loss, upstream)
        return list(torch.autograd.grad(loss, students, above, retain_graph=kept))

    given = [(1.0, backward(1.0, True)), (2.5, backward(2.5, True)), (1.0, backward(1.0, True))]
    copies = [[g.clone() for g in grads] for _, grads in given]
    last = backward(4.0, False)
    for (_, grads), before in zip(given, copies, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(grads, before, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(copies[0], copies[2], strict=True))
    # bfloat16 and float16 are rounded once more.
    torch.testing.assert_close(copies[1], [2.5 * g for g in copies[0]])
    torch.testing.assert_close(last, [4 * g for g in copies[0]])
    with pytest.raises(RuntimeError, match="second time"):
        backward(1.0, False)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["logits", "spread", "dkd", "jsd", "tanh", "gan-logits", "discriminator"])
def test_a_step_multiplies_nothing_more(kind: str, impl: str) -> None:
    problem = make(kind, device=DEVICES[impl])
    students = [x.requires_grad_() for x in problem.students]
    for above in (None, torch.tensor(1.0, device=DEVICES[impl])):
        loss = problem.loss(reduction="sum", impl=impl)
        with seen() as names:
            torch.autograd.grad(loss, students, above)
        assert not {"mul.Tensor", "mul_.Tensor", "mul.out", "_to_copy", "clone", "copy_"} & set(names), names


@pytest.mark.parametrize("impl", IMPLS)
def test_float16_is_multiplied_while_it_is_rounded(impl: str) -> None:
    problem = make("logits", dtype=torch.float16, device=DEVICES[impl])
    (student,) = (x.requires_grad_() for x in problem.students)
    exact = make("logits", dtype=torch.float16, device=DEVICES[impl])
    exact.students = [exact.students[0].float().requires_grad_()]
    loss = problem.loss(impl=impl) * 1e6  # a GradScaler's factor: float16 would not hold the half of it
    with seen() as names:
        (grad,) = torch.autograd.grad(loss, student)
    if impl == "triton":
        assert names.count("mul.out") == 1 and "_to_copy" not in names
    (wanted,) = torch.autograd.grad(exact.loss(impl=impl) * 1e6, exact.students)
    torch.testing.assert_close(grad, wanted.half())


@pytest.mark.parametrize("impl", IMPLS)
def test_a_kept_layer_before_it_sees_no_change(impl: str) -> None:
    # A linear layer in between: what it saved, and what it is given, stays what it was in both passes.
    problem = make("logits", device=DEVICES[impl])
    weight = torch.eye(7, device=DEVICES[impl]).requires_grad_()
    loss = 3 * problem.loss(problem.students[0] @ weight, impl=impl)
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight)
    assert torch.equal(first, second)


@TRITON
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_kernel(dtype: torch.dtype) -> None:
    from mekd.kernels.scale import BLOCK, scale_

    for size in (0, 1, BLOCK, 2 * BLOCK + 3):
        x = torch.randn(size + 1, device=GPU).to(dtype)
        part, before = x[:size], x.clone()
        for factor in (1.0, 2.5, -0.0, float("nan")):
            part.copy_(before[:size])
            scale_(part, torch.tensor(factor, device=GPU))
            torch.testing.assert_close(part, before[:size] * factor, equal_nan=True)
            assert torch.equal(x[size:], before[size:])  # nothing beyond its end
    image = torch.randn(2, 3, 4, 5, device=GPU).to(memory_format=torch.channels_last)
    wanted = image * 3
    scale_(image, torch.tensor(3.0, device=GPU))
    assert torch.equal(image, wanted)
