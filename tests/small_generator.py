"""A small generator, what it draws written out in float64, and a teacher's answers of every kind."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Rows = np.ndarray
CLASSES = 6
#: Half the spacing of float32 numbers just below 1.
FLOOR = 2.0**-25


class Plain(nn.Module):
    """Linear, batch norm, tanh: codes (m, C) to images (m, 3, 2, 2). Counts how it is run."""

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.linear, self.bn = nn.Linear(num_classes, 12), nn.BatchNorm1d(12)
        with torch.no_grad():
            for x in (*self.parameters(), self.bn.running_mean, self.bn.running_var):
                assert x is not None
                low = 0.5 if x is self.bn.running_var else -0.3
                x.copy_(low + torch.rand(x.shape, generator=generator))
        self.runs: list[bool] = []

    def draw(self, code: Tensor) -> Tensor:
        self.runs.append(torch.is_grad_enabled())
        return self.bn(self.linear(code)).unflatten(1, (3, 2, 2))

    def forward(self, code: Tensor) -> Tensor:
        return self.draw(code).tanh()


class WithPreactivation(Plain):
    """The same, with the image before its tanh at hand; asking for more is a waste."""

    def preactivation(self, code: Tensor) -> Tensor:
        return self.draw(code)

    def forward(self, code: Tensor) -> Tensor:
        raise AssertionError("the tanh is the loss's")


def image(generator: Plain, code: Rows) -> Rows:
    """What the generator draws with its running statistics, in float64: (m, 12)."""
    w = {name: x.double().numpy() for name, x in generator.state_dict().items()}
    x = code @ w["linear.weight"].T + w["linear.bias"]
    x = (x - w["bn.running_mean"]) / np.sqrt(w["bn.running_var"] + generator.bn.eps)
    return np.tanh(x * w["bn.weight"] + w["bn.bias"])


def log_softmax(x: Rows) -> Rows:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def centre(log_p: Rows, floor: float = FLOOR) -> Rows:
    log_p = np.maximum(log_p, np.log(floor))
    return log_p - log_p.mean(-1, keepdims=True)


def inputs(num_classes: int = CLASSES, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits of a student and of a teacher (5, C)."""
    random = np.random.default_rng(0)
    student, teacher = torch.from_numpy(3 * random.standard_normal((2, 5, num_classes))).to(dtype)
    return student, teacher


def answer_of(target: str, teacher: Tensor) -> tuple[dict[str, Any], Rows]:
    """The answer as MEKDLoss takes it, and log p."""
    log_p = log_softmax(teacher.double().numpy())
    if target == "logits":
        return {"logits": teacher}, log_p
    if target == "labels":
        labels = teacher.argmax(-1)
        with np.errstate(divide="ignore"):
            return {"labels": labels}, np.log(np.eye(teacher.shape[-1])[labels.numpy()])
    probs = torch.from_numpy(np.exp(log_p)).to(teacher.dtype)
    if target == "probs":
        return {"probs": probs}, log_p
    # The best two, the rest shared equally.
    values, indices = probs.topk(2)
    rest = (1 - values.double().numpy().sum(-1, keepdims=True)) / (teacher.shape[-1] - 2)
    p = np.repeat(rest, teacher.shape[-1], axis=1)
    np.put_along_axis(p, indices.numpy(), values.double().numpy(), axis=1)
    return {"topk": (values, indices)}, np.log(p)
