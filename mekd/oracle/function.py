"""A teacher that is the user's own Python function: any SDK, any protocol, in a few lines of theirs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mekd import user_code
from mekd.errors import UsageError
from mekd.oracle.answers import Raw
from mekd.oracle.http import Lost, Refused
from mekd.oracle.response import AnswerError


class Function:
    """Calls of function(images), images uint8 (m, H, W, ch) as NumPy; as many at once as the oracle has in flight.

    It gives scores (m, C), class indices (m,), names, or for each image a list of (name, score). What it raises is of
    unknown fate, and is asked again; mekd.oracle.http.Refused is free.
    """

    def __init__(self, function: Callable[[np.ndarray], Any]) -> None:
        self._function = function

    def call(self, images: list[bytes] | Tensor) -> tuple[Raw, int]:
        assert isinstance(images, Tensor)
        pixels = images.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).numpy()  # it may change them
        try:
            found = self._function(pixels)
        except (Refused, Lost):
            raise
        except (Exception, SystemExit) as error:  # as of sys.exit in a helper of theirs
            raise Lost(f"teacher.python raised {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
        raw = read(found)
        return raw, sum(part.nbytes for part in raw if isinstance(part, np.ndarray))

    def close(self) -> None:
        pass


def load(setting: str) -> Callable[[np.ndarray], Any]:
    """The function that FILE.py:function names; UsageError where there is none."""
    try:
        return user_code.from_file(setting)
    except UsageError as error:
        raise UsageError(f"teacher.python is {setting!r}; {error}") from error


def read(found: Any) -> Raw:
    """What a function gave as an answer; AnswerError says what it may give."""
    try:
        raw = _read(found)
    except Exception:  # of what it gave, whose methods may raise anything
        raw = None
    if raw is not None:
        return raw
    shown = f"{type(found).__name__}" + (
        f" of {found.dtype}, shape {tuple(found.shape)}" if isinstance(found, np.ndarray | Tensor) else ""
    )
    raise AnswerError(
        f"teacher.python gave {shown}; it must give scores (m, C) of floats, classes (m,) of whole numbers, m names, "
        "or for each image a list of (name, score)"
    )


def _read(found: Any) -> Raw | None:
    if isinstance(found, Tensor):
        found = found.detach().cpu()
        found = (found.float() if found.is_floating_point() else found).numpy()  # NumPy has no bfloat16
    if isinstance(found, np.ndarray):
        if found.ndim == 2 and found.dtype.kind == "f":
            return Raw(scores=found)
        if found.ndim == 1 and found.dtype.kind in "iu":
            return Raw(indices=found)
        if found.ndim == 1 and found.dtype.kind in "UO":
            return Raw(names=[str(name) for name in found])
    elif isinstance(found, list) and found and all(isinstance(name, str) for name in found):
        return Raw(names=found)
    elif isinstance(found, list) and found and all(isinstance(row, list | tuple) for row in found):
        return Raw(pairs=[[(str(name), float(score)) for name, score in row] for row in found])
    return None
