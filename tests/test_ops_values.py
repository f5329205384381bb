"""Every op on every backend against the truth: shapes, dtypes, values, temperatures, scales and reductions."""

import pytest
import torch

from mekd import extension
from op_grid import (
    DEVICES,
    DTYPES,
    GAN_KINDS,
    IMAGE_KINDS,
    IMPLS,
    KERNELS,
    KINDS,
    ROW_KINDS,
    TOPK_KINDS,
    check,
    compiled_only,
    make,
    result,
    truth,
)

VALUES = [
    # As a network gives them.
    "plain",
    # A student at the end of its training: the loss is a small difference of large terms.
    "near",
    # Gaps of 600 and 1200: every exponential under- or overflows.
    "gap",
]
ROW_SHAPES = [
    # Nothing to tell apart.
    (5, 1),
    # A binary teacher: less than a vector of 8.
    (5, 2),
    # dkd's rest is two classes.
    (5, 3),
    # One less than a vector of floats.
    *compiled_only((5, 7)),
    # Exactly one vector.
    *compiled_only((5, 8)),
    # The digits: a vector and a tail.
    (5, 10),
    # Two full tiles of 8 rows, and a part.
    (19, 10),
    # The most classes that tiles of rows are made for, in one full tile and a row; and one more.
    (9, 32),
    (9, 33),
    # CIFAR-100.
    (5, 100),
    # ImageNet: no tail.
    (3, 1000),
    # Exactly one block of the kernels.
    (3, 1024),
    # One more than a block: a second block of one element.
    *compiled_only((3, 1025)),
    # Three blocks, the last one with a tail.
    (3, 2500),
    # One row.
    (1, 10),
    # Not even a batch.
    (10,),
    # Tokens of a language model.
    (2, 3, 10),
    # Last batches without a row, and sequences of length 0.
    (0, 10),
    (2, 0, 10),
]
IMAGE_SHAPES = [
    # A batch of colour images.
    (4, 3, 8, 8),
    # Less than a vector, not square.
    (1, 1, 2, 3),
    # Generators that draw no planes.
    (3, 7),
    # One pixel a sample.
    (5, 1),
    # Samples without dimensions of their own.
    (5,),
    # More than a task's share of one sample (16384), with a tail.
    (2, 16397),
    # As the generator draws them.
    *compiled_only((4, 3, 64, 64)),
    # No images, and images without a pixel.
    (0, 3, 4, 4),
    (3, 0),
]
GAN_SHAPES = [
    # One image, one class.
    (1, 1),
    # Less than a vector of either.
    (5, 2),
    # The digits.
    (8, 10),
    # ImageNet.
    (3, 1000),
    # A second block of one element.
    *compiled_only((3, 1025)),
    # Three blocks.
    (3, 2500),
    # More images than one thread's share, or more than one program's.
    (1100 if extension.INTERPRETED else 9000, 2),
    # No image.
    (0, 10),
]
GRID = [
    *((kind, shape) for kind in ROW_KINDS for shape in ROW_SHAPES),
    *((kind, shape) for kind in IMAGE_KINDS for shape in IMAGE_SHAPES),
    *((kind, shape) for kind in GAN_KINDS for shape in GAN_SHAPES),
]


