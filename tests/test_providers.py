"""Where an ONNX file runs: on the execution provider that was asked for, or not at all."""

import sys
import warnings
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch

from mekd.oracle.onnx import OnnxOracle, ProviderError, open_session
from onnx_files import asked, echo


def test_cuda_never_becomes_the_cpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: CUDA may well run")
    path = echo(tmp_path / "x.onnx")
    with pytest.raises(ProviderError, match="CUDAExecutionProvider"):
        OnnxOracle(path, providers="cuda")
    with pytest.raises(ProviderError, match="CUDAExecutionProvider"):
        OnnxOracle(path, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])


def test_a_session_that_fell_back_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a machine whose driver is too old, whatever this one has.
    class Fallen:
        def __init__(self, path: str, settings: Any, providers: list[Any], enable_fallback: int) -> None:
            assert [name for name, _ in providers] == ["CUDAExecutionProvider"] and not enable_fallback

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", Fallen)
    with pytest.raises(ProviderError, match="CUDAExecutionProvider was asked for, but CPUExecutionProvider would run"):
        open_session(echo(tmp_path / "x.onnx"), "cuda")


def test_auto_runs_where_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session = open_session(echo(tmp_path / "x.onnx"))
    assert session.get_providers() == ["CPUExecutionProvider"]


def test_a_provider_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match="provider is 'gpu'; it must be auto, cpu, cuda, tensorrt"):
        OnnxOracle(echo(tmp_path / "x.onnx"), providers="gpu")


def test_a_provider_that_this_build_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = echo(tmp_path / "x.onnx")
    with pytest.raises(ProviderError, match="NoSuchExecutionProvider is not in this build of ONNX Runtime, which has"):
        OnnxOracle(path, providers=["NoSuchExecutionProvider"])
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match=r"CUDAExecutionProvider is not in this build .* has CPUExecutionProvider"):
        OnnxOracle(path, providers="cuda")


def test_no_provider_at_all(tmp_path: Path) -> None:
    with pytest.raises((ProviderError, ValueError), match="provider"):
        OnnxOracle(echo(tmp_path / "x.onnx"), providers=[])


def test_two_runtimes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mekd.oracle.session.version", lambda name: "1.2.3")
    with pytest.raises(ProviderError, match=r"onnxruntime 1.2.3 and onnxruntime-gpu 1.2.3 are both installed"):
        asked(echo(tmp_path / "x.onnx"))


def test_no_runtime_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ProviderError, match=r"not installed: pip install 'mekd\[onnx\]' \(CPU\) or 'mekd\[onnx-gpu\]'"):
        asked(tmp_path / "x.onnx")
