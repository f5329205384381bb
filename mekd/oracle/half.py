"""A classifier's file computed in float16, and how far its answers then are from float32's."""

from pathlib import Path

import torch
from torch import Tensor

from mekd.oracle.session import ModelError, one_line

#: What float16 may cost: images whose best class is another, and the difference of a probability.
SHARE, DIFFERENCE = 0.9, 0.02


def to_float16(path: Path) -> bytes:
    """The file's graph in float16 but for its inputs and outputs; ModelError where that cannot be had."""
    try:
        import onnx
        from onnxruntime.transformers.float16 import convert_float_to_float16

        half: bytes = convert_float_to_float16(onnx.load(str(path)), keep_io_types=True).SerializeToString()
        return half
    except Exception as error:
        raise ModelError(
            f"{path} cannot be turned into float16 ({type(error).__name__}: {one_line(error)}): say --oracle.precision "
            "float32"
        ) from error


def agreement(ours: Tensor, theirs: Tensor, output: str) -> tuple[float, float]:
    """The share of images (m,) with the same best class, and the largest difference of a probability.

    ours, theirs: raw outputs of two precisions, scores (m, C) or class indices (m,), as output says: "logits",
    "probs" or "index". NaN agrees with nothing.
    """
    if output == "index":
        return (ours.flatten() == theirs.flatten()).float().mean().item(), 0.0
    a, b = (raw.float().flatten(1) for raw in (ours, theirs))
    if output == "logits":
        a, b = a.softmax(-1), b.softmax(-1)
    same = (a.argmax(-1) == b.argmax(-1)) & ~(a.isnan() | b.isnan()).any(-1)
    return same.float().mean().item(), (a - b).abs().max().item()


def require_agreement(path: object, ours: Tensor, theirs: Tensor, output: str) -> None:
    """ModelError where float16's raw output differs too much from float32's; arguments as in agreement."""
    share, difference = agreement(ours, theirs, output)
    if not (share >= SHARE and difference <= DIFFERENCE):
        raise ModelError(
            f"{path} answers otherwise in float16: of {len(ours)} random images {share:.0%} have float32's best class "
            f"({SHARE:.0%} are wanted), and a probability differs by {difference:.2g} ({DIFFERENCE} is allowed): say "
            "--oracle.precision float32"
        )


def random_pixels(count: int, image: tuple[int, int, int]) -> Tensor:
    """Images (count, *image) of noise, uint8, the same ones every time."""
    return torch.randint(0, 256, (count, *image), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
