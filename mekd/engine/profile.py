"""Where the time of a stage goes: a torch profiler trace of ten of its steps, and a table."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from mekd import files

SKIPPED, WARMUP, STEPS, ROWS = 2, 3, 10, 25
#: The name of a mark in a profile of memory.
MARK = "mekd.mark"


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


def peak_mb(work: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Most memory that PyTorch's allocator held at once during a call, beyond what was there before, in MB.

    The call is made once before, so that what it keeps is no part of it.
    """
    work()
    return peaks_mb(lambda mark: work(), device)[0]


def peaks_mb(work: Callable[[Callable[[], None]], object], device: torch.device | str = "cpu") -> tuple[float, float]:
    """Most memory held during a call, the only one, and from its first mark to its last; the call is given mark().

    The second is 0 where the call marks nothing.
    """
    if torch.device(device).type == "cuda":
        return _peaks_of_card(work, device)

    def mark() -> None:
        with torch.profiler.record_function(MARK):
            pass

    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        work(mark)
    held = peak = inside = lowest = marks = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() in ("[memory]", MARK)]
    left = sum(e.name() == MARK for e in events)
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == MARK:
            marks, left = marks + 1, left - 1
        else:
            held += event.nbytes()
            lowest = min(lowest, held)  # the last call's gradient goes first
        peak = max(peak, held - lowest)
        if marks and left:
            inside = max(inside, held - lowest)
    return peak / 1e6, inside / 1e6


def _peaks_of_card(work: Callable[[Callable[[], None]], object], device: torch.device | str) -> tuple[float, float]:
    before, most = torch.cuda.memory_allocated(device), []

    def mark() -> None:
        most.append(torch.cuda.max_memory_allocated(device) - before)
        torch.cuda.reset_peak_memory_stats(device)

    torch.cuda.reset_peak_memory_stats(device)
    work(mark)
    mark()
    return max(most) / 1e6, max(most[1:-1], default=0) / 1e6
