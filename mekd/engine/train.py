"""What the training stages share: optimisers, the learning rate, the precision of a step, predictions."""

import functools
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mekd.engine import parallel


def sgd(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with Nesterov momentum 0.9, one kernel for all parameters."""
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=weight_decay, nesterov=True, fused=True)


def adam(model: nn.Module, lr: float) -> torch.optim.Adam:
    """Adam as GANs take it, betas 0.5 and 0.999, one kernel for all parameters."""
    return torch.optim.Adam(model.parameters(), lr, betas=(0.5, 0.999), fused=True)


def computed_in(precision: str, device: torch.device) -> torch.autocast:
    """A context in which convolutions and linear layers compute in float32, bfloat16 or float16."""
    return torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")


@functools.cache
def faster_in_bfloat16(device: str) -> bool:
    """Whether a convolution's forward and backward take less than 0.8 of float32's time on a device, measured once.

    The first process measures, the others do as it does.
    """
    here = device == "cpu" or (device.startswith("cuda") and torch.cuda.is_available())  # the run says so itself
    return parallel.any_of(here and parallel.rank() == 0 and _bfloat16_share(torch.device(device)) < 0.8)[0]


def _bfloat16_share(device: torch.device) -> float:
    weight = torch.zeros(64, 64, 3, 3, device=device, requires_grad=True)
    images = torch.zeros(64, 64, 16, 16, device=device).contiguous(memory_format=torch.channels_last)
    best = {"float32": math.inf, "bfloat16": math.inf}
    for _ in range(5):  # the first of each chooses its kernels
        for precision in best:
            begun = time.perf_counter()
            with computed_in(precision, device):
                drawn = F.conv2d(images, weight, padding=1)
            (grad,) = torch.autograd.grad(drawn, weight, torch.zeros_like(drawn))
            grad[0, 0, 0, 0].item()  # waits for a card
            best[precision] = min(best[precision], time.perf_counter() - begun)
    return best["bfloat16"] / best["float32"]


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
