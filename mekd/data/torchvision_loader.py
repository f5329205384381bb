"""Images of class folders by torchvision and a DataLoader: slower than DALI, and needs nothing but torchvision."""

import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

from mekd.data.arrays import DataError
from mekd.data.decode import decode
from mekd.data.listing import Listing, sample
from mekd.data.stream import Plan, Running, Stream, mixed


def check(listing: Listing) -> None:
    """Raises DataError where torchvision is missing, and for shards but Parquet's, which it does not read."""
    if listing.kind not in ("folder", "parquet"):
        raise DataError(
            f"{listing.root}: the torchvision loader reads no {listing.kind} shards; use --data.loader dali"
        )
    if importlib.util.find_spec("torchvision") is None:
        raise DataError("--data.loader torchvision needs torchvision: pip install 'mekd[vision]'")


def open(plan: Plan) -> Stream:
    """The batches of a plan; its threads are worker processes, or 0. Raises DataError as check does."""
    check(plan.listing)
    return Stream("torchvision", plan, _running, faults)


def faults(listing: Listing, rows: list[int]) -> dict[int, str]:
    """Which of the images Pillow cannot decode, and why not."""
    found = {}
    for row in rows:
        try:
            decode(sample(listing, row)[0])
        except DataError:
            raise
        except Exception as error:
            found[row] = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
    return found


class _Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """One image by (epoch, row), so that its augmentation is the same in whichever process it is made."""

    def __init__(self, plan: Plan) -> None:
        from torchvision.transforms import v2

        resized = [v2.Resize(plan.shorter, antialias=True), v2.CenterCrop(plan.size)]
        crop = [v2.RandomResizedCrop(plan.size, antialias=True)] if plan.crop == "random" else resized
        self._plan, self._change = plan, v2.Compose([*crop, *([v2.RandomHorizontalFlip()] if plan.flip else [])])

    def __getitem__(self, at: tuple[int, int]) -> tuple[Tensor, int]:
        from torchvision.transforms.v2.functional import pil_to_tensor

        epoch, row = at
        content, label = sample(self._plan.listing, row)
        image = decode(content)
        # torchvision draws from the global generator, which is not this module's: put back as it was.
        generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(int(mixed(self._plan.seed, epoch, torch.tensor([row]).numpy(), 1)[0, 0] >> 1))
        try:
            image = self._change(image)
        finally:
            generator.set_state(before)
        return pil_to_tensor(image), label

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
