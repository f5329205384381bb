"""Faults at random moments: each run is disturbed, goes on by the same command, and is held against an undisturbed one.

A run learns from a teacher behind an address that books every image it computes. A row says of how many
runs of a fault the student, the paid answers and the counts came out the same, to the bit (same); of how many not
(lost); how many queries were in flight when it happened, so that their answer was lost (in_flight); and how many more
the teacher was asked twice for (paid_twice). Damaged files may be refused: then the copy that the message asks for is
put back (refused). Every run that is done stands in --out, and the same command goes on behind it.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mekd import cli, files
from mekd.engine.run import ACCOUNTS
from mekd.nets import build
from mekd.oracle.export import Classifier, export
from mekd.oracle.ledger import totals

#: 360 queries, 40 of them held out and 320 to learn from, in calls of 8, of which four are in flight.
SETTINGS = {
    "data.name": "digits", "data.size": 16, "teacher.name": "counted", "oracle.batch": 8, "oracle.concurrency": 4,
    "oracle.budget": 540, "oracle.reserve": 1 / 3, "oracle.rate": 200, "oracle.patience": 60,
    "deprivatize.steps": 6, "deprivatize.batch": 8, "deprivatize.width": 0.1, "deprivatize.precision": "float32",
    "distill.student": "resnet8", "distill.steps": 12, "distill.batch": 8, "distill.holdout": 40,
    "distill.coverage": 0, "distill.eval_every": 4, "distill.precision": "float32", "audit.enabled": "false",
    "engine.checkpoint_every": 2, "engine.log_every": 2, "engine.device": "cpu", "engine.progress": "false",
}  # fmt: skip
QUERIES, LATENCY_MS = 360, 100
#: Seconds after which a process hangs, and how often the same command is given at most.
HANGS, TRIES = 120, 8
COLUMNS = ("case", "runs", "same", "lost", "paid_twice", "refused", "in_flight")
FORK = multiprocessing.get_context("forkserver")
#: What a run imports late takes longer than all that it does.
FORK.set_forkserver_preload([
    "bench.faults", "matplotlib.pyplot", "mekd.engine.preflight", "mekd.engine.stages", "mekd.serve.app",
    "onnxruntime", "onnxscript", "sklearn.datasets", "torch._dynamo", "torch._inductor.cudagraph_trees",
    "torch.onnx._internal.exporter._core",
])  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Disturb what has not been disturbed yet, print the table; returns 1 where one was lost or a query paid twice."""
    parser = argparse.ArgumentParser(prog="python -m bench faults", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 runs instead of 200")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    parser.add_argument("--only", nargs="+", choices=CASES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/faults"), help="what is done already stands there")
    options = parser.parse_args(arguments)
    cases = options.only or list(CASES)
    options.out.mkdir(parents=True, exist_ok=True)
    done = options.out / f"seed{options.seed}.jsonl"
    kept = [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []
    begun = time.monotonic()
    for case in cases:
        disturb, processes, runs = CASES[case]
        for number in range(runs // 10 if options.quick else runs):
            if any((row["case"], row["number"]) == (case, number) for row in kept):
                continue
            row = {
                "case": case,
                "number": number,
                **disturbed(disturb, processes, options, f"{options.seed} {case} {number}"),
            }
            kept.append(row)
            with open(done, "a") as file:
                file.write(json.dumps(row) + "\n")
            if not row["same"] or row["paid_twice"]:
                print(f"{row}", flush=True)
    rows = [summed(case, [row for row in kept if row["case"] == case]) for case in cases]
    print("\n".join(f"| {' | '.join(map(str, row))} |" for row in (COLUMNS, ["---"] * len(COLUMNS))))
    print("\n".join(f"| {' | '.join(str(row[name]) for name in COLUMNS)} |" for row in rows))
    print(f"{sum(row['runs'] for row in rows)} runs, {time.monotonic() - begun:.0f} s of this command")
    if options.json:
        files.write_text(options.json, json.dumps(rows, indent=1) + "\n")
    return int(any(row["lost"] or row["paid_twice"] for row in rows))


def summed(case: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of a case."""
    same = sum(row["same"] for row in rows)
    counts = {name: sum(row[name] for row in rows) for name in ("paid_twice", "refused", "in_flight")}
    return {"case": case, "runs": len(rows), "same": same, "lost": len(rows) - same, **counts}


class Teacher:
    """The served teacher: a process that may be killed and begun again under its address."""

    def __init__(self, place: Path) -> None:
        self.file, self.seen = place / "teacher.onnx", place / "seen"
        self.seen.touch()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v2/models/teacher"
        self.begin()

    def begin(self) -> None:
        self.process = start(_serve, self.file, self.port, self.seen, log=self.seen.with_name("server.txt"))
        until = time.monotonic() + HANGS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if time.monotonic() > until or not self.process.is_alive():
                raise SystemExit(f"the teacher does not serve: {self.seen.with_name('server.txt').read_text()}")
            time.sleep(0.02)

    def end(self) -> None:
        self.process.kill()
        self.process.join()

    def computed(self) -> int:
        """Images that it computed, over all its lives."""
        return self.seen.stat().st_size


def _serve(file: Path, port: int, seen: Path) -> None:
    from mekd.serve import main as serve
    from mekd.serve.model import Model

    run = Model.run

    def counted(self: Model, images: np.ndarray) -> np.ndarray:
        with open(seen, "ab", buffering=0) as book:
            book.write(bytes(len(images)))
        return run(self, images)

    Model.run = counted  # type: ignore[method-assign]
    serve([str(file), "--port", str(port), "--latency_ms", str(LATENCY_MS)])


def start(target: Callable[..., None], *arguments: Any, log: Path) -> BaseProcess:
    """A process that does target(*arguments), what it says in a file."""
    process = FORK.Process(target=_work, args=(target, arguments, log))
    process.start()
    return process


def _work(target: Callable[..., None], arguments: tuple[Any, ...], log: Path) -> None:
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(descriptor, number)
    target(*arguments)


def _ask(words: list[str], environment: dict[str, str], limits: dict[int, int], clock: str | None) -> None:
    os.environ |= environment
    for kind, limit in limits.items():
        used = 0
        if kind == resource.RLIMIT_AS:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(kind, (used + limit, used + limit))
    if clock is not None:
        _let_it_step(random.Random(clock))
    sys.exit(cli.main(words))


def _let_it_step(chance: random.Random) -> None:
    """Let the time of day jump now and then, by up to a day, back or forth."""
    real, offset = time.time, 0.0

    def now() -> float:
        nonlocal offset
        if chance.random() < 0.02:
            offset = chance.choice((1, 60, 3600, 86400)) * chance.uniform(-1, 1)
        return real() + offset

    time.time, time.time_ns = now, lambda: int(now() * 1e9)


class Run:
    """A run in a folder, of one process or of two, that is begun again and again."""

    def __init__(self, place: Path, out: Path, teacher: Teacher, chance: random.Random, processes: int = 1) -> None:
        self.place, self.out, self.teacher, self.chance, self.processes = place, out, teacher, chance, processes
        settings = SETTINGS | {"teacher.url": teacher.url}
        self.words = ["run", *(str(word) for key, value in settings.items() for word in (f"--{key}", value))]
        self.words += ["--out", str(out), "--yes"]
        self.log = place / "run.txt"

    def begin(self, limits: dict[int, int] | None = None, clock: str | None = None) -> list[BaseProcess]:
        environments: list[dict[str, str]] = [{}]
        if self.processes > 1:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = str(free.getsockname()[1])
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_WORLD_SIZE": "1"}
            shared |= {"WORLD_SIZE": str(self.processes)}
            environments = [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(self.processes)]
        return [start(_ask, self.words, each, limits or {}, clock, log=self.log) for each in environments]

    def end(self, processes: list[BaseProcess]) -> list[int]:
        """Wait until all have ended; where one ended badly the others are ended, as torchrun does. Their statuses."""
        until = time.monotonic() + HANGS
        while any(process.is_alive() for process in processes) and time.monotonic() < until:
            if any(process.exitcode for process in processes):
                until = min(until, time.monotonic() + 5)
                for process in processes:
                    process.terminate()
            time.sleep(0.02)
        for process in processes:
            process.kill()
            process.join()
        return [process.exitcode or 0 for process in processes]

    def reached(self, process: BaseProcess, seconds: float) -> None:
        """Wait for a random moment of the run, if it lasts so long: of its time, or twice as often of what it pays."""
        if self.chance.random() < 1 / 3:
            process.join(self.chance.uniform(0, seconds))
            return
        computed = self.teacher.computed() + self.chance.randrange(QUERIES // 2)
        while process.is_alive() and self.teacher.computed() < computed:
            time.sleep(0.01)
        time.sleep(self.chance.uniform(0, 2 * LATENCY_MS / 1000))

    def killed(self, processes: list[BaseProcess], seconds: float) -> None:
        """Kill one of them at a random moment, if it is still there."""
        chosen = self.chance.choice(processes)
        self.reached(chosen, seconds)
        chosen.kill()
        self.end(processes)

    def finished(self) -> bool:
        """Go on by the same command until it ends well."""
        return any(not any(self.end(self.begin())) for _ in range(TRIES))


def undisturbed(options: argparse.Namespace, processes: int) -> tuple[Path, float]:
    """The folder of a run that nothing happens to, and the seconds it took."""
    place = options.out / f"undisturbed-{processes}"
    if not (place / "seconds").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        torch.manual_seed(0)
        export(Classifier(build("resnet8", 10, 1)), place / "teacher.onnx", (1, 16, 16))
        teacher = Teacher(place)
        try:
            run = Run(place, place / "out", teacher, random.Random(0), processes)
            run.end(run.begin())  # imports and caches
            shutil.rmtree(run.out)
            begun = time.monotonic()
            statuses = run.end(run.begin())
            took = time.monotonic() - begun
        finally:
            teacher.end()
        if any(statuses) or counts(run.out) != {"queries": QUERIES, "uncertain": 0}:
            raise SystemExit(f"the undisturbed run ended with {statuses}: {run.log.read_text()}")
        (place / "seconds").write_text(str(took))
    return place, float((place / "seconds").read_text())


def counts(out: Path) -> dict[str, int]:
    """Queries with an answer, and those whose answer was lost, of all accounts of a run."""
    found = totals(out / "ledger", *(name for stage in ACCOUNTS.values() for name in stage))
    return {name: found[name] for name in ("queries", "uncertain")}


def disturbed(disturb: "Disturb", processes: int, options: argparse.Namespace, seed: str) -> dict[str, Any]:
    """One run that something happens to, and what became of it."""
    chance = random.Random(seed)
    expected, seconds = undisturbed(options, processes)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        place = Path(folder)
        shutil.copy(expected / "teacher.onnx", place)
        out = place / "out"
        if disturb is _fill_disk:
            stack.enter_context(_small_disk(out))
        teacher = Teacher(place)
        try:
            run = Run(place, out, teacher, chance, processes)
            refused = disturb(run, seconds)
            same = run.finished() and is_same(out, expected / "out")
            found = counts(out) if same else {"queries": QUERIES, "uncertain": 0}
            twice = max(0, teacher.computed() - found["queries"] - found["uncertain"])
        finally:
            teacher.end()
        if not same:
            shutil.copytree(place, options.out / f"lost {seed}", dirs_exist_ok=True)
    return {"same": same, "refused": refused, "in_flight": found["uncertain"], "paid_twice": twice}


def is_same(out: Path, expected: Path) -> bool:
    """Whether weights, paid answers and their number are those of the run that nothing happened to."""
    found, wanted = (files.load(folder / "student.pt") for folder in (out, expected))
    arrays = [path.relative_to(expected) for name in ("holdout", "replay") for path in (expected / name).glob("*.npy")]
    return (
        all(torch.equal(found[name], wanted[name]) for name in wanted)
        and all(np.array_equal(np.load(out / path), np.load(expected / path)) for path in arrays)
        and counts(out)["queries"] == QUERIES
    )


# -- what happens: each leaves the run to be finished by the same command, and says whether it was refused -----------

Disturb = Callable[[Run, float], bool]


def _kill(run: Run, seconds: float) -> bool:
    for _ in range(run.chance.choice((1, 1, 2, 3))):
        run.killed(run.begin(), seconds)
    return False


def _kill_server(run: Run, seconds: float) -> bool:
    processes = run.begin()
    for _ in range(run.chance.choice((1, 1, 2, 3))):
        run.reached(processes[0], seconds)
        run.teacher.end()
        time.sleep(run.chance.uniform(0, 0.5))
        run.teacher.begin()
    run.end(processes)
    return False


@contextlib.contextmanager
def _small_disk(out: Path) -> Iterator[None]:
    """A file system of its own for the run, where this process may mount one."""
    out.mkdir()
    mounted = not subprocess.run(["mount", "-t", "tmpfs", "none", str(out)], capture_output=True).returncode
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(out)], check=True)


def _fill_disk(run: Run, seconds: float) -> bool:
    """A file system of a random size that runs full; without the right to mount, files that may not grow beyond one."""
    if not os.path.ismount(run.out):
        run.end(run.begin({resource.RLIMIT_FSIZE: run.chance.randrange(1 << 10, 1 << 18)}))
        return False
    for room in (run.chance.randrange(1 << 12, 3 << 20), 1 << 28):
        subprocess.run(["mount", "-o", f"remount,size={room}", str(run.out)], check=True)
        run.end(run.begin())
    return False


def _take_memory(run: Run, seconds: float) -> bool:
    run.end(run.begin({resource.RLIMIT_AS: run.chance.randrange(1 << 20, 200 << 20)}))
    return False


def _step_clock(run: Run, seconds: float) -> bool:
    run.killed(run.begin(clock=str(run.chance.random())), seconds)
    run.end(run.begin(clock=str(run.chance.random())))
    return False


def _damage(folders: Sequence[str]) -> Disturb:
    """Kill the run while it pays or learns, then flip a bit of one of its files, or cut it short."""

    def disturb(run: Run, seconds: float) -> bool:
        found: list[Path] = []
        while not found:
            run.killed(run.begin(), seconds)
            found = sorted(p for f in folders for p in (run.out / f).glob("*") if p.is_file() and p.stat().st_size)
        path = run.chance.choice(found)
        content = bytearray(path.read_bytes())
        at = run.chance.randrange(len(content))
        kept = bytes(content)
        if run.chance.random() < 0.5:
            content[at] ^= 1 << run.chance.randrange(8)
        else:
            del content[at:]
        path.write_bytes(content)
        said = run.log.stat().st_size
        (status,) = run.end(run.begin())
        refused = status in (2, 3) and any(part in run.log.read_text()[said:] for part in (path.name, path.parent.name))
        if refused:
            path.write_bytes(kept)
        return refused

    return disturb


#: What happens, to runs of how many processes, and to how many of 200 runs.
CASES: dict[str, tuple[Disturb, int, int]] = {
    "client killed": (_kill, 1, 50),
    "one of two processes killed": (_kill, 2, 20),
    "server killed": (_kill_server, 1, 30),
    "disk full": (_fill_disk, 1, 20),
    "memory short": (_take_memory, 1, 20),
    "clock stepping": (_step_clock, 1, 20),
    "ledger damaged": (_damage(["ledger"]), 1, 20),
    "store or checkpoint damaged": (_damage(["replay", "holdout", "checkpoints"]), 1, 20),
}
