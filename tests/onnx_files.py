"""ONNX files made by hand, node by node, and how they are asked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from mekd.oracle.ort import OnnxOracle
from mekd.oracle.response import Response

IMAGE = (3, 8, 8)
SMALL = (1, 2, 3)  # an image whose six pixels are the six classes of echo()
NAMES = ["ant", "bee", "cat", "dog", "emu", "fox"]
FLOAT, INT64, STRING, UINT8 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING, TensorProto.UINT8
#: What both the installed onnx and older ONNX Runtimes read.
IR_VERSION, OPSET = 8, 17


def pixels(m: int, image: Sequence[int] = IMAGE, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (m, *image), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[tuple[str, int, Sequence[Any] | None]],
    outputs: list[tuple[str, int, Sequence[Any] | None]],
    constants: dict[str, Any] | None = None,
) -> Path:
    """Write a graph; inputs and outputs are (name, type, shape)."""
    tensors = []
    for name, value in (constants or {}).items():
        if isinstance(value, list):  # of strings
            tensors.append(helper.make_tensor(name, STRING, [len(value)], [item.encode() for item in value]))
        else:
            tensors.append(numpy_helper.from_array(np.asarray(value), name))
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*o) for o in outputs],
        tensors,
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION), str(path))
    return path


def echo(
    path: Path,
    tail: list[onnx.NodeProto] | None = None,
    *,
    shape: Sequence[Any] = ("m", *SMALL),
    dtype: int = FLOAT,
    head: list[onnx.NodeProto] | None = None,
    output: tuple[str, int, Sequence[Any] | None] = ("scores", FLOAT, ["m", 6]),
    constants: dict[str, Any] | None = None,
) -> Path:
    """A classifier whose logits are the very numbers it was fed; head works on "x", tail from "flat" to its output."""
    fed = head[-1].output[0] if head else "x"
    nodes = [
        *(head or []),
        helper.make_node("Flatten", [fed], ["whole"]),
        helper.make_node("Cast", ["whole"], ["flat"], to=FLOAT),
        *(tail if tail is not None else [helper.make_node("Identity", ["flat"], [output[0]])]),
    ]
    return save(path, nodes, [("x", dtype, shape)], [output], constants)


def argmax(*behind: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The tail of a classifier that answers "best", the class index."""
    return [helper.make_node("ArgMax", ["flat"], ["best"], axis=1, keepdims=0), *behind]


def named(path: Path) -> Path:
    tail = argmax(helper.make_node("Gather", ["names", "best"], ["name"]))
    return echo(path, tail, output=("name", STRING, ["m"]), constants={"names": NAMES})


def expected_small(images: Tensor) -> Tensor:
    """What echo() answers if it is fed pixels in [0, 1]."""
    return images.float().div(255).flatten(1)


def asked(path: Path, response: str = "logits", **options: Any) -> OnnxOracle:
    return OnnxOracle(path, response, providers="cpu", **options)


def values(response: Response) -> Tensor:
    assert response.values is not None
    return response.values
