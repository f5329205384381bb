"""Small trees of images, as folders of JPEGs and as shards with the same content."""

import io
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mekd.data.listing import Listing
from mekd.data.stream import Plan, Stream

STEP = 6  # between the grey levels of two images


def opened(loader: Any, listed: Listing, batch: int, size: int, **how: Any) -> Stream:
    """A loader's stream of a plan, with the fewest threads: worker processes are slow to start."""
    least = 1 if loader.__name__.endswith("dali_loader") else 0
    return loader.open(Plan(listed, batch, size, **{"threads": least, **how}))


def grey_tree(root: Path, counts: dict[str, dict[str, int]], side: int = 24) -> Path:
    """root/split/class/NN.jpg, each of one grey level that tells its number in the split: level = STEP * number."""
    for split, classes in counts.items():
        number = 0
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for _ in range(count):
                level = np.full((side, side + 8, 3), STEP * number, np.uint8)
                Image.fromarray(level).save(root / split / name / f"{number:02}.jpg", quality=95)
                number += 1
    return root


def photographs() -> list[Image.Image]:
    """Two photographs of 640 x 427."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(array) for array in load_sample_images().images]


def numbers(images: "np.ndarray") -> list[int]:
    """The numbers of grey images (m, 3, s, s)."""
    return [round(float(level) / STEP) for level in np.asarray(images, np.float64).mean((1, 2, 3))]


def write_tars(listed: Listing, folder: Path, each: int) -> list[Path]:
    """The images of a folder as WebDataset shards of so many samples, with classes.txt."""
    shards = []
    for number, rows in enumerate(_split(listed, folder, each)):
        shards.append(folder / f"shard-{number:03}.tar")
        with tarfile.open(shards[-1], "w") as tar:
            for row in rows:
                for suffix, content in (
                    ("jpg", Path(listed.files[row]).read_bytes()),
                    ("cls", b"%d" % _label(listed, row)),
                ):
                    info = tarfile.TarInfo(f"{row:05}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return shards


def write_records(listed: Listing, folder: Path, each: int) -> list[Path]:
    """The images of a folder as TFRecords of so many samples, with classes.txt; checksums are left at 0."""
    shards = []
    for number, rows in enumerate(_split(listed, folder, each)):
        shards.append(folder / f"train-{number:05}-of-00009.tfrecord")
        records = [_example(Path(listed.files[row]).read_bytes(), _label(listed, row) + 1) for row in rows]
        shards[-1].write_bytes(b"".join(struct.pack("<QI", len(r), 0) + r + bytes(4) for r in records))
    return shards


def _label(listed: Listing, row: int) -> int:
    assert listed.labels is not None
    return int(listed.labels[row])


def _split(listed: Listing, folder: Path, each: int) -> list[range]:
    folder.mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(listed.classes) + "\n")
    return [range(i, min(i + each, len(listed))) for i in range(0, len(listed), each)]


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def _example(image: bytes, label: int) -> bytes:
    features = {
        "image/class/label": field(3, field(1, varint(label))),
        "image/class/text": field(1, field(1, b"a name")),
        "image/encoded": field(1, field(1, image)),
        "score": field(2, field(1, struct.pack("<f", 0.5))),
    }
    entries = [field(1, field(1, key.encode()) + field(2, value)) for key, value in features.items()]
    return field(1, b"".join(entries))
