"""What the machine code of the Triton kernels takes, compiled for every architecture on a machine without a GPU.

A part of the sheet that `python -m bench kernels` prints whole: all kernels and target kinds, fewer dtypes and sizes.
"""

import functools
import json
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch

from mekd import extension

pytest.importorskip("triton")
if extension.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled in this process", allow_module_level=True)

from bench import kernels as bench
from bench.traffic import moved
from mekd.kernels import tempered_kl, tuning
from mekd.kernels.aot import ARCHS, Launch, Resources, access_widths, compiling, occupancy, resources, widths
from mekd.kernels.variants import CLASSES, ROWS, TOPK, Variant, variants

ONE_PASS = 16384
#: How often more the k entries of a row are read.
ENTRIES = {"spread": 1, "drop": 1, "tail": 4}
#: The variant of jsd in which more of each class is alive at once. It has half the occupancy, as "tail" has, which
#: holds the named classes beside the others.
SKEWED = "skewed"
COMPILED: dict[str, list[tuple[torch.dtype, tuple[int, ...]]]] = {
    # One architecture with every regime: tiles of rows, one row in registers, the loop ...
    "sm_90": [(torch.bfloat16, CLASSES), (torch.float32, (1000, CLASSES[-2])), (torch.float16, (1000,))],
    # ... and the others where registers are scarcest and where loads are asked to be wide.
    **{arch: [(torch.bfloat16, (1000, 8192, ONE_PASS, CLASSES[-1]))] for arch in ARCHS if arch != "sm_90"},
}
#: In make test the one with every regime; the others take as long again each.
EACH = [pytest.param(arch, marks=[] if arch == "sm_90" else pytest.mark.slow) for arch in ARCHS]
#: Numbers of a row that are read a second time, by the class that the answer names.
AGAIN = {"tempered_kl_labels": 1, "dkd": 2, "tempered_kl_topk": TOPK}


class Code(NamedTuple):
    variant: Variant
    launch: Launch
    taken: Resources

    def __str__(self) -> str:
        return f"{self.variant.kernel} {self.variant.name} {self.variant.dtype} C={self.variant.classes}: {self.taken}"


@functools.cache
def compiled(arch: str) -> list[Code]:
    found = []
    for dtype, classes in COMPILED[arch]:
        for variant in variants([dtype], classes):
            with compiling(arch) as launches:
                variant.call()
            assert len(launches) == 1, f"{variant.kernel}: loss and gradient took {len(launches)} launches"
            (launch,) = launches
            found.append(Code(variant, launch, resources(launch)))
    return found


@pytest.mark.parametrize("arch", EACH)
def test_nothing_spills(arch: str) -> None:
    spilt = [str(code) for code in compiled(arch) if code.taken.spill_bytes]
    assert not spilt


