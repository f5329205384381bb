"""Writing files so that a reader finds the old one or the new one, never half of one; and knowing them again."""

import contextlib
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mekd.errors import MekdError
from mekd.formats import NAMES, kind_of


class WriteError(MekdError, RuntimeError):
    """A file could not be written; what stood there before still stands."""


class DamagedError(MekdError, ValueError):
    """A file of ours does not hold what was written."""


def digest(path: str | os.PathLike[str]) -> str:
    """A hash of a file's content, by which a run knows it again."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


class WeightsError(MekdError, ValueError):
    """A file of the user's holds no weights that can be taken."""


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Let fill write to a file beside path, flush it to the disk, then rename it to path, and flush that too.

    Raises WriteError, with the old file untouched, where the disk is full or the folder cannot be written.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        with told(path, "; the earlier one stays as it was"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, "wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
            _flush_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def append(path: Path, line: str) -> None:
    """Add a line to a text file; WriteError where the disk is full or the folder cannot be written."""
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{line}\n")


@contextlib.contextmanager
def told(path: Path, stays: str = "") -> Iterator[None]:
    """Make WriteError of what the system says while path is written; stays: of what stood there before."""
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"{path} could not be written ({error}){stays if os.path.exists(path) else ''}. Free some space, or check "
            "the folder's permissions, and run the same command again: a run goes on from its last checkpoint"
        ) from error


def _flush_folder(folder: Path) -> None:
    """Make a rename survive a power cut: what follows it, as a ledger that lets answers go, counts on the new file."""
    with contextlib.suppress(OSError):  # some file systems have no such thing
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def shown(name: object) -> str:
    """A path or a message as any file and any terminal of UTF-8 takes it: bytes that are no UTF-8 as \\xNN."""
    return str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class ReadError(MekdError, ValueError):
    """A text file is no text."""


def read_text(path: str | Path) -> str:
    """A text file in UTF-8, whatever the locale, with or without a byte-order mark. Raises ReadError naming it."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ReadError(f"{shown(path)} is no text in UTF-8 ({error}); save it as UTF-8") from error


def read_json(path: Path) -> dict[str, Any]:
    """A small file of a run, of what is named in it; DamagedError where it is another."""
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not a dict")
    except (ValueError, RecursionError) as error:
        raise DamagedError(
            f"{path} is damaged ({error}): put a copy back; or delete it, and what it says is found anew or left out"
        ) from error
    return found


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write(path, lambda file: file.write(text.encode()))


def save(path: Path, state: dict[str, Any]) -> None:
    """torch.save, whole or not at all."""

    def fill(file: BinaryIO) -> None:
        try:
            torch.save(state, file)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # that is what it makes of a full disk
            raise OSError(*error.args) from error

    write(path, fill)


def load(path: Path) -> dict[str, Any]:
    """A checkpoint of ours, tensors and plain values only; DamagedError where it is damaged or none."""
    with open(path, "rb") as file:  # what cannot be opened says so itself
        try:
            with zipfile.ZipFile(file) as parts:  # torch itself looks at no checksum
                if (part := parts.testzip()) is not None:
                    raise zipfile.BadZipFile(part)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise DamagedError(
                f"{path} is damaged or no checkpoint ({type(error).__name__}); put a copy back, or start anew with "
                "another --out"
            ) from error
    if not isinstance(state, dict):
        raise DamagedError(f"{path} holds a {type(state).__name__}, not a dict; it is no checkpoint")
    return state


def load_weights(path: Path, setting: str) -> dict[str, Tensor]:
    """The state_dict in a file of the user's, which the setting of that name gave; WeightsError says what it is not.

    A training checkpoint that holds it as "state_dict", "model_state_dict" or "model" will do, and so will names that
    DataParallel or torch.compile put a prefix before.
    """
    if not path.exists():
        raise WeightsError(f"{setting} is {str(path)!r}; no such file")
    state = _load_tensors(path, setting)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        held = f"a {type(state).__name__}"
        if isinstance(state, dict):
            held += f" of {', '.join(map(str, list(state)[:6])) or 'nothing'}"
        raise WeightsError(
            f"{setting} is {str(path)!r}, which holds {held}; it must hold weights by name: "
            "torch.save(model.state_dict(), FILE)"
        )
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _load_tensors(path: Path, setting: str) -> Any:
    kind = kind_of(path)
    given = f"{setting} is {str(path)!r}"
    if kind == "safetensors":
        raise WeightsError(
            f"{given}, a safetensors file; it must be one of torch.save: torch.save(safetensors.torch.load_file(FILE), "
            "'weights.pt') writes it (pip install safetensors)"
        )
    if kind == "torchscript":
        raise WeightsError(
            f"{given}, a TorchScript module; it must hold weights by name: "
            "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')"
        )
    if kind not in (None, "torch", "pickle"):
        raise WeightsError(f"{given}, {NAMES[kind]}; it must be a file of torch.save(model.state_dict(), FILE)")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if other := re.search(r"GLOBAL `?([\w.]+)", str(error)):
            raise WeightsError(
                f"{given}, which holds more than weights ({other[1]}): a whole pickled model, or objects of the "
                "training. Reading it would run code of the file. Where you trust it and its code is at hand: model = "
                "torch.load(FILE, weights_only=False), then torch.save(model.state_dict(), 'weights.pt'), or of a dict "
                "what it holds as state_dict"
            ) from error
        onnx = "; an ONNX file is given with --teacher.onnx" if path.suffix == ".onnx" else ""
        raise WeightsError(
            f"{given}, which torch cannot read ({type(error).__name__}): it is cut short or no file of torch.save{onnx}"
        ) from error
