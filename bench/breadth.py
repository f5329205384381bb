"""What the generator of finished runs does with its two inputs: how much of a picture is the code's, how much n's.

The teacher is asked here, outside the runs and their budgets: for experiments, with a teacher that is a file.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mekd.cli import parse
from mekd.engine.pictures import families
from mekd.engine.run import Run
from mekd.metrics import explained_by_rows, same_class
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
        parsed = parse(["--config", str(folder / "config.yaml"), "--out", str(folder)])
        assert parsed is not None  # it printed nothing instead
        run = Run(*parsed)
        generator, oracle = run.load_generator(), run.open_oracle(Ledger("breadth"))
        k, m = options.codes, options.each
        named, shares = [], []
        for images in families(generator, k, m, run.device):
            shares.append(explained_by_rows(images))
            named.append(oracle.query(to_uint8(images.flatten(0, 1))).labels.view(k, m))
        (by_code, apart), (by_n, _) = map(same_class, named)
        drawn = named[0].flatten().bincount(minlength=generator.num_classes) / (k * m)
        print(
            f"| {folder.name} | {generator.num_classes} + {generator.nuisance} | "
            f"{100 * shares[0]:.1f} | {100 * shares[1]:.1f} | {100 * by_code:.1f} | {100 * by_n:.1f} | "
            f"{100 * apart:.1f} | {100 * drawn.min():.1f} to {100 * drawn.max():.1f} |"
        )
    return 0
