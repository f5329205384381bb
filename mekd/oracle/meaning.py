"""What a classifier's outputs mean: told by their values for images that cost nothing, with the graph as a witness.

A file does not say what it answers. Probabilities need not end in a softmax, and scores need not be the first output.
Where the values leave two readings open, nothing is guessed: the message names the setting that decides.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mekd.oracle.binding import DTYPES, run_options
from mekd.oracle.graph import ending, load_graph
from mekd.oracle.half import random_pixels
from mekd.oracle.response import AnswerError, from_names, rounding_step, sum_limit
from mekd.oracle.session import ModelError, one_line

_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")
_INTEGERS = ("tensor(int64)", "tensor(int32)")
_STRING = "tensor(string)"
ALMOST = 1e-6


@dataclass(frozen=True)
class Look:
    """One output as it was seen: values (m, ...), or None where it has not a row for each image.

    type, shape: as the file declares them; kind: "logits", "probs", "index" or "names", None where no reading is sure;
    says: what it looks like.
    """

    name: str
    type: str
    shape: Any
    values: np.ndarray | None
    kind: str | None
    says: str

    @property
    def width(self) -> int:
        """Numbers for an image, 0 where they are in no single row."""
        if self.values is None:
            return 0
        size = int(np.prod(self.values.shape[1:]))
        return size if size == max(self.values.shape[1:], default=1) else 0

    @property
    def rows(self) -> np.ndarray:
        """The values as (m, width)."""
        assert self.values is not None
        return self.values.reshape(len(self.values), -1)

    def __str__(self) -> str:
        return f"{self.name}: {self.type} {self.shape}, {self.says}"


@dataclass(frozen=True)
class Reading:
    """How the answer of a file is read.

    name: of the output; kind: "logits", "probs", "index" or "names"; classes: how many, None where the file does not
    say; row, dtype: of one image's raw values; step: what they are rounded to; note: a sentence for the log.
    """

    name: str
    kind: str
    classes: int | None
    row: tuple[int, ...]
    dtype: torch.dtype
    step: float
    note: str

    def scores(self, raw: Tensor) -> Tensor:
        """Raw values (m, *row) as scores (m, C) float32: a single probability p as (1 - p, p), a logit z as (0, z)."""
        scores = raw.to(torch.float32).reshape(len(raw), -1)
        if scores.shape[1] > 1:
            return scores
        return torch.cat([1 - scores if self.kind == "probs" else torch.zeros_like(scores), scores], 1)


def probe_images(image: tuple[int, int, int]) -> Tensor:
    """Images (8, *image), uint8, the same ones every time: a blank one, noise, and patches of colour."""
    patches = F.interpolate(random_pixels(3, (image[0], 2, 2)).float(), size=image[1:], mode="nearest")
    return torch.cat([torch.zeros(1, *image, dtype=torch.uint8), random_pixels(4, image), patches.to(torch.uint8)])


def probe(session: Any, path: object, source: str, images: Tensor, piece: int) -> dict[str, np.ndarray | None]:
    """What a session puts out for images (n, ...), asked in pieces of that many; None for what has no row an image."""
    names = [o.name for o in session.get_outputs() if o.type in DTYPES or o.type == _STRING]
    wait, m = run_options(images.device, wait=True), len(images)
    images = torch.cat([images, images[:1].expand(-m % piece, *images.shape[1:])])
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for part in images.cpu().split(piece):
        try:
            answered = session.run(names, {source: part.numpy()}, wait) if names else []
        except Exception as error:
            raise ModelError(f"{path} does not run on images {tuple(part.shape)}: {one_line(error)}") from error
        for name, values in zip(names, answered, strict=True):
            found[name].append(np.asarray(values))
    return {name: _rows(parts, piece, m) for name, parts in found.items()}


def read(
    session: Any,
    path: Path,
    values: dict[str, np.ndarray | None],
    response: str,
    *,
    output: str = "auto",
    output_name: str | None = None,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
) -> Reading:
    """The output of a file that a response is made of, and how it is read; values are those of probe().

    output: what the user says of the scores; output_name: which output holds them; num_classes, classes: how many
    classes there are, and their names. Raises ModelError where no reading is sure, listing the outputs.
    """
    if output not in ("auto", "logits", "probs"):
        raise ModelError(f"output is {output!r} (oracle.output); it must be 'auto', 'logits' or 'probs'")
    graph = functools.cache(lambda: load_graph(path))
    ends = functools.cache(lambda name: "linear" if "logit" in name.lower() else ending(graph(), name))
    looks = [_look(o, values.get(o.name), output, functools.partial(ends, o.name)) for o in session.get_outputs()]
    if output_name is not None:
        named = [look for look in looks if look.name == output_name]
        if not named:
            raise ModelError(f"{path} has no output {output_name!r} (oracle.output_name); it has {_list(looks)}")
        chosen = _named(named[0], path, response)
    else:
        chosen = _choose(looks, path, response, num_classes)
    if chosen.kind in ("index", "names"):
        count = len(classes or ()) or None if chosen.kind == "names" else num_classes
    else:
        count = max(chosen.width, 2)
    if num_classes is not None and count not in (None, num_classes):
        raise ModelError(
            f"{path} answers {count} classes in {chosen.name}; {num_classes} were expected (oracle.num_classes, "
            f"oracle.classes or the data). It has {_list(looks)}"
        )
    _check_labels(chosen, looks if output_name is None else [chosen], path, num_classes, classes)
    assert chosen.values is not None
    scores = chosen.kind in ("logits", "probs")
    note = f"the teacher's output {chosen.name} ({chosen.type} {chosen.shape}) is read as {chosen.says}"
    if scores and chosen.width == 1:
        how = "(1 - p, p)" if chosen.kind == "probs" else "(0, z)"
        note = f"{note}; its one column is a binary classifier's, and gives two classes {how}"
    return Reading(
        chosen.name,
        str(chosen.kind),
        count,
        chosen.values.shape[1:],
        torch.int64 if chosen.kind == "names" else torch.from_numpy(chosen.values[:0]).dtype,
        rounding_step(chosen.rows) if chosen.kind == "probs" else 0.0,
        note,
    )


def _rows(parts: list[np.ndarray], piece: int, m: int) -> np.ndarray | None:
    if any(part.ndim == 0 or len(part) != piece or part.shape[1:] != parts[0].shape[1:] for part in parts):
        return None
    return np.concatenate(parts)[:m]


def _list(looks: list[Look]) -> str:
    return "; ".join(map(str, looks)) or "no output"


# -- one output --------------------------------------------------------------------------------------------


def _look(o: Any, values: np.ndarray | None, output: str, ends: Callable[[], str]) -> Look:
    look = functools.partial(Look, o.name, o.type, o.shape)
    if not o.type.startswith("tensor"):
        return look(None, None, "no tensor (skl2onnx: convert with zipmap=False)")
    seen = look(values, None, "not one row of numbers for each image")
    if not seen.width:
        return seen
    if o.type == _STRING:
        kind, says = ("names", "class names") if seen.width == 1 else (None, "several names an image")
    elif o.type in _INTEGERS:
        kind, says = ("index", "class indices") if seen.width == 1 else (None, "several whole numbers an image")
    elif o.type in _FLOATS:
        kind, says = _scores(seen.rows.astype(np.float64), output, ends)
    else:
        kind, says = None, "numbers of a type that is not read"
    return look(values, kind, says)


@np.errstate(invalid="ignore")  # of -inf, which masks a class
def _scores(v: np.ndarray, output: str, ends: Callable[[], str]) -> tuple[str | None, str]:
    """The reading of floating values (m, C), and what they look like; ends(): what makes them in the graph."""
    usable = np.isfinite(v.max(-1))  # NaN wins a maximum; a row of -inf masks every class
    if 2 * usable.sum() <= len(v):
        return None, f"NaN or infinity for {(~usable).sum()} of {len(v)} images that were tried, a blank one and noise"
    v = v[usable]
    if (np.diff(v) <= 0).all() and ends() == "top":
        return None, "the largest scores alone (TopK or a maximum), without their classes"
    if v.shape[1] == 1:
        return _column(v[:, 0], output, ends)
    width, sums = v.shape[1], v.sum(-1)
    off = np.abs(sums - 1).max()
    between = v.min() >= -ALMOST and v.max() <= 1 + ALMOST
    limit = sum_limit(width, rounding_step(v))
    if output == "auto":
        limit = min(limit, 0.2)  # of very many rounded values any sum would do
    distribution = v.min() >= -ALMOST and v.max() <= 1 + 1e-2 and off <= limit
    if output == "probs":
        return ("probs", "probabilities, as oracle.output says") if distribution else (
            None, f"no probabilities: numbers from {v.min():.4g} to {v.max():.4g}, rows that sum to {sums.min():.4g} "
            f"to {sums.max():.4g} (if they are logits, say --oracle.output logits)",
        )  # fmt: skip
    if output == "logits":
        return "logits", "logits, as oracle.output says" + (", though rows sum to 1" if distribution else "")
    varies = np.ptp(v, 0).max()
    if distribution:
        even = np.abs(v - 1 / width).max() <= 0.1 / width
        if even and (off > 1e-5 or varies <= ALMOST) and ends() != "softmax":
            return None, "nearly equal numbers that sum to 1: probabilities or logits (say which with --oracle.output)"
        return "probs", "probabilities"
    total = sums.mean()
    if v.min() >= -ALMOST and np.ptp(sums) <= 1e-2 * total and (varies > 0.1 * v.max() or abs(total - 100) < 1):
        return None, f"shares that sum to {total:.4g}; they must sum to 1 (divide them in the file)"
    if between and ends() != "linear":
        return None, (
            "numbers between 0 and 1 that do not sum to 1: labels that may come together, each with a probability of "
            "its own, are no distribution (let the file put out what goes into the sigmoid; if these are logits, say "
            "--oracle.output logits)"
        )
    return "logits", "logits"


def _column(v: np.ndarray, output: str, ends: Callable[[], str]) -> tuple[str | None, str]:
    """The same for one number an image (m,)."""
    between = v.min() >= -ALMOST and v.max() <= 1 + ALMOST
    if output == "logits":
        return "logits", "the logit of class 1, as oracle.output says"
    if between and (output == "probs" or ends() == "sigmoid"):
        return "probs", "the probability of class 1"
    if (v == v.round()).all():
        return None, "whole numbers in one column: class indices as floating numbers (cast them to int64 in the file)"
    if between and np.ptp(v) > ALMOST and ends() != "linear":
        return "probs", "the probability of class 1"
    return None, (
        "one column of numbers that need not be a probability (a binary classifier's: say --oracle.output logits"
        + (" or probs)" if between else ")")
    )


# -- which output ------------------------------------------------------------------------------------------


def _named(look: Look, path: Path, response: str) -> Look:
    if look.kind is None:
        raise ModelError(f"{path}: the output that oracle.output_name names cannot be read: {look}")
    if look.kind in ("index", "names") and response != "label":
        raise ModelError(
            f"{path}: the output that oracle.output_name names cannot answer {response!r}: {look}. Say "
            "--oracle.response label"
        )
    return look


def _choose(looks: list[Look], path: Path, response: str, num_classes: int | None) -> Look:
    """The one output that a response can be made of, or ModelError."""
    floats = [look for look in looks if look.type in _FLOATS and look.width]
    rows = [look for look in floats if look.width > 1 and not _is_topk(look, looks)]
    if num_classes is not None:
        rows = [look for look in rows if look.width == num_classes] or rows
    if len(rows) > 1:
        rows = _alike(rows, response)
    columns = [look for look in floats if look.width == 1]
    labels = [look for look in looks if look.kind in ("index", "names")]
    if not rows and len(columns) == 1 and len(looks) == 1:
        rows = columns
    if not rows and labels and response == "label":
        named = [look for look in labels if look.kind == "names"]
        return (named or labels)[0]  # of both, the names need no number of classes
    if not rows and not columns:
        raise ModelError(
            f"{path} is no classifier that can answer {response!r}: it needs an output (m, C), it has {_list(looks)}"
        )
    if len(rows) != 1 or rows[0].kind is None or _is_detector(rows[0], looks):
        which = "Name the one that holds the scores with --oracle.output_name NAME. " if len(looks) > 1 else ""
        raise ModelError(f"{path} leaves open how its answer is to be read. {which}It has {_list(looks)}")
    return rows[0]


def _is_topk(look: Look, looks: list[Look]) -> bool:
    """Whether its rows fall and stand beside whole numbers of the same shape: the values of a TopK."""
    beside = [o for o in looks if o.type in _INTEGERS and o.width == look.width]
    return bool(beside) and bool((np.diff(look.rows) <= 0).all())


def _is_detector(look: Look, looks: list[Look]) -> bool:
    """Whether another output holds a row for each of its columns, as boxes are."""
    shapes = [o.values.shape for o in looks if o.values is not None and o.type in _FLOATS]
    return any(len(shape) == 3 and shape[1] == look.width and shape[2] > 1 for shape in shapes)


def _alike(rows: list[Look], response: str) -> list[Look]:
    """One of several outputs that say the same, logits beside their probabilities; otherwise all of them."""
    if len({look.width for look in rows}) > 1 or any(look.kind is None for look in rows):
        return rows
    probs = []
    for look in rows:
        scores = torch.from_numpy(look.rows.astype(np.float64))
        probs.append(scores.softmax(-1) if look.kind == "logits" else scores)
    if not all(torch.allclose(p, probs[0], rtol=0, atol=1e-3, equal_nan=True) for p in probs):
        return rows
    wanted = "logits" if response == "logits" else "probs"
    return ([look for look in rows if look.kind == wanted] or rows)[:1]


def _check_labels(
    chosen: Look, looks: list[Look], path: Path, num_classes: int | None, classes: Sequence[str] | None
) -> None:
    """Raise ModelError where the chosen labels are unknown, or labels beside the chosen scores are not their best."""
    if chosen.kind == "index" and num_classes is None:
        raise ModelError(
            f"{path} answers class indices and does not say of how many classes: say --oracle.num_classes N"
        )
    if chosen.kind == "names" and not classes:
        raise ModelError(f"{path} answers class names: give their list as classes (--oracle.classes FILE)")
    for look in looks if chosen.width > 1 else [chosen]:
        if look.kind == "names" and classes:
            try:
                indices = from_names([str(name) for name in look.rows[:, 0]], list(classes)).numpy()
            except AnswerError as error:
                raise ModelError(f"{path}: {error}") from error
        elif look.kind == "index":
            indices = look.rows[:, 0]
        else:
            continue
        count = chosen.width if chosen.width > 1 else num_classes or len(classes or ())
        wrong = (indices < 0) | (indices >= count)
        if look is chosen and wrong.any():
            raise ModelError(
                f"{path} answers class {indices[wrong][0]} in {look.name}; there are {count} (oracle.num_classes)"
            )
        if look is not chosen and (wrong.any() or not _best(chosen.rows, indices)):
            raise ModelError(
                f"{path}: the labels in {look.name} are not the best classes of {chosen.name}, so that either may be "
                f"meant, or oracle.classes has another order. Name one with --oracle.output_name NAME. It has "
                f"{_list(looks)}"
            )


def _best(scores: np.ndarray, indices: np.ndarray) -> bool:
    """Whether the indices (m,) are best classes of scores (m, C), ties and rows of NaN aside."""
    own = scores[np.arange(len(scores)), indices]
    return not (own < scores.max(-1) - ALMOST).any()
