"""What the generator of finished runs does with its two inputs: how much of a picture is the code's, how much n's.

The teacher is asked here, outside the runs and their budgets: for experiments, with a teacher that is a file.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.runs import reopened
from mekd.metrics import explained_by_rows, same_class
from mekd.nets.frozen import freeze
from mekd.oracle.ledger import Ledger
from mekd.pixels import to_uint8


def main(arguments: Sequence[str]) -> int:
    """Print a Markdown table, a row per run; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m bench breadth", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs whose step 1 is finished")
    parser.add_argument("--codes", type=int, default=128)
    parser.add_argument("--each", type=int, default=16, help="images of a code, and codes of a nuisance")
    options = parser.parse_args(arguments)
    print(
        "| run | C + n | variance by the code, % | by n, % | T names one class for one code, % | for one n, % | for "
        "neither, % | classes drawn, least and most, % |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for folder in options.runs:
        run = reopened(folder)
        draw, oracle = freeze(run.load_generator()), run.open_oracle(Ledger("breadth"))
        torch.manual_seed(0)
        k, m = options.codes, options.each
        cells, shares = [], []
        for fixed in ("code", "n"):
            inputs = {}
            for name, size in (("code", draw.num_classes), ("n", draw.nuisance)):
                one = torch.randn(k, 1, size).expand(k, m, size) if name == fixed else torch.randn(k, m, size)
                inputs[name] = one.reshape(k * m, size)
            with torch.no_grad():
                images = draw(**inputs)
            classes = oracle.query(to_uint8(images.clone())).labels.view(k, m)
            alike, apart = same_class(classes)
            shares.append(explained_by_rows(images.view(k, m, -1)))
            cells.append(alike)
        drawn = classes.flatten().bincount(minlength=draw.num_classes) / (k * m)
        print(
            f"| {folder.name} | {draw.num_classes} + {draw.nuisance} | {100 * shares[0]:.1f} | {100 * shares[1]:.1f} | "
            f"{100 * cells[0]:.1f} | {100 * cells[1]:.1f} | {100 * apart:.1f} | "
            f"{100 * drawn.min():.1f} to {100 * drawn.max():.1f} |"
        )
    return 0
