"""What a service's answers mean, told by the first of them, and answers of every shape as a Response.

A service says less of itself than a file: one image is asked for, its answer is read, and what stays open is the user's
to say, by a named setting, before a second one is paid.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from mekd.oracle.response import AnswerError, Response, answer, from_names, rounding_step, sum_limit

#: A class by its name, or by its number where the service says that it is one, and its score.
Pair = tuple[str | int, float]

#: How far from 1 the first answer's rounded probabilities may sum unless they are said to be some: of very many values
#: any sum would do.
_ODD = 0.2

#: What is to be done about a list of scores that are not parts of a whole.
_NO_SHARES = (
    "Where they are logits, --oracle.output logits has the whole output asked for (a server with the classification "
    "extension), and --oracle.response label takes the best class of any scores"
)


class Raw(NamedTuple):
    """An answer as it came: scores (m, C) floating, indices (m,) whole numbers, names, or pairs for each image."""

    scores: np.ndarray | None = None
    indices: np.ndarray | None = None
    names: list[str] | None = None
    pairs: Sequence[Sequence[Pair]] | None = None

    def __len__(self) -> int:
        return next(len(part) for part in self if part is not None)


@dataclass(frozen=True)
class Meaning:
    """kind: of scores, "logits" or "probs"; or "pairs", "index", "names". scale: what a sure answer is, 1 or 100.

    step: what its shares are rounded to; the default is what runs were begun with that keep none.
    """

    kind: str
    scale: float
    note: str
    classes: tuple[str, ...] = ()
    unknown: str = "error"
    step: float = 0.01

    def kept(self) -> dict[str, Any]:
        """What is written to the run: without the list of names, which has a file of its own."""
        return {key: value for key, value in asdict(self).items() if key in ("kind", "scale", "note", "step")}


def establish(
    raw: Raw, num_classes: int, response: str, *,
    output: str = "auto", classes: Sequence[str] = (), unknown: str = "error", decimals: int | None = None,
) -> Meaning:  # fmt: skip
    """Read the first answer; AnswerError names the setting that decides where it leaves two readings open.

    decimals: what its values are said to be rounded to.
    """
    more: dict[str, Any] = {"classes": tuple(classes), "unknown": unknown}
    if response == "label" and unknown == "rest" and (raw.pairs is not None or raw.names is not None):
        raise AnswerError("a class that is not listed is no label: list it, and say --oracle.unknown error")
    if raw.indices is not None or raw.names is not None:
        kind = "index" if raw.indices is not None else "names"
        if response != "label":
            raise AnswerError(f"the teacher answers a class and no {response}: say --oracle.response label")
        if kind == "names" and not classes:
            raise AnswerError(f"the teacher answers names ({_first(raw.names)}): list them with --oracle.classes FILE")
        return Meaning(kind, 1.0, f"the first answer is the class {_first(raw.indices, raw.names)}", **more)
    if raw.pairs is not None:
        return _pairs(raw.pairs[0], num_classes, response, output, decimals, more)
    assert raw.scores is not None
    return _scores(raw.scores, num_classes, output, decimals, more)


def _scores(scores: np.ndarray, num_classes: int, output: str, decimals: int | None, more: dict[str, Any]) -> Meaning:
    if scores.ndim != 2 or scores.shape[1] != num_classes:
        raise AnswerError(
            f"the teacher answers {int(np.prod(scores.shape[1:]))} scores an image, and {num_classes} classes are "
            "meant: say that --oracle.num_classes with another --out, or name another output with "
            "--oracle.output_name"
        )
    if not np.isfinite(scores.max(1)).all():
        raise AnswerError("the teacher answered NaN or infinity to the first image")
    low, high, total = (float(x) for x in (scores.min(), scores.max(), scores[0].sum()))
    said = f"the first answer runs from {low:.4g} to {high:.4g} and sums to {total:.4g}"
    if output == "logits":
        return Meaning("logits", 1.0, f"{said}: logits, as oracle.output says", **more)
    scale = 1.0 if high <= 1.001 else 100.0
    step = _rounding(scores[0] / scale, decimals)
    limit, off = sum_limit(num_classes, step), abs(total / scale - 1)
    distribution = low >= 0 and off <= _allowed(limit, output)
    like = {
        "probs": distribution and scale == 1,
        "per cent": distribution and scale == 100,
        "logits": low < 0 or high > 1.001,
    }
    if like["probs"]:
        return Meaning("probs", 1.0, f"{said}: probabilities", **more, step=step)
    if like["per cent"] and output == "probs":
        return Meaning("probs", 100.0, f"{said}: per cent", **more, step=step)
    if like["per cent"]:
        raise AnswerError(f"{said}: per cent, or logits? Say --oracle.output probs for per cent, or logits")
    if output == "probs" or not like["logits"]:
        raise AnswerError(
            f"{said}, which is no distribution over {num_classes} classes. Say "
            f"--oracle.output logits if these are logits{_or_rounded(off, limit, output)}"
        )
    return Meaning("logits", 1.0, f"{said}: logits", **more)


def _rounding(shares: np.ndarray, decimals: int | None) -> float:
    """What shares (n,) are rounded to, by their values: two decimals at most, since a sure answer is a multiple of all.

    decimals: what they are said to be rounded to, which may be coarser.
    """
    return max(min(rounding_step(shares), 0.01), 0.0 if decimals is None else 10.0**-decimals)


def _allowed(limit: float, output: str) -> float:
    """How far from 1 the first answer may sum, where rounding alone would bring it as far as limit."""
    return limit if output == "probs" else min(limit, _ODD)


def _or_rounded(off: float, limit: float, output: str) -> str:
    return ", or --oracle.output probs if they are rounded shares" if _allowed(limit, output) < off <= limit else ""


def _pairs(
    pairs: Sequence[Pair], num_classes: int, response: str, output: str, decimals: int | None, more: dict[str, Any]
) -> Meaning:
    scores = [score for _, score in pairs]
    shown = ", ".join(f"{name} {score:.4g}" for name, score in pairs[:3]) + (", ..." if len(pairs) > 3 else "")
    low, high, total = min(scores, default=0.0), max(scores, default=0.0), sum(scores)
    said = f"the first answer names {len(pairs)} classes" + (f" ({shown})" if pairs else "")
    said += f" with the sum {total:.4g}" if len(pairs) == num_classes else ""
    if response not in ("topk", "label", "probs"):
        raise AnswerError(f"{said}, with no logits: say --oracle.response topk")
    if response == "label":
        return Meaning("pairs", 1.0, f"{said}: the best of them is the label", **more)
    if response == "probs" and len(pairs) != num_classes:
        raise AnswerError(f"{said} of {num_classes}: say --oracle.response topk, which takes answers of any length")
    if output == "logits":
        raise AnswerError(f"{said}; a list of logits does not say what is left out: say --oracle.response label")
    scale = 1.0 if high <= 1.0 + 1e-6 else 100.0
    step = _rounding(np.array(scores) / scale, decimals)
    limit, off = sum_limit(len(pairs), step), total / scale - 1
    most = _allowed(limit, output)
    every = len(pairs) == num_classes and more["unknown"] == "error"
    short = every and off < -most  # of all classes nothing is left out
    if low < 0 or high > 100.0 or off > most or short:
        raise AnswerError(
            f"{said}, which are neither shares nor per cent; mekd takes one of both. {_NO_SHARES}"
            f"{_or_rounded(abs(off), limit, output)}"
        )
    if scale > 1 and output != "probs":
        raise AnswerError(f"{said}: per cent, or logits? Say --oracle.output probs for per cent. {_NO_SHARES}")
    return Meaning("pairs", scale, f"{said}: {'shares' if scale == 1 else 'per cent'}", **more, step=step)


def respond(raw: Raw, meaning: Meaning, num_classes: int, response: str, k: int, decimals: int | None) -> Response:
    """An answer as what it means; AnswerError for NaN, unknown classes and what is no distribution."""
    if meaning.kind in ("logits", "probs") and raw.scores is not None:
        if raw.scores.ndim != 2 or raw.scores.shape[1] != num_classes:
            raise AnswerError(f"the teacher answered scores {raw.scores.shape[1:]}; {num_classes} were expected")
        scores = torch.from_numpy(np.array(raw.scores, dtype=np.float32)) / meaning.scale  # a copy: bytes are read-only
        return answer(scores, response, output=meaning.kind, k=k, decimals=decimals, step=meaning.step)
    if meaning.kind == "pairs" and raw.pairs is not None:
        return _from_pairs(raw.pairs, meaning, num_classes, response, k, decimals)
    if meaning.kind == "names" and raw.names is not None:
        return Response("label", None, from_names(raw.names, list(meaning.classes)))
    if meaning.kind == "index" and raw.indices is not None:
        indices = torch.from_numpy(np.array(raw.indices, dtype=np.int64)).flatten()
        wrong = indices[(indices < 0) | (indices >= num_classes)]
        if len(wrong):
            raise AnswerError(
                f"the teacher answered class {int(wrong[0])}; there are {num_classes} (oracle.num_classes)"
            )
        return Response("label", None, indices)
    raise AnswerError(f"the teacher answers in another shape than at first: {meaning.note}")


def _from_pairs(
    pairs: Sequence[Sequence[Pair]], meaning: Meaning, num_classes: int, response: str, k: int, decimals: int | None
) -> Response:
    index = {name: i for i, name in enumerate(meaning.classes)}
    values, indices = torch.zeros(len(pairs), k), torch.full((len(pairs), k), -1, dtype=torch.int64)
    dense = torch.zeros(len(pairs), num_classes) if response == "probs" else None
    step = meaning.step if decimals is None else max(meaning.step, 10.0**-decimals)
    for row, named in enumerate(pairs):
        found: dict[int, float] = {}
        for name, score in named:
            if isinstance(name, int):
                if not 0 <= name < num_classes:
                    raise AnswerError(
                        f"the teacher answered class {name}; there are {num_classes} (oracle.num_classes)"
                    )
                at = name
            else:
                number = int(name) if not index and name.isdecimal() and len(name) < 10 else num_classes
                at = index.get(name, number if number < num_classes else -1)
                name = name[:80]
            share = score / meaning.scale
            if not (0 <= share <= 1.01 or (response == "label" and not math.isnan(share))):
                raise AnswerError(
                    f"the teacher answered {name!r} with {score:g}; it must lie in 0 to {meaning.scale:g}, since "
                    f"{meaning.note}. {_NO_SHARES}, in a run with another --out"
                )
            if at < 0 and meaning.unknown == "rest":
                continue  # its mass is missing mass
            if at < 0:
                raise AnswerError(
                    f"the teacher answered {name!r}, which is not among the {num_classes} classes: give their names, "
                    "one a line, with --oracle.classes FILE, or let its mass be missing with --oracle.unknown rest"
                )
            if at in found:
                raise AnswerError(f"the teacher named {name!r} twice for one image")
            found[at] = share
        if response != "label" and sum(found.values()) > 1 + sum_limit(len(found), step):
            raise AnswerError(
                f"the teacher's shares of one image sum to {sum(found.values()):.4g}; they must not exceed 1"
            )
        best = sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:k]
        for column, (at, share) in enumerate(best):
            values[row, column], indices[row, column] = share, at
        if dense is not None:
            if len(found) != num_classes:
                raise AnswerError(f"the teacher named {len(found)} of {num_classes} classes: --oracle.response topk")
            dense[row, list(found)] = torch.tensor(list(found.values()))
    if dense is not None:
        return answer(dense, "probs", output="probs", decimals=decimals, step=meaning.step)
    if response == "label":
        if (indices[:, 0] < 0).any():
            raise AnswerError("the teacher named no class for an image: --oracle.response topk takes such answers")
        return Response("label", None, indices[:, 0].clone())
    return Response("topk", values if decimals is None else values.round(decimals=decimals), indices, decimals)


def _first(*parts: Any) -> str:
    return str(next(part[0] for part in parts if part is not None))
