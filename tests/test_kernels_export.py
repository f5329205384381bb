"""python -m mekd.kernels.export: cubins and the manifest that says how each is launched."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mekd import extension
from mekd.files import WriteError

pytest.importorskip("triton")
if extension.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled in this process", allow_module_level=True)

from mekd.kernels import export as exporter
from mekd.kernels.aot import compiling
from mekd.kernels.export import export, main
from mekd.kernels.variants import variants


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("cubins") / "sm_90"
    export("sm_90", out, [torch.bfloat16], [1000])
    return out, json.loads((out / "manifest.json").read_text())


def test_every_kernel_is_there_as_the_manifest_says(exported: tuple[Path, dict[str, Any]]) -> None:
    out, manifest = exported
    assert manifest["arch"] == "sm_90"
    listed = manifest["kernels"]
    wanted = {(v.kernel, v.name, v.classes) for v in variants([torch.bfloat16], [1000])}
    assert {(k["op"], k["variant"], k["c"]) for k in listed} == wanted
    assert {path.name for path in out.iterdir()} == {"manifest.json", *(k["file"] for k in listed)}
    for kernel in listed:
        cubin = (out / kernel["file"]).read_bytes()
        assert cubin[:4] == b"\x7fELF" and kernel["name"].encode() in cubin
        assert hashlib.sha256(cubin).hexdigest() == kernel["sha256"]


def test_a_launch_is_described_whole(exported: tuple[Path, dict[str, Any]]) -> None:
    (kernel,) = (k for k in exported[1]["kernels"] if (k["op"], k["variant"]) == ("gan_generator", "logits"))
    with compiling("sm_90") as launches:
        for variant in variants([torch.bfloat16], [1000]):
            if (variant.kernel, variant.name) == ("gan_generator", "logits"):
                variant.call()
    (launch,) = launches
    entry = re.search(r"\.entry .*?\)", launch.compiled.asm["ptx"], re.DOTALL)
    assert entry is not None
    parameters = re.findall(r"\.param \.(\w+)", entry[0])
    kinds = {"*bf16": "u64", "*fp32": "u64", "fp64": "f64", "i32": "u32"}
    # As the manifest says: the arguments, then two null pointers.
    assert parameters == [*(kinds[kind] for kind in kernel["arguments"].values()), "u64", "u64"]
    assert kernel["constants"]["CLASSES"] == 1000 and kernel["constants"]["LOGITS"] is True
    assert kernel["grid"] == [4096] and kernel["warps"] == 4 and kernel["shared"] == launch.compiled.metadata.shared
    assert set(kernel["divisible_by_16"]) <= set(kernel["arguments"])


def test_a_second_export_leaves_nothing_half_written(
    exported: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, manifest = exported
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(path: Path, text: str) -> None:
        raise WriteError(f"{path} could not be written (disk full)")

    monkeypatch.setattr(exporter, "write_text", full)
    with pytest.raises(WriteError, match="disk full"):
        export("sm_90", out, [torch.float32], [10])
    # The first manifest, and all that it lists, are what they were.
    assert {name: (out / name).read_bytes() for name in before} == before
    assert json.loads((out / "manifest.json").read_text()) == manifest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arch", "sm_70", "--out", "x"], "arch is 'sm_70'; it must be one of 'sm_80', 'sm_90', 'sm_100', 'sm_120'"),
        (["--arch", "sm_90", "--out", "x", "--classes", "0"], "classes are [0]; they must be numbers from 1 on"),
        # A file is no folder.
        (["--arch", "sm_90", "--out", "file"], "out is file, and the folder cannot be made"),
        (["--arch", "sm_90", "--out", "file/below"], "out is file/below, and the folder cannot be made"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
