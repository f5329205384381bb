"""Where the numbers lie in memory is not the value: strides, storage offsets, class dimensions, memory formats."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from op_grid import DEVICES, IMAGE_KINDS, IMPLS, KERNELS, OF_EACH_OP, Problem, check, make, result, truth, within

NAN = float("nan")


def contiguous(x: Tensor) -> Tensor:
    """As it came."""
    return x


def transposed(x: Tensor) -> Tensor:
    """Classes along the rows in memory."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def columns(x: Tensor) -> Tensor:
    """Every second element of a wider tensor, with NaN between."""
    return torch.stack([x, torch.full_like(x, NAN if x.is_floating_point() else -7)], -1)[..., 0]


def wide_rows(x: Tensor) -> Tensor:
    """Rows further apart than they are long."""
    return torch.cat([x, torch.full_like(x[..., :1], NAN if x.is_floating_point() else -7)], -1)[..., :-1]


def offset(x: Tensor) -> Tensor:
    """One element into a buffer: no vector is aligned."""
    buffer = x.new_full((x.numel() + 2,), NAN if x.is_floating_point() else -7)
    buffer[1:-1] = x.reshape(-1)
    return buffer[1:-1].view(x.shape)


def strided_rows(x: Tensor) -> Tensor:
    """Every second row."""
    return torch.stack([x, torch.full_like(x, NAN if x.is_floating_point() else -7)], 1)[:, 0]


def negated(x: Tensor) -> Tensor:
    """A view that torch negates when it is read, as the imaginary part of a conjugate is."""
    return torch.complex(-x, -x).conj().imag if x.dtype == torch.float32 else x


LAYOUTS = [contiguous, transposed, columns, wide_rows, offset, strided_rows, negated]


def arranged(problem: Problem, own: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor]) -> Problem:
    """The same problem, its student and its target laid out like this."""

    def of(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(map(of, value))
        return theirs(value) if isinstance(value, Tensor) else value

    target = {name: of(value) for name, value in problem.target.items()}
    return Problem(problem.kind, [own(x) for x in problem.students], target, problem.options)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        # Each layout on each side once: alike, ...
        (offset, offset),
        (negated, negated),
        (transposed, transposed),
        # ... beside a contiguous one, ...
        (contiguous, strided_rows),
        (columns, contiguous),
        # ... and two that differ.
        (strided_rows, wide_rows),
        (wide_rows, columns),
    ],
)
@pytest.mark.parametrize("kind", OF_EACH_OP)
def test_layouts(kind: str, own: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], impl: str) -> None:
    problem = arranged(make(kind, (5, 16), device=DEVICES[impl]), own, theirs)
    reduction = "mean" if kind == "discriminator" else "none"
    check(problem, impl, reduction)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["logits", "probs", "spread", "dkd", "jsd"])
def test_layouts_of_other_dtypes(kind: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], impl: str) -> None:
    # Two blocks and a tail: a block in the middle of a row begins where the strides say.
    check(arranged(make(kind, (3, 1100), dtype, device=DEVICES[impl]), layout, layout), impl)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("kind", [kind for kind in OF_EACH_OP if kind not in ("finished", "discriminator")])
def test_one_answer_for_all(kind: str, impl: str) -> None:
    # A teacher expanded over the batch: its rows have stride 0.
    problem = make(kind, (5, 16), device=DEVICES[impl])
    check(arranged(problem, contiguous, lambda x: x[:1].expand_as(x)), impl)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("kind", ["logits", "dkd", "jsd", "tanh"])
