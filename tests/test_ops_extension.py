"""The C++ kernels come and go: a build for each instruction set, a broken one, an old torch, and none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mekd
from mekd import extension
from op_grid import KERNELS, check, make

HERE = Path(__file__).parent
PACKAGE = Path(mekd.__file__).parent


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU here: the Triton kernels are tested interpreted alone, with TRITON_INTERPRET=1, as make test does",
)
def test_the_tests_of_the_ops_include_the_triton_kernels() -> None:
    assert any(param.values == ("triton",) for param in KERNELS)
    check(make("logits", device="cuda"), "triton")


def python(code: str, *arguments: str, path: Path = PACKAGE.parent, **environment: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code, *arguments],
        capture_output=True, text=True, timeout=120, cwd=path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(HERE)]), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


ONE_BUILD = """
import sys
import torch
from mekd import extension
from op_grid import KINDS, ROW_KINDS, check, make

assert extension.LOADED == sys.argv[1], (extension.LOADED, extension.WHY_NOT)
for kind in KINDS:
    for classes in (1, 7, 10, 33, 1100):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            check(make(kind, (9, classes), dtype), "cpp", "mean" if kind == "discriminator" else "none")
    if kind in ROW_KINDS:
        for values in ("near", "gap"):
            check(make(kind, (9, 100), values=values), "cpp")
print("as the truth")
"""


@pytest.mark.skipif(extension.LOADED is None, reason=extension.WHY_NOT)
@pytest.mark.parametrize("build", extension.CAPABILITIES)
def test_every_build_computes_the_same(build: str) -> None:
    if build not in extension.possible():
        pytest.skip(f"torch sees no {build} here, and the build for it would not run")
    assert "as the truth" in python(ONE_BUILD, build, MEKD_CPU=build.lower())


@pytest.mark.skipif(extension.LOADED is None, reason=extension.WHY_NOT)
def test_the_best_build_for_this_processor_runs() -> None:
    built = [build for build in extension.possible() if list(PACKAGE.glob(extension.name(build) + ".*"))]
    assert os.environ.get("MEKD_CPU", built[0]).upper() == extension.LOADED
    assert extension.WHY_NOT == ""
    # And each op of the schema has its kernel: nothing runs on the reference in silence.
    for op in ("tempered_kl", "tempered_kl_labels", "tempered_kl_topk", "dkd", "jsd", "tanh_l1", "tanh_l1_",
               "gan_generator", "gan_discriminator"):  # fmt: skip
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mekd::{op}", "CPU")


@pytest.fixture
def without_kernels(tmp_path: Path) -> Path:
    """A folder with mekd as it is installed with MEKD_NO_EXT=1."""
    shutil.copytree(PACKAGE, tmp_path / "mekd", ignore=shutil.ignore_patterns("_cpu_*", "__pycache__"))
    return tmp_path


WITHOUT = """
import sys, warnings
import torch
import mekd
assert mekd.__file__.startswith(sys.argv[1]), mekd.__file__
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from mekd import extension
    from mekd.functional import discriminator_loss, image_l1_loss, kd_loss
    assert extension.LOADED is None
    assert not caught  # importing is no use yet
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    reference = kd_loss(student, teacher, impl="reference")
    assert not caught  # whoever names the reference gets what was asked for
    for _ in range(3):
        loss = kd_loss(student, teacher)
        loss.backward()
        image_l1_loss(student * 1, teacher, inplace=True).backward()
        discriminator_loss(student[0], teacher[0])
    assert torch.equal(loss, reference)
    assert len(caught) == 1, [str(w.message) for w in caught]
    print("warned:", caught[0].message)
    for call in (lambda: kd_loss(student, teacher, impl="cpp"),
                 lambda: image_l1_loss(student * 1, teacher, inplace=True, impl="cpp"),
                 lambda: discriminator_loss(student[0], teacher[0], impl="cpp")):
        try:
            call()
        except RuntimeError as error:
            print("refused:", error)
        else:
            raise AssertionError("impl='cpp' ran without an extension")
"""


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        # Never built: MEKD_NO_EXT=1, or no compiler.
        ("", "not built"),
        # No processor has it.
        ("avx10", "MEKD_CPU in the environment is 'avx10'; this processor can run "),
    ],
)
def test_without_kernels_the_reference_runs_and_says_so_once(without_kernels: Path, build: str, reason: str) -> None:
    out = python(WITHOUT, str(without_kernels), path=without_kernels, MEKD_CPU=build)
    warned, *refused = [line for line in out.splitlines() if line.startswith(("warned:", "refused:"))]
    assert reason in warned
    assert len(refused) == 3
    assert all(reason in line and "impl='cpp'" in line for line in refused)


def test_a_library_that_does_not_load_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The right name, but no library: neither an exception nor silence.
    for build in extension.CAPABILITIES:
        (tmp_path / f"{extension.name(build)}.so").write_text("no library")
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "extension.py"))
    loaded, reason = extension._load()
    assert loaded is None
    assert "does not load" in reason and extension.name(extension.possible()[0]) in reason


def test_a_torch_without_the_stable_abi_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert extension._load() == (None, "its C++ kernels take torch 2.10 or newer, and this is torch 2.9.1+cpu")


@pytest.mark.skipif(extension.LOADED is None, reason=extension.WHY_NOT)
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_the_builds_take_nothing_of_torch_but_its_stable_abi() -> None:
    found = sorted(PACKAGE.glob("_cpu_*"))
    assert found
    for path in found:
        command = ["nm", "-DC", "--undefined-only", str(path)]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        names = [line.split(maxsplit=1)[1] for line in listed]
        ours = [name for name in names if not any(word in name for word in ("@GLIBC", "@GCC", "@CXXABI"))]
        strange = [name for name in ours if not name.startswith(("aoti_torch_", "torch_", "_ITM_", "__gmon_start__"))]
        assert any(name.startswith("aoti_torch_") for name in ours) and not strange


def test_a_backend_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "LOADED", None)
    monkeypatch.setattr(extension, "WHY_NOT", "its C++ kernels are on holiday")
    for kind in ("logits", "tanh", "in-place", "gan-logits", "discriminator"):
        problem = make(kind)
        with pytest.raises(RuntimeError, match=r"impl='cpp' is not available: its C\+\+ kernels are on holiday"):
            students = [(x.requires_grad_() * 1) for x in problem.students]
            problem.loss(*students, reduction="mean", impl="cpp")
