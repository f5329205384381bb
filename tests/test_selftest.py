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
from mekd.testing import make, truth

CPU = torch.device("cpu")


def test_every_op_is_tested() -> None:
    assert set(selftest.OPS) == {*REGISTERED, "tanh_l1_"}


@pytest.mark.parametrize("op", selftest.OPS)
def test_what_is_compiled_beside_an_op_is_the_same_loss(op: str) -> None:
    problem = make(selftest.OPS[op][0], (4, 3, 5, 5) if op.startswith("tanh") else (6, 10))
    found = selftest.plain(op, tuple(problem.students), problem.target, problem.options)
    torch.testing.assert_close(found, truth(problem, "mean")[0].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(extension.LOADED is None, reason=extension.WHY_NOT)
def test_speed_on_a_card_is_beside_torch_compile_too(capsys: pytest.CaptureFixture[str]) -> None:
    line = selftest.speed("tempered_kl", (64, 10), torch.float32, CPU, "cpp", True)
    assert line["vs_compile"] > 0 and line["of_copy"] > 0
    selftest.table([{"op": "tempered_kl", "part": "speed", **line}])
    assert "times its torch.compile |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "impl", ["cpp", *(pytest.param(impl, marks=pytest.mark.slow) for impl in ("triton", "reference"))]
)
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


def test_what_is_tested_is_the_mekd_that_was_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And not another one that lies where the command runs, without the kernels that were built into this one."""
    (tmp_path / "mekd").mkdir()
    (tmp_path / "mekd" / "__init__.py").write_text("raise SystemExit('another mekd')")
    monkeypatch.setattr(sys, "path", [os.path.abspath(folder) for folder in sys.path])
    monkeypatch.chdir(tmp_path)
    (line,) = selftest.run_op("no such op", CPU, "reference")
    assert "invalid choice: 'no such op'" in line["failed"]


@pytest.mark.parametrize(
    ("device", "cards", "said"),
    [
        ("cuda", 0, "no CUDA device is visible; use --device cpu"),
        ("cuda:2", 2, "'cuda:2', and there are 2 CUDA devices, from cuda:0"),
        ("gpu", 2, "device is 'gpu'; it must be cpu, cuda or cuda:N"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    device: str, cards: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    assert main(["selftest", "--device", device]) == 2
    assert said in capsys.readouterr().err


def test_one_card_of_several_is_made_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert [str(selftest.device_named(name)) for name in ("cuda", "cuda:1", "cpu")] == ["cuda", "cuda:1", "cpu"]
    assert current == [torch.device("cuda:1")]
