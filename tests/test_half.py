"""A teacher in float16: what is converted, how it is held against float32, and when it is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from mekd.oracle import ort as onnx_oracle
from mekd.oracle.half import agreement, require_agreement, to_float16
from mekd.oracle.ort import ModelError, OnnxOracle
from mekd.oracle.session import open_session
from onnx_files import UINT8, echo, pixels


def test_the_graph_is_float16_and_its_ends_are_not(teacher_onnx: Path) -> None:
    model = onnx.load_from_string(to_float16(teacher_onnx))
    assert {value.type.tensor_type.elem_type for value in model.graph.input} == {TensorProto.UINT8}
    assert {value.type.tensor_type.elem_type for value in model.graph.output} == {TensorProto.FLOAT}
    large = [tensor for tensor in model.graph.initializer if np.prod(tensor.dims) > 100]
    assert large and {tensor.data_type for tensor in large} == {TensorProto.FLOAT16}
    images = pixels(9, (1, 16, 16)).numpy()
    whole = open_session(teacher_onnx, "cpu").run(None, {"images": images})[0]
    half = ort.InferenceSession(to_float16(teacher_onnx), providers=["CPUExecutionProvider"])
    found = half.run(None, {"images": images})[0]
    assert found.dtype == np.float32 and not np.array_equal(found, whole)
    share, difference = agreement(torch.from_numpy(found), torch.from_numpy(whole), "logits")
    assert share == 1 and 0 < difference < 0.02


def test_a_file_that_cannot_be_converted(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_text("no model")
    with pytest.raises(ModelError, match=r"x.onnx cannot be turned into float16 .*: say --oracle.precision float32"):
        to_float16(path)


LOGITS = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 0.0], [0.0, 5.0, 4.9], [1.0, 0.0, 0.5]])


def test_agreement_of_logits_is_of_probabilities() -> None:
    assert agreement(LOGITS + 7, LOGITS, "logits") == (1.0, pytest.approx(0, abs=1e-6))
    other = LOGITS.clone()
    other[2, 2] = 5.1
    share, difference = agreement(other, LOGITS, "logits")
    assert share == 0.75
    assert difference == pytest.approx(float((other.softmax(-1) - LOGITS.softmax(-1)).abs().max()))
    share, difference = agreement(other.softmax(-1).view(4, 3, 1, 1), LOGITS.softmax(-1).view(4, 3, 1, 1), "probs")
    assert share == 0.75 and 0 < difference < 0.1


def test_agreement_of_indices() -> None:
    assert agreement(torch.tensor([1, 2, 3, 0]), torch.tensor([[1], [2], [3], [4]]), "index") == (0.75, 0.0)


def test_nan_agrees_with_nothing() -> None:
    broken = LOGITS.clone()
    broken[0] = torch.nan
    with pytest.raises(ModelError, match="75% have float32's best class"):
        require_agreement("x.onnx", broken, LOGITS, "logits")
    with pytest.raises(ModelError):
        require_agreement("x.onnx", LOGITS * torch.nan, LOGITS, "probs")


def test_a_difference_that_is_too_large() -> None:
    a, b = torch.tensor([[0.6, 0.4]]), torch.tensor([[0.63, 0.37]])
    require_agreement("x.onnx", a + torch.tensor([[0.015, -0.015]]), b, "probs")
    with pytest.raises(
        ModelError, match=r"x.onnx answers otherwise in float16: of 1 random .* by 0.03 \(0.02 is allowed"
    ):
        require_agreement("x.onnx", a, b, "probs")


@pytest.fixture
def half_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU take precision="float16", which it is refused, to see what an oracle then does on a GPU."""

    def open_half(path: Path, names: Any, *, precision: str = "float32", **options: Any) -> Any:
        if precision == "float32":
            return open_session(path, "cpu")
        return ort.InferenceSession(to_float16(path), providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnx_oracle, "check_options", lambda *options: None)
    monkeypatch.setattr(onnx_oracle, "open_session", open_half)


@pytest.mark.usefixtures("half_on_the_cpu")
def test_an_oracle_in_float16(teacher_onnx: Path) -> None:
    oracle = OnnxOracle(teacher_onnx, "probs", providers="cpu", precision="float16")
    whole = OnnxOracle(teacher_onnx, "probs", providers="cpu")
    images = pixels(9, (1, 16, 16))
    (ours,), (theirs,) = oracle.query(images).tensors(), whole.query(images).tensors()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)
    assert not torch.equal(ours, theirs) and oracle.ledger.counts["queries"] == 9


@pytest.mark.usefixtures("half_on_the_cpu")
@pytest.mark.parametrize("factor", [1e9, 1e-9])
def test_a_teacher_that_float16_breaks_is_refused(tmp_path: Path, factor: float) -> None:
    # A weight that float16 cannot hold. (Pixels out of its range show on a GPU alone: the CPU computes in float32.)
    tail = [
        helper.make_node("Mul", ["flat", "factor"], ["far"]),
        helper.make_node("Sqrt", ["far"], ["near"]),
        helper.make_node("Div", ["near", "root"], ["scores"]),
    ]
    constants = {"factor": np.float32(factor), "root": np.float32(factor**0.5)}
    path = echo(tmp_path / "x.onnx", tail, dtype=UINT8, constants=constants)
    with pytest.raises(ModelError, match=r"x.onnx answers otherwise in float16: of 16 random .*precision float32"):
        OnnxOracle(path, providers="cpu", precision="float16")
