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


class DamagedError(MekdError, ValueError):
    """A file of ours does not hold what was written."""


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
    except OSError as error:
        stays = "; the earlier one stays as it was" if path.exists() else ""
        raise WriteError(
            f"{path} could not be written ({error}){stays}. Free some space, or check the folder's permissions, "
            "and run the same command again: it goes on from the last checkpoint"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


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
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise DamagedError(
                f"{path} is damaged or no checkpoint ({type(error).__name__}); put a copy back, or delete it to begin "
                "that stage anew"
            ) from error
    if not isinstance(state, dict):
        raise DamagedError(f"{path} holds a {type(state).__name__}, not a dict; it is no checkpoint")
    return state
