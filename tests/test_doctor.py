"""mekd doctor says what runs here, what is missing, and what to install."""

import platform
import re
import sys
from importlib.metadata import metadata, requires

import pytest
import torch

from mekd import doctor as module
from mekd.doctor import EXTRAS, doctor
from mekd.oracle import session


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What was printed, by the first word of each line; the verdict is called so."""
    printed = capsys.readouterr().out.splitlines()
    return {line.split()[0]: line for line in printed[:-1] if line} | {"verdict": printed[-1]}


def installed(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """Let every package be installed but these."""
    monkeypatch.setattr(module, "_version", lambda package: None if package in missing else "1.2.3")


def test_the_main_job_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor() == 0
    said = lines(capsys)
    assert {"machine", "python", "torch", "compiler", "runtime", *EXTRAS} <= said.keys()
    assert platform.machine() in said["machine"] and "cores" in said["machine"]
    assert platform.python_version() in said["python"] and torch.__version__ in said["torch"]
    assert "runs on cpu" in said["runtime"]
    assert said["verdict"] == "the main job can run here"


def test_every_extra_that_a_user_may_want_is_listed() -> None:
    extras = metadata("mekd").get_all("Provides-Extra") or []
    # Those for people who work on mekd, and those that are several others.
    own = {"onnx-gpu", "photos", "examples", "docs", "bench", "browser", "dist", "dev"}
    assert set(extras) - own == EXTRAS.keys()
    for extra, packages in EXTRAS.items():
        needed = [one for one in requires("mekd") or [] if re.search(rf"""extra == ['"]{extra}['"]""", one)]
        assert set(packages) <= {re.split(r"[\[><=; ]", one)[0] for one in needed}, extra


def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor() == 0
    said = lines(capsys)
    assert said["cuda"].startswith("cuda         none: ") and said["cuda"].endswith("everything runs on the CPU")
    # A provider that is built in but has no device must not pass for one that runs.
    assert "cuda" not in said["runtime"].split(";")[0]


def test_no_runtime(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert doctor() == 1
    said = lines(capsys)
    assert "pip install 'mekd[onnx]' (CPU) or 'mekd[onnx-gpu]'" in said["runtime"]
    assert said["verdict"] == "the main job cannot run yet: see the lines above"


def test_two_runtimes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "version", lambda package: {"onnxruntime": "1.2", "onnxruntime-gpu": "3.4"}[package])
    assert doctor() == 1
    said = lines(capsys)
    assert "onnxruntime 1.2 and onnxruntime-gpu 3.4 are both installed and overwrite each other" in said["runtime"]
    assert "pip uninstall both" in said["runtime"] and said["verdict"].startswith("the main job cannot run yet")


@pytest.mark.parametrize(
    ("extra", "package"),
    [("run", "jsonargparse"), ("onnx", "onnxscript")],
)
def test_a_missing_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, extra: str, package: str
) -> None:
    installed(monkeypatch, package)
    assert doctor() == 1
    said = lines(capsys)
    assert f"missing {package}: pip install" in said[extra] and "cannot run yet" in said["verdict"]
    assert not any("missing" in line for name, line in said.items() if name != extra)


def test_what_the_main_job_can_do_without(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "torchvision", "nvidia-dali-cuda130", "scikit-learn", "matplotlib")
    assert doctor() == 0
    said = lines(capsys)
    assert "missing matplotlib: pip install" in said["plot"], "a run without it has no pictures"
    assert "missing torchvision: pip install" in said["vision"]
    assert "missing nvidia-dali-cuda130: pip install" in said["dali"]
    assert "missing scikit-learn: pip install" in said["demo"], "which the extra photos does not bring"


def test_the_hint_does_not_bring_a_second_runtime(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, "onnx")  # and onnxruntime-gpu is there
    doctor()
    assert "'mekd[onnx]'" not in lines(capsys)["onnx"]
