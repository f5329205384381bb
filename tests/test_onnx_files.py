"""ONNX files of every make can be asked, whatever their names, types, shapes and endings."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from mekd.oracle.ledger import Ledger
from mekd.oracle.ort import ModelError
from mekd.oracle.response import AnswerError
from mekd.pixels import to_float
from onnx_files import (
    FLOAT,
    INT64,
    NAMES,
    SMALL,
    STRING,
    UINT8,
    argmax,
    asked,
    echo,
    expected_small,
    named,
    pixels,
    save,
    values,
)


def test_names_of_input_and_output_do_not_matter(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Flatten", ["data:0"], ["f"]),
        helper.make_node("Identity", ["f"], ["StatefulPartitionedCall:0"]),
    ]
    path = save(
        tmp_path / "x.onnx",
        nodes,
        [("data:0", FLOAT, [None, *SMALL])],
        [("StatefulPartitionedCall:0", FLOAT, [None, 6])],
    )
    oracle = asked(path)
    assert oracle.image == SMALL and oracle.num_classes == 6
    torch.testing.assert_close(values(oracle.query(pixels(3, SMALL))), expected_small(pixels(3, SMALL)))


def test_uint8_input_gets_the_pixels(tmp_path: Path) -> None:
    oracle = asked(echo(tmp_path / "x.onnx", dtype=UINT8))
    images = pixels(3, SMALL)
    assert torch.equal(values(oracle.query(images)), images.float().flatten(1))
    assert torch.equal(values(oracle.query(to_float(images))), images.float().flatten(1))


def test_float_input_gets_mean_and_std(tmp_path: Path) -> None:
    image, mean, std = (3, 2, 2), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    path = echo(tmp_path / "x.onnx", shape=("m", *image), output=("scores", FLOAT, ["m", 12]))
    images = pixels(4, image)
    expected = images.double() / 255
    for c in range(3):
        expected[:, c] = (expected[:, c] - mean[c]) / std[c]
    oracle = asked(path, mean=mean, std=std)
    torch.testing.assert_close(values(oracle.query(images)), expected.flatten(1).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        values(oracle.query(to_float(images))), expected.flatten(1).float(), rtol=1e-5, atol=1e-6
    )


def test_transport_float_reaches_a_float_input_unrounded(tmp_path: Path) -> None:
    oracle = asked(echo(tmp_path / "x.onnx"), transport="float")
    images = torch.rand(3, *SMALL) * 2 - 1
    torch.testing.assert_close(values(oracle.query(images)), ((images + 1) / 2).flatten(1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("dtype", "rtol"), [(TensorProto.FLOAT16, 1e-3), (TensorProto.DOUBLE, 1e-6)])
def test_other_floating_inputs(tmp_path: Path, dtype: int, rtol: float) -> None:
    oracle = asked(echo(tmp_path / "x.onnx", dtype=dtype))
    response = oracle.query(pixels(3, SMALL))
    torch.testing.assert_close(values(response), expected_small(pixels(3, SMALL)), rtol=rtol, atol=1e-4)


@pytest.mark.parametrize("size", [(4, 5), (None, None)], ids=["fixed", "open"])
def test_channels_last(tmp_path: Path, size: tuple[int | None, int | None]) -> None:
    image = (3, 4, 5)
    path = echo(
        tmp_path / "x.onnx",
        # Back to (m, ch, H, W), so that the answer is that of the pixels in our order.
        head=[helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2])],
        shape=("m", *size, 3),
        output=("scores", FLOAT, ["m", 60]),
    )
    oracle = asked(path, image=None if size[0] else image)
    assert oracle.image == image
    images = pixels(3, image)
    torch.testing.assert_close(values(oracle.query(images)), expected_small(images))


def test_channels_last_with_mean_and_std(tmp_path: Path) -> None:
    path = echo(
        tmp_path / "x.onnx",
        head=[helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2])],
        shape=("m", 2, 4, 3),
        output=("scores", FLOAT, ["m", 24]),
    )
    images = pixels(2, (3, 2, 4))
    mean = torch.tensor([0.1, 0.5, 0.9])
    expected = (images.float() / 255 - mean.view(3, 1, 1)).flatten(1)
    response = asked(path, mean=mean.tolist(), std=(1.0, 1.0, 1.0)).query(images)
    torch.testing.assert_close(values(response), expected)


@pytest.mark.parametrize("fixed", [1, 4])
@pytest.mark.parametrize("m", [1, 3, 4, 6])
def test_a_fixed_batch_is_filled_up_and_cut(tmp_path: Path, fixed: int, m: int) -> None:
    path = echo(tmp_path / "x.onnx", shape=(fixed, *SMALL), output=("scores", FLOAT, [fixed, 6]))
    oracle = asked(path)
    images = pixels(m, SMALL)
    torch.testing.assert_close(values(oracle.query(images)), expected_small(images))
    assert oracle.ledger.counts["queries"] == m and oracle.ledger.counts["calls"] == 1


def softmax(name: str) -> onnx.NodeProto:
    return helper.make_node("Softmax", ["flat"], [name], axis=1)


def test_a_softmax_at_the_end_means_probabilities(tmp_path: Path) -> None:
    path = echo(tmp_path / "x.onnx", [softmax("scores")])
    images = pixels(3, SMALL)
    torch.testing.assert_close(values(asked(path, "probs").query(images)), expected_small(images).softmax(-1))
    with pytest.raises((AnswerError, ModelError), match=r"its logits cannot be had: --oracle.response probs"):
        asked(path, "logits").query(images)


def test_logits_asked_of_probabilities_cost_nothing(tmp_path: Path) -> None:
    path, ledger = echo(tmp_path / "x.onnx", [softmax("scores")]), Ledger("s")
    with pytest.raises((AnswerError, ModelError), match="cannot be had"):
        asked(path, "logits", ledger=ledger).query(pixels(3, SMALL))
    assert ledger.spent == 0


@pytest.mark.parametrize("behind", ["Cast", "Identity", "Flatten", "Squeeze"])
def test_a_softmax_just_before_the_end_means_probabilities(tmp_path: Path, behind: str) -> None:
    options = {"to": FLOAT} if behind == "Cast" else {}
    tail = [softmax("soft"), helper.make_node(behind, ["soft"], ["scores"], **options)]
    if behind == "Squeeze":
        tail = [
            helper.make_node("Unsqueeze", ["flat", "axes"], ["deep"]),
            helper.make_node("Softmax", ["deep"], ["soft"], axis=1),
            helper.make_node("Squeeze", ["soft", "axes"], ["scores"]),
        ]
    path = echo(tmp_path / "x.onnx", tail, constants={"axes": np.array([2, 3])})
    images = pixels(3, SMALL)
    torch.testing.assert_close(values(asked(path, "probs").query(images)), expected_small(images).softmax(-1))


def test_what_the_user_says_about_the_output_goes_first(tmp_path: Path) -> None:
    path = echo(tmp_path / "x.onnx", [softmax("soft"), helper.make_node("Identity", ["soft"], ["scores"])])
    images = pixels(3, SMALL)
    response = asked(path, "probs", output="probs").query(images)
    torch.testing.assert_close(values(response), expected_small(images).softmax(-1))
    plain = echo(tmp_path / "y.onnx")
    with pytest.raises(ModelError, match=r"no probabilities: .*if they are logits, say --oracle.output logits"):
        asked(plain, "probs", output="probs")


def test_log_probabilities_are_logits(tmp_path: Path) -> None:
    path = echo(tmp_path / "x.onnx", [helper.make_node("LogSoftmax", ["flat"], ["scores"], axis=1)])
    images = pixels(3, SMALL)
    torch.testing.assert_close(values(asked(path, "probs").query(images)), expected_small(images).softmax(-1))
    torch.testing.assert_close(values(asked(path, "logits").query(images)), expected_small(images).log_softmax(-1))


def test_scores_with_two_idle_axes(tmp_path: Path) -> None:
    path = echo(
        tmp_path / "x.onnx",
        [helper.make_node("Unsqueeze", ["flat", "axes"], ["scores"])],
        output=("scores", FLOAT, ["m", 6, 1, 1]),
        constants={"axes": np.array([2, 3])},
    )
    images = pixels(3, SMALL)
    torch.testing.assert_close(values(asked(path).query(images)), expected_small(images))


def best(images: Tensor) -> Tensor:
    return images.flatten(1).long().argmax(-1)


@pytest.mark.parametrize("dtype", [INT64, TensorProto.INT32])
@pytest.mark.parametrize("keep", [False, True], ids=["(m,)", "(m, 1)"])
def test_a_model_that_answers_class_indices(tmp_path: Path, dtype: int, keep: bool) -> None:
    tail = [
        helper.make_node("ArgMax", ["flat"], ["best"], axis=1, keepdims=int(keep)),
        helper.make_node("Cast", ["best"], ["label"], to=dtype),
    ]
    path = echo(tmp_path / "x.onnx", tail, output=("label", dtype, ["m", 1] if keep else ["m"]))
    images = pixels(9, SMALL)
    response = asked(path, "label", num_classes=6).query(images)
    assert response.kind == "label" and response.values is None and response.indices is not None
    assert response.indices.dtype == torch.int64 and torch.equal(response.indices, best(images))
    assert len(best(images).unique()) > 1


def test_class_indices_need_the_number_of_classes(tmp_path: Path) -> None:
    path = echo(tmp_path / "x.onnx", argmax(), output=("best", INT64, ["m"]))
    with pytest.raises(ModelError, match=r"does not say of how many classes: say --oracle.num_classes N"):
        asked(path, "label")


def test_a_class_index_out_of_range(tmp_path: Path) -> None:
    path = echo(tmp_path / "x.onnx", argmax(), output=("best", INT64, ["m"]))
    with pytest.raises(ModelError, match=r"answers class \d in best; there are 2 \(oracle.num_classes\)"):
        asked(path, "label", num_classes=2)
    # Class 5 for a white image alone, which is none of those that are tried when the file is opened.
    tail = [
        helper.make_node("ReduceMin", ["flat"], ["least"], axes=[1], keepdims=0),
        helper.make_node("Floor", ["least"], ["white"]),
        helper.make_node("Mul", ["white", "five"], ["class"]),
        helper.make_node("Cast", ["class"], ["best"], to=INT64),
    ]
    path = echo(path, tail, output=("best", INT64, ["m"]), constants={"five": np.float32(5)})
    oracle = asked(path, "label", num_classes=5)
    with pytest.raises(AnswerError, match="class 5; there are 5"):
        oracle.query(torch.full((2, *SMALL), 255, dtype=torch.uint8))
    assert oracle.ledger.counts["uncertain"] == 2


def test_a_negative_class_index_is_named(tmp_path: Path) -> None:
    tail = argmax(helper.make_node("Sub", ["best", "one"], ["label"]))
    path = echo(tmp_path / "x.onnx", tail, output=("label", INT64, ["m"]), constants={"one": np.array(1)})
    with pytest.raises(ModelError, match="answers class -1 in label; there are 6"):
        asked(path, "label", num_classes=6)


@pytest.mark.parametrize("response", ["logits", "probs", "topk"])
def test_class_indices_are_no_scores(tmp_path: Path, response: str) -> None:
    path = echo(tmp_path / "x.onnx", argmax(), output=("best", INT64, ["m"]))
    with pytest.raises(ModelError, match=rf"can answer '{response}': it needs an output \(m, C\), it has best: tensor"):
        asked(path, response, num_classes=6)


def test_a_model_that_answers_class_names(tmp_path: Path) -> None:
    images = pixels(9, SMALL)
    path = named(tmp_path / "x.onnx")
    response = asked(path, "label", classes=NAMES).query(images)
    assert response.indices is not None and torch.equal(response.indices, best(images))
    # The order of the user's list is the one that counts.
    turned = asked(path, "label", classes=NAMES[::-1]).query(images)
    assert turned.indices is not None and torch.equal(turned.indices, 5 - best(images))


def test_class_names_by_a_label_encoder(tmp_path: Path) -> None:
    # What scikit-learn's converters write.
    encode = helper.make_node(
        "LabelEncoder", ["best"], ["name"], domain="ai.onnx.ml", keys_int64s=list(range(6)), values_strings=NAMES
    )
    path = echo(tmp_path / "x.onnx", argmax(encode), output=("name", STRING, ["m"]))
    images = pixels(9, SMALL)
    response = asked(path, "label", classes=NAMES).query(images)
    assert response.indices is not None and torch.equal(response.indices, best(images))


def test_class_names_need_the_list_of_classes(tmp_path: Path) -> None:
    path = named(tmp_path / "x.onnx")
    with pytest.raises(ModelError, match="answers class names: give their list as classes"):
        asked(path, "label")
    with pytest.raises(ModelError, match=r"'ant', which is not among the 6 class names \(oracle.classes\)"):
        asked(path, "label", classes=["yak", *NAMES[1:]])
    with pytest.raises(ModelError, match=r"classes \(oracle.classes\) has 'bee' more than once"):
        asked(path, "label", classes=[*NAMES, "bee"])
    # A name that shows first in a query: the images that are tried when the file is opened have no best class 5.
    tail = [
        helper.make_node("ReduceMin", ["flat"], ["least"], axes=[1], keepdims=0),
        helper.make_node("Floor", ["least"], ["white"]),
        helper.make_node("Cast", ["white"], ["best"], to=INT64),
        helper.make_node("Gather", ["names", "best"], ["name"]),
    ]
    path = echo(path, tail, output=("name", STRING, ["m"]), constants={"names": NAMES})
    oracle = asked(path, "label", classes=["ant", "cat"])
    with pytest.raises(AnswerError, match="'bee', which is not among the 2 class names"):
        oracle.query(torch.full((1, *SMALL), 255, dtype=torch.uint8))
    assert oracle.ledger.counts["uncertain"] == 1 and oracle.ledger.counts["queries"] == 0
