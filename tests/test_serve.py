"""What a served classifier answers by the Open Inference Protocol, and what is given away."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from onnx_files import IMAGE, INT64, NAMES, SMALL, argmax, echo, named, pixels
from serve_requests import FED, binary, grey, infer, linear, photo_server, png, raw, tensor
from served import Answer, call, inside, metrics

pytest.importorskip("starlette", reason="starlette is not installed: pip install 'mekd[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'mekd[serve]'")
pytest.importorskip("PIL", reason="Pillow is not installed: pip install 'mekd[serve]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def url(small: Path) -> Iterator[str]:
    """A server without options."""
    with inside(small) as url:
        yield url


@pytest.fixture(scope="module")
def photos(folder: Path) -> Iterator[tuple[Path, str]]:
    with photo_server(folder) as photos:
        yield photos


# -- the Open Inference Protocol ---------------------------------------------------------------------------


def test_metadata(url: str) -> None:
    assert call(f"{url}/v2/health/live").json() == {"live": True}
    assert call(f"{url}/v2/health/ready").status == call(f"{url}/v2/models/echo/ready").status == 200
    server = call(f"{url}/v2").json()
    assert server["name"] == "mekd" and {"binary_tensor_data", "classification"} <= set(server["extensions"])
    assert call(f"{url}/v2/models/echo").json() == {
        "name": "echo",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, *SMALL]}],
        "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, 6]}],
    }
    assert call(f"{url}/v2/models/echo/config").json()["max_batch_size"] == 256


@pytest.mark.parametrize("path", ["/v2/models/other", "/v2/models/other/ready", "/v2/models/other/config", "/v3"])
def test_what_is_not_there(url: str, path: str) -> None:
    answer = call(url + path)
    assert answer.status == 404 and answer.json()["error"]


def test_tensors_as_json(url: str) -> None:
    flat = infer(url, {"id": "seven", "inputs": [tensor([FED, FED[::-1]])]})
    expected = np.array([FED, FED[::-1]], np.float32)
    tree = flat.json()
    assert flat.status == 200 and flat.headers["Content-Type"] == "application/json"
    assert (tree["model_name"], tree["model_version"], tree["id"]) == ("echo", "1", "seven")
    (scores,) = tree["outputs"]
    assert (scores["name"], scores["datatype"], scores["shape"]) == ("scores", "FP32", [2, 6])
    # Bit for bit: each number is the float32 itself, not a rounding of it.
    assert scores["data"] == expected.reshape(-1).tolist()
    nested = infer(url, {"inputs": [tensor([FED], data=np.array([FED]).reshape(1, *SMALL).tolist())]}).json()
    assert nested["outputs"][0]["data"] == expected[0].tolist() and "id" not in nested


def test_binary_tensors(photos: tuple[Path, str]) -> None:
    path, url = photos
    images = pixels(3).numpy()
    head = {"name": "pixels", "datatype": "UINT8", "shape": [3, *IMAGE], "parameters": {"binary_data_size": 576}}
    both = infer(url, {"inputs": [head], "parameters": {"binary_data_output": True}}, images.tobytes(), "photos")
    tree, tail = binary(both)
    assert both.headers["Content-Type"] == "application/octet-stream"
    assert tree["outputs"] == [
        {"name": "logits", "datatype": "FP32", "shape": [3, 5], "parameters": {"binary_data_size": 60}}
    ]
    expected = raw(path, images)
    assert tail == expected.tobytes()
    # JSON up and binary down, and the other way round.
    plain = {"name": "pixels", "datatype": "UINT8", "shape": [3, *IMAGE], "data": images.tolist()}
    wanted = [{"name": "logits", "parameters": {"binary_data": True}}]
    assert binary(infer(url, {"inputs": [plain], "outputs": wanted}, name="photos"))[1] == expected.tobytes()
    wanted = [{"name": "logits", "parameters": {"binary_data": False}}]
    tree = {"inputs": [head], "outputs": wanted, "parameters": {"binary_data_output": True}}
    answer = infer(url, tree, images.tobytes(), "photos").json()
    assert answer["outputs"][0]["data"] == expected.reshape(-1).tolist()


def test_nan_is_written_bare(url: str) -> None:
    answer = infer(url, {"inputs": [tensor([1, 2, float("nan"), 4, float("inf"), 6])]})
    assert b"[1.0,2.0,NaN,4.0,Infinity,6.0]" in answer.body


def test_classification(url: str) -> None:
    def best(k: int, **parameters: Any) -> Answer:
        outputs = [{"name": "scores", "parameters": {"classification": k, **parameters}}]
        return infer(url, {"inputs": [tensor([FED, FED[::-1]])], "outputs": outputs})

    (output,) = best(2).json()["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
    assert output["data"] == ["3.000000:2", "2.000000:5", "3.000000:3", "2.000000:0"]
    assert best(99).json()["outputs"][0]["shape"] == [2, 6]
    tree, tail = binary(best(1, binary_data=True))
    assert tree["outputs"][0]["parameters"] == {"binary_data_size": len(tail)}
    assert tail == struct.pack("<I", 10) + b"3.000000:2" + struct.pack("<I", 10) + b"3.000000:3"


def test_classification_with_names(photos: tuple[Path, str]) -> None:
    path, url = photos
    images = pixels(1).numpy()
    head = {"name": "pixels", "datatype": "UINT8", "shape": [1, *IMAGE], "data": images.reshape(-1).tolist()}
    outputs = [{"name": "logits", "parameters": {"classification": 1}}]
    (word,) = infer(url, {"inputs": [head], "outputs": outputs}, name="photos").json()["outputs"][0]["data"]
    logits = raw(path, images)[0]
    assert word == f"{logits.max():f}:{logits.argmax()}:{NAMES[logits.argmax()]}"


@pytest.mark.parametrize(
    ("tree", "part"),
    [
        (b"{", "no JSON"),
        (b"[" * 100000, "no JSON"),
        (b"\xff\xfe", "no JSON"),
        ([], "JSON object"),
        ({}, "inputs"),
        ({"inputs": [tensor(FED), tensor(FED)]}, "inputs"),
        ({"inputs": ["x"]}, "JSON object"),
        ({"inputs": [tensor(FED)], "id": 7}, "id"),
        ({"inputs": [tensor(FED, name="y")]}, "'y'"),
        ({"inputs": [tensor(FED, datatype="UINT8")]}, "FP32"),
        ({"inputs": [tensor(FED, shape=[1, 6])]}, "[-1, 1, 2, 3]"),
        ({"inputs": [tensor(FED, shape=[0, 1, 2, 3], data=[])]}, "1 image"),
        ({"inputs": [tensor(FED, shape=[-1, 1, 2, 3])]}, "[-1, 1, 2, 3]"),
        ({"inputs": [tensor(FED, shape=None)]}, "[-1, 1, 2, 3]"),
        ({"inputs": [tensor(FED, data=FED[:5])]}, "[5]"),
        ({"inputs": [tensor(FED, data=[FED])]}, "[1, 6]"),
        ({"inputs": [tensor(FED, data=[FED[:2], FED[2:]])]}, "no even array"),
        ({"inputs": [tensor(FED, data=["1"] * 6)]}, "array of numbers"),
        ({"inputs": [tensor(FED, data=[None] * 6)]}, "array of numbers"),
        ({"inputs": [tensor(FED, data=7)]}, "array of numbers"),
        ({"inputs": [tensor(FED, parameters={"binary_data_size": 24})]}, "both data and"),
        ({"inputs": [tensor(FED)], "outputs": [{"name": "other"}]}, "'other'"),
        ({"inputs": [tensor(FED)], "outputs": [{"name": "scores", "parameters": {"classification": 0}}]}, "at least 1"),
        ({"inputs": [tensor(FED)], "outputs": [{"name": "scores"}] * 2}, "scores is asked for twice"),
        ({"inputs": [tensor(FED)], "parameters": {"binary_data_output": 1}}, "true or false"),
        ({"inputs": [tensor([FED] * 257)]}, "256 are allowed"),
    ],
)
def test_bad_requests_compute_nothing(url: str, tree: Any, part: str) -> None:
    before = metrics(url)["mekd_images_computed_total"]
    answer = infer(url, tree)
    assert answer.status == 400 and part in answer.json()["error"]
    assert metrics(url)["mekd_images_computed_total"] == before


@pytest.mark.parametrize(("size", "tail"), [(24, b"1234"), (20, b"0" * 20), (24, b"0" * 28), (-4, b"0" * 24)])
def test_bad_binary_sizes(url: str, size: int, tail: bytes) -> None:
    head = {"name": "x", "datatype": "FP32", "shape": [1, *SMALL], "parameters": {"binary_data_size": size}}
    assert infer(url, {"inputs": [head]}, tail).status == 400


def test_a_length_of_the_header_that_is_none(url: str) -> None:
    for length in ("-1", "many", "100000", "1" * 5000):
        answer = call(f"{url}/v2/models/echo/infer", b"{}", Inference_Header_Content_Length=length)
        assert answer.status == 400 and length in answer.json()["error"]


@pytest.mark.parametrize("value", [256, -1, 1.5, 2**70])
def test_what_is_no_uint8(photos: tuple[Path, str], value: float) -> None:
    data = [0] * 191 + [value]
    head = {"name": "pixels", "datatype": "UINT8", "shape": [1, *IMAGE], "data": data}
    assert infer(photos[1], {"inputs": [head]}, name="photos").status == 400
    head["data"] = [0] * 191 + [255]
    assert infer(photos[1], {"inputs": [head]}, name="photos").status == 200


def test_unknown_models_are_not_asked(url: str) -> None:
    assert infer(url, {"inputs": [tensor(FED)]}, name="other").status == 404
    assert call(f"{url}/hf/other", png(pixels(1)[0].numpy())).status == 404


# -- what is given away ------------------------------------------------------------------------------------

P = torch.tensor([FED]).softmax(-1)


@pytest.mark.parametrize(
    ("options", "outputs"),
    [
        (["--response", "logits"], {"scores": FED}),
        (["--response", "logits", "--decimals", "1"], {"scores": [0.5, -1.2, 3.0, 0.1, 0.0, 2.0]}),
        (["--response", "probs"], {"probs": P[0].tolist()}),
        (["--response", "topk", "--k", "2"], {"values": P[0, [2, 5]].tolist(), "indices": [2, 5]}),
        (["--response", "topk", "--k", "1", "--decimals", "3"], {"values": [round(P[0, 2].item(), 3)], "indices": [2]}),
        (["--response", "label"], {"label": [2]}),
    ],
)
def test_responses(small: Path, options: list[str], outputs: dict[str, Any]) -> None:
    with inside(small, *options) as url:
        described = {o["name"]: o for o in call(f"{url}/v2/models/echo").json()["outputs"]}
        answered = infer(url, {"inputs": [tensor(FED)]}).json()["outputs"]
        assert [o["name"] for o in answered] == list(outputs) == list(described)
        for output in answered:
            name = output["name"]
            assert output["data"] == (outputs[name] if "--decimals" in options else pytest.approx(outputs[name], 1e-6))
            assert output["shape"][1:] == described[name]["shape"][1:]
            assert output["datatype"] == described[name]["datatype"]
        # A classification gives no more away than the output that it is made of.
        wanted = [{"name": next(iter(outputs)), "parameters": {"classification": 6}}]
        best = infer(url, {"inputs": [tensor(FED)], "outputs": wanted})
        if "label" in outputs:
            assert best.status == 400 and "no scores" in best.json()["error"]
        else:
            (words,) = best.json()["outputs"]
            assert len(words["data"]) == len(next(iter(outputs.values()))) and words["data"][0].endswith(":2")


def test_files_of_every_kind(folder: Path) -> None:
    index = echo(folder / "index.onnx", argmax(), output=("best", INT64, ["m"]))
    with inside(index, "--num_classes", 6) as url:
        (output,) = infer(url, {"inputs": [tensor([FED, FED[::-1]])]}, name="index").json()["outputs"]
        assert output == {"name": "best", "datatype": "INT64", "shape": [2], "data": [2, 3]}
        assert call(f"{url}/hf/index", png(grey([0, 9, 0, 0, 0, 0]))).json() == [{"label": "1", "score": 1.0}]
    (folder / "animals.txt").write_text("\n".join(NAMES))
    with inside(named(folder / "named.onnx"), "--classes", folder / "animals.txt") as url:
        (output,) = infer(url, {"inputs": [tensor([FED])]}, name="named").json()["outputs"]
        assert output == {"name": "name", "datatype": "BYTES", "shape": [1], "data": ["cat"]}
        assert call(f"{url}/hf/named", png(grey([0, 0, 0, 0, 0, 9]))).json() == [{"label": "fox", "score": 1.0}]
    # A file for exactly two images at once.
    with inside(linear(folder / "two.onnx", (2, *IMAGE))) as url:
        head = {"name": "pixels", "datatype": "UINT8", "shape": [3, *IMAGE], "data": pixels(3).flatten().tolist()}
        (output,) = infer(url, {"inputs": [head]}, name="two").json()["outputs"]
        expected = raw(linear(folder / "any.onnx"), pixels(3).numpy())
        np.testing.assert_allclose(np.reshape(output["data"], (3, 5)), expected, rtol=1e-5, atol=1e-6)


def test_half_precision_has_no_json(folder: Path) -> None:
    half = TensorProto.FLOAT16
    cast = helper.make_node("Cast", ["flat"], ["scores"], to=half)
    path = echo(folder / "half.onnx", [cast], dtype=half, output=("scores", half, ["m", 6]))
    with inside(path) as url:
        head = {"name": "x", "datatype": "FP16", "shape": [1, *SMALL], "parameters": {"binary_data_size": 12}}
        content = np.array(FED, np.float16).tobytes()
        assert infer(url, {"inputs": [head]}, content, "half").status == 400
        assert metrics(url)["mekd_images_computed_total"] == 0
        asked = {"inputs": [head], "parameters": {"binary_data_output": True}}
        assert binary(infer(url, asked, content, "half"))[1] == content
