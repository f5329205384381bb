"""What this machine can do at most: bytes, exponentials and multiplications a second, on all threads."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def seconds(work: Callable[[], object], repeats: int) -> list[float]:
    """Wall-clock seconds of each repeat, after one that is not counted."""
    work()
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return taken


def measure(repeats: int) -> list[dict[str, object]]:
    """One row per limit: the amount of work, the median time with its 20th and 80th percentile, the rate."""
    big = torch.rand(1 << 25)  # 128 MB: beyond every cache
    other = torch.rand(1 << 25)
    small = torch.rand(1 << 14) - 0.5  # 64 KB: in cache
    out = torch.empty_like(small)
    a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
    cases: list[tuple[str, Callable[[], object], float, str]] = [
        ("copy, in memory that is there", lambda: other.copy_(big), 2 * big.nbytes / 1e9, "GB/s"),
        ("copy, into fresh memory", lambda: big.clone(), 2 * big.nbytes / 1e9, "GB/s"),
        ("exponential, in cache", lambda: [torch.exp(small, out=out) for _ in range(256)], 256 * 2**14 / 1e9, "G/s"),
        ("matrix product 1024", lambda: a @ b, 2 * 1024**3 / 1e9, "GFLOP/s"),
    ]  # fmt: skip
    rows: list[dict[str, object]] = []
    for name, work, amount, unit in cases:
        taken = seconds(work, repeats)
        low, *_, high = statistics.quantiles(taken, n=5)
        median = statistics.median(taken)
        rows.append(
            {
                "limit": name,
                "median_s": median,
                "p20_s": low,
                "p80_s": high,
                "rate": amount / median,
                "unit": unit,
            }
        )
    return rows


def main(arguments: Sequence[str]) -> int:
    """Print the table; --json FILE also writes it."""
    parser = argparse.ArgumentParser(prog="python -m bench limits", description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    rows = measure(options.repeats)
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(
        f"{machine['threads']} threads, float32, torch {machine['torch']}, "
        f"medians of {options.repeats} (20th to 80th percentile)"
    )
    for row in rows:
        spread = f"{1e3 * row['p20_s']:.2f} to {1e3 * row['p80_s']:.2f}"  # type: ignore[operator]
        print(f"{row['limit']:<32} {1e3 * row['median_s']:8.2f} ms ({spread})   {row['rate']:8.1f} {row['unit']}")  # type: ignore[operator]
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0