def test_one_student_for_all(kind: str, impl: str) -> None:
    # A student expanded over the batch: the gradients of its rows are not the same.
    problem = arranged(make(kind, (5, 16), device=DEVICES[impl]), lambda x: x[:1].expand_as(x), contiguous)
    check(problem, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("lead", "rearrange"),
    [
        # Segmentation: (B, C, H, W).
        ((2, 3, 4), lambda x: x.movedim(-1, 1)),
        # The same as a convolution writes it.
        ((2, 3, 4), lambda x: x.movedim(-1, 1).contiguous()),
        # Channels last: classes are next to each other in memory.
        ((2, 3, 4), lambda x: x.movedim(-1, 1).contiguous(memory_format=torch.channels_last)),
        # Tokens: (B, C, T).
        ((2, 5), lambda x: x.movedim(-1, 1).contiguous()),
    ],
)
@pytest.mark.parametrize("kind", OF_EACH_OP[:6])
def test_classes_in_the_second_dimension(
    kind: str, lead: tuple[int, ...], rearrange: Callable[[Tensor], Tensor], impl: str
) -> None:
    problem = make(kind, (*lead, 10), device=DEVICES[impl])
    random = torch.Generator().manual_seed(9)
    problem.options["weights"] = torch.rand(lead, generator=random).to(DEVICES[impl])
    problem.options["mask"] = (torch.rand(lead, generator=random) < 0.7).to(DEVICES[impl])
    moved = arranged(problem, rearrange, lambda x: x if x.shape == lead else rearrange(x))
    moved.options = {**problem.options, "dim": 1}
    for reduction in ("none", "mean", "batchmean"):
        got = check(moved, impl, reduction)
        # And so it is of the rows themselves.
        loss, grad = truth(problem, reduction)
        plain = truth(problem, reduction, torch.float32)
        within(got[0], loss, plain[0], "loss")
        within(got[1].movedim(1, -1), grad, plain[1], "gradient")


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("kind", OF_EACH_OP[:6])
def test_any_leading_shape_is_rows(kind: str, impl: str) -> None:
    # A slice of a batch of sequences: (B, T, C) that cannot be viewed as rows.
    problem = make(kind, (3, 4, 10), device=DEVICES[impl])
    check(arranged(problem, lambda x: x[:, 1:], lambda x: x[:, 1:]), impl)


def swapped(x: Tensor) -> Tensor:
    """(C, B, H, W) in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def channels_last(x: Tensor) -> Tensor:
    """As convolutions on the CPU like it."""
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        # Both alike: no copy.
        (channels_last, channels_last),
        # The teacher's half as NCHW, and the student's.
        (channels_last, contiguous),
        (contiguous, channels_last),
        # Dense, but batch and channels are swapped: samples do not lie one after another.
        (swapped, contiguous),
        # Not dense: every second image, every second column.
        (lambda x: torch.stack([x, x], 1)[:, 0], contiguous),
        (lambda x: torch.stack([x, x], -1)[..., 0], channels_last),
        # One image for all.
        (channels_last, lambda x: x[:1].expand_as(x)),
    ],
)
@pytest.mark.parametrize("kind", IMAGE_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images(
    dtype: torch.dtype,
    kind: str,
    own: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    impl: str,
) -> None:
    if kind == "in-place" and own is swapped:
        own = contiguous  # refused: see the test of errors
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0], device=DEVICES[impl])
    problem = arranged(make(kind, (4, 3, 5, 6), dtype, device=DEVICES[impl], weights=weights), own, theirs)
    for reduction in ("none", "mean"):
        check(problem, impl, reduction)


@pytest.mark.parametrize("impl", KERNELS)
def test_one_image_of_one_pixel_in_channels_last(impl: str) -> None:
    # Strides of dimensions of size 1 mean nothing.
    problem = arranged(make("tanh", (1, 1, 1, 1), device=DEVICES[impl]), channels_last, contiguous)
    check(problem, impl)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("kind", OF_EACH_OP[:6])
def test_rows_of_weights_and_masks_are_strided_too(kind: str, impl: str) -> None:
    weights = torch.tensor([[0.5, NAN], [2.0, NAN], [1.0, NAN], [3.0, NAN], [0.0, NAN], [1.5, NAN]])[:, 0]
    mask = torch.tensor([[1, 0], [0, 1], [1, 0], [1, 0], [1, 0], [0, 1]], dtype=torch.bool)[:, 0]
    problem = make(kind, device=DEVICES[impl], weights=weights.to(DEVICES[impl]), mask=mask.to(DEVICES[impl]))
    check(problem, impl, "batchmean")
    # One weight for all.
    problem.options["weights"] = torch.tensor(2.0, device=DEVICES[impl]).expand(6)
    check(problem, impl)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("kind", OF_EACH_OP)
def test_inputs_are_left_alone(kind: str, impl: str) -> None:
    problem = arranged(make(kind, (5, 16), device=DEVICES[impl]), wide_rows, wide_rows)
    tensors = [x for x in (*problem.students, *problem.target.values()) if isinstance(x, Tensor)]
    before = [x.clone() for x in tensors]
    result(problem, impl, "mean")
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
