"""A torch classifier as an ONNX file with its preprocessing inside, checked against torch."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mekd.errors import MekdError
from mekd.oracle.session import one_line, open_session

#: A protobuf file ends at 2 GiB; the graph takes its share.
LARGEST = 2**31 - 2**24


class ExportError(MekdError, RuntimeError):
    """The network cannot be written as ONNX, or the graph does not compute what torch computes."""


class Classifier(nn.Module):
    """A network behind its preprocessing: pixels (m, ch, H, W), uint8 or float in [0, 1], to logits (m, C).

    resize: the side in pixels that the network wants, None for the image's own; mean and std per channel, in
    units of [0, 1]; classes: their names, where they are known.
    """

    classes: tuple[str, ...] = ()
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
        x = ((x - self.mean) / self.std).to(self.mean.dtype)  # of a classifier that was cast, the network's own
        logits: Tensor = self.net(x)
        return logits


def export(
    classifier: nn.Module,
    path: Path,
    image: tuple[int, int, int],
    transport: str = "uint8",
    metadata: Mapping[str, str] | None = None,
) -> float:
    """Write classifier, which maps pixels (m, *image) to logits, to path with a dynamic batch.

    transport: "uint8" for an input of pixels 0 to 255, "float" for [0, 1]; metadata: what the file says of itself. The
    file is compared with torch on random images at two batch sizes before it gets its name. Returns the largest
    difference of a logit, relative to the largest logit. Raises ExportError where it is above 1e-4, where the exporter
    refuses the network or is not installed, and where the weights do not fit into one file.
    """
    weights = sum(tensor.nbytes for tensor in (*classifier.parameters(), *classifier.buffers()))
    if weights > LARGEST:
        raise ExportError(
            f"{path.name} would hold {weights / 1e9:.1f} GB of weights, and a file of ONNX holds 2 GB: write it with "
            "torch.onnx.export(..., external_data=True), its pixels uint8, and give it with --teacher.onnx FILE"
        )
    classifier = classifier.eval().cpu()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5, *image), dtype=torch.uint8, generator=generator)
    images = pixels if transport == "uint8" else pixels / 255
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.part.onnx")
    try:
        _write(classifier, images[:2], beside)
        import onnx

        model = onnx.load(beside)
        forget_origin(model)
        if metadata:
            onnx.helper.set_model_props(model, dict(metadata))
        onnx.save(model, beside)
        session = open_session(beside, "cpu")
        worst = 0.0
        for batch in (images, images[:1]):
            with torch.inference_mode():
                expected = classifier(batch).numpy()
            found = session.run(None, {"images": batch.numpy()})[0]
            off = np.abs(found - expected).max() / max(1.0, np.abs(expected).max())
            worst = float(np.maximum(worst, off))  # unlike max(), it keeps NaN
        if not worst <= 1e-4:
            raise ExportError(
                f"{path.name} differs from torch by {worst:.2g} of the largest logit; 1e-4 is allowed. nan: the "
                "network itself answers NaN. Otherwise the exporter does not translate it rightly: take another "
                "network, or write the ONNX file yourself"
            )
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return worst


def forget_origin(message: Any) -> None:
    """Clear what a protobuf message of ONNX, and all that it holds, say of where they come from.

    The exporter writes the lines of code that made a node, and the folders of this machine that they lie in.
    """
    for field, value in message.ListFields():
        if field.name in ("doc_string", "metadata_props"):
            message.ClearField(field.name)
        elif field.type == field.TYPE_MESSAGE:
            for part in [value] if hasattr(value, "ListFields") else value:
                forget_origin(part)


def _write(classifier: nn.Module, images: Tensor, path: Path) -> None:
    try:
        with _quiet():
            torch.onnx.export(
                classifier,
                (images,),
                path,
                dynamo=True,
                external_data=False,
                verbose=False,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except ImportError as error:
        raise ExportError(f"the exporter lacks a package ({error}): pip install 'mekd[onnx]'") from error
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(
            f"the exporter does not take this network: {one_line(error)[:500]}. Write its ONNX file yourself and give "
            "it with --teacher.onnx FILE, or take another network"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporter prints out of sight; its errors still raise."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            open(os.devnull, "w") as null,
            contextlib.redirect_stdout(null),
            contextlib.redirect_stderr(null),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
