"""Two tables of the same bench: what got slower, and what got faster, by more than both spreads."""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

TIMES = ("median_s", "p20_s", "p80_s")
#: Columns that say what was measured, in whichever of them a table has.
NAMES = ("op", "case", "dtype", "direction", "target", "impl", "row", "name")


def main(arguments: Sequence[str]) -> int:
    """Print what differs; returns 1 where something got slower."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.add_argument("before", type=Path, help="a CSV file with the columns median_s, p20_s and p80_s")
    parser.add_argument("after", type=Path)
    parser.add_argument("--least", type=float, default=1.05, help="ratios of medians below this are not told")
    options = parser.parse_args(arguments)
    before, after = (read(path, parser) for path in (options.before, options.after))
    both = [key for key in before if key in after]
    for what, alone in (
        ("only in the first", set(before) - set(after)),
        ("only in the second", set(after) - set(before)),
    ):
        if alone:
            print(f"{len(alone)} rows {what}")
    if not both:
        parser.error("the two tables have no row in common")
    found = sorted(((ratio(before[key], after[key]), key) for key in both), reverse=True)
    slower = [(by, key) for by, key in found if by >= options.least and apart(before[key], after[key])]
    faster = [(by, key) for by, key in found if by <= 1 / options.least and apart(after[key], before[key])]
    for name, some in (("slower", slower), ("faster", list(reversed(faster)))):
        for by, key in some:
            times = " -> ".join(words(rows[key]) for rows in (before, after))
            print(f"{name} {by if name == 'slower' else 1 / by:5.2f}x  {' '.join(key)}  {times}")
    print(f"{len(both)} rows in both: {len(slower)} slower, {len(faster)} faster, the others within their spread")
    return 1 if slower else 0


def read(path: Path, parser: argparse.ArgumentParser) -> dict[tuple[str, ...], tuple[float, ...]]:
    """Median, 20th and 80th percentile in seconds of each row, by what was measured."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        parser.error(f"{path}: {error.strerror}")
    missing = [name for name in TIMES if not rows or name not in rows[0]]
    if missing:
        parser.error(f"{path} has no column {', '.join(missing)}: a table of `python -m bench losses` or linear has")
    return {
        tuple(row[name] for name in NAMES if row.get(name)): tuple(float(row[name]) for name in TIMES) for row in rows
    }


def ratio(before: tuple[float, ...], after: tuple[float, ...]) -> float:
    """How many times longer it takes."""
    return after[0] / before[0]


def apart(low: tuple[float, ...], high: tuple[float, ...]) -> bool:
    """Whether even the quick fifth of the second takes longer than the slow fifth of the first."""
    return high[1] > low[2]


def words(times: tuple[float, ...]) -> str:
    """Milliseconds, with the spread."""
    median, low, high = (1e3 * x for x in times)
    return f"{median:.3g} ms ({low:.3g}-{high:.3g})"
