"""The DCGAN discriminator: one logit per image."""

from torch import Tensor, nn

#: Image size: channels after each halving.
WIDTHS: dict[int, tuple[int, ...]] = {
    16: (16, 32, 64, 128),
    32: (16, 32, 64, 128),
    64: (16, 32, 64, 128, 256),
    128: (16, 32, 64, 128, 256, 256),
    224: (16, 32, 64, 128, 256, 256),
}


class Discriminator(nn.Module):
    """Stride-2 convolutions with leaky ReLU 0.2 and dropout of whole channels, then one linear layer.

    Images (m, channels, size, size) to logits (m,). width multiplies the channels of its layers. There is no batch
    norm: real and generated images come in batches of their own, and normalising each would take away the difference
    of their means, which at 16 px, where the last map is one pixel, is all that the linear layer could see. Without
    dropout it gets to know a few hundred private images by heart, and the generator leaves whole classes out; thousands
    of images need none.
    """

    def __init__(self, size: int, channels: int = 3, dropout: float = 0.25, width: float = 1.0) -> None:
        super().__init__()
        if size not in WIDTHS:
            raise ValueError(f"size is {size}; the discriminator reads {', '.join(map(str, WIDTHS))} px")
        layers: list[nn.Module] = []
        inputs = channels
        for outputs in [max(8, round(w * width)) for w in WIDTHS[size]]:
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.LeakyReLU(0.2, inplace=True), nn.Dropout2d(dropout)]
            inputs, size = outputs, (size + 1) // 2
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(inputs * size**2, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.features(images).flatten(1))
        return logits.squeeze(1)
