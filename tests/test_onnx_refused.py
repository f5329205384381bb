"""ONNX files that cannot be asked, and mistakes that are known before anything is paid."""

import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor

from mekd.oracle.ledger import Ledger
from mekd.oracle.ort import ModelError
from mekd.oracle.response import AnswerError
from onnx_files import FLOAT, INT64, NAMES, SMALL, UINT8, asked, echo, expected_small, named, pixels, save, values

# -- ONNX files that cannot --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([], "it has none"),
        ([("tokens", INT64, ["m", 7])], r"it has tokens: tensor\(int64\) \['m', 7\]"),
        ([("row", FLOAT, ["m", 6])], r"it has row: tensor\(float\) \['m', 6\]"),
        ([("x", INT64, ["m", *SMALL])], r"it has x: tensor\(int64\) \['m', 1, 2, 3\]"),
        ([("x", FLOAT, None)], r"it has x: tensor\(float\) \[\]"),
        (
            [("x", FLOAT, ["m", *SMALL]), ("mask", FLOAT, ["m", *SMALL])],
            r"it has x: .* \['m', 1, 2, 3\]; mask: .* \['m', 1, 2, 3\]",
        ),
    ],
    ids=["no input", "tokens", "a table", "int64 images", "no shape", "two inputs"],
)
def test_a_file_without_one_image_input(
    tmp_path: Path, inputs: list[tuple[str, int, Sequence[Any] | None]], says: str
) -> None:
    source = inputs[0][0] if inputs else "constant"
    nodes = [helper.make_node("Cast", [source], ["float"], to=FLOAT), helper.make_node("Flatten", ["float"], ["y"])]
    if len(inputs) == 2:
        nodes[0] = helper.make_node("Add", ["x", "mask"], ["float"])
    constants = {} if inputs else {"constant": np.zeros((1, *SMALL), np.float32)}
    path = save(tmp_path / "x.onnx", nodes, inputs, [("y", FLOAT, ["m", 6])], constants)
    with pytest.raises(ModelError, match=says) as caught:
        asked(path)
    assert "needs one input (m, ch, H, W) of pixels" in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (["m", 2, 3], r"it has y: tensor\(float\) \['m', 2, 3\]"),
        (["m"], r"it has y: tensor\(float\) \['m'\]"),
        (["m", 1, 2, 3], r"it has y: tensor\(float\) \['m', 1, 2, 3\], not one row of numbers for each image"),
    ],
)
@pytest.mark.parametrize("response", ["probs", "label"])
def test_an_output_that_is_no_scores(tmp_path: Path, shape: list[Any], says: str, response: str) -> None:
    sizes = {"dims": np.array([-1] + [n for n in shape[1:]])}
    tail = [helper.make_node("Reshape", ["flat", "dims"], ["y"])]
    path = echo(tmp_path / "x.onnx", tail, output=("y", FLOAT, shape), constants=sizes)
    with pytest.raises(ModelError, match=says) as caught:
        asked(path, response)
    assert "no classifier" in str(caught.value)


def test_a_map_of_probabilities_is_refused(tmp_path: Path) -> None:
    # The default of scikit-learn's converters: a list of dictionaries.
    path = tmp_path / "x.onnx"
    zipped = helper.make_node("ZipMap", ["flat"], ["maps"], domain="ai.onnx.ml", classlabels_int64s=list(range(6)))
    echo(path, [zipped], output=("maps", FLOAT, None))
    model = onnx.load(str(path))
    entry = helper.make_map_type_proto(INT64, helper.make_tensor_type_proto(FLOAT, None))
    model.graph.output[0].CopyFrom(helper.make_value_info("maps", helper.make_sequence_type_proto(entry)))
    onnx.save(model, str(path))
    with pytest.raises(ModelError, match=r"needs an output \(m, C\), it has maps: seq\(map"):
        asked(path, "probs")


def test_another_number_of_classes(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="answers 6 classes in scores; 10 were expected"):
        asked(echo(tmp_path / "x.onnx"), num_classes=10)
    with pytest.raises(ModelError, match="answers 6 classes in name; 5 were expected"):
        asked(named(tmp_path / "y.onnx"), "label", classes=NAMES, num_classes=5)
    with pytest.raises(ModelError, match=r"answers 6 classes in scores; 2 were expected \(oracle.num_classes"):
        asked(tmp_path / "x.onnx", num_classes=2)


