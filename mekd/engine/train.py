"""What the training stages share: optimisers, the learning rate, predictions."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def sgd(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with Nesterov momentum 0.9, one kernel for all parameters."""
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=weight_decay, nesterov=True, fused=True)


def adam(model: nn.Module, lr: float) -> torch.optim.Adam:
    """Adam as GANs take it, betas 0.5 and 0.999, one kernel for all parameters."""
    return torch.optim.Adam(model.parameters(), lr, betas=(0.5, 0.999), fused=True)


def set_cosine_lr(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """A linear warm-up over the first twentieth of the steps, then a cosine to 0: a function of the step alone."""
    warmup = max(1, steps // 20)
    rate = (
        (step + 1) / warmup
        if step < warmup
        else 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    )
    for group in optimizer.param_groups:
        group["lr"] = peak * rate


@torch.inference_mode()
def predict(
    model: nn.Module, images: Tensor, *, device: torch.device | str | None = None,
    convert: Callable[[Tensor], Tensor] = lambda images: images, batch: int = 512,
) -> Tensor:  # fmt: skip
    """Classes (n,) of images, moved to device and converted in parts, in eval mode; the mode is put back afterwards."""
    training = model.training
    model.eval()
    classes = torch.cat([model(convert(part.to(device or part.device))).argmax(1) for part in images.split(batch)])
    model.train(training)
    return classes.clone()
