"""How alike two classifiers are."""

import torch
from torch import Tensor


def accuracy(predicted: Tensor, expected: Tensor) -> float:
    """The share of equal classes in (n,) and (n,)."""
    return float((predicted.cpu() == expected.cpu()).double().mean())


def confusion(rows: Tensor, columns: Tensor, num_classes: int) -> Tensor:
    """How often rows (n,) said i and columns (n,) said j: (num_classes, num_classes) int64."""
    pairs = rows.cpu() * num_classes + columns.cpu()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
