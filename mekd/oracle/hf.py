"""A teacher that takes one picture a call and answers [{"label", "score"}, ...], as Hugging Face's endpoints do."""

import base64
import json
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mekd.oracle.answers import Raw
from mekd.oracle.http import Line, judged
from mekd.oracle.response import AnswerError


class Pictures:
    """Calls of one picture each, png or jpeg; in_json: as base64 in {"inputs": ...} instead of the bytes alone."""

    def __init__(self, line: Line, kind: str, classes: int, in_json: bool = False) -> None:
        self._line, self._type, self._classes, self._in_json = line, f"image/{kind}", classes, in_json

    def call(self, images: list[bytes] | Tensor) -> tuple[Raw, int]:
        assert isinstance(images, list)
        (file,) = images
        body, kind = file, self._type
        if self._in_json:
            body, kind = json.dumps({"inputs": base64.b64encode(file).decode()}).encode(), "application/json"
        limit = (1 << 16) + 512 * self._classes
        reply = judged(self._line, self._line.exchange("POST", "", body, {"content-type": kind}, limit=limit))
        try:
            found = json.loads(reply.body)
        except (ValueError, RecursionError) as error:
            raise AnswerError(f"the teacher's answer is no JSON ({error}): is teacher.protocol right?") from error
        return Raw(pairs=[named(found, self._line.secrets.hide)]), len(reply.body)

    def close(self) -> None:
        self._line.close()


def named(found: Any, hide: Callable[[str], str] = str) -> list[tuple[str, float]]:
    """[{"label", "score"}, ...], or that in a list of its own, as names and scores; AnswerError for anything else.

    hide: takes secrets out of what a server says.
    """
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], list):
        found = found[0]
    try:
        if not isinstance(found, list):
            raise TypeError
        pairs = [(hide(str(entry["label"])), float(entry["score"])) for entry in found]
    except (TypeError, KeyError, ValueError, OverflowError):
        shown = hide(found if isinstance(found, str) else json.dumps(found))[:120]
        raise AnswerError(
            f'the teacher answered {shown}; it must be [{{"label": name, "score": number}}, ...]'
        ) from None
    if any(score != score or score in (float("inf"), float("-inf")) for _, score in pairs):
        raise AnswerError("the teacher answered NaN or infinity")
    return pairs
