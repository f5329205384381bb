"""The networks: the CIFAR ResNets, the DCGAN pair, and classifiers by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mekd.nets import Discriminator, Generator, ResNet, build
from mekd.nets.generator import UpConv
from mekd.nets.resnet import Block

SIZES = [
    # scikit-learn's digits.
    16,
    # The paper's network: CIFAR and MNIST-like sets.
    32,
    # Tiny ImageNet.
    64,
    # Faces.
    128,
    # ImageNet.
    224,
]


def weights(module: nn.Module) -> int:
    return sum(x.numel() for x in module.parameters())


def resnet_weights(depth: int, num_classes: int, channels: int) -> int:
    """He et al. (2016), option A: shortcuts have no weights, a batch norm has two numbers a channel."""
    n = (depth - 2) // 6
    total = channels * 16 * 9 + 2 * 16
    for inputs, outputs in ((16, 16), (16, 32), (32, 64)):
        total += inputs * outputs * 9 + (2 * n - 1) * outputs * outputs * 9 + 2 * n * 2 * outputs
    return total + 64 * num_classes + num_classes


# ResNets.


@pytest.mark.parametrize(
    ("depth", "exact", "millions"),
    [
        # The student of the paper; not in the table of He et al.
        (8, 75_290, 0.075),
        # The rest is: 0.27, 0.46, 0.85 and 1.7 million.
        (20, 269_722, 0.27),
        (32, 464_154, 0.46),
        (56, 853_018, 0.85),
        (110, 1_727_962, 1.7),
    ],
)
def test_resnets_have_as_many_weights_as_published(depth: int, exact: int, millions: float) -> None:
    count = weights(ResNet(depth, 10))
    assert count == exact == resnet_weights(depth, 10, 3)
    assert count / 1e6 == pytest.approx(millions, rel=0.04)


@pytest.mark.parametrize(("num_classes", "channels"), [(100, 3), (10, 1), (2, 1)])
def test_resnet_weights_follow_classes_and_channels(num_classes: int, channels: int) -> None:
    assert weights(ResNet(20, num_classes, channels)) == resnet_weights(20, num_classes, channels)


@pytest.mark.parametrize("depth", [8, 20, 32, 56, 110])
def test_resnets_are_as_deep_as_they_say(depth: int) -> None:
    layers = [m for m in ResNet(depth, 10).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth


@pytest.mark.parametrize(
    ("depth", "channels", "size"),
    [
        # Digits.
        (8, 1, 16),
        # CIFAR.
        (20, 3, 32),
        # The deepest.
        (110, 3, 16),
        # Sizes are not fixed: the mean is taken over what is left.
        (8, 3, 28),
        # Odd at every halving.
        (8, 3, 7),
    ],
)
def test_resnets_give_logits(depth: int, channels: int, size: int) -> None:
    net = ResNet(depth, 7, channels)
    logits = net(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(x.grad is not None and torch.isfinite(x.grad).all() for x in net.parameters())


@pytest.mark.parametrize(
    ("inputs", "outputs", "stride"),
    [
        # Within a stage: the identity.
        (16, 16, 1),
        # Between stages: every second pixel, new channels zero.
        (16, 32, 2),
    ],
)
def test_shortcuts_have_no_weights(inputs: int, outputs: int, stride: int) -> None:
    block = Block(inputs, outputs, stride).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, inputs, 8, 8)
    y = block(x)
    assert y.shape == (2, outputs, 8 // stride, 8 // stride)
    # With its branch switched off, a block is its shortcut.
    assert torch.equal(y[:, :inputs], x[:, :, ::stride, ::stride])
    assert not y[:, inputs:].any()


# The generator.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_generators_draw_images(size: int, channels: int) -> None:
    generator = Generator(10, size, channels, width=0.1)
    code = torch.randn(2, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    images = generator(code)
    assert images.shape == (2, channels, size, size)
    assert images.min() >= -1 and images.max() <= 1
    assert images.std() > 1e-3
    assert not torch.equal(images[0], images[1])
    images.sum().backward()
    assert code.grad is not None and torch.isfinite(code.grad).all()
    assert all(x.grad is not None for x in generator.parameters())


def test_the_image_is_the_tanh_of_the_preactivation() -> None:
    generator = Generator(10, 16, 1, width=0.1).eval()
    code = 5 * torch.randn(2, 10)
    torch.testing.assert_close(generator(code), generator.preactivation(code).tanh(), rtol=0, atol=0)


def test_the_generator_at_32_px_is_the_papers() -> None:
    generator = Generator(10, 32)
    # Linear to 128 x 8 x 8, convolutions to 128, 64 and 3 channels, a batch norm behind all but the last.
    linear = 10 * 8192 + 8192
    convs = (128 * 128 + 128 * 64 + 64 * 3) * 9 + 128 + 64 + 3
    norms = 2 * (128 + 128 + 64)
    assert weights(generator) == linear + convs + norms


def test_the_width_multiplies_the_channels() -> None:
    generator = Generator(10, 32, width=0.5)
    assert [conv.out_channels for conv in generator.convs] == [64, 32]
    assert generator.linear.out_features == 64 * 8 * 8
    # Never to less than 8.
    assert [conv.out_channels for conv in Generator(10, 32, width=0.01).convs] == [8, 8]


def test_a_thousand_classes_at_224_px_fit_into_memory() -> None:
    with torch.device("meta"):
        generator = Generator(1000, 224)
    assert weights(generator.linear) < 30_000_000
    # The paper's layer, 128 channels at a quarter of the side, would have 400 million.
    assert 1000 * 128 * (224 // 4) ** 2 > 400_000_000


@pytest.mark.parametrize(
    ("height", "width"),
    [
        # The generator's planes.
        (8, 8),
        # Odd, and not square.
        (7, 5),
        # Nothing but borders.
        (1, 1),
        (1, 2),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "allowed"),
    [
        # What it is trained in.
        (torch.float32, 1e-5),
        # Exact, up to the order of the sum.
        (torch.float64, 1e-12),
    ],
)
def test_upconv_upsamples_and_convolves(height: int, width: int, dtype: torch.dtype, allowed: float) -> None:
    torch.manual_seed(0)
    layer = UpConv(6, 5).to(dtype)
    assert layer.weight.shape == (5, 6, 3, 3) and layer.bias is not None
    x = torch.randn(2, 6, height, width, dtype=dtype, requires_grad=True)
    got = layer(x)
    wanted = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), layer.weight, layer.bias, padding=1)
    assert got.shape == (2, 5, 2 * height, 2 * width)
    torch.testing.assert_close(got, wanted, rtol=allowed, atol=allowed)
    upstream = torch.randn_like(wanted)
    inputs = (x, layer.weight, layer.bias)
    for ours, exact in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(wanted, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=allowed, atol=10 * allowed)


def test_generators_refuse_other_sizes() -> None:
    with pytest.raises(ValueError, match=r"size is 48.*16, 32, 64, 128, 224"):
        Generator(10, 48)


# The discriminator.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_discriminators_give_one_logit_per_image(size: int, channels: int) -> None:
    net = Discriminator(size, channels)
    images = torch.randn(2, channels, size, size, requires_grad=True)
    d = net(images)
    assert d.shape == (2,)
    d.sum().backward()
    assert images.grad is not None and images.grad.abs().max() > 0
    assert all(x.grad is not None for x in net.parameters())


def test_discriminators_take_a_single_image() -> None:
    assert Discriminator(16, 1).eval()(torch.zeros(1, 1, 16, 16)).shape == (1,)


def test_discriminators_judge_each_image_alone() -> None:
    # In training too: a batch norm would tell G's batch from the real one's by nothing but its company.
    net = Discriminator(16, 1).train()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0  # chance aside
    images = torch.randn(3, 1, 16, 16)
    torch.testing.assert_close(net(images), torch.cat([net(x[None]) for x in images]), rtol=1e-5, atol=1e-6)


def test_the_discriminator_at_32_px_halves_four_times() -> None:
    convs = [m for m in Discriminator(32).modules() if isinstance(m, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [16, 32, 64, 128]
    linear = Discriminator(32).linear
    assert (linear.in_features, linear.out_features) == (128 * 2 * 2, 1)


def test_discriminators_refuse_other_sizes() -> None:
    with pytest.raises(ValueError, match=r"size is 48.*16, 32, 64, 128, 224"):
        Discriminator(48)


# By name.


@pytest.mark.parametrize("depth", [8, 20, 32, 56, 110])
def test_resnets_by_name(depth: int) -> None:
    net = build(f"resnet{depth}", 5, 1)
    assert isinstance(net, ResNet)
    assert weights(net) == resnet_weights(depth, 5, 1)


@pytest.mark.parametrize(
    "channels",
    [
        # What they were made for.
        3,
        # One channel, repeated: the network keeps its first layer.
        1,
    ],
)
def test_torchvisions_classifiers_by_name(channels: int) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed: pip install 'mekd[vision]'")
    net = build("torchvision:resnet18", 10, channels).eval()
    # 11 689 512 with 1000 classes.
    assert weights(net) == 11_689_512 - 513 * 990
    images = torch.randn(2, channels, 32, 32, requires_grad=True)
    logits = net(images)
    assert logits.shape == (2, 10)
    logits.sum().backward()
    assert images.grad is not None and images.grad.shape == images.shape and images.grad.any()


def test_one_channel_is_three_alike() -> None:
    models = pytest.importorskip("torchvision.models")
    gray = build("torchvision:resnet18", 10, 1).eval()
    color = models.resnet18(num_classes=10).eval()
    color.load_state_dict({name.removeprefix("net."): x for name, x in gray.state_dict().items()})
    images = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(gray(images), color(images.repeat(1, 3, 1, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        # A depth that He et al. do not have.
        ("resnet21", ["'resnet21'", "nearest", "resnet20"]),
        ("resnet-32", ["'resnet-32'", "nearest", "resnet32"]),
        # The name of a torchvision network without its family.
        ("vgg16", ["'vgg16'", "resnet8", "resnet110", "torchvision:NAME"]),
        # A family without a name.
        ("torchvision:", ["'torchvision:'", "torchvision:NAME", "timm:NAME"]),
    ],
)
def test_unknown_names_get_the_nearest_known(name: str, parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        build(name, 10)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        # A digit too many.
        ("resnet188", "resnet18"),
        # A typo.
        ("mobilnet_v2", "mobilenet_v2"),
        # Nothing like it.
        ("zzz", "list_models()"),
    ],
)
def test_unknown_names_of_torchvision_get_the_nearest_known(name: str, nearest: str) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed: pip install 'mekd[vision]'")
    with pytest.raises(ValueError) as caught:
        build(f"torchvision:{name}", 10)
    assert repr(name) in str(caught.value) and nearest in str(caught.value)


def test_resnets_refuse_other_depths() -> None:
    with pytest.raises(ValueError, match=r"depth is 21.*8, 20, 32, 56, 110"):
        ResNet(21, 10)
