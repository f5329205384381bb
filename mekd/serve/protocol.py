"""Tensors of the Open Inference Protocol v2: a request's image input, and the outputs that answer it.

A tensor is JSON, or its bytes lie behind the JSON: little-endian, in order, as long as its binary_data_size says.
https://github.com/kserve/open-inference-protocol and Triton's extensions binary_tensor_data and classification.
"""

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Bytes of a PNG or JPEG, or of it as base64, that is taken however small the model's images are.
PICTURE = 1 << 26
#: Counts the bytes of the JSON in front of binary tensors, in requests and in answers.
LENGTH_HEADER = "Inference-Header-Content-Length"
DATATYPES: dict[str, np.dtype[Any]] = {
    "UINT8": np.dtype("u1"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}


class RequestError(Exception):
    """What a client did wrong, with the status that tells it so."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Spec:
    """A tensor as the metadata describe it; row: its shape without the batch."""

    name: str
    datatype: str
    row: tuple[int, ...]

    def described(self) -> dict[str, Any]:
        """Its entry in the metadata."""
        return {"name": self.name, "datatype": self.datatype, "shape": [-1, *self.row]}


@dataclass(frozen=True)
class Wanted:
    """An output that a request asks for; classification: so many best classes instead of the values."""

    name: str
    binary: bool
    classification: int | None


@dataclass(frozen=True)
class Infer:
    """A request: its images (m, *row), and what it asks for."""

    id: str | None
    images: np.ndarray
    wanted: list[Wanted]


def most_bytes(takes: Spec, images: int) -> int:
    """What a request of so many images takes at most: as JSON, or one large picture, and a megabyte for all else."""
    digits = 5 if takes.datatype == "UINT8" else 27  # "255, ", and a double with its sign and exponent
    return max(images * math.prod(takes.row) * digits, PICTURE) + (1 << 20)


def read_infer(body: bytes, length: str | None, takes: Spec, gives: Sequence[Spec], max_batch: int) -> Infer:
    """A request's body; length is its LENGTH_HEADER. Raises RequestError."""
    text, tail = _split(body, length)
    tree = _object(_json(text), "the request")
    asked = tree.get("id")
    if asked is not None and not isinstance(asked, str):
        raise RequestError(f"id must be a string, not {asked!r}")
    inputs = tree.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1:
        raise RequestError(f"inputs must be a list of one tensor, {takes.name}")
    images = _images(_object(inputs[0], "an input"), tail, takes, max_batch)
    everything = _parameters(tree).get("binary_data_output", False)
    return Infer(asked, images, _wanted(tree.get("outputs"), gives, _flag(everything, "binary_data_output")))


def write_infer(
    model: str, asked: str | None, tensors: Sequence[tuple[Wanted, str, np.ndarray]], decimals: int | None
) -> tuple[bytes, dict[str, str]]:
    """The body and headers of an answer of outputs, each with its datatype; decimals: of numbers written as JSON."""
    outputs, tail = [], b""
    for wanted, datatype, values in tensors:
        entry: dict[str, Any] = {"name": wanted.name, "datatype": datatype, "shape": list(values.shape)}
        if wanted.binary:
            content = _bytes(datatype, values)
            entry["parameters"] = {"binary_data_size": len(content)}
            tail += content
        else:
            entry["data"] = _numbers(values, decimals)
        outputs.append(entry)
    head: dict[str, Any] = {"model_name": model, "model_version": "1"}
    text = json.dumps(head | ({} if asked is None else {"id": asked}) | {"outputs": outputs}, separators=(",", ":"))
    if not any(wanted.binary for wanted, _, _ in tensors):
        return text.encode(), {"Content-Type": "application/json"}
    content = text.encode()
    return content + tail, {"Content-Type": "application/octet-stream", LENGTH_HEADER: str(len(content))}


# -- requests ----------------------------------------------------------------------------------------------


def _split(body: bytes, length: str | None) -> tuple[bytes, bytes]:
    if length is None:
        return body, b""
    if not length.isdecimal() or len(length) > 18 or int(length) > len(body):  # int() takes no thousands of digits
        raise RequestError(f"{LENGTH_HEADER} is {length!r}; it must be a whole number, at most the body's {len(body)}")
    return body[: int(length)], body[int(length) :]


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request is no JSON: {error}") from error


def _object(tree: Any, what: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise RequestError(f"{what} must be a JSON object")
    return tree


def _parameters(tree: dict[str, Any]) -> dict[str, Any]:
    return _object(tree.get("parameters") or {}, "parameters")


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}; it must be true or false")
    return value


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _images(tensor: dict[str, Any], tail: bytes, takes: Spec, max_batch: int) -> np.ndarray:
    if tensor.get("name") != takes.name:
        raise RequestError(f"there is no input {tensor.get('name')!r}; the model takes {takes.name}")
    if tensor.get("datatype") != takes.datatype:
        raise RequestError(f"input {takes.name} has datatype {tensor.get('datatype')!r}; it must be {takes.datatype}")
    shape = tensor.get("shape")
    if not isinstance(shape, list) or not all(map(_count, shape)) or tuple(shape[1:]) != takes.row or shape[0] < 1:
        raise RequestError(f"input {takes.name} has shape {shape!r}; it must be {[-1, *takes.row]}, of 1 image or more")
    if shape[0] > max_batch:
        raise RequestError(f"the request has {shape[0]} images; {max_batch} are allowed")
    size = _parameters(tensor).get("binary_data_size")
    if size is None:
        values = _from_json(tensor.get("data"), shape, takes)
        left = tail
    elif "data" in tensor:
        raise RequestError(f"input {takes.name} has both data and a binary_data_size")
    else:
        if not _count(size) or size > len(tail):
            raise RequestError(f"binary_data_size is {size!r}; {len(tail)} bytes follow the JSON")
        values, left = _from_bytes(tail[:size], shape, takes), tail[size:]
    if left:
        raise RequestError(f"{len(left)} bytes behind the JSON belong to no tensor")
    return values.reshape(shape)


def _from_bytes(content: bytes, shape: list[int], takes: Spec) -> np.ndarray:
    dtype = DATATYPES[takes.datatype]
    expected = int(np.prod(shape)) * dtype.itemsize
    if len(content) != expected:
        raise RequestError(f"input {takes.name} has {len(content)} bytes of data; its shape {shape} takes {expected}")
    return np.frombuffer(content, dtype)


def _from_json(data: Any, shape: list[int], takes: Spec) -> np.ndarray:
    if takes.datatype == "FP16":
        raise RequestError(f"input {takes.name} is FP16, which JSON cannot hold; send it as binary data")
    dtype = DATATYPES[takes.datatype]
    try:
        values = np.asarray(data)
    except (ValueError, OverflowError) as error:
        raise RequestError(f"the data of input {takes.name} is no even array of numbers") from error
    if not isinstance(data, list) or values.dtype.kind not in ("iu" if dtype.kind == "u" else "iuf"):
        kind = "whole numbers" if dtype.kind == "u" else "numbers"
        raise RequestError(f"the data of input {takes.name} must be an array of {kind}")
    if values.size != np.prod(shape) or (values.ndim > 1 and list(values.shape) != shape):
        raise RequestError(f"input {takes.name} has data of shape {list(values.shape)}; it must be {shape}, or flat")
    if dtype.kind == "u" and (values.min() < 0 or values.max() > np.iinfo(dtype).max):
        raise RequestError(f"the data of input {takes.name} must lie between 0 and {np.iinfo(dtype).max}")
    return values.astype(dtype)


def _wanted(outputs: Any, gives: Sequence[Spec], everything: bool) -> list[Wanted]:
    names = [spec.name for spec in gives]
    if not outputs:
        return [Wanted(name, everything, None) for name in names]
    if not isinstance(outputs, list):
        raise RequestError("outputs must be a list")
    found: list[Wanted] = []
    for output in outputs:
        tree = _object(output, "an output")
        if tree.get("name") not in names:
            raise RequestError(f"there is no output {tree.get('name')!r}; the model gives {', '.join(names)}")
        parameters = _parameters(tree)
        best = parameters.get("classification")
        if best is not None and (not _count(best) or best < 1):
            raise RequestError(f"classification is {best!r}; it must be a whole number of at least 1")
        if any(wanted.name == tree["name"] for wanted in found):  # a short request would have an answer of any length
            raise RequestError(f"output {tree['name']} is asked for twice; name it once")
        found.append(Wanted(tree["name"], _flag(parameters.get("binary_data", everything), "binary_data"), best))
    return found


# -- answers -----------------------------------------------------------------------------------------------


def _bytes(datatype: str, values: np.ndarray) -> bytes:
    if datatype != "BYTES":
        return values.astype(DATATYPES[datatype], copy=False).tobytes()
    words = [str(word).encode() for word in values.reshape(-1)]
    return b"".join(struct.pack("<I", len(word)) + word for word in words)


def _numbers(values: np.ndarray, decimals: int | None) -> list[Any]:
    """Flat values; float32 as the very numbers that they are, or, if they were rounded, with so many decimals."""
    numbers = values.reshape(-1).tolist()
    rounded = decimals is not None and values.dtype.kind == "f"
    return [round(x, decimals) for x in numbers] if rounded else numbers
