"""Classifiers by name: resnet8 to resnet110 (for small images), torchvision:NAME, timm:NAME, or the user's own."""

import difflib
import inspect

from torch import Tensor, nn

from mekd import user_code
from mekd.errors import UsageError
from mekd.nets.resnet import DEPTHS, ResNet


class _GrayAsRGB(nn.Module):
    """A network for three channels fed with one, repeated."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images.expand(-1, 3, -1, -1))
        return logits


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module:
    """An untrained classifier from images (m, channels, H, W) to logits (m, num_classes).

    name: resnet8 to resnet110, torchvision:NAME, timm:NAME, package.module:factory or FILE.py:factory, which is called
    with num_classes and channels. Raises ValueError for an unknown name, with the nearest known ones, and for a factory
    that is not there or gives no network; ImportError for torchvision:NAME and timm:NAME without their package.
    """
    own = {f"resnet{depth}": depth for depth in DEPTHS}
    if name in own:
        return ResNet(own[name], num_classes, channels)
    family, _, model = name.partition(":")
    if family == "torchvision" and model:
        return _torchvision(name, model, num_classes, channels)
    if family == "timm" and model:
        return _timm(name, model, num_classes, channels)
    if family and model:
        return _from_factory(name, num_classes, channels)
    near = ", ".join(difflib.get_close_matches(name, own)) or ", ".join(own)
    raise ValueError(
        f"no network is called {name!r}; nearest: {near}; or torchvision:NAME, timm:NAME, package.module:factory, "
        "FILE.py:factory"
    )


def is_users(name: str) -> bool:
    """Whether a network is made by a factory of the user's."""
    family, colon, _ = name.partition(":")
    return bool(colon) and family not in ("torchvision", "timm")


def file_of(name: str) -> str | None:
    """The file of a factory, FILE.py:factory; None for every other name."""
    file = name.rpartition(":")[0]
    return file if is_users(name) and file.endswith(".py") else None


def without_folder(name: str) -> str:
    """A network's name as it may be handed on: of FILE.py:factory the file without its folder."""
    return name if file_of(name) is None else name.replace("\\", "/").rpartition("/")[2]


def _torchvision(name: str, model: str, num_classes: int, channels: int) -> nn.Module:
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


def _timm(name: str, model: str, num_classes: int, channels: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"{name} needs timm: pip install timm") from error
    if not timm.is_model(model):  # a name of the hub, hf-hub:..., is none: nothing is downloaded
        near = ", ".join(difflib.get_close_matches(model, timm.list_models())) or "see timm.list_models()"
        raise ValueError(f"timm has no model {model!r}; nearest: {near}")
    return timm.create_model(model, pretrained=False, num_classes=num_classes, in_chans=channels)


def _from_factory(name: str, num_classes: int, channels: int) -> nn.Module:
    load = user_code.from_module if file_of(name) is None else user_code.from_file
    factory = load(name)
    what = f"the factory {name.rpartition(':')[2]}"
    given = {"num_classes": num_classes, "channels": channels}
    try:
        inspect.signature(factory).bind(**given)
    except TypeError as error:
        raise UsageError(
            f"{what} cannot be called with num_classes and channels ({error}): write it as "
            "def factory(num_classes, channels)"
        ) from error
    except ValueError:
        pass  # what is written in C tells no signature
    try:
        net = factory(**given)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{what} raised {user_code.told(error)}, called with {given}") from error
    if not isinstance(net, nn.Module):
        raise UsageError(f"{what} gave a {type(net).__name__}; it must give a torch.nn.Module")
    return net
