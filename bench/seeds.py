"""Several finished runs side by side, and their means: what a result over seeds is quoted from."""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

ACCURACIES = ("teacher_accuracy", "baseline_accuracy", "student_accuracy", "agreement")


def main(arguments: Sequence[str]) -> int:
    """Print a Markdown table of the runs' summary.json, a row per run, and a row of means."""
    parser = argparse.ArgumentParser(prog="python -m bench seeds", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    runs = parser.parse_args(arguments).runs
    if unfinished := [str(run) for run in runs if not (run / "summary.json").exists()]:
        parser.error(f"no summary.json in {', '.join(unfinished)}: name folders of finished runs")
    rows = [(run, json.loads((run / "summary.json").read_text("utf-8"))) for run in runs]
    print("| run | seed | response | teacher | baseline | student | agreement | queries | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for run, summary in rows:
        cells = [run.name, summary["seed"], summary["response"], *(f"{100 * summary[a]:.2f}" for a in ACCURACIES)]
        print(f"| {' | '.join(map(str, cells))} | {summary['queries']:,} | {sum(summary['seconds'].values()):.0f} |")
    for response in sorted({summary["response"] for _, summary in rows}):
        chosen = [summary for _, summary in rows if summary["response"] == response]
        means = (f"{100 * statistics.mean(s[a] for s in chosen):.2f}" for a in ACCURACIES)
        print(f"| mean of {len(chosen)} | | {response} | {' | '.join(means)} | | |")
    return 0
