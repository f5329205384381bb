"""How far two sets of answers or of images are from each other, how near one comes to the other, and who was seen.

Every distance comes with what it is of two parts of one set, which is the least that it can tell apart.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Transport(NamedTuple):
    """A mean over random halves, and what 95 of 100 of them lie between."""

    mean: float
    low: float
    high: float


def wasserstein(cost: Tensor) -> float:
    """The 1-Wasserstein distance of two samples that count alike, (m) and (n), from the cost of each pair (m, n).

    Exact, by the network simplex of POT (Flamary et al., 2021).
    """
    import ot

    return float(ot.emd2([], [], cost.double().numpy(), numItermax=2_000_000))


def half_l1(p: Tensor, q: Tensor) -> Tensor:
    """Half the L1 norm of the difference of each two of p (m, C) and q (n, C): 0 to 1 of distributions; of classes that
    are one-hot 0 or 1."""
    return 0.5 * torch.cdist(p.double(), q.double(), p=1)


def answers_apart(
    student: Tensor, teacher: Tensor, generator: torch.Generator, halves: int = 20
) -> tuple[Transport, Transport]:
    """W(P_S, P_T) of answers (n, C) to the same images, and what it is of the teacher against itself (Ma et al., 2024).

    Both are between two halves of the images, one of each network's answers, so that they are of as many samples and of
    different images: the second is what the first would be of a student that is the teacher.
    """
    apart, noise = [], []
    n = len(teacher)
    for _ in range(halves):
        order = torch.randperm(n, generator=generator)
        one, other = order[: n // 2], order[n // 2 : n // 2 * 2]
        apart.append(wasserstein(half_l1(student[one], teacher[other])))
        noise.append(wasserstein(half_l1(teacher[one], teacher[other])))
    return _spread(apart), _spread(noise)


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 15) -> float:
    """The expected calibration error of confidences (n,) and whether each is right (n,) (Guo et al., 2017)."""
    which = (confidence.double() * bins).long().clamp(0, bins - 1)
    count = torch.bincount(which, minlength=bins).double()
    gap = torch.bincount(which, weights=confidence.double() - right.double(), minlength=bins).abs()
    return float(gap.sum() / count.sum())


def standardized(rows: Tensor) -> Tensor:
    """Rows (m, ...) as (m, D) of mean 0 and deviation 1; of a row of one value, 0."""
    flat = rows.flatten(1).float()
    centred = flat - flat.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)


def nearest(rows: Tensor, others: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For rows (k, ...) the distance (k,) to the nearest of others (n, ...), and its number (k,).

    The root mean square difference of both, standardized: 0 of the same picture, 1.4 of two that have nothing in
    common, however dark or pale they are. own: the numbers of the rows themselves, where they are of the others.
    """
    apart, which = _two_nearest(rows, others, own)
    return apart[:, 0], which


