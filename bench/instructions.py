"""Instructions of each op's forward and backward, counted by callgrind: what a noisy machine cannot hide.

The AVX2 build on one thread, float32, of 256 rows of 1000 classes and 8 images of 3 x 64 x 64 pixels. Python's own
instructions are among them, some ten thousands a call.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

MISSING = "valgrind is not installed: apt-get install valgrind"
KEPT = Path("bench/results/instructions.csv")
COLUMNS = ("op", "instructions", "compiler")
#: One problem of mekd.testing for each way through csrc/.
CASES = {
    "tempered_kl": "logits", "tempered_kl_probs": "probs", "tempered_kl_labels": "labels", "tempered_kl_topk": "spread",
    "dkd": "dkd", "jsd": "jsd", "jsd_skewed": "jsd-skew", "tanh_l1": "tanh", "tanh_l1_": "in-place",
    "gan_generator": "gan-logits", "gan_generator_probs": "gan-probs", "gan_discriminator": "discriminator",
}  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Print the instructions of each op, and write them with --keep; returns 0, or 1 where callgrind is missing."""
    parser = argparse.ArgumentParser(prog="python -m bench instructions", description=__doc__)
    parser.add_argument("--keep", action="store_true", help=f"write {KEPT}, which tests/test_instructions.py holds to")
    options = parser.parse_args(arguments)
    if shutil.which("valgrind") is None:
        print(MISSING)
        return 1
    found = counted()
    for op, instructions in found.items():
        print(f"{op:22s}{instructions:12,d}")
    if options.keep:
        with open(KEPT, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows((op, instructions, compiler()) for op, instructions in found.items())
    return 0


def counted() -> dict[str, int]:
    """The instructions of each op, in a process of its own under callgrind: it takes a minute to import torch there."""
    with tempfile.TemporaryDirectory() as folder:
        own = {"OMP_NUM_THREADS": "1", "MEKD_CPU": "AVX2", "PYTHONHASHSEED": "0"}
        subprocess.run(
            ["valgrind", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={folder}/out",
             sys.executable, "-c", "from bench.instructions import run; run()"],
            env=os.environ | own, check=True, capture_output=True,
        )  # fmt: skip
        # A file a dump, numbered, and one of the end of the process, which has no number.
        dumps = sorted(Path(folder).glob("out.*"), key=lambda path: int(path.suffix[1:]))
        totals = [re.search(r"^(?:totals|summary): (\d+)", path.read_text(), re.MULTILINE) for path in dumps]
    assert len(totals) == len(CASES), f"{len(totals)} dumps of {len(CASES)} ops"
    return {op: int(total[1]) for op, total in zip(CASES, totals, strict=True) if total}


def run() -> None:
    """Each op twice, the second time counted."""
    import torch

    from mekd.testing import IMAGE_KINDS, make, result

    torch.set_num_threads(1)
    for kind in CASES.values():
        problem = make(kind, (8, 3, 64, 64) if kind in IMAGE_KINDS else (256, 1000))
        reduction = "sum" if kind == "discriminator" else "batchmean"
        result(problem, "cpp", reduction)
        torch._C._valgrind_toggle()
        result(problem, "cpp", reduction)
        torch._C._valgrind_toggle_and_dump_stats()


def compiler() -> str:
    """The compiler that builds csrc/ here: another one makes other instructions."""
    words = [os.environ.get("CXX", "g++"), "--version"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[0]
