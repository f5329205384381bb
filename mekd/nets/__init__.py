"""Networks: the CIFAR ResNets, the DCGAN pair, and torchvision's classifiers by name."""

from mekd.nets.discriminator import Discriminator
from mekd.nets.generator import Generator
from mekd.nets.registry import build
from mekd.nets.resnet import ResNet

__all__ = ["Discriminator", "Generator", "ResNet", "build"]
