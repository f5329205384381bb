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


def peak_mb(work: Callable[[], object], device: torch.device | str = "cpu", again: bool = True) -> float:
    """Most memory that PyTorch's allocator held at once during a call, beyond what was there before, in MB.

    again: the call is made once before, so that what it keeps is no part of it.
    """
    if again:
        work()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    held = peak = lowest = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        lowest = min(lowest, held)  # the last call's gradient goes first
        peak = max(peak, held - lowest)
    return peak / 1e6
