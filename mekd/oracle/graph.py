"""What the graph of an ONNX file says of an output: which node makes its values."""

from pathlib import Path
from typing import Any

#: Nodes that leave the values what they are.
_THROUGH = ("Cast", "Identity", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Dropout", "Transpose")
#: Nodes that scale or average them: a linear layer stays one, a softmax need not.
_SCALES = ("Add", "Sub", "Mul", "Div", "Neg", "GlobalAveragePool", "AveragePool", "ReduceMean", "BatchNormalization")
#: Nodes that choose some of them.
_CHOOSES = ("Gather", "Slice", "Compress")
_MAKERS = {
    "Softmax": "softmax", "Sigmoid": "sigmoid", "HardSigmoid": "sigmoid", "TopK": "top", "ReduceMax": "top",
    "Gemm": "linear", "MatMul": "linear", "Conv": "linear",
}  # fmt: skip


def load_graph(path: Path) -> Any:
    """The file's graph without its external data; None where the package onnx is not installed."""
    try:
        import onnx
    except ImportError:
        return None
    return onnx.load(str(path), load_external_data=False).graph


def ending(graph: Any, output: str) -> str:
    """What makes an output: "softmax", "sigmoid", "top" (a maximum or TopK), "linear" or "unknown"."""
    if graph is None:
        return "unknown"
    makers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    scaled = False
    while (node := makers.get(output)) is not None:
        if node.domain not in ("", "ai.onnx"):
            return "unknown"
        if node.op_type in _SCALES:
            moving = [name for name in node.input if name not in constants]
            if len(moving) != 1:
                return "unknown"
            output, scaled = moving[0], True
        elif node.op_type in (*_THROUGH, *_CHOOSES):
            output, scaled = node.input[0], scaled or node.op_type in _CHOOSES
        else:
            made = _MAKERS.get(node.op_type, "unknown")
            return made if not scaled or made == "linear" else "unknown"
    return "linear"  # the input itself
