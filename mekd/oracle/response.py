"""What a black box answers: logits, probabilities, a few best classes, or only a label."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mekd.checks import slack_of
from mekd.codes import FLOAT32_FLOOR
from mekd.errors import MekdError

KINDS = ("logits", "probs", "topk", "label")


class AnswerError(MekdError, RuntimeError):
    """The teacher's answer cannot be used: NaN, wrong shape, no distribution, an unknown class."""


@dataclass(frozen=True)
class Response:
    """The teacher's answer to a batch of m images.

    kind "logits" or "probs": values (m, C) float32. "topk": probabilities values (m, k), classes indices (m, k)
    int64, best first; an entry that an answer lacks has index -1 and value 0. "label": indices (m,) int64. decimals:
    what the API rounds its values to, if it does.
    """

    kind: str
    values: Tensor | None = None
    indices: Tensor | None = None
    decimals: int | None = None

    def __len__(self) -> int:
        return len(self.tensors()[0])

    def tensors(self) -> list[Tensor]:
        """The tensors that came down, values before indices."""
        return [t for t in (self.values, self.indices) if t is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of the answer: 4 for a value, 8 for a class index."""
        return sum(t.nbytes for t in self.tensors())

    @property
    def labels(self) -> Tensor:
        """The best class of each image, (m,) int64; -1, which is equal to no class, where a top-k answer names none."""
        if self.kind == "label":
            assert self.indices is not None
            return self.indices
        assert self.values is not None
        if self.indices is None:
            return self.values.argmax(-1)
        best = self.values.masked_fill(self.indices < 0, -1.0).argmax(-1)
        return self.indices.gather(-1, best.unsqueeze(-1)).squeeze(-1)

    @property
    def confidence(self) -> Tensor:
        """The top probability of each image, (m,) float32; 1 where only a label is known, 0 where no class is."""
        if self.kind == "label":
            return torch.ones(self.labels.shape, device=self.labels.device)
        assert self.values is not None
        probs = self.values.softmax(-1) if self.kind == "logits" else self._present()
        return probs.amax(-1)

    @property
    def target(self) -> dict[str, Any]:
        """The answer as the keyword argument of kd_loss and MEKDLoss, which take it with floor_of(decimals).

        A row of probabilities that sums to more than they take, or dense ones to less, is divided by its sum.
        """
        if self.kind == "label":
            return {"labels": self.labels}
        assert self.values is not None
        values = self.values
        if self.kind != "logits":
            # Rounding can leave a row of zeros: an answer that prefers no class of those that it names.
            values = self._present()
            named = torch.ones_like(values) if self.indices is None else (self.indices >= 0).to(values.dtype)
            alike = named / named.sum(-1, keepdim=True).clamp_min(1)
            values = torch.where(values.sum(-1, keepdim=True) > 0, values, alike)
            # The teacher may round where decimals says nothing of it. The losses, which may add up in another order,
            # are kept clear of the edge; every other row stays as it came down, bit for bit.
            sums, edge = values.sum(-1, keepdim=True), slack_of(values, floor_of(self.decimals)) - 1e-4
            off = sums > 1 + edge if self.indices is not None else (sums - 1).abs() > edge
            values = torch.where(off, values / sums, values)
        return {"topk": (values, self.indices)} if self.indices is not None else {self.kind: values}

    def _present(self) -> Tensor:
        """The values, 0 where the entry is absent."""
        assert self.values is not None
        return self.values if self.indices is None else self.values.masked_fill(self.indices < 0, 0.0)

    def to(self, device: torch.device | str) -> "Response":
        """The same answer on another device."""
        values, indices = (None if t is None else t.to(device) for t in (self.values, self.indices))
        return Response(self.kind, values, indices, self.decimals)

    def __getitem__(self, rows: slice | Tensor) -> "Response":
        values, indices = (None if t is None else t[rows] for t in (self.values, self.indices))
        return Response(self.kind, values, indices, self.decimals)


def floor_of(decimals: int | None) -> float:
    """The smallest probability that the answer tells from 0: half the rounding step of the API."""
    return FLOAT32_FLOOR if decimals is None else 0.5 * 10.0**-decimals


def concatenate(responses: list[Response]) -> Response:
    """Several answers of one kind as one."""
    first = responses[0]
    values = None if first.values is None else torch.cat([r.values for r in responses if r.values is not None])
    indices = None if first.indices is None else torch.cat([r.indices for r in responses if r.indices is not None])
    return Response(first.kind, values, indices, first.decimals)


#: What probabilities may come rounded to: decimals, or the levels of eight bits.
_STEPS = (0.1, 0.01, 1e-3, 1e-4, 1 / 255, 1 / 256)


@np.errstate(invalid="ignore")  # of infinity
def rounding_step(values: np.ndarray) -> float:
    """What probabilities (...) are rounded to, 0 where they are not."""
    values = values.astype(np.float64)
    for step in _STEPS:
        if values.max(initial=0.0) >= step / 2 and np.abs(values / step - (values / step).round()).max() * step < 1e-7:
            return step
    return 0.0


def sum_limit(classes: int, step: float) -> float:
    """How far from 1 probabilities of so many classes may sum that come rounded to multiples of step."""
    return 1e-2 + min(classes * step / 2, 1.0)  # a value that does not vanish is at most doubled


def answer(
    scores: Tensor, kind: str, *, output: str, k: int = 5, decimals: int | None = None, step: float = 0.0
) -> Response:
    """Turn a classifier's raw output (m, C), output="logits" or "probs", into what the API gives away.

    decimals rounds the values, as APIs do; step: what the classifier itself rounds probabilities to. Raises
    AnswerError for NaN, for probabilities that are none, and for logits asked of a classifier that answers
    probabilities.
    """
    scores = scores.to(torch.float32)
    best = scores.amax(-1)
    unusable = ~best.isfinite()  # NaN wins a maximum; a row of -inf masks every class
    wrong = unusable
    if output == "probs":
        limit = sum_limit(scores.shape[-1], max(step, 0.0 if decimals is None else 10.0**-decimals))
        off = (scores.sum(-1) - 1).abs()
        wrong = unusable | (scores.amin(-1) < -1e-6) | (best > 1 + 1e-2) | (off > limit)
    if wrong.any():  # the one look at the values: on a GPU each look waits for it
        if unusable.any():
            rows = int(unusable.sum())
            raise AnswerError(f"the teacher answered NaN or infinity for {rows} of {len(scores)} images")
        raise AnswerError(
            f"the teacher's probabilities run from {scores.min():.4g} to {scores.max():.4g} and a row sums to "
            f"{scores.sum(-1)[off.argmax()]:.4g}; they must lie between 0 and 1, and a row must sum to 1 within "
            f"{limit:.2g}. Start anew with another --out, and --oracle.output logits if it answers logits or "
            "--oracle.decimals N if it rounds: what was answered before was read otherwise"
        )
    if kind == "logits":
        if output != "logits":
            raise AnswerError("this teacher answers probabilities; its logits cannot be had: --oracle.response probs")
        return Response(kind, _rounded(scores, decimals), None, decimals)
    probs = scores.softmax(-1) if output == "logits" else scores.clamp_min(0)  # 1 - p may be a rounding below 0
    if kind == "probs":
        return Response(kind, _rounded(probs, decimals), None, decimals)
    if kind == "topk":
        values, indices = probs.topk(k, -1)
        return Response(kind, _rounded(values, decimals), indices, decimals)
    return Response(kind, None, scores.argmax(-1))


def _rounded(values: Tensor, decimals: int | None) -> Tensor:
    return values if decimals is None else values.round(decimals=decimals)


def from_names(names: list[str], classes: list[str]) -> Tensor:
    """Class names as indices (m,) into the list of classes, each of them once; AnswerError names one not in it."""
    index = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in names if name not in index]
    if unknown:
        raise AnswerError(
            f"the teacher answered {unknown[0]!r}, which is not among the {len(classes)} class names (oracle.classes)"
        )
    return torch.from_numpy(np.array([index[name] for name in names], dtype=np.int64))