def reductions(kind: str) -> list[str]:
    # gan_discriminator reduces each of its two batches: it has no loss for each of both.
    return ["mean", "sum"] if kind == "discriminator" else ["none", "mean", "batchmean", "sum"]


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize(("kind", "shape"), GRID, ids=lambda x: x if isinstance(x, str) else "x".join(map(str, x)))
def test_shapes(kind: str, shape: tuple[int, ...], impl: str) -> None:
    for dtype in DTYPES:
        check(make(kind, shape, dtype, device=DEVICES[impl]), impl, reductions(kind)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_in_shapes_at_the_edge(kind: str) -> None:
    # Where its wrapper could fail: nothing to tell apart, no batch, no rows.
    shapes: list[tuple[int, ...]] = [(5, 1), (0, 10)]
    shapes += [(10,), (2, 3, 10), (2, 0, 10)] if kind in ROW_KINDS else [(3, 0)] if kind in IMAGE_KINDS else []
    for shape in shapes:
        for dtype in DTYPES:
            check(make(kind, shape, dtype), "reference", reductions(kind)[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("values", VALUES[1:])
@pytest.mark.parametrize(
    "shape",
    [
        # Short rows: so many that plain arithmetic is not exact in all of them by luck.
        (16, 10),
        # Three blocks, whose tops differ.
        (8, 2500),
    ],
    ids=["10", "2500"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_values(kind: str, shape: tuple[int, int], values: str, impl: str) -> None:
    narrow = [torch.float32, *compiled_only(torch.float64, torch.float16), torch.bfloat16]
    for dtype in DTYPES if shape[1] < 100 else narrow:
        check(make(kind, shape, dtype, values, DEVICES[impl], seed=1), impl, reductions(kind)[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_reductions(kind: str, impl: str) -> None:
    for reduction in reductions(kind):
        loss, *_ = check(make(kind, device=DEVICES[impl], seed=2), impl, reduction)
        assert (loss.dim() == 0) == (reduction != "none")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "tau",
    [
        # No temperature.
        1.0,
        # Sharpens.
        0.5,
        # Softens, and is no power of two: log2(e) / tau is rounded.
        4.3,
        # A gradient that is next to nothing.
        1000.0,
    ],
)
@pytest.mark.parametrize("kind", ROW_KINDS)
def test_temperatures_and_scales(kind: str, tau: float, impl: str) -> None:
    for values, scale in zip(VALUES, ["tau2", "tau", "one"], strict=True):
        check(make(kind, (8, 100), values=values, device=DEVICES[impl], seed=3, tau=tau, scale=scale), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "beta",
    [
        # Both limits.
        0.0,
        1.0,
        # The middle.
        0.5,
        # So near to the limits that 1 - beta rounds to 1 or beta to 1 in float32: the mixture still has two parts.
        1e-9,
        1 - 1e-9,
    ],
)
@pytest.mark.parametrize("values", VALUES)
def test_jsd_for_any_beta(values: str, beta: float, impl: str) -> None:
    for dtype in DTYPES:
        check(make("jsd", (8, 100), dtype, values, DEVICES[impl], seed=4, beta=beta), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_jsd_of_close_distributions(impl: str) -> None:
    # A loss that is small is not measured by what is allowed to a large one: here the error is held to be relative.
    near = {"cpp": 4e-5, "triton": 1e-3, "reference": 1.0}[impl]  # plain float32 has no digits left
    for beta, apart in ((0.5, 0.1), (0.5, 1e-3), (0.1, 1e-2), (1e-3, 1e-2)):
        problem = make("jsd", (4, 100), device=DEVICES[impl], tau=1.0, beta=beta)
        teacher = problem.target["teacher"]
        problem.students = [teacher + apart / 3 * problem.students[0]]
        for got, exact in zip(result(problem, impl), truth(problem), strict=True):
            got = got.cpu().double()
            torch.testing.assert_close(got, exact, rtol=near, atol=near * exact.abs().max().item() / 10)
    # And between equal ones there is nothing, at either limit too; 1e-4 apart there is not less.
    for kind in ("jsd", "jsd-forward", "jsd-reverse", "jsd-log"):
        for values in (0.0, 1e-4):
            problem = make(kind, (50, 30), device=DEVICES[impl])
            problem.target["teacher"] = problem.students[0] + values * torch.randn_like(problem.students[0])
            if kind == "jsd-log":
                problem.target["teacher"] = problem.target["teacher"].log_softmax(-1)
            loss, grad = result(problem, impl)
            assert (loss >= 0).all() and (values or kind == "jsd-log" or not loss.any()), kind
            assert values == 0 or grad.abs().sum() > 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("alpha", "beta"),
    [
        # The authors'.
        (1.0, 8.0),
        # Each part alone.
        (1.0, 0.0),
        (0.0, 1.0),
        # Nothing at all.
        (0.0, 0.0),
    ],
)
@pytest.mark.parametrize("values", VALUES)
def test_dkd_for_any_weights(values: str, alpha: float, beta: float, impl: str) -> None:
    check(make("dkd", (4, 100), values=values, device=DEVICES[impl], seed=5, alpha=alpha, beta=beta), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "k",
    [
        # The best class alone.
        1,
        # Some.
        4,
        # All: nothing is missing that could be spread.
        10,
    ],
)
@pytest.mark.parametrize("kind", TOPK_KINDS)
def test_topk_for_any_k(kind: str, k: int, impl: str) -> None:
    problem = make(kind, (6, 10), device=DEVICES[impl])
    values, indices = (0.9 * make("probs", (6, 10), seed=6, device=DEVICES[impl]).target["probs"]).topk(k)
    problem.target["topk"] = (values, indices)
    check(problem, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("kind", [kind for kind in GAN_KINDS if kind != "discriminator"])
def test_generator_for_any_alpha(kind: str, alpha: float, impl: str) -> None:
    for values in VALUES:
        check(make(kind, values=values, device=DEVICES[impl], seed=7, alpha=alpha), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", GAN_KINDS)
def test_a_discriminator_that_answers_columns(kind: str, impl: str) -> None:
    # (m, 1), as a last linear layer gives it: (m, 1) times (m,) would be (m, m).
    problem = make(kind, device=DEVICES[impl])
    problem.students = [x.unsqueeze(1) for x in problem.students]
    if kind == "confidence":
        problem.target["confidence"] = problem.target["confidence"].unsqueeze(1)
    for reduction in reductions(kind):
        check(problem, impl, reduction)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        # Autocast around the student alone.
        (torch.bfloat16, torch.float32),
        # A teacher that answers in half precision.
        (torch.float32, torch.float16),
        # Numbers that were parsed from JSON.
        (torch.float32, torch.float64),
    ],
)
@pytest.mark.parametrize("kind", ROW_KINDS + IMAGE_KINDS + ["confidence", "gan-logits", "gan-probs"])
def test_student_and_teacher_of_different_dtypes(
    kind: str, student: torch.dtype, teacher: torch.dtype, impl: str
) -> None:
    problem, other = (make(kind, dtype=dtype, device=DEVICES[impl]) for dtype in (student, teacher))
    check(type(problem)(kind, problem.students, other.target, problem.options), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_probabilities_below_the_range_of_float32(impl: str) -> None:
    # Parsed from JSON into float64, and softened: 1e-60 becomes 1e-3 and is no longer nothing.
    problem = make("probs", (4, 5), device=DEVICES[impl], tau=20.0)
    problem.target["probs"] = problem.target["probs"].double()
    problem.target["probs"][:, 2] = 0
    problem.target["probs"] /= problem.target["probs"].sum(-1, keepdim=True)
    problem.target["probs"][:, 2] = 1e-60
    check(problem, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["tanh", "images", "in-place"])
def test_equal_images_have_no_distance(kind: str, dtype: torch.dtype, impl: str) -> None:
    # Not next to none: what is left of each pixel would add up over all of them.
    problem = make(kind, (2, 3, 32, 32), dtype, device=DEVICES[impl])
    problem.target["teacher"] = problem.students[0].clone()
    loss, grad = result(problem, impl)
    assert not loss.any() and not grad.any()
