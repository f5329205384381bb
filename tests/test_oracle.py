"""A teacher can be asked and not opened: torch modules and ONNX files of every make behind one interface."""

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from mekd.functional import kd_loss
from mekd.oracle.base import Oracle
from mekd.oracle.ledger import BudgetSpent, Ledger
from mekd.oracle.onnx import ModelError, OnnxOracle, ProviderError, open_session
from mekd.oracle.response import KINDS, AnswerError, Response
from mekd.oracle.torch import TorchOracle
from mekd.pixels import to_float, to_uint8

IMAGE = (3, 8, 8)
CLASSES = 5
FLOAT, INT64, STRING, UINT8 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING, TensorProto.UINT8
#: What both the installed onnx and older ONNX Runtimes read.
IR_VERSION, OPSET = 8, 17


def pixels(m: int, image: Sequence[int] = IMAGE, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (m, *image), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# -- ONNX files, made by hand ------------------------------------------------------------------------------


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


SMALL = (1, 2, 3)  # an image whose six pixels are the six classes of echo()


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


def asked(path: Path, response: str = "logits", **options: Any) -> OnnxOracle:
    return OnnxOracle(path, response, providers="cpu", **options)


def values(response: Response) -> Tensor:
    assert response.values is not None
    return response.values


# -- the interface, the same for both ----------------------------------------------------------------------


class Net(nn.Module):
    """A small CNN on images in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 6, 3, padding=1)
            self.linear = nn.Linear(6, CLASSES)
            nn.init.normal_(self.conv.weight)
            nn.init.normal_(self.linear.weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.conv(images).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> Net:
    return Net()


@pytest.fixture(scope="module")
def net_file(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Net as an ONNX file that takes uint8 pixels, written node by node and not by the exporter."""
    node = helper.make_node
    nodes = [
        node("Cast", ["pixels"], ["float"], to=FLOAT),
        node("Div", ["float", "half"], ["double"]),
        node("Sub", ["double", "one"], ["images"]),
        node("Conv", ["images", "kernel", "bias"], ["features"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Relu", ["features"], ["active"]),
        node("GlobalAveragePool", ["active"], ["pooled"]),
        node("Flatten", ["pooled"], ["flat"]),
        node("Gemm", ["flat", "weight", "shift"], ["logits"], transB=1),
    ]
    constants = {
        "half": np.float32(127.5),
        "one": np.float32(1),
        "kernel": net.conv.weight.detach().numpy(),
        "bias": net.conv.bias.detach().numpy(),  # type: ignore[union-attr]
        "weight": net.linear.weight.detach().numpy(),
        "shift": net.linear.bias.detach().numpy(),
    }
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    return save(path, nodes, [("pixels", UINT8, ["m", *IMAGE])], [("logits", FLOAT, ["m", CLASSES])], constants)


@pytest.fixture(params=["torch", "onnx"])
def connect(request: pytest.FixtureRequest, net: Net, net_file: Path) -> Callable[..., Oracle]:
    def connect(response: str = "probs", **options: Any) -> Oracle:
        if request.param == "torch":
            return TorchOracle(net, IMAGE, CLASSES, response, **options)
        return OnnxOracle(net_file, response, providers="cpu", **options)

    return connect


@pytest.mark.parametrize("kind", KINDS)
def test_both_give_the_same_answers(kind: str, net: Net, net_file: Path) -> None:
    # A colour of its own for each image, so that they are told apart.
    images = pixels(33) // 8 + pixels(33, (3, 1, 1), seed=1) // 8 * 7
    with torch.no_grad():
        logits = net.double()(images.double() / 127.5 - 1)
    net.float()
    assert len(logits.argmax(-1).unique()) > 1
    probs = logits.softmax(-1)
    for oracle in (TorchOracle(net, IMAGE, CLASSES, kind, k=3), asked(net_file, kind, k=3)):
        response = oracle.query(images)
        assert response.kind == kind and len(response) == 33
        if kind == "logits":
            torch.testing.assert_close(values(response), logits.float(), rtol=1e-5, atol=1e-5)
        elif kind == "probs":
            torch.testing.assert_close(values(response), probs.float(), rtol=1e-5, atol=1e-6)
        elif kind == "topk":
            best, indices = probs.topk(3, -1)
            torch.testing.assert_close(values(response), best.float(), rtol=1e-5, atol=1e-6)
            assert response.indices is not None and torch.equal(response.indices, indices)
        else:
            assert response.indices is not None and torch.equal(response.indices, probs.argmax(-1))


@pytest.mark.parametrize("kind", ["logits", "probs", "topk"])
def test_answers_are_rounded(connect: Callable[..., Oracle], kind: str) -> None:
    exact = values(connect(kind, k=3).query(pixels(9)))
    response = connect(kind, k=3, decimals=2).query(pixels(9))
    torch.testing.assert_close(values(response), (exact.double() * 100).round().div(100).float(), rtol=1e-6, atol=1e-6)
    assert response.decimals == 2 and not torch.equal(values(response), exact)


def test_only_the_question_can_be_reached(connect: Callable[..., Oracle]) -> None:
    oracle = connect()
    oracle.query(pixels(2))
    public = {name for name in dir(oracle) if not name.startswith("_")}
    assert public == {"query", "ledger", "image", "num_classes", "response", "k", "decimals", "transport"}
    for name, value in [*vars(oracle).items(), *vars(oracle.ledger).items()]:
        assert not isinstance(value, nn.Module | nn.Parameter | ort.InferenceSession), name
    assert oracle.image == IMAGE and oracle.num_classes == CLASSES


@pytest.mark.parametrize("kind", ["logits", "probs", "topk"])
def test_answers_carry_no_gradient(connect: Callable[..., Oracle], kind: str) -> None:
    images = to_float(pixels(4)).requires_grad_()
    response = connect(kind, k=3).query(images)
    assert not values(response).requires_grad and not values(response).is_inference()
    # The answer must be usable in a step that does have a gradient.
    student = torch.zeros(4, CLASSES, requires_grad=True)
    kd_loss(student, tau=1.0, **response.target).backward()
    assert student.grad is not None and student.grad.abs().sum() > 0 and images.grad is None


def test_the_teacher_is_asked_in_eval_mode_and_gets_no_gradient() -> None:
    class Noted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(CLASSES))
            self.seen: list[tuple[bool, bool]] = []

        def forward(self, images: Tensor) -> Tensor:
            self.seen.append((self.training, torch.is_grad_enabled()))
            return images.flatten(1)[:, :CLASSES] + self.bias

    noted = Noted().train()
    TorchOracle(noted, IMAGE, CLASSES).query(pixels(2))
    assert noted.seen == [(False, False)]


class Recorder(nn.Module):
    """Keeps what it is sent; every image gets the same logits."""

    def __init__(self, row: Sequence[float] = (0.0, 1.0, 2.0, 3.0, 4.0)) -> None:
        super().__init__()
        self.sent: list[Tensor] = []
        self.row = torch.tensor(row)

    def forward(self, images: Tensor) -> Tensor:
        self.sent.append(images.clone())
        return self.row.expand(len(images), -1)


def test_float_images_are_sent_as_pixels() -> None:
    recorder = Recorder()
    oracle = TorchOracle(recorder, IMAGE, CLASSES)
    images = torch.rand(16, *IMAGE) * 2.2 - 1.1  # some beyond the range
    oracle.query(images)
    (sent,) = recorder.sent
    levels = (sent.double() + 1) * 127.5
    assert (levels - levels.round()).abs().max() < 1e-4 and levels.min() > -1e-4 and levels.max() < 255.0001
    assert (sent - images.clamp(-1, 1)).abs().max() <= 0.5 / 127.5 + 1e-6
    assert not torch.equal(sent, images.clamp(-1, 1))
    assert oracle.ledger.counts["bytes_up"] == 16 * 3 * 8 * 8


def test_pixels_are_sent_as_they_are() -> None:
    recorder = Recorder()
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(4, 3, 8, 8)
    TorchOracle(recorder, IMAGE, CLASSES).query(images)
    assert torch.equal(to_uint8(recorder.sent[0]), images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transport_float_rounds_nothing(dtype: torch.dtype) -> None:
    recorder = Recorder()
    oracle = TorchOracle(recorder, IMAGE, CLASSES, transport="float")
    images = torch.rand(4, *IMAGE, dtype=dtype) * 2 - 1
    oracle.query(images)
    assert torch.equal(recorder.sent[0], images.float())
    assert oracle.ledger.counts["bytes_up"] == 4 * 3 * 8 * 8 * 4


def test_the_answer_counts_once_however_large_the_batch(connect: Callable[..., Oracle]) -> None:
    oracle = connect("topk", k=2)
    for m in (1, 7):
        oracle.query(pixels(m))
    assert oracle.ledger.totals() == {
        "requests": 2,
        "queries": 8,
        "bytes_up": 8 * 3 * 8 * 8,
        "bytes_down": 8 * 2 * (4 + 8),
        "uncertain": 0,
    }


@pytest.mark.parametrize(
    ("images", "error", "says"),
    [
        (torch.zeros(IMAGE), ValueError, r"shape \(3, 8, 8\); the teacher takes \(m, 3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 9), ValueError, r"shape \(2, 3, 8, 9\)"),
        (torch.zeros(2, 8, 8, 3), ValueError, r"shape \(2, 8, 8, 3\)"),
        (torch.zeros(2, 1, 8, 8), ValueError, r"shape \(2, 1, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), ValueError, "holds no image"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), TypeError, "dtype torch.int64; transport 'uint8' takes uint8"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.bool), TypeError, "dtype torch.bool"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.complex64), TypeError, "dtype torch.complex64"),
    ],
)
def test_images_it_does_not_take_cost_nothing(
    connect: Callable[..., Oracle], images: Tensor, error: type[Exception], says: str
) -> None:
    oracle = connect()
    oracle.query(pixels(3))
    before = oracle.ledger.totals()
    with pytest.raises(error, match=says):
        oracle.query(images)
    assert oracle.ledger.totals() == before


def test_transport_float_takes_no_pixels() -> None:
    recorder = Recorder()
    oracle = TorchOracle(recorder, IMAGE, CLASSES, transport="float")
    with pytest.raises(TypeError, match=r"dtype torch.uint8; transport 'float' takes float"):
        oracle.query(pixels(2))
    assert oracle.ledger.spent == 0 and recorder.sent == []


@pytest.mark.parametrize("transport", ["uint8", "float"])
def test_images_of_a_generator_that_diverged_cost_nothing(transport: str) -> None:
    recorder = Recorder()
    oracle = TorchOracle(recorder, IMAGE, CLASSES, transport=transport)
    images = torch.zeros(2, *IMAGE)
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        oracle.query(images)
    assert oracle.ledger.spent == 0 and recorder.sent == []


def test_an_answer_of_nan_is_uncertain() -> None:
    oracle = TorchOracle(Recorder((0.0, 1.0, torch.nan, 0.0, 0.0)), IMAGE, CLASSES, budget=5)
    with pytest.raises(AnswerError, match="NaN or infinity for 3 of 3"):
        oracle.query(pixels(3))
    # The provider answered, and may bill it; we have no answer to count.
    assert oracle.ledger.counts["uncertain"] == 3 and oracle.ledger.counts["queries"] == 0
    assert oracle.ledger.counts["requests"] == 0 and oracle.ledger.left == 2


def test_too_few_answers_are_refused() -> None:
    class Half(Recorder):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images)[::2]

    oracle = TorchOracle(Half(), IMAGE, CLASSES)
    with pytest.raises(RuntimeError, match="answered 2 of 4 images"):
        oracle.query(pixels(4))
    assert oracle.ledger.counts["uncertain"] == 4 and oracle.ledger.counts["queries"] == 0


def test_a_module_with_another_number_of_classes_is_refused() -> None:
    with pytest.raises(AnswerError, match="5 scores an image; 7"):
        TorchOracle(Recorder(), IMAGE, 7).query(pixels(2))


def test_budget(connect: Callable[..., Oracle]) -> None:
    oracle = connect(budget=6)
    oracle.query(pixels(4))
    with pytest.raises(BudgetSpent):
        oracle.query(pixels(3))
    oracle.query(pixels(2))
    assert oracle.ledger.left == 0 and oracle.ledger.counts["queries"] == 6


def test_a_ledger_kept_elsewhere_is_the_one_that_counts(connect: Callable[..., Oracle]) -> None:
    ledger = Ledger("distill", budget=3)
    oracle = connect(ledger=ledger)
    oracle.query(pixels(3))
    assert oracle.ledger is ledger and ledger.left == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"response": "scores"}, r"response is 'scores'; it must be one of 'logits', 'probs', 'topk', 'label'"),
        ({"transport": "jpeg"}, r"transport is 'jpeg'; it must be one of 'uint8', 'float'"),
        ({"response": "topk", "k": 0}, r"k is 0; it must lie between 1 and the teacher's 5"),
        ({"response": "topk", "k": 6}, r"k is 6; it must lie between 1 and the teacher's 5"),
        ({"decimals": -1}, r"decimals is -1; it must lie between 0 and 7"),
        ({"decimals": 8}, r"decimals is 8; it must lie between 0 and 7"),
    ],
)
def test_options_are_checked(connect: Callable[..., Oracle], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        connect(**options)


# -- ONNX files that can be asked --------------------------------------------------------------------------


def expected_small(images: Tensor) -> Tensor:
    """What echo() answers if it is fed pixels in [0, 1]."""
    return images.float().div(255).flatten(1)


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
    assert oracle.ledger.counts["queries"] == m and oracle.ledger.counts["requests"] == 1


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
    with pytest.raises(AnswerError, match=r"if it answers logits, say --oracle.output logits"):
        asked(plain, "probs", output="probs").query(images)


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
    with pytest.raises(ModelError, match="does not say how many classes it has: give num_classes"):
        asked(path, "label")


def test_a_class_index_out_of_range(tmp_path: Path) -> None:
    path = echo(tmp_path / "x.onnx", argmax(), output=("best", INT64, ["m"]))
    images = torch.zeros(2, *SMALL, dtype=torch.uint8)
    images[1, 0, 1, 2] = 9
    oracle = asked(path, "label", num_classes=5)
    with pytest.raises(AnswerError, match="class 5; there are 5"):
        oracle.query(images)
    assert oracle.ledger.counts["uncertain"] == 2


def test_a_negative_class_index_is_named(tmp_path: Path) -> None:
    tail = argmax(helper.make_node("Sub", ["best", "one"], ["label"]))
    path = echo(tmp_path / "x.onnx", tail, output=("label", INT64, ["m"]), constants={"one": np.array(1)})
    images = torch.zeros(2, *SMALL, dtype=torch.uint8)
    images[1, 0, 1, 2] = 9
    with pytest.raises(AnswerError, match="class -1"):
        asked(path, "label", num_classes=6).query(images)


@pytest.mark.parametrize("response", ["logits", "probs", "topk"])
def test_class_indices_are_no_scores(tmp_path: Path, response: str) -> None:
    path = echo(tmp_path / "x.onnx", argmax(), output=("best", INT64, ["m"]))
    with pytest.raises(ModelError, match=rf"can answer '{response}': it needs an output \(m, C\), it has best: tensor"):
        asked(path, response, num_classes=6)


NAMES = ["ant", "bee", "cat", "dog", "emu", "fox"]


def named(path: Path) -> Path:
    tail = argmax(helper.make_node("Gather", ["names", "best"], ["name"]))
    return echo(path, tail, output=("name", STRING, ["m"]), constants={"names": NAMES})


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
    images = torch.zeros(1, *SMALL, dtype=torch.uint8)
    oracle = asked(path, "label", classes=["yak", *NAMES[1:]])
    with pytest.raises(AnswerError, match="'ant', which is not among the 6 class names"):
        oracle.query(images)
    assert oracle.ledger.counts["uncertain"] == 1 and oracle.ledger.counts["queries"] == 0


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
        (["m", 1, 2, 3], r"its output y has shape \['m', 1, 2, 3\], not \(m, C\)"),
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
    with pytest.raises(ModelError, match="answers 6 classes; 10 were expected"):
        asked(echo(tmp_path / "x.onnx"), num_classes=10)
    with pytest.raises(ModelError, match="answers 6 classes; 5 were expected"):
        asked(named(tmp_path / "y.onnx"), "label", classes=NAMES, num_classes=5)


def test_a_number_of_classes_that_the_file_leaves_open(tmp_path: Path) -> None:
    # How many columns are kept depends on the first image, so that no shape inference can tell.
    tail = [
        helper.make_node("Gather", ["flat", "first"], ["row"], axis=0),
        helper.make_node("Greater", ["row", "below"], ["kept"]),
        helper.make_node("Compress", ["flat", "kept"], ["scores"], axis=1),
    ]
    constants = {"first": np.array(0), "below": np.float32(-1)}
    path = echo(tmp_path / "x.onnx", tail, output=("scores", FLOAT, ["m", "C"]), constants=constants)
    with pytest.raises(ModelError, match="does not say how many classes it has: give num_classes"):
        asked(path)
    images = pixels(2, SMALL)
    torch.testing.assert_close(values(asked(path, num_classes=6).query(images)), expected_small(images))
    with pytest.raises((AnswerError, ModelError), match="6 scores an image; 7 were expected"):
        asked(path, num_classes=7).query(images)


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
    with pytest.raises(ValueError, match="output is 'softmax'; it must be 'auto', 'logits' or 'probs'"):
        asked(echo(tmp_path / "x.onnx"), output="softmax")


@pytest.mark.parametrize("name", ["teacher.onnx", "empty.onnx", "cut.onnx", "half.onnx"])
def test_a_file_that_is_no_model(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    whole = echo(tmp_path / "whole.onnx").read_bytes()
    text = b"git-lfs: version https://git-lfs.github.com/spec/v1\n"
    path.write_bytes({"t": text, "e": b"", "c": whole[:-10], "h": whole[: len(whole) // 2]}[name[0]])
    with pytest.raises(ModelError, match="is no ONNX model that ONNX Runtime can load") as caught:
        asked(path)
    assert str(path) in str(caught.value)


def test_a_damaged_file_is_no_fault_of_the_provider(tmp_path: Path) -> None:
    path = tmp_path / "my_provider.onnx"
    path.write_text("no model")
    with pytest.raises(ModelError, match="is no ONNX model"):
        asked(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"teacher.onnx is '.*nowhere.onnx'; no such file"):
        asked(tmp_path / "nowhere.onnx")
    with pytest.raises(FileNotFoundError, match="no such file"):
        asked(tmp_path)


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


# -- execution providers -----------------------------------------------------------------------------------


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
        def __init__(self, path: str, settings: Any, providers: list[str]) -> None:
            assert providers == ["CUDAExecutionProvider"]

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", Fallen)
    with pytest.raises(ProviderError, match="CUDAExecutionProvider was asked for, but CPUExecutionProvider would run"):
        OnnxOracle(echo(tmp_path / "x.onnx"), providers="cuda")


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
    monkeypatch.setattr("mekd.oracle.onnx.version", lambda name: "1.2.3")
    with pytest.raises(ProviderError, match=r"onnxruntime 1.2.3 and onnxruntime-gpu 1.2.3 are both installed"):
        asked(echo(tmp_path / "x.onnx"))


def test_no_runtime_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ProviderError, match=r"not installed: pip install 'mekd\[onnx\]' \(CPU\) or 'mekd\[onnx-gpu\]'"):
        asked(tmp_path / "x.onnx")
