"""What PyTorch asks of an operator: opcheck, gradcheck, torch.compile without breaks and without recompiles."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from mekd.functional import image_l1_loss, kd_loss
from mekd.ops import OPS
from op_grid import (
    DEVICES,
    GAN_KINDS,
    IMAGE_KINDS,
    IMPLS,
    KERNELS,
    KINDS,
    OF_EACH_OP,
    ROW_KINDS,
    TOPK_KINDS,
    compiled_only,
    make,
    result,
)
from op_schemas import direct

OUT_OF_PLACE = [kind for kind in KINDS if kind != "in-place"]


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No cache of another test, and none left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("reduction", "dtype", "weighted"),
    [
        # What a training step calls.
        ("mean", torch.float32, False),
        # A loss for each row; a gradient whose dtype is not the student's; the optional arguments.
        ("none", torch.float16, True),
    ],
)
@pytest.mark.parametrize(
    "kind",
    [
        # One for each op, and for each of its optional arguments.
        "logits", "tanh", *compiled_only("labels", "spread", "dkd", "jsd", "gan-logits", "gan-label", "discriminator"),
    ],
)  # fmt: skip
def test_opcheck(kind: str, reduction: str, dtype: torch.dtype, weighted: bool) -> None:
    problem = make(kind, (4, 5), dtype)
    if kind == "discriminator" and reduction == "none":
        reduction = "sum"
    if weighted and kind in ROW_KINDS + IMAGE_KINDS:
        problem.options["weights"] = torch.tensor([1.0, 0.5, 2.0, 0.0])
    if weighted and kind in ROW_KINDS:
        problem.options["mask"] = torch.tensor([True, False, True, True])
    op, arguments = direct(problem, reduction, grad=True)
    torch.library.opcheck(op, tuple(arguments))


@pytest.mark.parametrize(
    ("arrangement", "dtype", "reduction"),
    [
        # As it comes.
        ("contiguous", torch.float64, "none"),
        # Half precision: the stored gradient is wider than the student.
        *compiled_only(("contiguous", torch.float16, "batchmean")),
        # As convolutions on the CPU write it.
        *compiled_only(("channels_last", torch.float32, "mean")),
        # Dense, its first two dimensions swapped.
        ("transposed", torch.bfloat16, "none"),
        # Not dense; for the GAN a discriminator that answers (m, 1).
        ("columns", torch.float32, "none"),
    ],
)
@pytest.mark.parametrize("kind", OF_EACH_OP)
def test_fake_kernels_tell_the_truth(kind: str, arrangement: str, dtype: torch.dtype, reduction: str) -> None:
    # Shapes, dtypes and strides, which a compiled graph is laid out by, for every layout a student may have.
    problem = make(kind, (4, 3, 5, 5) if kind in IMAGE_KINDS else (4, 5), dtype)
    if kind == "discriminator" and reduction in ("none", "batchmean"):
        reduction = "mean"

    def arrange(x: Tensor) -> Tensor:
        if arrangement == "channels_last" and x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        if arrangement == "transposed" and x.dim() > 1:
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if arrangement == "columns":
            return x.unsqueeze(-1) if kind in GAN_KINDS else torch.stack([x, x], -1)[..., 0]
        return x

    if kind == "confidence":
        problem.target["confidence"] = arrange(problem.target["confidence"])
    problem.students = [arrange(x) for x in problem.students]
    for grad in (False, True):
        op, arguments = direct(problem, reduction, grad)
        with torch.no_grad():
            torch.library.opcheck(op, tuple(arguments), test_utils=["test_schema", "test_faketensor"])


def classes_before(x: Tensor) -> Tensor:
    return x.movedim(-1, 1).contiguous().movedim(1, -1)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", OF_EACH_OP)
@pytest.mark.parametrize(
    ("shape", "arrange"),
    [
        # An image says by its strides how its gradient lies; rows of classes, and a GAN's patches, may look as it does.
        ((4, 3, 5, 6), channels_last),
        # Dense predictions (B, C, T, 1), their classes moved behind: channels_last to whom a size of 1 says nothing.
        ((4, 5, 1, 6), classes_before),
        # Neither.
        ((4, 3, 5, 6), classes_before),
    ],
)
def test_fake_kernels_lay_gradients_out_as_real_ones(
    shape: tuple[int, ...], arrange: Callable[[Tensor], Tensor], kind: str, impl: str
) -> None:
    problem = make(kind, (24, 3) if kind in GAN_KINDS else shape, device=DEVICES[impl])
    if kind in GAN_KINDS:
        problem.students = [problem.students[0].reshape(4, 3, 1, 2)] * len(problem.students)
        if kind == "confidence":
            problem.target["confidence"] = problem.target["confidence"].reshape(4, 3, 1, 2)
    problem.students = [arrange(x) for x in problem.students]
    for reduction in ("mean", "sum" if kind == "discriminator" else "none"):
        op, arguments = direct(problem, reduction, grad=True)
        found = OPS[op.name().removeprefix("mekd::")].reference(*arguments) if impl == "reference" else op(*arguments)
        with FakeTensorMode() as mode:
            promised = op(*tree_map_only(Tensor, mode.from_tensor, arguments))
        assert [(x.shape, x.stride(), x.dtype) for x in found] == [(x.shape, x.stride(), x.dtype) for x in promised]


@pytest.mark.parametrize("arrangement", [torch.contiguous_format, torch.channels_last])
def test_the_in_place_op_declares_what_it_writes(arrangement: torch.memory_format) -> None:
    for reduction in ("mean", "none"):
        a, b = (torch.randn(2, 3, 4, 4).contiguous(memory_format=arrangement) for _ in range(2))
        torch.library.opcheck(
            torch.ops.mekd.tanh_l1_.default,
            (a, b, None, True, False, reduction),
            test_utils=["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"],
        )


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", OF_EACH_OP)
def test_gradcheck(kind: str, reduction: str, impl: str) -> None:
    if kind == "discriminator" and reduction == "none":
        reduction = "sum"
    problem = make(kind, (3, 4), torch.float64, device=DEVICES[impl])
    if kind in ROW_KINDS:
        problem.options["weights"] = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64, device=DEVICES[impl])
        problem.options["mask"] = torch.tensor([True, True, False], device=DEVICES[impl])
    students = [x.requires_grad_() for x in problem.students]

    # In place there is one backward, where gradcheck runs several: that op is held against this one elsewhere.
    assert torch.autograd.gradcheck(lambda *xs: problem.loss(*xs, reduction=reduction, impl=impl), students)


def compiled(kind: str, backend: str | CompileCounterWithBackend) -> Callable[..., Tensor]:
    """A training step's loss, scaled so that its gradient is not what the op stored."""
    problem = make(kind)

    def loss(students: list[Tensor], target: dict[str, object], options: dict[str, object]) -> Tensor:
        return 3 * problem.function(*students, **target, **options, reduction="mean")

    return torch.compile(loss, fullgraph=True, backend=backend)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "kind",
    [
        # One for each op and each way into one.
        "logits", "tanh", "discriminator",
        *compiled_only("probs", "labels", "spread", "dkd", "jsd", "in-place", "gan-logits", "gan-label"),
    ],
)  # fmt: skip
def test_compiled_without_a_break_it_is_the_same(kind: str) -> None:
    step = compiled(kind, "aot_eager")
    problem = make(kind)
    for tau in (3.0, 3.0):
        if kind in ROW_KINDS:
            problem.options["tau"] = torch.tensor(tau)
        leaves = [x.detach().clone().requires_grad_() for x in problem.students]
        students = [x * 1.0 for x in leaves]
        loss = step(students, problem.target, problem.options)
        grads = torch.autograd.grad(loss, leaves)
        wanted = result(problem, "reference", "mean")
        torch.testing.assert_close(loss.detach(), 3 * wanted[0].float())
        for got, exact in zip(grads, wanted[1:], strict=True):
            torch.testing.assert_close(got, 3 * exact)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_by_inductor_it_is_the_same() -> None:
    # The real compiler, with a network before and two losses after, one of an image in channels_last.
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 4, 1).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    teacher = torch.randn(2, 4, 6, 6)

    def step(x: Tensor, tau: Tensor) -> Tensor:
        y = net(x)
        return image_l1_loss(y, teacher) + kd_loss(y, teacher, tau=tau, dim=1, reduction="mean")

    tau, weights = torch.tensor(2.0), tuple(net.parameters())
    wanted, wanted_grads = (loss := step(x, tau)).detach(), torch.autograd.grad(loss, weights)
    loss = torch.compile(step, fullgraph=True)(x, tau)
    torch.testing.assert_close(loss.detach(), wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, weights), wanted_grads)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("kind", ["logits", "dkd"])
