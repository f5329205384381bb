"""The Triton kernels over rows in their three regimes, each forced, and at its true boundary."""

import importlib

import pytest
import torch

from mekd import extension
from op_grid import DEVICES, DTYPES, ROW_KINDS, check, make, result

if not extension.INTERPRETED:
    pytest.skip("interpreted alone, with TRITON_INTERPRET=1, as make test does", allow_module_level=True)
triton, tl, rows = map(importlib.import_module, ("triton", "triton.language", "mekd.kernels.rows"))
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
TILES = [
    # Online, with a tail: three rounds over 20 classes.
    (1, 8, (F32, F64)),
    # Online, several rows in one program, in which the last one does not fill it.
    (2, 16, (F32, BF16, F16)),
    # One row in registers.
    (1, 32, (F32, BF16, F16)),
    # Many rows in one program.
    (4, 32, (F32, F64)),
]


def force(monkeypatch: pytest.MonkeyPatch, rows: int, block: int) -> None:
    from mekd.kernels import tuning

    monkeypatch.setattr(tuning, "tile", lambda *_: tuning.Tile(rows, block, 1, 1))


@pytest.mark.parametrize(("rows", "block", "dtypes"), TILES, ids=lambda x: str(x) if isinstance(x, int) else "")
@pytest.mark.parametrize("kind", ROW_KINDS)
def test_each_regime_is_the_truth(
    kind: str, rows: int, block: int, dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, rows, block)
    for dtype in dtypes:
        check(make(kind, (3, 20), dtype, device=DEVICES["triton"]), "triton")
    for values in ("near", "gap"):
        check(make(kind, (3, 20), values=values, device=DEVICES["triton"]), "triton")
    options = {"weights": torch.tensor([0.5, 3.0, 1.0]), "mask": torch.tensor([True, False, True])}
    check(make(kind, (3, 20), **options), "triton", "batchmean")


@pytest.mark.parametrize(("classes", "block"), [(33, 16), (39, 32)])
@pytest.mark.parametrize("kind", ROW_KINDS)
def test_a_loop_over_rows_that_begin_anywhere(
    kind: str, classes: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks begin where memory does: before the row by up to 7 elements, of all numbers here, and a last one may hold
    # nothing but the end of it.
    force(monkeypatch, 1, block)
    if classes == 33:
        check(make(kind, (4, classes), BF16, device=DEVICES["triton"]), "triton")
    options = {"weights": torch.arange(4.0), "mask": torch.arange(4) != 2}
    check(make(kind, (4, classes), **options), "triton", "batchmean")
    # A neighbour's numbers stay its own.
    problem = make(kind, (3, classes), device=DEVICES["triton"])
    clean = result(problem, "triton")
    problem.students[0][1] = float("nan")
    loss, grad = result(problem, "triton")
    assert loss[1].isnan()
    for i in (0, 2):
        assert torch.equal(loss[i], clean[0][i]) and torch.equal(grad[i], clean[1][i])


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_a_shifted_loop_writes_between_its_ends(offset: int) -> None:
    @triton.jit
    def copy(x, y, count, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
        lanes = tl.arange(0, BLOCK)
        for start in range(0, CLASSES + 8, BLOCK):
            tile = rows.load(x, row, lanes, row < count, CLASSES, CLASSES, tl.float32, start, True)
            rows.store(y, tile, row, lanes, row < count, row < count, CLASSES, start, True)

    memory = torch.full((5 * 19 + 16,), 7.0)
    out = memory.clone()
    inside = slice(8 + offset, 8 + offset + 5 * 19)
    memory[inside] = torch.randn(5 * 19)
    copy[(5,)](memory[inside], out[inside], 5, CLASSES=19, BLOCK=16)
    assert torch.equal(out, memory)


@pytest.mark.parametrize("first", [0.0, -1e4, float("-inf")])
@pytest.mark.parametrize("kind", ["logits", "dkd", "jsd", "jsd-forward", "jsd-reverse"])
def test_a_first_block_that_is_masked(kind: str, first: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # No number in the first block of either side, or only in the teacher's.
    force(monkeypatch, 4, 8)
    problem = make(kind, (3, 24), device=DEVICES["triton"])
    name = "logits" if kind == "logits" else "teacher"
    problem.students[0][:, :8] = float("-inf") if kind != "jsd-forward" or first else 0.0
    problem.target[name][:, :8] = first if kind != "logits" or first else -1e4
    if kind == "dkd":
        problem.target["labels"] = problem.target["labels"].clamp_min(8)
        problem.target[name][:, :8] = first or -1e4
    if kind == "jsd-reverse":
        problem.target[name][:, :8] = -10.0  # what the student masks costs nothing
    check(problem, "triton")


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_nan_of_a_middle_block_spoils_its_row_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, 4, 8)
    problem = make(kind, (3, 24), device=DEVICES["triton"])
    clean = result(problem, "triton")
    problem.students[0][1, 11] = float("nan")
    loss, grad = result(problem, "triton")
    assert loss[1].isnan() and grad[1].isnan().any()
    for i in (0, 2):
        assert torch.equal(loss[i], clean[0][i]) and torch.equal(grad[i], clean[1][i])


@pytest.mark.parametrize(
    "classes",
    [
        # The longest rows that are held in registers, by jsd and by the others, and one class more.
        8192,
        8193,
        16384,
        16385,
    ],
)
@pytest.mark.parametrize("kind", ROW_KINDS)
def test_the_boundary_between_registers_and_loops(kind: str, classes: int) -> None:
    from mekd.kernels import tuning

    name = {"logits": "tempered_kl", "probs": "tempered_kl", "labels": "tempered_kl_labels", "dkd": "dkd"}.get(
        kind, "jsd" if kind.startswith("jsd") else "tempered_kl_topk"
    )
    longest = 8192 if name == "jsd" else 16384
    assert (tuning.tile(name, torch.float32, classes).block < classes) == (classes > longest)
    check(make(kind, (1, classes), device=DEVICES["triton"]), "triton", "mean")


@pytest.mark.parametrize("k", [1, 32, 33, 40])
@pytest.mark.parametrize("kind", ["spread", "drop"])
def test_topk_by_comparison_and_by_a_target_in_memory(kind: str, k: int) -> None:
    problem = make(kind, (4, 40), device=DEVICES["triton"], mask=torch.tensor([True, True, False, True]))
    values, indices = (0.9 * make("probs", (4, 40), seed=6).target["probs"]).topk(k)
    values[2], indices[2] = float("nan"), 999
    problem.target["topk"] = (values, indices)
    check(problem, "triton", "batchmean")


def test_every_kernel_has_tiles_for_every_size() -> None:
    from mekd.kernels import tuning

    for kernel, archs in tuning.table().items():
        for arch, dtypes in archs.items():
            for dtype in DTYPES:
                sizes = dtypes[str(dtype).removeprefix("torch.")]
                assert list(sizes) == [*(str(2**i) for i in range(4, 15)), "more"], (kernel, arch, dtype)
                for size, (_, block, warps, _) in sizes.items():
                    # Of the longest rows some would spill, and loop.
                    may_loop = size == "16384" or (kernel, size) == ("jsd_skewed", "8192")
                    assert size == "more" or block == int(size) or (may_loop and block < int(size))
                    assert 1 <= warps <= 32
