"""Where the time of a stage goes: a torch profiler trace of ten of its steps, and a table."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from mekd import files

SKIPPED, WARMUP, STEPS, ROWS = 2, 3, 10, 25


@contextlib.contextmanager
def profiled(name: str, folder: Path, log: Callable[[str], None]) -> Iterator[Callable[[], object]]:
    """Yields what is to be called after each step; after fifteen, NAME.json (a Chrome trace) and NAME.txt are there."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"

    def ready(profile: torch.profiler.profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(folder / f"{name}.json"))
        files.write_text(folder / f"{name}.txt", profile.key_averages().table(sort_by=by, row_limit=ROWS))
        log(f"{name}: {STEPS} steps profiled, {folder / name}.txt and {folder / name}.json")

    schedule = torch.profiler.schedule(wait=SKIPPED, warmup=WARMUP, active=STEPS, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=ready) as profile:
        yield profile.step
