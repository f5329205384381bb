"""Images of class folders by torchvision and a DataLoader: slower than DALI, and needs nothing but torchvision."""

import io
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mekd.data.arrays import DataError
from mekd.data.listing import Listing, sample
from mekd.data.stream import Plan, Running, Stream, mixed, planned


def training(
    listing: Listing,
    batch: int,
    size: int,
    *,
    crop: str = "random",
    flip: bool = False,
    resize: int | None = None,
    seed: int = 0,
    dtype: str = "uint8",
    channels_last: bool = False,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
    threads: int = 2,
    on_error: str = "raise",
) -> Stream:
    """An endless stream of shuffled batches, the tail of each epoch dropped; threads are worker processes, or 0.

    crop "random": a share of 0.08 to 1 of the image at a ratio of 3/4 to 4/3; "centre": as evaluation.
    """
    return _stream(
        listing, batch, size, crop, flip, resize, seed, dtype, channels_last, device, rank, world, threads, on_error
    )


def evaluation(
    listing: Listing,
    batch: int,
    size: int,
    *,
    resize: int | None = None,
    dtype: str = "uint8",
    channels_last: bool = False,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
    threads: int = 2,
    on_error: str = "raise",
) -> Stream:
    """Each image once over all processes, in order: its shorter side resized to resize pixels, the centre cropped."""
    return _stream(
        listing, batch, size, "once", False, resize, 0, dtype, channels_last, device, rank, world, threads, on_error
    )


def _stream(listing: Listing, *arguments: Any) -> Stream:
    if listing.kind != "folder":
        raise DataError(
            f"{listing.root}: the torchvision loader reads no {listing.kind} shards; use --data.loader dali"
        )
    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        raise ImportError("--data.loader torchvision needs torchvision: pip install 'mekd[vision]'") from error
    return Stream(planned("torchvision", listing, *arguments), _running, faults)


def faults(listing: Listing, rows: list[int]) -> dict[int, str]:
    """Which of the images PIL cannot decode, and why not."""
    found = {}
    for row in rows:
        try:
            _decoded(listing, row)
        except Exception as error:
            found[row] = " ".join(str(error).split())
    return found


def _decoded(listing: Listing, row: int) -> Any:
    from PIL import Image

    content, _ = sample(listing, row)
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")  # three channels; EXIF's rotation stays unheeded
    except Image.UnidentifiedImageError as error:
        raise OSError("no image that PIL knows") from error


class _Images(torch.utils.data.Dataset):
    """One image by (epoch, row), so that its augmentation is the same in whichever process it is made."""

    def __init__(self, plan: Plan) -> None:
        from torchvision.transforms import v2

        resized = [v2.Resize(plan.resize, antialias=True), v2.CenterCrop(plan.size)]
        crop = [v2.RandomResizedCrop(plan.size, antialias=True)] if plan.crop == "random" else resized
        self._plan, self._change = plan, v2.Compose([*crop, *([v2.RandomHorizontalFlip()] if plan.flip else [])])

    def __getitem__(self, at: tuple[int, int]) -> tuple[Tensor, int]:
        from torchvision.transforms.v2.functional import pil_to_tensor

        epoch, row = at
        image = _decoded(self._plan.listing, row)
        # torchvision draws from the global generator, which is not this module's: put back as it was.
        generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(int(mixed(self._plan.seed, epoch, torch.tensor([row]).numpy(), 1)[0, 0] >> 1))
        try:
            image = self._change(image)
        finally:
            generator.set_state(before)
        assert self._plan.listing.labels is not None
        return pil_to_tensor(image), int(self._plan.listing.labels[row])

    def together(self, samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """A batch, in the plan's dtype and layout."""
        images = torch.stack([image for image, _ in samples])
        if self._plan.dtype == "float32":
            images = images.float().div_(127.5).sub_(1)
        if self._plan.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, torch.tensor([label for _, label in samples], dtype=torch.int64)


class _Steps:
    """The rows of each step, as a DataLoader asks for them."""

    def __init__(self, plan: Plan, step: int, left_out: frozenset[int]) -> None:
        self._arguments = plan, step, left_out

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        plan, step, left_out = self._arguments
        for _, epoch, rows in plan.steps(step, left_out):
            yield [(epoch, row) for row in rows.tolist()]


def _running(plan: Plan, step: int, left_out: frozenset[int]) -> Running:
    data = _Images(plan)
    batches = torch.utils.data.DataLoader(
        data,
        batch_sampler=_Steps(plan, step, left_out),
        num_workers=plan.threads,
        collate_fn=data.together,
        pin_memory=plan.device.type == "cuda",
        generator=torch.Generator(),  # its base seed is drawn from here and not from the global generator
    )
    numbers = (at for at, _, _ in plan.steps(step, left_out))
    for at, (images, labels) in zip(numbers, batches, strict=False):
        yield at, images.to(plan.device, non_blocking=True), labels.to(plan.device, non_blocking=True)