def wide(launch: Launch, tensors: int, dtype: torch.dtype) -> int:
    """Accesses of 128 bits that a thread makes to tensors of a tile, if none of them is narrower."""
    tile = launch.arguments.get("ROWS", 1) * launch.arguments["BLOCK"]
    return tensors * max(1, tile * dtype.itemsize // (16 * 32 * launch.compiled.metadata.num_warps))


@pytest.mark.parametrize("arch", EACH)
def test_a_thousand_classes_and_images_move_128_bits_at_a_time(arch: str) -> None:
    narrow, seen = [], 0
    for code in compiled(arch):
        variant = code.variant
        image = variant.kernel.startswith("tanh_l1")
        if variant.classes != 1000 and not image:
            continue
        seen += 1
        read = 2 if image or variant.kernel in ("tempered_kl", "dkd", "jsd") else 1
        written = 0 if variant.kernel == "gan_generator" else 1
        grad = torch.float32 if variant.dtype == torch.float16 and variant.kernel != "tanh_l1_" else variant.dtype
        loads, stores = (found.get(128, 0) for found in access_widths(code.launch))
        if loads < wide(code.launch, read, variant.dtype) or stores < wide(code.launch, written, grad):
            narrow.append(f"{code}, {access_widths(code.launch)}")
    assert seen >= 18
    assert not narrow


def test_rows_that_begin_anywhere_move_what_a_thread_holds_at_a_time() -> None:
    # 21841 classes: but for its ends a row is read and written as one of 21840 is.
    seen, narrow = 0, []
    for code in compiled("sm_90"):
        variant, launch = code.variant, code.launch
        if variant.classes != 21841 or variant.kernel == "gan_generator":
            continue
        seen += 1
        held = launch.arguments["BLOCK"] // (32 * launch.compiled.metadata.num_warps)
        bits = min(128, 8 * held * variant.dtype.itemsize)
        passes = 3 if variant.kernel == "jsd" and variant.name != "log_probs" else 2
        read = passes * (2 if variant.kernel in ("tempered_kl", "dkd", "jsd") else 1)
        times = 8 * held * variant.dtype.itemsize // bits
        loads, stores = access_widths(launch)
        if loads.get(bits, 0) < read * times or stores.get(bits, 0) < times:
            narrow.append(f"{code}, {loads}, {stores}")
    assert seen == 24 and not narrow


def longest(variant: Variant, arch: str) -> int:
    """The longest row that is held in registers: where half as much again would spill."""
    if variant.kernel == "jsd":
        return 4096 if variant.name == SKEWED else 8192
    half = {"dkd": ("sm_120",), "tempered_kl_topk": ("sm_100", "sm_120")}
    return 8192 if arch in half.get(variant.kernel, ()) else ONE_PASS


@pytest.mark.parametrize("arch", EACH)
def test_what_fits_is_read_and_written_once(arch: str) -> None:
    for code in compiled(arch):
        variant = code.variant
        more = moved(code.launch) - variant.bytes_least
        if variant.kernel.startswith("tanh_l1"):
            # A sum for each piece of 2048 pixels, where the least is one for each image.
            assert 0 <= more <= 1e-3 * variant.bytes_least, f"{more} bytes more: {code}"
        elif variant.classes <= longest(variant, arch) or variant.kernel == "gan_generator":
            # A byte says whether a row with a label counts, and a number how many do.
            named = AGAIN.get(variant.kernel, 0)
            again = ROWS * (named * variant.dtype.itemsize + 1) + 8 if named else 0
            # The entries are gone through more than once, indices of 8 bytes too; a bucket takes their logits as well.
            again += ENTRIES.get(variant.name, 0) * ROWS * TOPK * (variant.dtype.itemsize + 8)
            assert 0 <= more <= again, f"{more} bytes more: {code}"


@pytest.mark.parametrize("arch", EACH)
def test_occupancy(arch: str) -> None:
    low = []
    for code in compiled(arch):
        image = code.variant.kernel.startswith("tanh_l1")
        least = 0.5 if image or code.variant.classes <= 1000 else 0.25 if code.variant.classes <= ONE_PASS else 0.0
        if code.variant.name in (SKEWED, "tail"):
            least = min(least, 0.25)
        if code.taken.occupancy < least:
            low.append(str(code))
    assert not low


def test_an_online_kernel_is_seen_to_read_twice() -> None:
    x = torch.empty(ROWS, 2 * ONE_PASS, dtype=torch.float32, device="meta")
    with compiling("sm_90") as launches:
        tempered_kl.tempered_kl(x, x, torch.empty((), device="meta"), None, None, False, 0.0, "one", "sum", True)
    rows = moved(launches[0]) / (ROWS * x.shape[1])
    assert 20 <= rows < 20.01  # both sides twice, and the gradient


def test_a_backward_by_1_moves_one_number() -> None:
    # Whatever is done with the gradient is done behind the comparison.
    (scaled,) = (
        code for code in compiled("sm_90") if code.variant.kernel == "scale_" and code.variant.dtype == torch.bfloat16
    )
    before, behind = scaled.launch.compiled.asm["ttir"].split("scf.if")
    assert before.count("tt.load") == 1 and "tt.store" not in before
    assert behind.count("tt.load") == behind.count("tt.store") == 1
    assert scaled.variant.bytes_least == 2 * 2 * ROWS * 1000 + 4


def test_scalars_that_change_from_step_to_step_compile_nothing_new() -> None:
    x, labels = torch.empty(8, 10, device="meta"), torch.empty(8, dtype=torch.int64, device="meta")
    from mekd.kernels.dkd import dkd

    with compiling("sm_90") as launches:
        for alpha, beta in ((1.0, 8.0), (0.5, 0.25), (0.0, 1.0)):
            dkd(x, x, labels, torch.empty((), device="meta"), None, None, alpha, beta, -100, "one", "sum", True)
    assert len({id(launch.compiled) for launch in launches}) == 1


def test_compiling_launches_nothing_and_ends() -> None:
    from mekd.kernels import launch

    with pytest.raises(KeyError), compiling("sm_80"):
        assert launch.compile_instead is not None
        raise KeyError
    assert launch.compile_instead is None


def test_an_unknown_arch_is_refused() -> None:
    refused = pytest.raises(ValueError, match="arch is 'sm_35'; it must be one of 'sm_80', 'sm_90', 'sm_100', 'sm_120'")
    with refused, compiling("sm_35"):
        pass


def test_an_interpreter_process_cannot_compile() -> None:
    code = "from mekd.kernels.aot import compiling\nwith compiling('sm_90'): pass"
    done = subprocess.run([sys.executable, "-c", code], env={"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode != 0 and "TRITON_INTERPRET=1 is set, so that nothing can be compiled" in done.stderr


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "share"),
    [
        # 16 blocks of 4 warps: all 64.
        (32, 0, 4, 1.0),
        # A register more makes 40 of them: 12 blocks.
        (33, 0, 4, 0.75),
        # Two blocks of 100 KB, and 1 KB each for the system, fit into 228 KB.
        (32, 100 << 10, 8, 0.25),
        # No more than 32 blocks, be they ever so small.
        (16, 0, 1, 0.5),
        # 255 registers of 32 warps are more than there are.
        (255, 0, 32, 0.0),
    ],
)
def test_occupancy_by_hand(registers: int, shared: int, warps: int, share: float) -> None:
    assert occupancy("sm_90", registers, shared, warps) == share


def test_widths_are_read_off_the_machine_code() -> None:
    code = """
        /*0140*/ LDG.E.128 R8, desc[UR4][R4.64] ;   /*0150*/ @!P0 LDG.E.U16.CONSTANT R2, desc[UR4][R2.64] ;
        /*0160*/ LDG.E R3, [R2.64] ;                /*0170*/ LDGSTS.E.BYPASS.LTC128B.128 [R9], [R2.64] ;
        /*0180*/ LDG.E.64.STRONG.GPU R4, [R2.64] ;  /*0190*/ LDG.E.S8 R4, [R2.64] ;
        /*01a0*/ STG.E.128 desc[UR4][R4.64], R8 ;   /*01b0*/ LDL.64 R2, [R1] ;
    """
    assert widths(code, "LDG|LDGSTS") == {128: 2, 16: 1, 32: 1, 64: 1, 8: 1}
    assert widths(code, "STG") == {128: 1}


def test_the_sheet_has_the_fields_that_were_agreed() -> None:
    rows: list[dict[str, Any]] = bench.sheet("sm_90", [torch.float16], [1000])
    fields = (
        "kernel variant dtype arch c registers spill_bytes shared_bytes load_widths store_widths bytes_per_element "
        "bytes_least occupancy"
    )
    assert all(set(fields.split()) <= set(row) for row in json.loads(json.dumps(rows)))
    (row,) = (row for row in rows if (row["kernel"], row["variant"], row["c"]) == ("tempered_kl", "logits", 1000))
    # 2 + 2 bytes read and 4 written; a loss of 4 bytes for each row; tau.
    total = ROWS * (1000 * 8 + 4) + 8
    assert row["bytes_least"] == row["bytes_per_element"] == total / (ROWS * 1000)
    # Its backward rounds the float32 gradient to float16.
    assert row["backward_bytes"] == [6, 6]
    assert row["bound_us"] == pytest.approx({"H100": total / 3.35e6, "H200": total / 4.8e6})


@pytest.mark.parametrize(
    ("dtypes", "classes"),
    [
        # Tiles of rows, one row, and the loop.
        pytest.param([torch.bfloat16], (10, 1000, CLASSES[-1]), id="bfloat16"),
        pytest.param(
            [torch.float64, torch.float32, torch.float16], (10, 1000, ONE_PASS), id="all", marks=pytest.mark.slow
        ),
    ],
)
def test_every_kernel_compiles_for_amd(dtypes: list[torch.dtype], classes: tuple[int, ...]) -> None:
    for variant in variants(dtypes, classes):
        with compiling("gfx942") as launches:
            variant.call()
        (launch,) = launches
        made = launch.compiled
        assert made.metadata.target.backend == "hip" and len(made.asm["hsaco"]) > 0
        # A warp has 64 threads there, and a block 1024 at most.
        assert made.metadata.num_warps <= 16


def test_an_architecture_that_is_not_in_the_table_gets_the_nearest() -> None:
    with compiling("sm_90"):
        known = tuning.tile("jsd", torch.float32, 1000)
    with compiling("gfx942"):
        assert tuning.tile("jsd", torch.float32, 1000) == known
        assert tuning.tile("jsd", torch.float32, 8192).warps == 16 < tuning.tile_of("jsd", "float32", "8192", 90).warps
