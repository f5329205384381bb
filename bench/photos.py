"""How long a folder of many photos takes to open, the first time and the second, and the memory it needs."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from bench.timing import machine, write_json

DIFFERENT, SIDES = 500, (800, 600)
OPEN = """
import json, resource, sys, time
import torch
from pathlib import Path
from mekd.config import Config, DataConfig
from mekd.data import open_source
photos, cache, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
begun = time.perf_counter()
source = open_source(Config(data=DataConfig(path=photos, size=size)), torch.device("cpu"), cache=cache)
opened = time.perf_counter()
batches = source.local(128)
for step in range(20):
    batches.take(step)
took = time.perf_counter() - opened
print(json.dumps({
    "photos": source.count("local"), "seconds": round(opened - begun, 2), "batch_ms": round(1e3 * took / 20, 2),
    "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000,
}))
"""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench photos", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    options = parser.parse_args(arguments)
    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(
        f"{options.count:,} JPEGs of {SIDES[0]} x {SIDES[1]} pixels ({DIFFERENT} different ones) to {options.size} px"
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        photos = made(Path(folder), options.count)
        for start in ("first", "second"):
            words = [sys.executable, "-c", OPEN, str(photos), str(Path(folder) / "cache"), str(options.size)]
            found = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)
            rows.append({"start": start, **found})
            print(
                f"{start} start: {found['seconds']} s for {found['photos']:,} photos, a batch of 128 in "
                f"{found['batch_ms']} ms, at most {found['peak_mb']} MB of memory, mapped pages among them"
            )
        kept = sum(path.stat().st_size for path in (Path(folder) / "cache").rglob("*") if path.is_file())
        print(f"kept: {kept / 1e6:.0f} MB")
    if options.json:
        write_json(options.json, rows)
    return 0


def made(folder: Path, count: int) -> Path:
    """A folder of count JPEGs in albums, each one of a few different files: links to them."""
    from PIL import Image

    random = np.random.default_rng(0)
    originals = [folder / "originals" / f"{i}.jpg" for i in range(min(DIFFERENT, count))]
    originals[0].parent.mkdir()
    for path in originals:
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(SIDES)
        noise = random.integers(-6, 7, (SIDES[1], SIDES[0], 3))
        Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=88)
    for i in range(count):
        album = folder / "photos" / f"album {i // 500:03}"
        album.mkdir(parents=True, exist_ok=True)
        os.link(originals[i % len(originals)], album / f"IMG_{i % 500:04}.jpg")
    return folder / "photos"
