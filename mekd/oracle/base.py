"""What every oracle shares: the check of a query, the transport of its images, the ledger."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from mekd.checks import check_choice, check_tensor
from mekd.errors import UsageError
from mekd.oracle.ledger import Ledger
from mekd.oracle.response import KINDS, AnswerError, Response, concatenate
from mekd.pixels import to_uint8

TRANSPORTS = ("uint8", "float")


def about_scale(floating: bool, mean: Sequence[float], std: Sequence[float]) -> list[str]:
    """A sentence on a floating input of which nothing is subtracted: most networks were trained otherwise."""
    if not floating or any(mean) or any(x != 1 for x in std):
        return []
    return [
        "its input is floating and gets pixels / 255 as they are (oracle.mean 0, oracle.std 1). A network that was "
        "trained on normalised images answers less well then, and nobody says so: ImageNet's are --oracle.mean "
        "'[0.485, 0.456, 0.406]' --oracle.std '[0.229, 0.224, 0.225]'"
    ]


class Oracle(ABC):
    """A teacher that can be asked and not opened: query() is all there is of it.

    response: "logits", "probs", "topk" (with k) or "label"; decimals: what the API rounds values to. budget:
    queries at most; ledger: an account that is kept elsewhere, instead of one in memory with that budget.
    transport: "uint8" sends pixels as an API gets them, "float" sends them unrounded. One query is one call.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        num_classes: int,
        response: str = "probs",
        *,
        k: int = 5,
        decimals: int | None = None,
        budget: int | None = None,
        ledger: Ledger | None = None,
        transport: str = "uint8",
    ) -> None:
        check_choice("response", response, KINDS)
        check_choice("transport", transport, TRANSPORTS)
        if response == "topk" and not 1 <= k <= num_classes:
            raise UsageError(f"k is {k} (oracle.k); it must lie between 1 and the teacher's {num_classes} classes")
        if decimals is not None and not 0 <= decimals <= 7:
            raise UsageError(f"decimals is {decimals} (oracle.decimals); it must lie between 0 and 7")
        self.image, self.num_classes = image, num_classes
        self.response, self.k, self.decimals, self.transport = response, k, decimals, transport
        self.notes: list[str] = []  # how the teacher is read, for people
        self.ledger = ledger or Ledger("query", budget=budget, setting="budget")

    def query(self, images: Tensor) -> Response:
        """Ask for a batch: uint8 (m, ch, H, W), or float in [-1, 1], which transport="uint8" rounds to pixels.

        The answer lies on the device of the images. Raises ValueError for images the teacher does not take and
        BudgetSpent where the budget does not reach, both before anything is sent; AnswerError for an answer that
        cannot be used.
        """
        check_tensor("images", images)
        if images.dim() != 4 or tuple(images.shape[1:]) != self.image:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; the teacher takes (m, {', '.join(map(str, self.image))})"
            )
        if len(images) == 0:
            raise ValueError("images holds no image; a query needs at least one")
        if images.is_floating_point() and not images.isfinite().all():
            raise ValueError("images hold NaN or infinity: the generator diverged; nothing was sent")
        if images.is_floating_point():
            sent = to_uint8(images.detach()) if self.transport == "uint8" else images.detach().float()
        elif images.dtype == torch.uint8 and self.transport == "uint8":
            sent = images
        else:
            raise TypeError(
                f"images have dtype {images.dtype}; transport {self.transport!r} takes "
                f"{'uint8 or float' if self.transport == 'uint8' else 'float'}"
            )
        answered = self.ledger.recall(sent)
        for rows in _missing(answered, len(sent)):
            answered += self._ask(sent, rows)
        self.ledger.next += len(sent)
        parts = [part for _, part in sorted(answered, key=lambda piece: piece[0])]
        return (parts[0] if len(parts) == 1 else concatenate(parts)).to(images.device)

    def _ask(self, images: Tensor, rows: slice) -> list[tuple[int, Response]]:
        """The answers to some rows of a query, paid and booked, each with its first row; here by one call."""
        part = images[rows]
        sent = self.ledger.intend(part, rows.start)
        answer = self._send(part)
        if len(answer) != len(part):
            raise AnswerError(f"the teacher answered {len(answer)} of {len(part)} images")
        self.ledger.record(sent, part, answer)
        return [(rows.start, answer)]

    def shown(self, images: Tensor) -> Tensor:
        """uint8 images as the teacher gets to see them, which a student then sees too."""
        return images

    def close(self) -> None:
        """Write the ledger out; nothing is asked afterwards."""
        self.ledger.close()

    @abstractmethod
    def _send(self, images: Tensor) -> Response:
        """The teacher's answer to images as they are transported."""


def _missing(answered: list[tuple[int, Response]], count: int) -> list[slice]:
    """The stretches of rows 0 to count that no answer covers."""
    gaps, at = [], 0
    for row, part in answered:
        if row > at:
            gaps.append(slice(at, row))
        at = row + len(part)
    return [*gaps, slice(at, count)] if at < count else gaps
