"""A torch classifier behind the interface of an oracle: for tests and for trying things out."""

from typing import Any

import torch
from torch import Tensor, nn

from mekd.oracle.base import Oracle
from mekd.oracle.response import AnswerError, Response, answer
from mekd.pixels import as_float


class TorchOracle(Oracle):
    """Ask a torch module that maps images in [-1, 1], (m, ch, H, W), to logits (m, C), or to probabilities.

    image: (ch, H, W); output: "logits" or "probs"; the rest as in Oracle. The module is put in eval mode and
    cannot be reached through the oracle.
    """

    def __init__(
        self,
        module: nn.Module,
        image: tuple[int, int, int],
        num_classes: int,
        response: str = "probs",
        *,
        output: str = "logits",
        **options: Any,
    ) -> None:
        super().__init__(image, num_classes, response, **options)
        module.eval()
        kind, k, decimals = self.response, self.k, self.decimals

        @torch.inference_mode()
        def send(images: Tensor) -> Tensor:
            device = next(iter(module.parameters()), images).device
            answers: Tensor = module(as_float(images).to(device))
            return answers

        def respond(images: Tensor) -> Response:
            scores = send(images).clone()
            if scores.dim() != 2 or scores.shape[1] != num_classes:
                width = scores[0].numel()
                raise AnswerError(f"the teacher answered {width} scores an image; {num_classes} were expected")
            return answer(scores, kind, output=output, k=k, decimals=decimals)

        self._respond = respond

    def _send(self, images: Tensor) -> Response:
        return self._respond(images)
