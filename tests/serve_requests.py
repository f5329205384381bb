"""Requests to a served classifier, small files to serve, and what they answer without a server."""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import helper

from onnx_files import FLOAT, IMAGE, NAMES, SMALL, UINT8, save
from served import Answer, call, inside

FED = [0.5, -1.25, 3.0, 0.1, 1e-3, 2.0]  # six logits of echo()
CLASSES = 5


def linear(path: Path, shape: tuple[Any, ...] = ("m", *IMAGE)) -> Path:
    """Pixels of uint8 to logits, whose last bits depend on the order in which they are summed."""
    node = helper.make_node
    nodes = [
        node("Flatten", ["pixels"], ["flat"]),
        node("Cast", ["flat"], ["x"], to=FLOAT),
        node("MatMul", ["x", "weight"], ["logits"]),
    ]
    weight = np.random.default_rng(0).standard_normal((192, CLASSES)).astype(np.float32) / 1000
    return save(path, nodes, [("pixels", UINT8, shape)], [("logits", FLOAT, [shape[0], CLASSES])], {"weight": weight})


def raw(path: Path, images: np.ndarray) -> np.ndarray:
    """What the file answers, without a server."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def tensor(images: Any, **other: Any) -> dict[str, Any]:
    """An input of echo()."""
    array = np.asarray(images, dtype=np.float32).reshape(-1, *SMALL)
    return {"name": "x", "datatype": "FP32", "shape": list(array.shape), "data": array.reshape(-1).tolist()} | other


def infer(url: str, tree: Any, tail: bytes = b"", name: str = "echo") -> Answer:
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    headers = {"Inference_Header_Content_Length": str(len(text))} if tail else {}
    return call(f"{url}/v2/models/{name}/infer", text + tail, **headers)


def binary(answer: Answer) -> tuple[dict[str, Any], bytes]:
    """The JSON of an answer, and the bytes behind it."""
    length = int(answer.headers["Inference-Header-Content-Length"])
    return json.loads(answer.body[:length]), answer.body[length:]


def png(image: np.ndarray, size: tuple[int, int] | None = None, format: str = "PNG") -> bytes:
    """An image (ch, H, W) as the bytes of a file."""
    from PIL import Image

    picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    file = io.BytesIO()
    (picture if size is None else picture.resize(size, Image.Resampling.NEAREST)).save(file, format, quality=95)
    return file.getvalue()


def grey(values: list[int]) -> np.ndarray:
    return np.array(values, np.uint8).reshape(SMALL)


@contextlib.contextmanager
def photo_server(folder: Path) -> Iterator[tuple[Path, str]]:
    """A file for coloured images, and its server, which knows the classes' names."""
    path = linear(folder / "photos.onnx")
    (folder / "names.txt").write_text("\n".join(NAMES[:CLASSES]) + "\n")
    with inside(path, "--classes", folder / "names.txt") as url:
        yield path, url
