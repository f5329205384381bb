"""A teacher is its .onnx file and every file of weights that it names, wherever in the file it names them."""

import hashlib
import os
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mekd.oracle import identity
from mekd.oracle.identity import digest, external_files, size_bytes
from mekd.oracle.session import ModelError
from onnx_files import FLOAT, IR_VERSION, OPSET, asked, echo, pixels, values

IMAGE = (1, 2, 3)


def linear(path: Path, weights: np.ndarray, location: str = "weights.bin") -> Path:
    """A linear layer whose weights lie in a file beside it."""
    nodes = [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["z"])]
    source = helper.make_tensor_value_info("x", FLOAT, ["m", *IMAGE])
    sink = helper.make_tensor_value_info("z", FLOAT, ["m", 4])
    graph = helper.make_graph(nodes, "g", [source], [sink], [numpy_helper.from_array(weights, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    path.parent.mkdir(exist_ok=True)
    onnx.save(model, str(path), save_as_external_data=True, location=location, size_threshold=0)
    return path


def draw(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((6, 4)).astype(np.float32)


def test_two_teachers_of_one_graph_differ_by_their_weights(tmp_path: Path) -> None:
    a, b = (linear(tmp_path / str(seed) / "x.onnx", draw(seed)) for seed in (0, 1))
    assert a.read_bytes() == b.read_bytes() and digest(a) != digest(b)
    again = linear(tmp_path / "again" / "x.onnx", draw(0))
    assert digest(again) == digest(a)  # wherever it lies
    assert external_files(a) == [a.parent / "weights.bin"]
    assert size_bytes(a) == a.stat().st_size + 6 * 4 * 4
    images = pixels(2, IMAGE)
    expected = images.reshape(2, -1).numpy() / np.float32(255) @ draw(0)
    np.testing.assert_allclose(values(asked(a).query(images)), expected, rtol=1e-5, atol=1e-6)
    # Other weights under the same name, within a process.
    (a.parent / "weights.bin").write_bytes((b.parent / "weights.bin").read_bytes())
    os.utime(a.parent / "weights.bin", ns=(1, 1))
    assert digest(a) == digest(b)


def test_a_file_of_its_own_has_the_hash_of_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = echo(tmp_path / "x.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)  # the package is not needed
    assert digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert size_bytes(path) == path.stat().st_size and external_files(path) == []


def test_a_file_is_read_once_while_it_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = linear(tmp_path / "x.onnx", draw(0))
    first = digest(path)
    monkeypatch.setattr(identity, "_chunks", lambda *what: pytest.fail("read again"))
    assert digest(path) == first


def test_a_missing_file_of_weights_is_named(tmp_path: Path) -> None:
    path = linear(tmp_path / "x.onnx", draw(0), "layer.bin")
    (tmp_path / "layer.bin").unlink()
    for call in (digest, size_bytes, asked):
        with pytest.raises(ModelError, match=r"x.onnx keeps weights in 'layer.bin', which is not in .*: put it there"):
            call(path)
    with pytest.raises(ModelError, match=r"teacher.onnx is '.*nowhere.onnx'; no such file"):
        digest(tmp_path / "nowhere.onnx")


def test_no_package_to_find_them_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = linear(tmp_path / "x.onnx", draw(0))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModelError, match="may keep weights in other files, which the package onnx finds: pip install"):
        digest(path)


def tensor(location: str) -> onnx.TensorProto:
    outside = onnx.TensorProto(name=location, data_type=TensorProto.FLOAT, dims=[1])
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key="location", value=location)
    return outside


def test_weights_are_found_wherever_the_file_names_them(tmp_path: Path) -> None:
    inner = helper.make_graph([], "inner", [], [], [tensor("subgraph")])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=tensor("attribute")),
        helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner),
    ]
    graph = helper.make_graph(nodes, "g", [], [], [tensor("initializer")])
    graph.sparse_initializer.add().values.CopyFrom(tensor("sparse"))
    model = helper.make_model(graph)
    constant = [helper.make_node("Constant", [], ["b"], value=tensor("function"))]
    model.functions.append(helper.make_function("mine", "f", [], ["b"], constant, [helper.make_opsetid("", OPSET)]))
    path = tmp_path / "x.onnx"
    path.write_bytes(model.SerializeToString())
    names = ["attribute", "function", "initializer", "sparse", "subgraph"]
    for name in names:
        (tmp_path / name).write_bytes(b"1234")
    assert [part.name for part in external_files(path)] == names
    seen = {digest(path)}
    for name in names:
        (tmp_path / name).write_bytes(b"12345")
        seen.add(digest(path))
    assert len(seen) == 1 + len(names)
