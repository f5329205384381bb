"""A teacher can be asked and not opened: torch modules and ONNX files behind one interface."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

from mekd.functional import kd_loss
from mekd.oracle.base import Oracle
from mekd.oracle.ledger import BudgetSpent, Ledger
from mekd.oracle.module import TorchOracle
from mekd.oracle.ort import OnnxOracle
from mekd.oracle.response import KINDS, AnswerError
from mekd.pixels import to_float, to_uint8
from onnx_files import FLOAT, IMAGE, UINT8, asked, pixels, save, values

CLASSES = 5


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
    public_names = {"query", "ledger", "image", "num_classes", "response", "k", "decimals", "transport"}
    public_names |= {"notes", "close", "shown"}
    assert public == public_names
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
    assert oracle.ledger.counts == {
        "calls": 2,
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
    before = dict(oracle.ledger.counts)
    with pytest.raises(error, match=says):
        oracle.query(images)
    assert oracle.ledger.counts == before


def test_what_is_no_tensor_is_named(connect: Callable[..., Oracle]) -> None:
    with pytest.raises(TypeError, match="images is a ndarray; it must be a tensor"):
        connect().query(pixels(2).numpy())  # type: ignore[arg-type]
    oracle = connect(budget=1)
    with pytest.raises(BudgetSpent, match=r"^budget is 1 queries"):
        oracle.query(pixels(2))


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
    assert oracle.ledger.counts["calls"] == 0 and oracle.ledger.left == 2


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
        ({"response": "topk", "k": 0}, r"k is 0 .*; it must lie between 1 and the teacher's 5"),
        ({"response": "topk", "k": 6}, r"k is 6 .*; it must lie between 1 and the teacher's 5"),
        ({"decimals": -1}, r"decimals is -1 .*; it must lie between 0 and 7"),
        ({"decimals": 8}, r"decimals is 8 .*; it must lie between 0 and 7"),
    ],
)
def test_options_are_checked(connect: Callable[..., Oracle], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        connect(**options)
