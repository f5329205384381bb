"""A torch classifier as an ONNX file with its preprocessing inside, checked against torch."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mekd.errors import MekdError
from mekd.oracle.ort import open_session


class ExportError(MekdError, RuntimeError):
    """The exported graph does not compute what torch computes."""


class Classifier(nn.Module):
    """A network behind its preprocessing: pixels (m, ch, H, W), uint8 or float in [0, 1], to logits (m, C).

    resize: the side in pixels that the network wants, None for the image's own; mean and std per channel, in
    units of [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        resize: int | None = None,
    ) -> None:
        super().__init__()
        self.net, self.resize = net, resize
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.to(torch.float32) / 255 if pixels.dtype == torch.uint8 else pixels
        if self.resize is not None:
            x = F.interpolate(x, size=(self.resize, self.resize), mode="bilinear", align_corners=False)
        return self.net((x - self.mean) / self.std)


def export(classifier: nn.Module, path: Path, image: tuple[int, int, int], transport: str = "uint8") -> float:
    """Write classifier, which maps pixels (m, *image) to logits, to path with a dynamic batch.

    transport: "uint8" for an input of pixels 0 to 255, "float" for [0, 1]. The file is compared with torch on
    random images at two batch sizes before it gets its name. Returns the largest difference of a logit,
    relative to the largest logit. Raises ExportError where it is above 1e-4.
    """
    classifier = classifier.eval().cpu()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5, *image), dtype=torch.uint8, generator=generator)
    images = pixels if transport == "uint8" else pixels / 255
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.part.onnx")
    try:
        with _quiet():
            torch.onnx.export(
                classifier,
                (images[:2],),
                beside,
                dynamo=True,
                external_data=False,
                verbose=False,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
        session = open_session(beside, "cpu")
        worst = 0.0
        for batch in (images, images[:1]):
            with torch.inference_mode():
                expected = classifier(batch).numpy()
            found = session.run(None, {"images": batch.numpy()})[0]
            off = np.abs(found - expected).max() / max(1.0, np.abs(expected).max())
            worst = float(np.maximum(worst, off))  # unlike max(), it keeps NaN
        if not worst <= 1e-4:
            raise ExportError(f"{path.name} differs from torch by {worst:.2g} of the largest logit; 1e-4 is allowed")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return worst


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress notes out of the log; its errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
