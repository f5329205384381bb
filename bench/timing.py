"""What every benchmark does alike: interleaved repeats, medians with their spread, the machine, peak memory."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], object]


def interleaved(
    works: Mapping[str, Work], repeats: int, least_s: float = 2e-3, most_s: float = 20.0
) -> dict[str, list[float]]:
    """Wall-clock seconds a call, by name: each round runs every one in turn, so that a slow minute hits all alike.

    Short calls are repeated within a round until they fill least_s; rounds end early, after five, once most_s is spent.
    """
    calls = {}
    for name, work in works.items():
        work()
        work()
        begun = time.perf_counter()
        work()
        calls[name] = max(1, min(1000, int(least_s / max(time.perf_counter() - begun, 1e-7))))
    taken: dict[str, list[float]] = {name: [] for name in works}
    started = time.perf_counter()
    for done in range(repeats):
        if done >= 5 and time.perf_counter() - started > most_s:
            break
        for name, work in works.items():
            begun = time.perf_counter()
            for _ in range(calls[name]):
                work()
            taken[name].append((time.perf_counter() - begun) / calls[name])
    return taken


def spread(taken: list[float]) -> dict[str, float]:
    """median_s, p20_s and p80_s."""
    if len(taken) < 2:
        return {"median_s": taken[0], "p20_s": taken[0], "p80_s": taken[0]}
    low, *_, high = statistics.quantiles(taken, n=5)
    return {"median_s": statistics.median(taken), "p20_s": low, "p80_s": high}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    """The processor's name as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_json(path: Path, rows: list[dict[str, Any]], more: Mapping[str, Any] | None = None) -> None:
    """The machine, more of what the figures depend on, and the rows."""
    path.write_text(json.dumps({"machine": {**machine(), **(more or {})}, "rows": rows}, indent=1) + "\n")