def test_another_temperature_or_batch_does_not_compile_again(kind: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    step = compiled(kind, counter)

    def run(rows: int, tau: float) -> None:
        problem = make(kind, (rows, 7), tau=torch.tensor(tau))
        problem.students[0].requires_grad_()
        step(problem.students, problem.target, problem.options).backward()

    for tau in (1.0, 2.0, 3.5, 0.1):
        run(6, tau)
    assert counter.frame_count == 1
    # Another batch size: once more, for any.
    for rows in (5, 9, 31, 2):
        run(rows, 2.5)
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_dynamo")
def test_evaluation_compiles_too() -> None:
    step = compiled("logits", "aot_eager")
    problem = make("logits", tau=torch.tensor(3.0))
    with torch.no_grad():
        loss = step(problem.students, problem.target, problem.options)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, 3 * result(problem, "reference", "mean")[0])


@pytest.mark.parametrize("kind", OUT_OF_PLACE)
def test_the_op_of_the_dispatcher_is_the_function(kind: str) -> None:
    # torch.ops.mekd.NAME, with the autograd that is registered: what a compiled graph runs.
    problem = make(kind)
    op, arguments = direct(problem, "mean", grad=True)
    loss, *stored = op(*arguments)
    students = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    wanted = result(problem, "reference", "mean")
    torch.testing.assert_close(loss.detach(), wanted[0].float())
    for factor in (1.0, -2.0):
        for got, kept, exact in zip(
            torch.autograd.grad(loss * factor, students, retain_graph=True), stored, wanted[1:], strict=True
        ):
            torch.testing.assert_close(kept.detach(), exact)
            torch.testing.assert_close(got, factor * exact)
    # Unasked, no gradient is computed.
    op, arguments = direct(problem, "mean", grad=False)
    loss, *stored = op(*arguments)
    torch.testing.assert_close(loss, wanted[0].float())
    assert all(x.shape == (0,) for x in stored)


@pytest.mark.parametrize("kind", OUT_OF_PLACE)
def test_meta_tensors_have_shapes_alone(kind: str) -> None:
    problem = make(kind, device="meta") if kind not in TOPK_KINDS else make(kind)
    if kind in TOPK_KINDS:
        problem.students = [x.to("meta") for x in problem.students]
        values, indices = problem.target["topk"]
        problem.target["topk"] = (values.to("meta"), indices.to("meta"))
    if "tau" in problem.options:
        problem.options["tau"] = torch.tensor(3.0, device="meta")
    loss = problem.loss(reduction="mean")
    assert loss.device.type == "meta" and loss.shape == ()
