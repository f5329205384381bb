"""Memory that an op is given and memory that it takes: uninitialised, far apart, and shared between threads."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mekd import extension
from mekd.functional import kd_loss
from op_grid import DEVICES, IMPLS, KERNELS, KINDS, OF_EACH_OP, ROW_KINDS, Problem, make, result

NAN = float("nan")
#: Interpreted, programs run one after another: a hundredth of the rows shows the same.
FEWER = 100 if extension.INTERPRETED else 1


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """Fresh memory holds NaN, in Python and in C++."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filling = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    settings.fill_uninitialized_memory = filling


@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize(
    ("classes", "dtype"),
    [
        # Less than a vector: tails everywhere.
        (3, torch.float32),
        # A vector and a tail, in tiles of rows, and a gradient that is rounded on its way.
        (10, torch.bfloat16),
        # Two blocks, the second one of one element.
        (1025, torch.float32),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_is_returned_was_written(kind: str, classes: int, dtype: torch.dtype, impl: str) -> None:
    assert torch.empty(3).isnan().all()
    problem = make(kind, (5, classes), dtype, device=DEVICES[impl])
    if kind in ROW_KINDS:
        # Rows that are skipped must be written too.
        problem.options["mask"] = torch.tensor([True, False, True, True, False], device=DEVICES[impl])
    for reduction in ("none", "mean"):
        if (kind, reduction) != ("discriminator", "none"):
            assert all(x.isfinite().all() for x in result(problem, impl, reduction))


@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_in_filled_memory(kind: str, impl: str) -> None:
    if kind == "discriminator":
        problem = Problem(kind, [torch.empty(0, device=DEVICES[impl])] * 2, {})
    else:
        problem = make(kind, (0, 10), device=DEVICES[impl])
    loss, *grads = result(problem, impl, "mean")
    assert loss.item() == 0
    assert all(x.numel() == 0 for x in grads)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """The kernels' parallel loops, also on a machine that is told to use one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("kind", OF_EACH_OP)
def test_threads_are_not_the_value(kind: str, impl: str) -> None:
    # More rows than one task takes, and not a multiple of it.
    problem = make(kind, (7001 // FEWER, 10), device=DEVICES[impl])
    reduction = "mean" if kind == "discriminator" else "none"
    two = result(problem, impl, reduction)
    torch.set_num_threads(1)
    one = result(problem, impl, reduction)
    assert all(torch.equal(x, y) for x, y in zip(two, one, strict=True))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("impl", IMPLS)
def test_a_bad_value_that_another_thread_finds_is_an_error(impl: str) -> None:
    probs = torch.full((20_003 // FEWER, 10), 0.1, device=DEVICES[impl])
    probs[-2, 3] = -0.25
    with pytest.raises(ValueError, match=r"probs hold.*-0\.25"):
        kd_loss(torch.zeros_like(probs), probs=probs, impl=impl)
    # And the next call is not spoilt by it.
    probs[-2, 3] = 0.1
    assert kd_loss(torch.zeros_like(probs), probs=probs, impl=impl).item() < 1e-6


FAR_APART = """
import itertools, mmap, sys
import torch
from op_grid import KINDS, Problem, make, result

# Three rows, the last one 2^31 elements from the first. Nobody ever touches what lies between.
STRIDE, ROWS = 2**30, 3
def memory(dtype):
    size = (STRIDE * (ROWS - 1) + 65536) * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype)

def apart(x, storage, place):
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dtype != storage.dtype:
        return tuple(apart(y, storage, place) for y in x) if isinstance(x, tuple) else x
    stride = (STRIDE,) + ((1,) if x.dim() == 2 else ())
    return storage.as_strided(x.shape, stride, place).copy_(x)

for dtype, impl in itertools.product((torch.bfloat16, torch.float32), sys.argv[1:]):
    storage = memory(dtype)
    for kind in KINDS:
        if kind == "in-place":
            continue  # dense memory only
        for classes in (10, 1100):
            near = make(kind, (ROWS, classes), dtype)
            if kind == "discriminator":
                near.students[1] = near.students[1][:ROWS]
            far = Problem(kind, [apart(x, storage, 1 + 8192 * i) for i, x in enumerate(near.students)],
                          {k: apart(v, storage, 32768) for k, v in near.target.items()}, near.options)
            reduction = "mean" if kind == "discriminator" else "none"
            for x, y in zip(result(far, impl, reduction), result(near, impl, reduction), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7, msg=lambda m: f"{impl} {kind}: {m}")
print("far and near agree")
"""


def test_offsets_beyond_32_bits() -> None:
    # A process of its own: a wrong offset is a crash.
    impls = [impl for impl, device in DEVICES.items() if device == "cpu" and (impl != "cpp" or extension.LOADED)]
    done = subprocess.run(
        [sys.executable, "-c", FAR_APART, *impls],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "far and near agree" in done.stdout


@pytest.mark.skipif(extension.LOADED is None, reason=extension.WHY_NOT)
@pytest.mark.parametrize("kind", ["logits", "labels", "drop", "dkd", "jsd", "tanh", "gan-logits"])
def test_nothing_beyond_a_tensor_is_read_or_written(kind: str) -> None:
    # NaN around every input, and the gradient's neighbours in a filled buffer, for lengths around a vector.
    for classes in (1, 7, 8, 9, 15, 31, 33, 1023, 1025):
        problem = make(kind, (3, classes))
        wanted = result(problem, "cpp")

        def walled(x: object) -> object:
            if isinstance(x, tuple):
                return tuple(map(walled, x))
            if not isinstance(x, torch.Tensor) or not x.is_floating_point():
                return x
            wall = x.new_full((len(x) + 2, *(n + 16 for n in x.shape[1:])), NAN)
            inner = wall[1:-1] if x.dim() == 1 else wall[1:-1, 8:-8]
            return inner.copy_(x)

        target = {name: walled(value) for name, value in problem.target.items()}
        students = [walled(x) for x in problem.students]
        got = result(Problem(kind, students, target, problem.options), "cpp")  # type: ignore[arg-type]
        assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True)), classes
