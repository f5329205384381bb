"""ONNX Runtime works on the memory of torch tensors, in order with torch's stream, and nothing is copied."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mekd.oracle.binding import bound, in_pieces, on_stream, out_of_memory, replayed
from mekd.oracle.ort import OnnxOracle, ProviderError, open_session
from mekd.oracle.response import AnswerError
from mekd.pixels import to_float
from onnx_files import FLOAT, INT64, SMALL, TensorProto, argmax, asked, echo, pixels, values

CPU = torch.device("cpu")
gpu = [pytest.mark.gpu]


class Spy:
    """A session that notes what is bound to it: (name, device, type, shape, address)."""

    def __init__(self, session: Any) -> None:
        self.session, self.inputs, self.outputs = session, list[Any](), list[Any]()

    def io_binding(self) -> Any:
        binding, spy = self.session.io_binding(), self
        bind_input, bind_output = binding.bind_input, binding.bind_output

        def note_input(*what: Any) -> None:
            spy.inputs.append(what)
            bind_input(*what)

        def note_output(*what: Any) -> None:
            spy.outputs.append(what)
            bind_output(*what)

        binding.bind_input, binding.bind_output = note_input, note_output
        return binding

    def run_with_iobinding(self, *what: Any) -> None:
        self.session.run_with_iobinding(*what)


def spied(tmp_path: Path) -> Spy:
    return Spy(open_session(echo(tmp_path / "x.onnx"), "cpu"))


def test_input_and_output_are_the_tensors_own_memory(tmp_path: Path) -> None:
    spy = spied(tmp_path)
    ask = bound(spy, "x", "scores", (6,), torch.float32, CPU)
    images = torch.rand(3, *SMALL)
    out = ask(images)
    assert spy.inputs == [("x", "cpu", 0, np.float32, [3, *SMALL], images.data_ptr())]
    assert spy.outputs == [("scores", "cpu", 0, np.float32, [3, 6], out.data_ptr())]
    assert torch.equal(out, images.flatten(1))


def test_a_slice_is_bound_where_it_lies(tmp_path: Path) -> None:
    ask = bound(open_session(echo(tmp_path / "x.onnx"), "cpu"), "x", "scores", (6,), torch.float32, CPU)
    images = torch.rand(5, *SMALL)
    assert torch.equal(in_pieces(ask, 2, False)(images), images.flatten(1))


def test_an_answer_is_not_written_over_by_the_next(tmp_path: Path) -> None:
    oracle = asked(echo(tmp_path / "x.onnx"))
    first = values(oracle.query(pixels(4, SMALL)))
    kept = first.clone()
    values(oracle.query(pixels(4, SMALL, seed=1)))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "offset", "expanded"])
def test_images_in_any_layout(tmp_path: Path, layout: str) -> None:
    image = (3, 4, 4)
    path = echo(tmp_path / "x.onnx", dtype=TensorProto.UINT8, shape=("m", *image), output=("scores", FLOAT, ["m", 48]))
    images = pixels(6, image)
    made = {
        "channels_last": images.to(memory_format=torch.channels_last),
        "transposed": images.transpose(2, 3).contiguous().transpose(2, 3),
        "offset": torch.cat([images, images])[6:],
        "expanded": images[:1].expand(6, -1, -1, -1),
    }[layout]
    expected = made.contiguous().flatten(1).float()
    assert torch.equal(values(asked(path).query(made)), expected)
    assert torch.equal(values(asked(path, batch=4).query(made)), expected)


def test_the_images_themselves_stay_as_they_are(tmp_path: Path) -> None:
    oracle = asked(echo(tmp_path / "x.onnx"), transport="float", mean=(0.5,), std=(0.2,))
    images = to_float(pixels(4, SMALL))
    kept = images.clone()
    oracle.query(images)
    assert torch.equal(images, kept)


def test_fixed_addresses_are_used_again(tmp_path: Path) -> None:
    spy = spied(tmp_path)
    ask = replayed(spy, "x", "scores", torch.zeros(4, *SMALL), (6,), torch.float32)
    images = [torch.rand(4, *SMALL) for _ in range(3)]
    answers = [ask(batch) for batch in images]
    assert len(spy.inputs) == len(spy.outputs) == 1
    assert spy.inputs[0][-1] not in [batch.data_ptr() for batch in images]
    for batch, out in zip(images, answers, strict=True):
        assert torch.equal(out, batch.flatten(1))


@pytest.mark.parametrize(
    ("m", "fixed", "sent"),
    [(3, False, [3]), (4, False, [4]), (9, False, [4, 4, 1]), (3, True, [4]), (8, True, [4, 4]), (9, True, [4, 4, 4])],
)
def test_pieces(m: int, fixed: bool, sent: list[int]) -> None:
    sizes: list[int] = []

    def ask(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return images * 2

    images = torch.arange(m).view(m, 1)
    assert torch.equal(in_pieces(ask, 4, fixed)(images), images * 2)
    assert sizes == sent


def test_work_is_in_order_with_the_callers_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    # Streams that note who waits for whom: there is no GPU to get it wrong on.
    said: list[str] = []

    class Stream:
        device = CPU

        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            said.append(f"{self.name} waits for {other.name}")

    here, own = Stream("torch"), Stream("teacher")

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        said.append(f"on {stream.name}")
        yield
        said.append("back")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.cuda, "stream", on)

    def ask(images: Tensor) -> Tensor:
        said.append("ask")
        return images

    on_stream(ask, own)(torch.zeros(1))  # type: ignore[arg-type]
    assert said == ["teacher waits for torch", "on teacher", "ask", "back", "torch waits for teacher"]


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (RuntimeError("... bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 9663676416"), True),
        (RuntimeError("CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc"), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("std::bad_alloc"), True),
        (MemoryError(), True),
        (RuntimeError("Non-zero status code returned while running Flatten node"), False),
    ],
)
def test_what_says_that_memory_did_not_suffice(error: Exception, is_memory: bool) -> None:
    assert out_of_memory(error) == is_memory


def test_a_failure_in_a_query_is_an_answer_that_cannot_be_used(tmp_path: Path) -> None:
    # As many rows as the batch for blank images, fewer for others.
    from onnx import helper

    tail = [
        helper.make_node("ReduceSum", ["flat", "one"], ["sums"], keepdims=0),
        helper.make_node("Less", ["sums", "limit"], ["kept"]),
        helper.make_node("Compress", ["flat", "kept"], ["scores"], axis=0),
    ]
    path = echo(tmp_path / "x.onnx", tail, constants={"one": np.array([1]), "limit": np.float32(5.99)})
    oracle = asked(path)
    with pytest.raises(AnswerError, match=r"the teacher failed on 2 images: .*shape") as caught:
        oracle.query(torch.full((2, *SMALL), 255, dtype=torch.uint8))
    assert "\n" not in str(caught.value) and oracle.ledger.counts["uncertain"] == 2


def test_a_recorded_teacher_is_asked_on_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The CPU replays at fixed addresses too, once it is not refused.
    monkeypatch.setattr("mekd.oracle.ort.check_options", lambda *what: None)
    monkeypatch.setattr("mekd.oracle.session.check_options", lambda *what: None)
    path, images = echo(tmp_path / "x.onnx"), pixels(5, SMALL)
    for graph in (True, False):
        oracle = asked(path, batch=2, cuda_graph=graph)
        assert torch.equal(values(oracle.query(images)), images.float().div(255).flatten(1))
        with ThreadPoolExecutor(1) as other:
            there = other.submit(oracle.query, images)
        if graph:
            with pytest.raises(ProviderError, match=r"another thread than the one that opened it: .*cuda_graph false"):
                there.result()
        assert oracle.ledger.counts["queries"] == (5 if graph else 10) and oracle.ledger.counts["uncertain"] == 0


# -- on a GPU ----------------------------------------------------------------------------------------------


def on_cuda(path: Path, response: str = "logits", **options: Any) -> OnnxOracle:
    return OnnxOracle(path, response, providers="cuda", **options)


@pytest.mark.parametrize("options", [{}, {"batch": 4}, {"batch": 4, "cuda_graph": True}], ids=["whole", "4", "graph"])
@pytest.mark.parametrize("response", ["logits", "topk", "label"])
@pytest.mark.parametrize("m", [1, 11])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu), pytest.param("cpu", marks=gpu)])
def test_the_gpu_answers_what_the_cpu_answers(
    teacher_onnx: Path, device: str, m: int, response: str, options: dict[str, Any]
) -> None:
    images = pixels(m, (1, 16, 16))
    expected = asked(teacher_onnx, response, k=3).query(images)
    answered = on_cuda(teacher_onnx, response, k=3, **options).query(images.to(device))
    for ours, theirs in zip(answered.tensors(), expected.tensors(), strict=True):
        assert ours.device.type == device
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cuda_graph", [pytest.param(False, marks=gpu), pytest.param(True, marks=gpu)])
def test_streams_that_hurry_corrupt_nothing(tmp_path: Path, cuda_graph: bool) -> None:
    # The images are written just before and freed just after; the caller's stream has much to do.
    image = (3, 64, 64)
    count = int(np.prod(image))
    path = echo(tmp_path / "x.onnx", shape=("m", *image), output=("scores", FLOAT, ["m", count]))
    oracle = on_cuda(path, transport="float", batch=32, cuda_graph=cuda_graph)
    busy = torch.rand(2048, 2048, device="cuda")
    sums = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for i in range(50):
            busy = busy @ busy / 1024
            images = torch.full((32, *image), i / 50, device="cuda") * 2 - 1
            sums.append(values(oracle.query(images)).sub_(i / 50).abs().amax())
            del images
            torch.full((32, *image), 7.0, device="cuda")
        worst = torch.stack(sums).max()
    torch.cuda.synchronize()
    assert worst.item() < 1e-6


@pytest.mark.parametrize("output", [pytest.param("index", marks=gpu)])
def test_class_indices_on_the_gpu(tmp_path: Path, output: str) -> None:
    path = echo(tmp_path / "x.onnx", argmax(), output=("best", INT64, ["m"]))
    images = pixels(9, SMALL)
    answered = on_cuda(path, "label", num_classes=6).query(images.cuda())
    assert answered.labels.is_cuda
    assert torch.equal(answered.labels.cpu(), images.flatten(1).long().argmax(-1))


@pytest.mark.parametrize("precision", [pytest.param("float16", marks=gpu)])
def test_float16_on_the_gpu(teacher_onnx: Path, precision: str) -> None:
    images = pixels(9, (1, 16, 16))
    expected = values(asked(teacher_onnx, "probs").query(images))
    answered = values(on_cuda(teacher_onnx, "probs", precision=precision).query(images.cuda())).cpu()
    torch.testing.assert_close(answered, expected, rtol=0, atol=0.02)
    assert not torch.equal(answered, expected)


@pytest.mark.parametrize("device", [pytest.param("cuda:0", marks=gpu), pytest.param("cuda:1", marks=gpu)])
def test_the_teacher_works_on_the_card_of_the_run(tmp_path: Path, device: str) -> None:
    if int(device[-1]) >= torch.cuda.device_count():
        pytest.skip(f"needs two CUDA devices: there is {torch.cuda.device_count()}")
    current = torch.cuda.current_device()
    oracle = on_cuda(echo(tmp_path / "x.onnx"), device=torch.device(device))
    images = pixels(5, SMALL)
    for where in (device, "cuda:0", "cpu"):
        answered = values(oracle.query(images.to(where)))
        assert str(answered.device) == where and torch.cuda.current_device() == current
        torch.testing.assert_close(answered.cpu(), images.float().div(255).flatten(1))
    graph = on_cuda(echo(tmp_path / "x.onnx"), device=torch.device(device), batch=4, cuda_graph=True)
    torch.testing.assert_close(values(graph.query(images)), images.float().div(255).flatten(1))
