"""How alike two classifiers are."""

import torch
from torch import Tensor


def accuracy(predicted: Tensor, expected: Tensor) -> float:
    """The share of equal classes in (n,) and (n,)."""
    return float((predicted.cpu() == expected.cpu()).double().mean())


def confusion(rows: Tensor, columns: Tensor, num_classes: int) -> Tensor:
    """How often rows (n,) said i and columns (n,) said j: (num_classes, num_classes) int64; -1 said nothing."""
    rows, columns = rows.cpu(), columns.cpu()
    pairs = (rows * num_classes + columns)[(rows >= 0) & (columns >= 0)]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def majority_share(labels: Tensor) -> float:
    """The share of labels (n,) that are the most frequent class; -1 is none."""
    return int(labels[labels >= 0].bincount(minlength=1).max()) / len(labels)


def explained_by_rows(values: Tensor) -> float:
    """The share of the variance of values (k, m, ...) that the row explains, 0 to 1: the mean over m draws of each row.

    The variance of the rows' means less what m draws leave in a mean (one-way analysis of variance), over all entries.
    """
    flat = values.double().flatten(2)
    within = flat.var(1).mean()
    between = (flat.mean(1).var(0).mean() - within / flat.shape[1]).clamp(min=0)
    return float(between / (between + within))


def same_class(classes: Tensor) -> tuple[float, float]:
    """How often two of classes (k, m) are the same: in one row, and in two different ones, 0 to 1."""
    counts = torch.nn.functional.one_hot(classes).double().sum(1)  # (k, C)
    k, m = classes.shape
    in_rows = (counts.square().sum() - k * m) / (k * m * (m - 1))
    everywhere = counts.sum(0).square().sum() - counts.square().sum()
    return float(in_rows), float(everywhere / (k * (k - 1) * m * m))
