"""The tempered KL written out in float64 and without torch, and inputs of every kind."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

Rows = np.ndarray
IGNORED = -100

KINDS = [
    # A teacher that shows its logits: the textbook loss.
    "logits",
    # An API that answers probabilities: they are tempered again.
    "probs",
    # An API that answers a label: one-hot, never softened, and one row is ignored.
    "labels",
    # An API that answers its best classes: the rest of the mass is shared among the others ...
    "spread",
    # ... or left out, which makes classes of probability exactly 0.
    "drop",
]


def softmax(x: Rows) -> Rows:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(x: Rows) -> Rows:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def retemper(p: Rows, tau: float) -> Rows:
    """p^(1 / tau), normalised."""
    powered = p ** (1 / tau)
    return powered / powered.sum(-1, keepdims=True)


def kl_rows(p: Rows, student: Rows, tau: float) -> Rows:
    """sum p log(p / q) with q = softmax(student / tau) and 0 log 0 = 0, per row."""
    log_q = log_softmax(student / tau)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * (np.log(p) - log_q), 0.0).sum(-1)


def fill(values: Rows, indices: Rows, num_classes: int, rest: str) -> Rows:
    """The full distribution of a top-k answer, one class at a time."""
    filled = np.zeros((len(values), num_classes))
    for row, (vs, ks) in enumerate(zip(values, indices, strict=True)):
        others = [c for c in range(num_classes) if c not in ks]
        for c in others:
            filled[row, c] = (1 - vs.sum()) / len(others) if rest == "spread" else 0.0
        for v, k in zip(vs, ks, strict=True):
            filled[row, k] = v
        filled[row] /= filled[row].sum()
    return filled


def make(
    kind: str,
    tau: float,
    lead: tuple[int, ...] = (6,),
    num_classes: int = 7,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, dict[str, Any], Rows, Rows]:
    """Student logits, the target as kd_loss takes it, its tempered probabilities (N, C), who counts (N,)."""
    random = np.random.default_rng(seed)
    n, c = int(np.prod(lead, dtype=int)), num_classes
    student = torch.from_numpy(3 * random.standard_normal((*lead, c))).to(dtype)
    teacher = torch.from_numpy(3 * random.standard_normal((n, c))).to(dtype)
    exact = teacher.double().numpy()
    kept = np.ones(n, dtype=bool)
    if kind == "logits":
        return student, {"logits": teacher.reshape(*lead, c)}, softmax(exact / tau), kept
    if kind == "labels":
        labels = random.integers(0, c, n)
        onehot = np.eye(c)[labels]
        if n > 1:
            labels[1], kept[1] = IGNORED, False
        return student, {"labels": torch.from_numpy(labels.reshape(lead))}, onehot, kept
    probs = torch.from_numpy(softmax(exact)).to(dtype)
    if kind == "probs":
        return student, {"probs": probs.reshape(*lead, c)}, retemper(probs.double().numpy(), tau), kept
    values, indices = probs.topk(min(3, c))
    p = fill(values.double().numpy(), indices.numpy(), c, kind)
    k = values.shape[-1]
    topk = (values.reshape(*lead, k), indices.reshape(*lead, k))
    return student, {"topk": topk, "rest": kind}, retemper(p, tau), kept


def close(got: Tensor, wanted: Rows, rtol: float = 1e-12, atol: float = 1e-13) -> None:
    np.testing.assert_allclose(got.detach().double().numpy(), wanted, rtol=rtol, atol=atol)
