"""Classifiers by name: resnet8 to resnet110 (for small images), torchvision:NAME (any of its classifiers)."""

import difflib

from torch import Tensor, nn

from mekd.nets.resnet import DEPTHS, ResNet


class _GrayAsRGB(nn.Module):
    """A network for three channels fed with one, repeated."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.expand(-1, 3, -1, -1))


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module:
    """An untrained classifier from images (m, channels, H, W) to logits (m, num_classes).

    Raises ValueError for an unknown name, with the nearest known ones, and ImportError for torchvision:NAME
    without torchvision.
    """
    own = {f"resnet{depth}": depth for depth in DEPTHS}
    if name in own:
        return ResNet(own[name], num_classes, channels)
    family, _, model = name.partition(":")
    if family == "torchvision" and model:
        try:
            from torchvision import models
        except ImportError as error:
            raise ImportError(f"{name} needs torchvision: pip install 'mekd[vision]'") from error
        known = models.list_models(module=models)
        if model not in known:
            near = ", ".join(difflib.get_close_matches(model, known)) or "see torchvision.models.list_models()"
            raise ValueError(f"torchvision has no classifier {model!r}; nearest: {near}")
        net = models.get_model(model, weights=None, num_classes=num_classes)
        return _GrayAsRGB(net) if channels == 1 else net
    near = ", ".join(difflib.get_close_matches(name, own)) or ", ".join(own)
    raise ValueError(f"no network is called {name!r}; nearest: {near}; or torchvision:NAME")
