"""Writing files so that a reader finds the old one or the new one, never half of one."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mekd.errors import MekdError


class WriteError(MekdError, RuntimeError):
    """A file could not be written; what stood there before still stands."""


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Let fill write to a file beside path, flush it to the disk, then rename it to path.

    Raises WriteError, with the old file untouched, where the disk is full or the folder cannot be written.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        stays = "; the earlier one stays as it was" if path.exists() else ""
        raise WriteError(
            f"{path} could not be written ({error}){stays}. Free some space, or check the folder's permissions, "
            "and run the same command again: it goes on from the last checkpoint"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


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


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write(path, lambda file: file.write(text.encode()))


def save(path: Path, state: dict[str, Any]) -> None:
    """torch.save, whole or not at all."""
    write(path, lambda file: torch.save(state, file))


def load(path: Path) -> dict[str, Any]:
    """torch.load of tensors and plain values only; ValueError says so where the file is damaged or none of ours."""
    with open(path, "rb") as file:  # what cannot be opened says so itself
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{path} is damaged or no checkpoint ({type(error).__name__}); delete it to start anew"
            ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a dict; it is no checkpoint")
    return state