def test_a_number_of_classes_that_no_shape_tells(tmp_path: Path) -> None:
    # How many columns are kept depends on the first image, so that no shape inference can tell.
    tail = [
        helper.make_node("Gather", ["flat", "first"], ["row"], axis=0),
        helper.make_node("Greater", ["row", "below"], ["kept"]),
        helper.make_node("Compress", ["flat", "kept"], ["scores"], axis=1),
    ]
    constants = {"first": np.array(0), "below": np.float32(-1)}
    path = echo(tmp_path / "x.onnx", tail, output=("scores", FLOAT, ["m", "C"]), constants=constants)
    images = pixels(2, SMALL)
    oracle = asked(path)
    assert oracle.num_classes == 6  # counted in what it answers to the images that are tried
    torch.testing.assert_close(values(oracle.query(images)), expected_small(images))
    with pytest.raises(ModelError, match="answers 6 classes in scores; 7 were expected"):
        asked(path, num_classes=7)


@pytest.mark.parametrize(
    ("image", "takes"),
    [((1, 2, 4), r"\(1, 2, 3\)"), ((1, 4, 3), r"\(1, 2, 3\)"), ((3, 2, 3), r"\(1, 2, 3\)")],
    ids=["width", "height", "channels"],
)
def test_images_of_another_size(tmp_path: Path, image: tuple[int, int, int], takes: str) -> None:
    given = ", ".join(map(str, image))
    with pytest.raises(ModelError, match=rf"takes images \(ch, H, W\) = {takes}, but the images are \({given}\)") as e:
        asked(echo(tmp_path / "x.onnx"), image=image)
    assert "data.size" in str(e.value)


def test_an_image_size_left_open(tmp_path: Path) -> None:
    pool = [helper.make_node("GlobalAveragePool", ["x"], ["pooled"])]
    path = echo(tmp_path / "x.onnx", head=pool, shape=("m", 3, "h", "w"), output=("scores", FLOAT, ["m", 3]))
    with pytest.raises(ModelError, match=r"leaves its image size open \(.*'h', 'w'\]\): give image=\(ch, H, W\)"):
        asked(path)
    oracle = asked(path, image=(3, 4, 5))
    images = pixels(2, (3, 4, 5))
    assert oracle.image == (3, 4, 5)
    torch.testing.assert_close(values(oracle.query(images)), images.float().div(255).mean((2, 3)))
    with pytest.raises(ModelError, match=r"\(3, None, None\), but the images are \(1, 4, 5\)"):
        asked(path, image=(1, 4, 5))


def test_uint8_input_takes_no_float_transport(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="takes uint8 images; transport must be 'uint8'"):
        asked(echo(tmp_path / "x.onnx", dtype=UINT8), transport="float")


def test_an_output_that_is_misspelt(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"output is 'softmax' \(oracle.output\); it must be 'auto', 'logits' or"):
        asked(echo(tmp_path / "x.onnx"), output="softmax")


