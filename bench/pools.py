"""Images of another data set that are sent to a teacher: what model extraction does without a generator."""

from pathlib import Path

import torch
from torch import Tensor, nn

from mekd import data
from mekd.engine.evaluate import BATCH, train_plain
from mekd.engine.run import Run
from mekd.oracle.ledger import Ledger
from mekd.oracle.replay import Replay
from mekd.pixels import as_float
from mekd.seeds import generator_at

#: Crops of photos, and the share of a photo's area that one shows.
CROPS, SHOWN = 50_000, (0.01, 0.3)


def load(pool: str | None, size: int, channels: int, seed: int) -> Tensor:
    """The pool (n, channels, size, size), uint8, in an order of the seed: NAME=FOLDER, a data set or photos."""
    if pool is None:
        raise SystemExit("the rows pool need images to send: --pool mnist=FOLDER, or --pool photos=FOLDER")
    name, _, folder = pool.partition("=")
    images = crops(Path(folder), size, seed) if name == "photos" else data.load(name, folder, size).train_images
    if images.shape[1] != channels:
        images = images.expand(-1, 3, -1, -1) if channels == 3 else images.float().mean(1, keepdim=True).byte()
    return images[torch.randperm(len(images), generator=generator_at(seed, "pool"))]


def crops(folder: Path, size: int, seed: int) -> Tensor:
    """Random crops (n, 3, size, size), uint8, of the photos in a folder."""
    from PIL import Image
    from torchvision.transforms import v2

    photos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not photos:
        raise SystemExit(f"--pool photos={folder}: no photos there, .jpg or .png")
    crop = v2.Compose([v2.RandomResizedCrop(size, SHOWN, antialias=True), v2.RandomHorizontalFlip()])
    parts = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for number, path in enumerate(photos):
            photo = v2.functional.pil_to_tensor(Image.open(path).convert("RGB"))
            parts += [crop(photo) for _ in range(CROPS * number // len(photos), CROPS * (number + 1) // len(photos))]
    return torch.stack(parts)


def train(run: Run, images: Tensor, queries: int, uncertain: bool) -> nn.Module:
    """The student of the answers to so many images of the pool: the first ones, or half of them and then the others.

    uncertain: those of the rest come next of which a student of the first half has the smallest margin, the difference
    of its two largest probabilities.
    """
    if queries > len(images):
        raise SystemExit(f"--queries {queries}, and the pool holds {len(images)} images: ask for fewer")
    if uncertain:
        first = train(Run(run.config, run.out / "first"), images, queries // 2, False)
        rest = torch.arange(queries // 2, len(images))
        order = margins(first, images[rest]).argsort()[: queries - queries // 2]
        images = images[torch.cat([torch.arange(queries // 2), rest[order]])]
    store, oracle = Replay(run.out / "pool", queries), run.open_oracle(Ledger("pool"))
    for start in range(0, queries, BATCH):
        part = images[start : min(start + BATCH, queries)]
        store.write(start, part, oracle.query(part))
    oracle.close()
    return train_plain(run, store, queries)


@torch.inference_mode()
def margins(student: nn.Module, images: Tensor) -> Tensor:
    """The difference (n,) of a student's two largest probabilities for images (n, ch, S, S), uint8 or float."""
    student.eval()
    best = torch.cat([student(as_float(part)).softmax(1).topk(2).values for part in images.split(512)])
    return best[:, 0] - best[:, 1]
