"""What `import mekd` costs beyond `import torch`: processes in turns, medians of their time of CPU and by the clock."""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

NAMES = ("torch", "mekd")


class Times(NamedTuple):
    """Seconds of one process."""

    cpu: float
    clock: float


def took(name: str) -> Times:
    """A process that imports NAME and ends."""
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {name}"], check=True)
    clock, after = time.perf_counter() - began, os.times()
    return Times(after.children_user + after.children_system - before.children_user - before.children_system, clock)


def measure(rounds: int) -> dict[str, list[Times]]:
    """The times of every import; one of each before, which fills the caches."""
    for name in NAMES:
        took(name)
    times: dict[str, list[Times]] = {name: [] for name in NAMES}
    for _ in range(rounds):
        for name in NAMES:
            times[name].append(took(name))
    return times


def ratio(times: dict[str, list[Times]], what: str) -> float:
    """Median of mekd over median of torch, of "cpu" or "clock"."""
    torch, mekd = (statistics.median(getattr(one, what) for one in times[name]) for name in NAMES)
    return mekd / torch


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench imports", description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    times = measure(parser.parse_args(arguments).rounds)
    for what in Times._fields:
        for name in NAMES:
            seconds = sorted(getattr(one, what) for one in times[name])
            print(
                f"{what:<6} {name:<6} {statistics.median(seconds):6.2f} s  ({seconds[0]:.2f} to {seconds[-1]:.2f}, "
                f"{len(seconds)} processes)"
            )
        print(f"{what:<6} ratio  {ratio(times, what):6.2f}")
    return 0
