"""python -m bench tree NAME FOLDER: a data set in memory written out as a labelled tree of JPEGs, to be read as one."""

import argparse
from pathlib import Path

import torch

from mekd import data


def main(arguments: list[str]) -> int:
    """Write the tree; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m bench tree", description=__doc__)
    parser.add_argument("name", help="digits, mnist, fashion_mnist, cifar10 or cifar100")
    parser.add_argument("folder", type=Path, help="train/CLASS and val/CLASS are made in it")
    parser.add_argument("--path", default=None, help="folder of the data set's own files")
    parser.add_argument("--size", type=int, default=64, help="side of an image in pixels")
    parser.add_argument("--train", type=int, default=8000, help="training images, chosen at random")
    parser.add_argument("--val", type=int, default=2000, help="test images, chosen at random")
    options = parser.parse_args(arguments)
    if options.folder.exists():
        raise SystemExit(f"{options.folder} is there already; name a folder that is not")
    write(data.load(options.name, options.path, options.size), options.folder, options.train, options.val)
    print(f"{options.train} + {options.val} images of {options.size} px in {options.folder}")
    return 0


def write(images: data.Dataset, folder: Path, train: int, val: int, quality: int = 95) -> None:
    """Some of the training and of the test images as folder/train/CLASS/ROW.jpg and folder/val/CLASS/ROW.jpg."""
    from PIL import Image

    parts = (
        ("train", images.train_images, images.train_labels, train),
        ("val", images.test_images, images.test_labels, val),
    )
    for split, pixels, labels, count in parts:
        for name in images.classes:
            (folder / split / name).mkdir(parents=True)
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:count]
        for row in order.tolist():
            path = folder / split / images.classes[int(labels[row])] / f"{row}.jpg"
            Image.fromarray(pixels[row].expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()).save(path, quality=quality)
