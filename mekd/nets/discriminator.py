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
    of images need none. num_classes: an image may be judged together with its class, by a vector for each that its
    features are projected on (Miyato and Koyama, 2018).
    """

    def __init__(
        self, size: int, channels: int = 3, dropout: float = 0.25, width: float = 1.0, num_classes: int = 0
    ) -> None:
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
        if num_classes:
            self.classes = nn.Embedding(num_classes, inputs * size**2)
            nn.init.zeros_(self.classes.weight)  # it begins as if it knew of none

    def forward(self, images: Tensor, classes: Tensor | None = None) -> Tensor:
        """The logits of images, with their classes (m,) int64 where those are known."""
        features = self.features(images).flatten(1)
        logits: Tensor = self.linear(features).squeeze(1)
        return logits if classes is None else logits + (self.classes(classes) * features).sum(1)
