"""A teacher behind the Open Inference Protocol, version 2, over HTTP: Triton, KServe, MLServer, `mekd serve`."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mekd.errors import UsageError
from mekd.oracle.answers import Raw
from mekd.oracle.http import Line, Lost, Refused, Reply, ServiceError, Unreachable, judged
from mekd.oracle.response import AnswerError

_TYPES = {
    "UINT8": np.uint8, "FP32": np.float32, "FP16": np.float16, "FP64": np.float64, "INT64": np.int64, "INT32": np.int32,
}  # fmt: skip
_FLOATS = ("FP32", "FP16", "FP64")
_READ = _TYPES | {
    "INT8": np.int8, "INT16": np.int16, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
}  # fmt: skip
#: What reading a tree of another shape than the expected one raises.
_STRANGE = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError)


@dataclass(frozen=True)
class Model:
    """What is sent and read: of the metadata, or set by hand where the server says nothing.

    input, datatype: of the images; last: whether channels come last. output: the tensor that is read, None for the only
    one. classes: how many, None where it is not said. size: the side that it takes, None for any. binary: whether
    tensors travel as bytes. versions: as the server names them. most: images a call at most, None where not said.
    answers: the datatype of the output, None where it is not said.
    """

    input: str
    datatype: str
    last: bool
    output: str | None
    classes: int | None
    size: int | None
    binary: bool
    classification: bool
    versions: tuple[str, ...]
    most: int | None
    note: str
    answers: str | None = None


def describe(
    line: Line, channels: int, *, input_name: str | None, output_name: str | None, transport: str, binary: bool | None
) -> Model:
    """Ask the server what the model is; nothing of it is paid.

    ServiceError where it cannot be an image classifier, Unreachable where the server does not answer all of it now.
    """
    said, extensions, limits = _json(line, ""), _extensions(line), _json(line, "/config", quiet=True)
    try:
        return _model(said, extensions, limits, channels, input_name, output_name, transport, binary)
    except _STRANGE as error:
        raise ServiceError(
            f"the model's metadata are not of the Open Inference Protocol ({error!r}): is teacher.url "
            "http://HOST:PORT/v2/models/NAME?"
        ) from None


def check_transport(model: Model, transport: str) -> None:
    """Raise UsageError where pixels are taken and unrounded values would be sent."""
    if model.datatype == "UINT8" and transport == "float":
        raise UsageError("oracle.transport is 'float', but the model takes UINT8: say --oracle.transport uint8")


def check_output(model: Model, response: str, *, listed: bool, named: bool) -> None:
    """Raise UsageError where the datatype of the output tells that it cannot be read, or answers no such response.

    listed: whether the classification extension is asked for, which makes text of any scores; named: whether the names
    of the classes are known.
    """
    said = f"the model's output {model.output} is {model.answers}"
    if model.answers is None or model.answers in _FLOATS:
        return
    if model.answers not in (*_READ, "BYTES"):
        if not listed:
            raise UsageError(
                f"{said}, and mekd reads {', '.join(_FLOATS)}, whole numbers and BYTES: name another output with "
                "--oracle.output_name"
            )
    elif response != "label":
        raise UsageError(
            f"{said}, which is a class and no {response}: say --oracle.response label, or name another output with "
            "--oracle.output_name"
        )
    elif model.answers == "BYTES" and not named:
        raise UsageError(f"{said}, which is a class by its name: list the names with --oracle.classes FILE")


def _extensions(line: Line) -> list[str]:
    """What the server offers besides the protocol itself."""
    about = line.url.split("/models/")[0] if "/models/" in line.url else None
    if about is None:
        return []
    server = line.beside(about)
    try:  # a server may keep this to itself
        said = _json(server, "", quiet=True).get("extensions")
    finally:
        server.close()
    return [str(name) for name in said] if isinstance(said, list) else []


def _model(
    said: dict[str, Any], extensions: list[str], limits: dict[str, Any], channels: int, input_name: str | None,
    output_name: str | None, transport: str, binary: bool | None,
) -> Model:  # fmt: skip
    inputs, outputs = list(said.get("inputs") or []), list(said.get("outputs") or [])
    source = _named(inputs, input_name, "input", "oracle.input_name")
    sink = _named(outputs, output_name, "output", "oracle.output_name")
    datatype = source["datatype"] if source else ("UINT8" if transport == "uint8" else "FP32")
    if datatype not in ("UINT8", *_FLOATS):
        raise ServiceError(
            f"the model's input {source['name'] if source else ''} is {datatype}; mekd sends UINT8 or FP"
        )
    shape = [n if isinstance(n, int) and n > 0 else None for n in (source["shape"] if source else [])]
    if shape and len(shape) not in (3, 4):
        raise ServiceError(f"the model's input has shape {source['shape'] if source else ''}; images are (m, ch, H, W)")
    shape = shape[-3:] if shape else [None] * 3
    last = shape[2] in (1, 3) and shape[0] not in (1, 3)
    if last:
        shape = [shape[2], shape[0], shape[1]]
    if shape[0] not in (None, channels):
        raise ServiceError(f"the model takes images of {shape[0]} channels, the data has {channels}: use data that fit")
    if shape[1] != shape[2]:
        raise ServiceError(f"the model takes images of {shape[1]} x {shape[2]} pixels; mekd draws square ones")
    scores = sink["shape"][1:] if sink and sink["datatype"] in _FLOATS else []  # of one image, in whatever shape
    width = math.prod(scores) if scores and all(isinstance(n, int) and n > 0 for n in scores) else None
    most = limits.get("max_batch_size")
    model = Model(
        input=source["name"] if source else input_name or "input",
        datatype=datatype,
        last=last,
        output=sink["name"] if sink else output_name,
        classes=width,
        size=shape[1],
        binary=any("binary" in name for name in extensions) if binary is None else binary,
        classification=any("classification" in name for name in extensions),
        versions=tuple(map(str, said.get("versions") or ())),
        most=most if isinstance(most, int) and most > 0 else None,
        note="",
        answers=str(sink["datatype"]) if sink and "datatype" in sink else None,
    )
    shown = f"{model.input} {datatype} {source['shape'] if source else 'of a shape that the server does not say'}"
    note = (
        f"the model takes {shown}, as {'bytes' if model.binary else 'JSON'}, and answers {model.output or 'one tensor'}"
    )
    return Model(**{**model.__dict__, "note": note})


class Oip:
    """Calls of one model. k: ask for that many classes by the classification extension; None for the whole output.

    names: of the classes, which those that the extension tells must agree with; empty where they are not known.
    """

    def __init__(
        self, line: Line, model: Model, classes: int, *, mean: Sequence[float], std: Sequence[float], k: int | None,
        names: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._line, self._model, self._classes, self._k, self._names = line, model, classes, k, names
        self._shift, self._spread = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 1) for x in (mean, std))
        self._ids = itertools.count()
        #: Whether what the scores are is known, as RemoteOracle says; until then an answer is to list every class, as
        #: their sum tells it.
        self.known = True

    def call(self, images: list[bytes] | Tensor) -> tuple[Raw, int]:
        assert isinstance(images, Tensor)
        body, headers = self._request(images)
        limit = (1 << 20) + len(images) * (64 * self._classes + 1024)
        reply = judged(self._line, self._line.exchange("POST", "/infer", body, headers, limit=limit))
        try:
            raw = self._answer(reply, len(images))
        except AnswerError as error:
            raise AnswerError(self._line.secrets.hide(str(error))) from None
        return raw, len(reply.body)

    def close(self) -> None:
        self._line.close()

    def _request(self, images: Tensor) -> tuple[bytes, dict[str, str]]:
        model = self._model
        values = images
        check_transport(model, "float" if images.is_floating_point() else "uint8")
        if model.datatype != "UINT8":
            values = images.float() / 255 if images.dtype == torch.uint8 else images.add(1).mul(0.5)
            values = (values - self._shift) / self._spread
        array = (values.permute(0, 2, 3, 1) if model.last else values).contiguous().numpy()
        array = array.astype(_TYPES[model.datatype])
        tensor: dict[str, Any] = {"name": model.input, "shape": list(array.shape), "datatype": model.datatype}
        asked: dict[str, Any] = {"id": str(next(self._ids)), "inputs": [tensor]}
        parameters: dict[str, Any] = {"binary_data": True} if model.binary else {}
        if self._k is not None:
            parameters = {"classification": self._k if self.known else self._classes}
        if model.output is not None:
            asked["outputs"] = [{"name": model.output, **({"parameters": parameters} if parameters else {})}]
        elif model.binary:
            asked["parameters"] = {"binary_data_output": True}
        if not model.binary:
            tensor["data"] = array.reshape(-1).tolist()
            return json.dumps(asked).encode(), {"content-type": "application/json"}
        tensor["parameters"] = {"binary_data_size": array.nbytes}
        head = json.dumps(asked).encode()
        headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))}
        return head + array.tobytes(), headers

    def _answer(self, reply: Reply, count: int) -> Raw:
        length = reply.headers.get("inference-header-content-length")
        try:
            head = json.loads(reply.body[: int(length)] if length else reply.body)
            tensors = head["outputs"]
            at = int(length) if length else 0
            found = {}
            for tensor in tensors:
                size = (tensor.get("parameters") or {}).get("binary_data_size")
                found[tensor["name"]] = _values(tensor, reply.body[at : at + size] if size is not None else None)
                at += size or 0
        except (*_STRANGE, RecursionError) as error:
            raise AnswerError(
                f"the teacher's answer is not of the Open Inference Protocol ({error!r}): is teacher.url the address "
                "of a model, http://HOST/v2/models/NAME?"
            ) from error
        name = self._model.output
        if name is None and len(found) == 1:
            (name,) = found
        if name not in found:
            raise AnswerError(
                f"the teacher answered {', '.join(found) or 'nothing'}; name one with --oracle.output_name"
            )
        values = found[name]
        if isinstance(values, list):
            if self._k is None:
                return Raw(names=[str(value) for value in values])
            pairs = _classified(values, count, self._names)
            if not self.known and len(pairs[0]) < self._classes:
                raise AnswerError(
                    f"the teacher named {len(pairs[0])} of {self._classes} classes, and all of them were asked for, as "
                    "their sum tells whether scores are shares: is the number of classes (oracle.num_classes, "
                    "oracle.classes) right? Of a server that names no more at once --oracle.response probs has the "
                    "whole output asked for"
                )
            return Raw(pairs=pairs)
        if values.dtype.kind == "f":
            return Raw(scores=values.reshape(len(values), math.prod(values.shape[1:])))
        return Raw(indices=values.reshape(-1))


def _values(tensor: dict[str, Any], raw: bytes | None) -> "np.ndarray | list[str]":
    shape = [int(n) for n in tensor["shape"]]
    if not shape or min(shape) < 0:
        raise ValueError(f"a tensor of shape {shape}")
    if tensor["datatype"] == "BYTES":
        if raw is None:
            return [str(value) for value in np.ravel(np.array(tensor["data"], dtype=object))]
        found, at = [], 0
        while at < len(raw):
            size = int.from_bytes(raw[at : at + 4], "little")
            found.append(raw[at + 4 : at + 4 + size].decode("utf-8"))
            at += 4 + size
        return found
    kind = np.dtype(_READ[tensor["datatype"]]).newbyteorder("<")
    values = np.array(tensor["data"], dtype=kind).reshape(-1) if raw is None else np.frombuffer(raw, kind)
    return values.reshape(shape)


def _classified(values: list[str], count: int, names: Sequence[str]) -> list[list[tuple[int, float]]]:
    """value:index[:name] for each entry, in any order, as many for each image; AnswerError for another name there."""
    if count == 0 or len(values) % count:
        raise AnswerError(f"the teacher answered {len(values)} classes for {count} images")
    k = len(values) // count
    pairs = []
    for value in values:
        score, _, rest = value.partition(":")
        number, _, label = rest.partition(":")
        try:
            if not (number.isdecimal() and len(number) < 10):
                raise ValueError
            at, label = int(number), label.strip()
            pairs.append((at, float(score)))
        except ValueError:
            raise AnswerError(f"the teacher answered {value[:80]!r}; it must be value:index") from None
        if label and at < len(names) and label != names[at]:
            raise AnswerError(
                f"the teacher calls class {at} {label[:80]!r}, and oracle.classes lists {names[at][:80]!r} for it (the "
                "first name is of class 0): list the names as the server has them and in its order, or say "
                f"--oracle.classes null --oracle.num_classes {len(names)}, since it answers with numbers"
            )
    return [pairs[i * k : (i + 1) * k] for i in range(count)]


def _named(tensors: list[dict[str, Any]], name: str | None, what: str, setting: str) -> dict[str, Any] | None:
    """The tensor of that name, or the only one; None where the server lists none."""
    if not tensors:
        return None
    names = [str(tensor.get("name")) for tensor in tensors]
    if name is None and len(tensors) == 1:
        return tensors[0]
    if name not in names:
        raise ServiceError(
            f"the model has the {what}s {', '.join(names)}"
            + (f", and {setting} is {name!r}" if name is not None else "")
            + f": name one with --{setting}"
        )
    return tensors[names.index(name)]


def _json(line: Line, path: str, quiet: bool = False) -> dict[str, Any]:
    """What a free request answers; quiet: nothing where there is no such thing. Unreachable where that is not known."""
    try:
        reply = judged(line, line.exchange("GET", path))
        found = json.loads(reply.body)
    except UsageError:
        raise  # a secret that is missing
    except (Refused, Lost, ServiceError, ValueError, RecursionError) as error:
        away = isinstance(error, (Refused, Lost))
        if quiet and away:  # a guess would have the teacher asked in another way than before
            raise Unreachable(
                f"{line.url.partition('?')[0]}{path} does not say what the server offers ({error}), and how it is "
                "asked depends on that: try again later. A server that never answers there is asked by a function of "
                "yours, --teacher.python FILE.py:function"
            ) from None
        if quiet:
            return {}
        if isinstance(error, ServiceError):
            raise
        raise (Unreachable if away else ServiceError)(
            f"the model's metadata cannot be read ({error}). Is the server running, and teacher.url "
            "http://HOST:PORT/v2/models/NAME?"
        ) from None
    if not isinstance(found, dict):
        raise ServiceError("the model's metadata are no JSON object: is teacher.url http://HOST:PORT/v2/models/NAME?")
    return found
