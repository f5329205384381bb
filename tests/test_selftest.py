"""mekd selftest: each op in a process of its own, one table, and a part that fails takes no other with it."""

import os
import stat
import sys
from pathlib import Path

import pytest
import torch

from mekd import extension, selftest
from mekd.cli import main
from mekd.ops import OPS as REGISTERED

CPU = torch.device("cpu")


def test_every_op_is_tested() -> None:
    assert set(selftest.OPS) == {*REGISTERED, "tanh_l1_"}


@pytest.mark.parametrize("impl", ["triton", "reference", "cpp"])
def test_the_table(impl: str, capsys: pytest.CaptureFixture[str]) -> None:
    if impl == "cpp" and extension.LOADED is None:
        pytest.skip(extension.WHY_NOT)
    assert main(["selftest", "--device", "cpu", "--impl", impl, "--only", "gan_discriminator"]) == 0
    printed = capsys.readouterr().out
    assert f"backend {impl} on cpu" in printed
    assert "| gan_discriminator | values bfloat16 | " in printed
    assert ("| gan_discriminator | torch.compile | equal to eager |" in printed) == (impl != "reference")
    assert "times plain PyTorch |" in printed and "FAILED" not in printed


@pytest.mark.skipif(extension.LOADED is None, reason=extension.WHY_NOT)
def test_a_part_that_fails_is_told_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> dict[str, object]:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(selftest, "compiled", broken)
    lines = {line["part"]: line for line in selftest.op_lines("gan_discriminator", CPU, "cpp")}
    assert lines["torch.compile"]["failed"] == "RuntimeError: no kernel image is available"
    assert lines["values float32"]["worst"] <= 1 and any("seconds" in line for line in lines.values())


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("kill -SEGV $$", "status -11"),
        ("echo broken device >&2; exit 3", "broken device"),
        ("sleep 60", "nothing more"),
    ],
)
def test_a_process_that_dies_or_hangs_keeps_what_it_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ending: str, said: str
) -> None:
    script = tmp_path / "python"
    script.write_text(
        f'#!/bin/sh\necho \'{{"op": "dkd", "part": "values float32", "cases": 1, "worst": 0.5}}\'\n{ending}\n'
    )
    script.chmod(stat.S_IRWXU)
    monkeypatch.setattr(sys, "executable", os.fspath(script))
    monkeypatch.setattr(selftest, "LIMIT_S", 1.0)
    first, last = selftest.run_op("dkd", CPU, "reference")
    assert first["worst"] == 0.5 and last["part"] == "process" and said in last["failed"]


def test_cuda_without_a_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert main(["selftest", "--device", "cuda"]) == 2
    assert "no CUDA device is visible; use --device cpu" in capsys.readouterr().err