@pytest.mark.parametrize("name", ["text", "cut", "half"])
def test_a_file_that_is_no_model(tmp_path: Path, name: str) -> None:
    path = tmp_path / "teacher.onnx"
    whole = echo(path).read_bytes()
    path.write_bytes({"text": b"a model\n", "cut": whole[:-10], "half": whole[: len(whole) // 2]}[name])
    with pytest.raises(ModelError, match=r"is no ONNX model that ONNX Runtime [\d.]+ can load: .*cut short") as caught:
        asked(path)
    assert str(path) in str(caught.value)


def torch_file(path: Path, **how: Any) -> None:
    torch.save({"weight": torch.zeros(2)}, path, **how)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (
            torch_file,
            "a PyTorch checkpoint; it must be an ONNX model: `mekd export --teacher.arch NAME --teacher.c",
        ),
        (
            lambda path: torch_file(path, _use_new_zipfile_serialization=False),
            "a Python pickle.*`mekd export .*skl2onn",
        ),
        (lambda path: torch.jit.script(torch.nn.ReLU()).save(str(path)), "a TorchScript module.* torch.onnx.export"),
        (lambda path: path.write_bytes(struct.pack("<Q", 2) + b"{}       "), "a safetensors file.*`mekd export"),
        (lambda path: zipfile.ZipFile(path, "w").writestr("model.onnx", "x"), "a zip archive.*unpack it"),
        (lambda path: path.write_bytes(b"\x1f\x8b\x08 and so on"), "a gzip archive.*unpack it"),
        (lambda path: path.write_bytes(b""), "an empty file.*download or export it again"),
        (
            lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid"),
            "a pointer of git-lfs.*`git lfs pull`",
        ),
        (lambda path: path.write_bytes(b"\n<!DOCTYPE html><html>Sign in"), "a web page.*login"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\nrest"), "a Keras model.*tf2onnx"),
        (lambda path: path.write_bytes(b"\x1c\0\0\0TFL3rest"), "a TensorFlow Lite model.*tf2onnx"),
        (lambda path: path.mkdir(), "a folder.*name the .onnx file in it"),
        (lambda path: (path.mkdir(), (path / "saved_model.pb").touch()), "a TensorFlow SavedModel.*tf2onnx"),
    ],
    ids=["pt", "old pt", "script", "safetensors", "zip", "gzip", "empty", "lfs", "page", "keras", "lite", "dir", "tf"],
)
def test_a_file_of_another_format_is_called_by_its_name(
    tmp_path: Path, write: Callable[[Path], object], says: str
) -> None:
    path = tmp_path / "teacher.onnx"
    write(path)
    with pytest.raises(ModelError, match=rf"teacher.onnx is '.*', {says}") as caught:
        asked(path)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_no_fault_of_the_provider(tmp_path: Path) -> None:
    path = tmp_path / "my_provider.onnx"
    path.write_text("no model")
    with pytest.raises(ModelError, match="is no ONNX model"):
        asked(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"teacher.onnx is '.*nowhere.onnx'; no such file"):
        asked(tmp_path / "nowhere.onnx")


# -- mistakes that are known, or could be, before anything is paid -----------------------------------------


def refused(path: Path, response: str = "logits", *, images: Tensor | None = None, **options: Any) -> str:
    """The message of the refusal, which must have cost nothing, when the file is opened or when it is asked."""
    ledger = Ledger("s")
    with pytest.raises((ModelError, AnswerError, ValueError)) as caught:
        asked(path, response, ledger=ledger, **options).query(pixels(2, SMALL) if images is None else images)
    assert ledger.spent == 0, f"cost {ledger.spent} queries: {caught.value}"
    return str(caught.value)


@pytest.mark.parametrize(
    "wrong", [{"mean": (0.5, 0.5, 0.5)}, {"std": (0.2, 0.2, 0.2)}, {"std": (0.0,)}], ids=["mean", "std", "zero"]
)
def test_mean_and_std_that_do_not_fit(tmp_path: Path, wrong: dict[str, Any]) -> None:
    assert next(iter(wrong)) in refused(echo(tmp_path / "x.onnx"), **wrong)


def test_several_class_indices_an_image(tmp_path: Path) -> None:
    tail = [helper.make_node("TopK", ["flat", "three"], ["scores", "labels"], axis=1)]
    path = echo(tmp_path / "x.onnx", tail, output=("labels", INT64, ["m", 3]), constants={"three": np.array([3])})
    assert "labels" in refused(path, "label", num_classes=6)


def test_a_graph_that_does_not_run_on_images_of_that_size(tmp_path: Path) -> None:
    # Open in the file, but the linear layer behind fits 2 x 3 only.
    tail = [helper.make_node("MatMul", ["flat", "weight"], ["scores"])]
    shape, weight = ("m", 1, "h", "w"), np.eye(6, dtype=np.float32)
    path = echo(tmp_path / "x.onnx", tail, shape=shape, constants={"weight": weight})
    oracle_images = pixels(2, (1, 3, 3))
    with pytest.raises((ModelError, AnswerError)):
        asked(path, image=(1, 3, 3)).query(oracle_images)


def test_one_answer_for_the_whole_batch(tmp_path: Path) -> None:
    tail = [helper.make_node("ReduceMean", ["flat"], ["scores"], axes=[0], keepdims=1)]
    path = echo(tmp_path / "x.onnx", tail, output=("scores", FLOAT, [1, 6]))
    with pytest.raises((ModelError, AnswerError)):
        asked(path).query(pixels(2, SMALL))
