"""What an ONNX file's outputs mean is told by their values, and asked of the user where two readings remain."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from mekd.oracle import graph as graph_file
from mekd.oracle.session import ModelError
from onnx_files import FLOAT, INT64, NAMES, STRING, asked, pixels, save, values

IMAGE, CLASSES = (1, 4, 4), 5
OUT: tuple[str, int, list[Any]] = ("out", FLOAT, ["m", CLASSES])
node = helper.make_node


def constants() -> dict[str, Any]:
    """Weights of several linear layers; drawn once, so that every case answers alike."""
    generator = np.random.default_rng(0)

    def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * generator.standard_normal(shape)).astype(np.float32)

    centred = draw(16, CLASSES)
    centred -= centred.mean(0)  # so that the best class differs from image to image
    return {
        "w": centred, "v": draw(16, CLASSES), "w1": draw(16, 1), "w7": draw(16, 7), "none": draw(16, 5) * 0,
        "third": np.full(CLASSES, 0.2, np.float32), "tiny": draw(16, CLASSES, scale=1e-4), "half": np.float32(0.5),
        "hundred": np.float32(100), "lowest": np.float32(0), "highest": np.float32(1),
        "order": np.array([4, 2, 0, 1, 3]), "axes": np.array([2, 3]), "three": np.array([3]),
        "one": np.array([1]), "names": NAMES[:CLASSES], "boxes": np.array([-1, CLASSES, 4]), "w20": draw(16, 20),
        "wide": draw(16, 200) * 0, "hundredth": np.float32(0.01),
    }  # fmt: skip


LOGITS = [node("Flatten", ["x"], ["flat"]), node("MatMul", ["flat", "w"], ["z"])]
OTHER = [node("MatMul", ["flat", "v"], ["y"])]
P = [node("Softmax", ["z"], ["p"], axis=1)]
Q = [node("Softmax", ["y"], ["q"], axis=1)]
BEST = [node("ArgMax", ["z"], ["best"], axis=1, keepdims=0)]
TOP = [node("TopK", ["z", "three"], ["top", "which"], axis=1)]
COLUMN = [node("MatMul", ["flat", "w1"], ["c"])]


@dataclass
class Case:
    """nodes behind the input x; outputs; reads: the reading, or says: a part of the refusal."""

    nodes: list[onnx.NodeProto]
    reads: str = ""
    says: str = ""
    outputs: Sequence[tuple[str, int, list[Any] | None]] = (OUT,)
    options: dict[str, Any] = field(default_factory=dict)
    of: str = "z"


def to(op: str, *inputs: str, **attributes: Any) -> list[onnx.NodeProto]:
    """The last node of a case."""
    return [node(op, list(inputs), ["out"], **attributes)]


SCORES = [("z", FLOAT, ["m", CLASSES])]
INDEX = [("best", INT64, ["m"])]
OPEN = "leaves open how its answer is to be read"
CASES = {
    # One output: what it holds is in its values.
    "logits": Case([*LOGITS, *to("Identity", "z")], "logits"),
    "logits behind a ReLU": Case([*LOGITS, *to("Relu", "z")], "logits", of="relu"),
    "softmax": Case([*LOGITS, *P, *to("Identity", "p")], "probs"),
    "log-softmax": Case([*LOGITS, *to("LogSoftmax", "z", axis=1)], "logits", of="log"),
    "mean of softmaxes": Case(
        [*LOGITS, *OTHER, *P, *Q, node("Add", ["p", "q"], ["s"]), *to("Mul", "s", "half")], "probs", of="mean"
    ),
    "exp of log-softmax": Case([*LOGITS, node("LogSoftmax", ["z"], ["l"], axis=1), *to("Exp", "l")], "probs"),
    "exp over a sum": Case(
        [*LOGITS, node("Exp", ["z"], ["e"]), node("ReduceSum", ["e", "one"], ["s"], keepdims=1), *to("Div", "e", "s")],
        "probs",
    ),
    "softmax and Clip": Case([*LOGITS, *P, *to("Clip", "p", "lowest", "highest")], "probs"),
    "softmax and Transpose": Case(
        [*LOGITS, *P, node("Transpose", ["p"], ["t"], perm=[1, 0]), *to("Transpose", "t", perm=[1, 0])], "probs"
    ),
    "softmax and Gather": Case([*LOGITS, *P, *to("Gather", "p", "order", axis=1)], "probs", of="turned"),
    "softmax rounded": Case(
        [*LOGITS, *P, node("Mul", ["p", "hundred"], ["c"]), node("Round", ["c"], ["r"]), *to("Div", "r", "hundred")],
        "probs",
        of="rounded",
    ),
    "softmax in a local function": Case([*LOGITS, node("Classify", ["z"], ["out"], domain="mine")], "probs"),
    "float16": Case(
        [*LOGITS, *P, *to("Cast", "p", to=TensorProto.FLOAT16)],
        "probs",
        outputs=[("out", TensorProto.FLOAT16, ["m", CLASSES])],
    ),
    "double, idle axes": Case(
        [*LOGITS, *P, node("Cast", ["p"], ["d"], to=TensorProto.DOUBLE), *to("Unsqueeze", "d", "axes")],
        "probs",
        outputs=[("out", TensorProto.DOUBLE, ["m", CLASSES, 1, 1])],
    ),
    "classes last": Case(
        [*LOGITS, node("Unsqueeze", ["z", "one"], ["u"]), *to("Unsqueeze", "u", "one")],
        "logits",
        outputs=[("out", FLOAT, ["m", 1, 1, CLASSES])],
    ),
    "sigmoids": Case([*LOGITS, *to("Sigmoid", "z")], says="between 0 and 1 that do not sum to 1.*--oracle.output log"),
    "sigmoids, said to be logits": Case([*LOGITS, *to("Sigmoid", "z")], "logits", options={"output": "logits"}, of="s"),
    "sigmoids, said to be probabilities": Case(
        [*LOGITS, *to("Sigmoid", "z")], says="no probabilities: numbers from", options={"output": "probs"}
    ),
    "small logits of a linear layer": Case(
        [*LOGITS, node("MatMul", ["flat", "tiny"], ["l"]), *to("Add", "l", "half")], "logits", of="small"
    ),
    "a layer of zeros": Case([*LOGITS, *to("MatMul", "flat", "none")], "logits", of="none"),
    "a wide layer of zeros": Case(
        [*LOGITS, *to("MatMul", "flat", "wide")], "logits", outputs=[("out", FLOAT, ["m", 200])], of="wide"
    ),
    "a wide layer of zeros, said to be probabilities": Case(
        [*LOGITS, *to("MatMul", "flat", "wide")],
        says="no probabilities: numbers from 0 to 0, rows that sum to 0 to 0",
        outputs=[("out", FLOAT, ["m", 200])],
        options={"output": "probs"},
    ),
    "a wide layer of hundredths": Case(
        [*LOGITS, node("MatMul", ["flat", "wide"], ["l"]), *to("Add", "l", "hundredth")],
        "logits",
        outputs=[("out", FLOAT, ["m", 200])],
        of="hundredths",
    ),
    "small numbers behind a ReLU": Case(
        [*LOGITS, node("MatMul", ["flat", "tiny"], ["l"]), *to("Relu", "l")], says="between 0 and 1"
    ),
    "small numbers behind a ReLU, called logits": Case(
        [*LOGITS, node("MatMul", ["flat", "tiny"], ["l"]), node("Relu", ["l"], ["logits"])],
        "logits",
        outputs=[("logits", FLOAT, ["m", CLASSES])],
        of="small relu",
    ),
    "a softmax of zeros": Case(
        [*LOGITS, node("MatMul", ["flat", "none"], ["l"]), *to("Softmax", "l", axis=1)], "probs", of="even"
    ),
    "logits that nearly sum to 1": Case(
        [*LOGITS, node("MatMul", ["flat", "tiny"], ["l"]), *to("Add", "l", "third")],
        says="nearly equal numbers that sum to 1: probabilities or logits .*--oracle.output",
    ),
    "per cent": Case([*LOGITS, *P, *to("Mul", "p", "hundred")], says="shares that sum to 100; they must sum to 1"),
    "a softmax over the images": Case([*LOGITS, *to("Softmax", "z", axis=0)], says="that do not sum to 1"),
    # One column.
    "the probability of one class": Case(
        [*LOGITS, *COLUMN, *to("Sigmoid", "c")], "probs", outputs=[("out", FLOAT, ["m", 1])], of="binary"
    ),
    "one logit": Case(
        [*LOGITS, *to("MatMul", "flat", "w1")],
        says="one column .*--oracle.output logits",
        outputs=[("out", FLOAT, ["m", 1])],
    ),
    "one logit, as the user says": Case(
        [*LOGITS, *to("MatMul", "flat", "w1")],
        "logits",
        outputs=[("out", FLOAT, ["m", 1])],
        options={"output": "logits"},
        of="binary",
    ),
    "class indices as floats": Case(
        [*LOGITS, *BEST, *to("Cast", "best", to=FLOAT)],
        says="class indices as floating",
        outputs=[("out", FLOAT, ["m"])],
    ),
    # Several outputs.
    "largest probability beside the class": Case(
        [*LOGITS, *P, *BEST, *to("ReduceMax", "p", axes=[1])],
        says=f"{OPEN}.*out: .*the largest scores alone.*best: .*class indices",
        outputs=[("out", FLOAT, ["m", 1]), *INDEX],
    ),
    "TopK": Case(
        [*LOGITS, *TOP, *to("Identity", "which")],
        says="it needs an output .*top: .*the largest scores alone",
        outputs=[("top", FLOAT, ["m", 3]), ("out", INT64, ["m", 3])],
    ),
    "TopK values through a function": Case(
        [*LOGITS, *TOP, node("Same", ["top"], ["out"], domain="mine")],
        says="it needs an output .*which: ",
        outputs=[("out", FLOAT, ["m", 3]), ("which", INT64, ["m", 3])],
    ),
    "TopK values alone": Case(
        [*LOGITS, *TOP, *to("Identity", "top")], says="the largest scores alone", outputs=[("out", FLOAT, ["m", 3])]
    ),
    "TopK beside all logits": Case(
        [*LOGITS, *TOP], "logits", outputs=[("top", FLOAT, ["m", 3]), ("which", INT64, ["m", 3]), *SCORES]
    ),
    "an embedding before the logits": Case(
        [*LOGITS, *to("MatMul", "flat", "w7")],
        says=rf"{OPEN}. Name the one .*--oracle.output_name NAME.*out: .* 7\]",
        outputs=[("out", FLOAT, ["m", 7]), *SCORES],
    ),
    "an embedding, and the number of classes": Case(
        [*LOGITS, *to("MatMul", "flat", "w7")],
        "logits",
        outputs=[("out", FLOAT, ["m", 7]), *SCORES],
        options={"num_classes": CLASSES},
    ),
    "an embedding beside the class": Case(
        [*LOGITS, *BEST, *to("MatMul", "flat", "w7")],
        says="the labels in best are not the best classes of out",
        outputs=[("out", FLOAT, ["m", 7]), *INDEX],
    ),
    "an auxiliary head": Case([*LOGITS, *to("MatMul", "flat", "v")], says=OPEN, outputs=[OUT, *SCORES]),
    "an auxiliary head, and the main one named": Case(
        [*LOGITS, *to("MatMul", "flat", "v")], "logits", outputs=[OUT, *SCORES], options={"output_name": "z"}
    ),
    "a name that is none": Case(
        [*LOGITS, *to("Identity", "z")],
        says=r"no output 'probs' \(oracle.output_name\); it has out: tensor",
        options={"output_name": "probs"},
    ),
    "TopK values named": Case(
        [*LOGITS, *TOP],
        says="names cannot be read: top: .*largest scores alone",
        outputs=[("top", FLOAT, ["m", 3]), *SCORES],
        options={"output_name": "top"},
    ),
    "logits and their probabilities": Case(
        [*LOGITS, *P, *to("Identity", "p")], "probs", outputs=[*SCORES, OUT], options={"response": "probs"}
    ),
    "probabilities and their logits": Case([*LOGITS, *P, *to("Identity", "p")], "logits", outputs=[OUT, *SCORES]),
    "a class beside its scores": Case([*LOGITS, *BEST], "logits", outputs=[*INDEX, *SCORES]),
    "a feature map": Case([*LOGITS, *to("Identity", "x")], "logits", outputs=[("out", FLOAT, ["m", *IMAGE]), *SCORES]),
    "a detector": Case(
        [*LOGITS, node("MatMul", ["flat", "w20"], ["b"]), *to("Reshape", "b", "boxes")],
        says=OPEN,
        outputs=[("out", FLOAT, ["m", CLASSES, 4]), *SCORES],
    ),
    "scikit-learn's": Case(
        [
            *LOGITS[:1],
            node(
                "LinearClassifier",
                ["flat"],
                ["best", "out"],
                domain="ai.onnx.ml",
                coefficients=constants()["w"].T.flatten().tolist(),
                intercepts=[0.0] * CLASSES,
                classlabels_ints=list(range(CLASSES)),
                post_transform="SOFTMAX",
            ),
        ],
        "probs",
        outputs=[*INDEX, OUT],
    ),
    "class names beside probabilities": Case(
        [*LOGITS, *P, *BEST, node("Gather", ["names", "best"], ["name"]), *to("Identity", "p")],
        "probs",
        outputs=[OUT, ("name", STRING, ["m"])],
        options={"classes": NAMES[:CLASSES]},
    ),
    "class names in another order": Case(
        [*LOGITS, *P, *BEST, node("Gather", ["names", "best"], ["name"]), *to("Identity", "p")],
        says="oracle.classes has another order",
        outputs=[OUT, ("name", STRING, ["m"])],
        options={"classes": NAMES[:CLASSES][::-1]},
    ),
    # Values that are no numbers.
    "NaN for the blank image": Case(
        [*LOGITS, node("ReduceMax", ["flat"], ["s"], axes=[1]), node("Div", ["s", "s"], ["n"]), *to("Mul", "z", "n")],
        "logits",
    ),
    "NaN for every image": Case(
        [*LOGITS, node("Sub", ["z", "z"], ["n"]), *to("Div", "n", "n")],
        says="NaN or infinity for 8 of 8 images that were tried",
    ),
    "a class that is masked": Case(
        [*LOGITS, node("Log", ["mask"], ["l"]), *to("Add", "z", "l")],
        "logits",
        of="masked",
    ),
}


def written(path: Path, case: Case) -> Path:
    tensors = {**constants(), "mask": np.array([1, 1, 0, 1, 1], np.float32)}
    used = {name for n in case.nodes for name in n.input}
    save(
        path,
        case.nodes,
        [("x", FLOAT, ["m", *IMAGE])],
        list(case.outputs),
        {k: tensors[k] for k in tensors if k in used},
    )
    model = onnx.load(str(path))
    if any(n.domain == "mine" for n in case.nodes):
        domain, opset = helper.make_opsetid("mine", 1), [helper.make_opsetid("", 17)]
        model.opset_import.append(domain)
        inside = {"Classify": node("Softmax", ["a"], ["b"], axis=1), "Same": node("Identity", ["a"], ["b"])}
        for name, inner in inside.items():
            model.functions.append(helper.make_function("mine", name, ["a"], ["b"], [inner], opset))
        onnx.save(model, str(path))
    return path


def truth(of: str, reads: str) -> torch.Tensor:
    """The answers to five images in float64: logits, or probabilities."""
    c = {name: torch.from_numpy(np.asarray(v)).double() for name, v in constants().items() if name != "names"}
    x = pixels(5, IMAGE, seed=7).double().flatten(1) / 255
    z = x @ c["w"]
    p = z.softmax(-1)
    binary = torch.cat([torch.zeros(5, 1), x @ c["w1"]], 1)
    special = {
        "mean": (p + (x @ c["v"]).softmax(-1)) / 2, "turned": p[:, [4, 2, 0, 1, 3]],
        "rounded": p.mul(100).round() / 100, "relu": z.relu(), "wide": x @ c["wide"],
        "hundredths": x @ c["wide"] + 0.01, "small relu": (x @ c["tiny"]).relu(),
        "log": z.log_softmax(-1), "s": z.sigmoid(),
        "small": x @ c["tiny"] + 0.5, "none": x @ c["none"], "even": torch.full((5, 5), 0.2),
        "binary": binary.softmax(-1) if reads == "probs" else binary,
        "masked": z + torch.tensor([1.0, 1, 0, 1, 1]).log(),
    }  # fmt: skip
    return special.get(of, p if reads == "probs" else z)


@pytest.mark.parametrize("name", CASES)
def test_the_reading_of_a_file(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    path = written(tmp_path / "x.onnx", case)
    options = dict(case.options)
    response = options.pop("response", "probs" if case.reads == "probs" else "logits")
    if case.says:
        for asked_for in ("probs", "logits"):
            with pytest.raises(ModelError, match=case.says) as caught:
                asked(path, asked_for, **options)
            assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        return
    oracle = asked(path, response, **options)
    expected = truth(case.of, case.reads)
    assert oracle.num_classes == expected.shape[1]
    found = values(oracle.query(pixels(5, IMAGE, seed=7)))
    tolerance = 2e-3 if name == "float16" else 1e-5
    torch.testing.assert_close(found, expected.float(), rtol=tolerance, atol=tolerance)
    note = oracle.notes[0]  # others are of its input
    used = {"out", "z", "logits"} & {output for output, _, _ in case.outputs}
    assert any(f"output {output} (tensor" in note for output in used)
    assert ("binary classifier" in note) == (case.of == "binary")
    if case.reads == "probs" and "logits" not in name:  # the logits that it has not are refused
        with pytest.raises(ModelError, match="its logits cannot be had"):
            asked(path, "logits", **options)


def test_values_decide_without_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As where the package onnx is not installed.
    monkeypatch.setattr("mekd.oracle.meaning.load_graph", lambda path: None)
    for name in ("logits", "softmax", "mean of softmaxes", "log-softmax", "the probability of one class"):
        case = CASES[name]
        found = values(asked(written(tmp_path / "x.onnx", case), case.reads).query(pixels(5, IMAGE, seed=7)))
        torch.testing.assert_close(found, truth(case.of, case.reads).float(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match="between 0 and 1 that do not sum to 1"):
        asked(written(tmp_path / "x.onnx", CASES["a layer of zeros"]))


@pytest.mark.parametrize("response", ["label", "probs"])
def test_a_class_beside_its_probability_alone(tmp_path: Path, response: str) -> None:
    path = written(tmp_path / "x.onnx", CASES["largest probability beside the class"])
    if response == "probs":
        with pytest.raises(ModelError, match=OPEN):
            asked(path, response)
        return
    with pytest.raises(ModelError, match=r"say --oracle.num_classes N"):
        asked(path, response)
    oracle = asked(path, response, num_classes=CLASSES)
    labels = oracle.query(pixels(5, IMAGE, seed=7)).labels
    assert torch.equal(labels, truth("z", "logits").argmax(-1)) and len(labels.unique()) > 1


def test_the_graph_is_not_parsed_where_the_values_suffice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise AssertionError("parsed")

    path = written(tmp_path / "x.onnx", CASES["logits"])
    monkeypatch.setattr("mekd.oracle.meaning.load_graph", refuse)
    asked(path)


def test_what_the_graph_says_of_an_output(tmp_path: Path) -> None:
    endings = {
        "logits": "linear", "softmax": "softmax", "mean of softmaxes": "unknown", "sigmoids": "sigmoid",
        "softmax and Gather": "unknown", "small logits of a linear layer": "linear", "per cent": "unknown",
        "TopK values alone": "top", "softmax in a local function": "unknown", "softmax and Transpose": "softmax",
    }  # fmt: skip
    for name, expected in endings.items():
        graph = graph_file.load_graph(written(tmp_path / "x.onnx", CASES[name]))
        assert graph_file.ending(graph, "out") == expected, name
