"""Whether a network can be a student: looked at with two images, before anything is trained or asked."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mekd.errors import UsageError
from mekd.pixels import SIDES
from mekd.user_code import told


def check_network(net: nn.Module, image: tuple[int, int, int], num_classes: int) -> None:
    """Raise UsageError, saying what is wrong, for a network that cannot learn to map images (m, *image) to (m, C).

    It takes a batch of two in training and one image in evaluation; every weight on the meta device: shapes alone. The
    network is left in training mode, its statistics changed; random numbers are as before.
    """
    if lazy := [name for name, value in net.state_dict(keep_vars=True).items() if is_lazy(value)]:
        raise UsageError(f"its {lazy[0]} has no size before the first image; a student's layers must be given theirs")
    if other := [name for name, value in net.state_dict().items() if not isinstance(value, Tensor)]:
        raise UsageError(f"its state_dict holds {other[0]}, which is no tensor; weights and buffers must be tensors")
    weights = [value for value in net.parameters() if value.requires_grad]
    if not weights:
        raise UsageError("it has no parameter that requires a gradient: nothing of it can learn")
    device = weights[0].device
    images = 2 * torch.rand(2, *image, generator=torch.Generator().manual_seed(0)) - 1
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    net.to(memory_format=torch.channels_last)  # weights and images lie so in training
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        logits = _run(net.train(), images, num_classes)
        _check_gradient(logits, weights)
        with torch.no_grad():
            _run(net.eval(), images[:1], num_classes)
        net.train()


def _run(net: nn.Module, images: Tensor, num_classes: int) -> Tensor:
    mode, shape = "training" if net.training else "evaluation", tuple(images.shape)
    try:
        logits = net(images)
    except (Exception, SystemExit) as error:
        raise UsageError(f"in {mode} it raised {told(error)}, given images {shape}{_side(net, images)}") from error
    wanted = f"it must give logits ({shape[0]}, {num_classes}), a row of num_classes for each image"
    if not isinstance(logits, Tensor):
        raise UsageError(f"in {mode} it gave a {type(logits).__name__} for images {shape}; {wanted}, and nothing else")
    if logits.shape != (len(images), num_classes):
        raise UsageError(f"in {mode} it gave {tuple(logits.shape)} for images {shape}; {wanted}")
    if not logits.is_floating_point():
        raise UsageError(f"in {mode} it gave {str(logits.dtype).removeprefix('torch.')}; {wanted}, of floats")
    if not logits.is_meta and not logits.isfinite().all():
        raise UsageError(f"in {mode} it gave NaN or infinity for images between -1 and 1; its first weights are wrong")
    sums = logits.detach().float().sum(1)
    if num_classes > 1 and not logits.is_meta and bool((logits >= 0).all() and ((sums - 1).abs() < 1e-2).all()):
        raise UsageError(f"in {mode} it gave probabilities, whose rows sum to 1; {wanted}: leave out its softmax")
    return logits


def _check_gradient(logits: Tensor, weights: list[nn.Parameter]) -> None:
    none = "its logits have no gradient by any of its parameters: look for detach(), no_grad() or argmax in its forward"
    if not logits.requires_grad:
        raise UsageError(none)
    try:
        gradients = torch.autograd.grad(logits.float().sum(), weights, allow_unused=True)
    except RuntimeError as error:
        raise UsageError(f"its gradient cannot be computed: {told(error)}") from error
    reached: list[Any] = [gradient for gradient in gradients if gradient is not None]
    if not any(gradient.is_meta or bool(gradient.any()) for gradient in reached):
        raise UsageError(none)
    if not all(gradient.is_meta or bool(gradient.isfinite().all()) for gradient in reached):
        raise UsageError("its first gradient is NaN or infinite; its first weights are wrong")


def _side(net: nn.Module, images: Tensor) -> str:
    """What to do about it where images of another size would do."""
    size = images.shape[-1]
    for side in SIDES:
        try:
            if side > size:
                net(images.new_zeros(*images.shape[:2], side, side))
                return f"; it takes images of {side} pixels: raise data.size to {side}, or choose another network"
        except Exception:
            continue
    return f". It must take images of {size} pixels (data.size)"
