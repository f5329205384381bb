"""What a teacher's file is: the .onnx and every file of weights that it names."""

import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mekd.oracle.session import ModelError, one_line

_CHUNK = 1 << 22
_KEY = b"location"  # under which a tensor says where its values lie


def digest(path: Path) -> str:
    """A hash of the .onnx file and of the external data that it keeps its weights in; ModelError for a missing file.

    Within a process a file is read again only where its size or its time of change is another one.
    """
    return _digest(path, *(_stamp(part) for part in (path, *external_files(path))))


def size_bytes(path: Path) -> int:
    """Bytes of the .onnx file and of its external data."""
    return sum(part.stat().st_size for part in (path, *external_files(path)))


def external_files(path: Path) -> list[Path]:
    """The files in which path keeps weights, named in it relative to its folder; ModelError where one is missing.

    Raises ModelError too where the package onnx is needed to find them, and is not installed.
    """
    if not path.is_file():
        raise ModelError(f"teacher.onnx is {str(path)!r}; no such file")
    found = _locations(path, _stamp(path))
    for location in found:
        if not (path.parent / location).is_file():
            raise ModelError(
                f"{path} keeps weights in {location!r}, which is not in {path.parent}: put it there, under that name"
            )
    return [path.parent / location for location in found]


def _stamp(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path), stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=16)
def _locations(path: Path, stamp: tuple[str, int, int]) -> tuple[str, ...]:
    """Of the file in this state: sorted, each once."""
    if not any(_KEY in chunk for chunk in _chunks(path, len(_KEY) - 1)):
        return ()
    try:
        import onnx
    except ImportError as error:
        raise ModelError(
            f"{path} may keep weights in other files, which the package onnx finds: pip install onnx"
        ) from error
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise ModelError(f"{path} is no ONNX model: {one_line(error)}") from error
    return tuple(sorted(set(_external(model, onnx.TensorProto))))


def _external(message: Any, tensor: Any) -> Iterator[str]:
    """The locations in a protobuf message and in all that it holds: subgraphs, attributes, functions."""
    if isinstance(message, tensor):
        if message.data_location == tensor.EXTERNAL:
            yield from (entry.value for entry in message.external_data if entry.key == _KEY.decode())
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _external(part, tensor)


@functools.lru_cache(maxsize=16)
def _digest(path: Path, *stamps: tuple[str, int, int]) -> str:
    total = hashlib.sha256()
    for i, (name, _, size) in enumerate(stamps):
        if i:  # a file without external data has the hash of its bytes
            total.update(f"\0{os.path.relpath(name, path.parent)}\0{size}\0".encode())
        for chunk in _chunks(Path(name)):
            total.update(chunk)
    return total.hexdigest()[:16]


def _chunks(path: Path, overlap: int = 0) -> Iterator[bytes]:
    """A file in pieces, each with the end of the one before it."""
    kept = b""
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            yield kept + chunk
            kept = chunk[-overlap:] if overlap else b""