def _two_nearest(rows: Tensor, others: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """As nearest, with the distances (k, 2) to the nearest two."""
    flat = standardized(rows)
    best = torch.full((len(flat), 2), float("inf"))
    which = torch.zeros(len(flat), dtype=torch.int64)
    for first in range(0, len(others), 1024):
        apart = torch.cdist(flat, standardized(others[first : first + 1024])) / flat.shape[1] ** 0.5
        if own is not None:
            inside = ((own >= first) & (own < first + apart.shape[1])).nonzero().squeeze(1)
            apart[inside, own[inside] - first] = float("inf")
        low, at = apart.topk(min(2, apart.shape[1]), 1, largest=False)
        nearer = low[:, 0] < best[:, 0]
        which[nearer] = at[nearer, 0] + first
        best = torch.cat([best, low], 1).topk(2, 1, largest=False).values
    return best, which


def share_nearer(rows: Tensor, private: Tensor) -> float:
    """The share of rows (k, ...) that are nearer to a private one (n, ...) than that is to any other private one.

    Half of them where rows come from where the private ones do; all where they repeat them, but smooth pictures too,
    which are near to everything.
    """
    apart, which = nearest(rows, private)
    own = which.unique()
    among = torch.full((len(private),), float("inf"))
    among[own], _ = nearest(private[own], private, own)
    return float((apart < among[which]).double().mean())


def share_of_one(rows: Tensor, private: Tensor, chance: float = 0.01) -> float:
    """The share of rows (k, ...) that are one private image's: near to it, and to no second one.

    That is, whose nearest distance over the second nearest is smaller than it is of all but a share, chance, of the
    private ones (n, ...) among each other. A picture that is near to everything is no one's.
    """
    (mine, _), (theirs, _) = (
        _two_nearest(x, private, own) for x, own in ((rows, None), (private, torch.arange(len(private))))
    )
    ratio, usual = (apart[:, 0] / apart[:, 1].clamp_min(1e-9) for apart in (mine, theirs))
    return float((ratio < usual.quantile(chance)).double().mean())


def perceptual_hash(images: Tensor) -> Tensor:
    """64 signs (n, 64), +-1, of images (n, ch, S, S): the low frequencies of a grey 32-px version against their median.

    The pHash of Zauner (2010): images that a person takes for one differ in a few of them.
    """
    grey = images.float().mean(1, keepdim=True)
    grey = torch.nn.functional.interpolate(grey, (32, 32), mode="bilinear", antialias=True, align_corners=False)
    at = torch.arange(32.0)
    cosines = torch.cos(math.pi / 32 * (at + 0.5) * torch.arange(1.0, 9.0)[:, None])  # without the mean
    low = (cosines @ grey.squeeze(1) @ cosines.T).flatten(1)
    return torch.where(low > low.median(1, keepdim=True).values, 1.0, -1.0)


def share_alike(images: Tensor, others: Tensor, bits: int = 6) -> float:
    """The share of images (k, ch, S, S) whose perceptual hash is within so many bits of that of one of the others."""
    theirs = perceptual_hash(others).T
    most = torch.cat([(part @ theirs).amax(1) for part in perceptual_hash(images).split(2048)])
    return float(((64 - most) / 2 <= bits).double().mean())


class Neighbours(NamedTuple):
    """Precision and recall (Kynkäänniemi et al., 2019), density and coverage (Naeem et al., 2020), 0 to 1 all but one.

    precision: drawn images that lie among real ones; recall: real ones that lie among drawn ones; density: as
    precision, counted; 1 where both are alike; coverage: real ones that have a drawn one among their neighbours.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbours(real: Tensor, drawn: Tensor, k: int = 5) -> Neighbours:
    """Of rows (n, D) each, with the k nearest neighbours of each within its own set."""
    pairs = torch.cdist(drawn, real)
    of_real, of_drawn = (torch.cdist(x, x).kthvalue(k + 1, 1).values for x in (real, drawn))
    inside = pairs <= of_real
    return Neighbours(
        float(inside.any(1).double().mean()),
        float((pairs <= of_drawn[:, None]).any(0).double().mean()),
        float(inside.double().sum() / (k * len(drawn))),
        float((pairs.amin(0) <= of_real).double().mean()),
    )


def mutual_information(counts: Tensor) -> float:
    """Of rows and columns in nats, from counts (R, C), less the bias of so few counts (Miller and Madow, 1955)."""
    if not counts.any():
        return 0.0
    p = counts.double() / counts.sum()
    rows, columns = p.sum(1, keepdim=True), p.sum(0, keepdim=True)
    raw = torch.where(p > 0, p * (p / (rows * columns)).log(), 0.0).nan_to_num(0.0).sum()
    cells, r, c = (int((x > 0).sum()) for x in (p, rows, columns))
    return max(0.0, float(raw) + (r + c - cells - 1) / (2 * float(counts.sum())))


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's, of each row of x and y (n, C), on the average."""
    ranks = (standardized(part.argsort(1).argsort(1)).double() for part in (x, y))
    return float(torch.mul(*ranks).mean(1).mean())


class Attack(NamedTuple):
    """The area under the ROC curve of telling members from others, with what it lies between."""

    auc: float
    low: float
    high: float


def attack(members: Tensor, others: Tensor, attacks: int = 1) -> Attack:
    """How well a score (m,) and (n,), high for members, tells them: 0.5 is chance.

    The interval holds for as many attacks together in 95 of 100 cases (DeLong et al., 1988; Bonferroni).
    """
    greater = (members.double()[:, None] - others.double()[None, :]).sign() / 2 + 0.5
    auc = float(greater.mean())
    variance = float(greater.mean(1).var() / len(members) + greater.mean(0).var() / len(others))
    z = float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - 0.025 / attacks)))
    # Where no pair is the other way round the variance is 0; that many pairs bound it by the rule of three.
    half = max(z * variance**0.5, 3.0 / min(len(members), len(others)) if auc in (0.0, 1.0) else 0.0)
    return Attack(auc, max(0.0, auc - half), min(1.0, auc + half))


def _spread(values: list[float]) -> Transport:
    found = torch.tensor(values, dtype=torch.float64)
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Transport(float(found.mean()), low, high)


def images_apart(drawn: Tensor, private: Tensor, generator: torch.Generator, most: int = 1000) -> dict[str, Any]:
    """W between drawn (k, D) and private rows (n, D), and between private halves; and the neighbours of both.

    The cost is the root mean square difference of two rows. Both distances are of as many rows against one half.
    """
    order = torch.randperm(len(private), generator=generator)
    n = min(len(private) // 2, len(drawn), most)
    half, other = private[order[:n]].float(), private[order[n : 2 * n]].float()
    some = drawn[torch.randperm(len(drawn), generator=generator)[:n]].float()
    scale = half.shape[1] ** 0.5
    return {
        "w": wasserstein(torch.cdist(some, half) / scale),
        "noise": wasserstein(torch.cdist(other, half) / scale),
        "drawn": neighbours(half, some)._asdict(),
        "private": neighbours(half, other)._asdict(),
        "rows": n,
    }
