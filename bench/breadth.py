"""What the generator of finished runs does with its two inputs: how much of a picture is the code's, how much n's.

And how sure the teacher is of its images, beside the private ones. The teacher is asked here, outside the runs and
their budgets, private images too: for experiments, with a teacher that is a file.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mekd.cli import parse
from mekd.engine.pictures import families
from mekd.engine.private import private_images
from mekd.engine.run import Run
from mekd.metrics import explained_by_rows, same_class
from mekd.oracle.ledger import Ledger
from mekd.oracle.response import Response
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
        "neither, % | classes drawn, least and most, % | T is sure, % | classes apart | private ones: sure, % | apart |"
    )
    print("|---" * 12 + "|")
    for folder in options.runs:
        parsed = parse(["--config", str(folder / "config.yaml"), "--out", str(folder)])
        assert parsed is not None  # it printed nothing instead
        run = Run(*parsed)
        generator, oracle = run.load_generator(), run.open_oracle(Ledger("breadth"))
        k, m = options.codes, options.each
        named, shares = [], []
        for images in families(generator, k, m, run.device):
            shares.append(explained_by_rows(images))
            answer = oracle.query(to_uint8(images.flatten(0, 1)))
            named.append(answer.labels.view(k, m))
        private = oracle.query(private_images(run, most=k * m))
        (by_code, apart), (by_n, _) = map(same_class, named)
        drawn = named[0].flatten().bincount(minlength=generator.num_classes) / (k * m)
        print(
            f"| {folder.name} | {generator.num_classes} + {generator.nuisance} | "
            f"{100 * shares[0]:.1f} | {100 * shares[1]:.1f} | {100 * by_code:.1f} | {100 * by_n:.1f} | "
            f"{100 * apart:.1f} | {100 * drawn.min():.1f} to {100 * drawn.max():.1f} | "
            f"{sure(answer)} | {sure(private)} |"
        )
    return 0


def sure(answer: Response) -> str:
    """The mean of the largest probability, and classes_apart; empty where the teacher shows neither."""
    probs = answer.target.get("probs")
    if probs is None:
        return " | "
    return f"{100 * probs.amax(1).mean():.1f} | {classes_apart(probs):.1f}"


def classes_apart(probs: Tensor) -> float:
    """How many classes answers (m, C) tell apart: e to their mutual information with the image, from 1 to C.

    The inception score (Salimans et al., 2016) with the teacher in the place of the inception network.
    """
    p = probs.double()
    return float(torch.exp(torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(1).mean()))
