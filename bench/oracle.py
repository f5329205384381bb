"""A teacher behind an address: images a second through all of mekd, against a bare client and against the file itself.

`mekd serve` runs beside it on the same cores, with a ResNet20 of random weights at 3 x 32 x 32. Ours is a query of a
RemoteOracle with a ledger on the disk: images to payloads, the calls in flight, each attempt booked, answers read. The
bare client sends the same payloads, made beforehand, over as many connections, and throws the answers away.
"""

import argparse
import contextlib
import itertools
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
import urllib3
from torch import Tensor

from bench.timing import Work, machine, spread, write_json
from mekd.nets import build
from mekd.oracle.export import Classifier, export
from mekd.oracle.hf import Pictures
from mekd.oracle.http import Line
from mekd.oracle.images import Encoding
from mekd.oracle.ledger import Ledger
from mekd.oracle.oip import Oip, describe
from mekd.oracle.ort import OnnxOracle
from mekd.oracle.remote import RemoteOracle

IMAGE, CLASSES, NAME = (3, 32, 32), 10, "teacher"


class Case(NamedTuple):
    """transport: hf (PNG), binary or JSON; concurrency: calls in flight; batch: images a call.

    calls, quick: of a query, all in all and with --quick.
    """

    case: str
    transport: str
    latency_ms: int
    concurrency: int
    batch: int
    calls: int
    quick: int


CASES = (
    Case("a picture a call", "hf", 50, 32, 1, 512, 192),
    Case("bytes", "binary", 0, 2, 256, 8, 2),
    Case("JSON", "JSON", 0, 2, 256, 4, 2),
    Case("bytes, latency", "binary", 50, 8, 32, 64, 8),
)


def main(arguments: Sequence[str]) -> int:
    """Measure, print a line for each case, and write JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench oracle", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer calls and 3 repeats")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    repeats = options.repeats or (3 if options.quick else 11)
    torch.manual_seed(0)
    begun, rows = time.perf_counter(), []
    print(", ".join(f"{key} {value}" for key, value in (machine() | versions()).items()))
    print(f"{'case':<18}{'transport':>10}{'latency':>9}{'in flight':>11}{'batch':>7}{'images/s':>10}"
          f"{'of bare':>9}{'of file':>9}")  # fmt: skip
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        file = folder / f"{NAME}.onnx"
        export(Classifier(build("resnet20", CLASSES, IMAGE[0])), file, IMAGE)
        latencies = sorted({case.latency_ms for case in CASES})
        urls = dict(zip(latencies, stack.enter_context(serving(file, latencies)), strict=True))
        for case in CASES:
            case = case._replace(calls=case.quick) if options.quick else case
            rows.append(measured(case, urls[case.latency_ms], file, folder, repeats))
            row = rows[-1]
            print(f"{case.case:<18}{case.transport:>10}{case.latency_ms:>6} ms{case.concurrency:>11}{case.batch:>7}"
                  f"{row['images_s']:>10.0f}{row['vs_limit']:>9.2f}{row['vs_file']:>9.2f}", flush=True)  # fmt: skip
    if options.json:
        write_json(options.json, rows, versions())
    print(f"{time.perf_counter() - begun:.0f} s; medians of {repeats} interleaved rounds")
    return 0


def measured(case: Case, url: str, file: Path, folder: Path, repeats: int) -> dict[str, Any]:
    """Images a second of ours, of the bare client, and of the file asked in this process."""
    images = torch.randint(0, 256, (case.calls * case.batch, *IMAGE), dtype=torch.uint8)
    books = itertools.count()

    def ledger() -> Ledger:
        return Ledger("query", folder / f"{case.transport}-{case.latency_ms}-{next(books)}")

    hf = case.transport == "hf"
    line = Line(f"{url}/hf/{NAME}" if hf else f"{url}/v2/models/{NAME}", {}, 60.0)
    service = (
        Pictures(line, "png", CLASSES)
        if hf
        else Oip(line, described(line, case.transport == "binary"), CLASSES, mean=[0.0], std=[1.0], k=None)
    )
    encoding = Encoding("png" if hf else "raw")
    ours = RemoteOracle(
        service, IMAGE, CLASSES, "probs", encoding=encoding, batch=case.batch,
        concurrency=case.concurrency, ledger=ledger(),
    )  # fmt: skip
    direct = OnnxOracle(file, response="probs", batch=min(256, len(images)), ledger=ledger())
    bare = Bare(case, line.url, payloads(service, encoding, images, case.batch))
    works: dict[str, Work] = {
        "ours": lambda: ours.query(images),
        "bare": bare.send,
        "file": lambda: [direct.query(part) for part in images.split(256)],
    }
    check_alike(ours.query(images[:4]).values, direct.query(images[:4]).values)
    times = {name: spread(taken) for name, taken in timed(works, repeats).items()}
    for oracle in (ours, direct):
        oracle.close()
    speed = {name: len(images) / taken["median_s"] for name, taken in times.items()}
    about = {key: value for key, value in case._asdict().items() if key != "quick"}
    return {
        **about, "images_s": speed["ours"], "vs_limit": speed["ours"] / speed["bare"],
        "vs_file": speed["ours"] / speed["file"], "bare_images_s": speed["bare"], "file_images_s": speed["file"],
        "times": times,
    }  # fmt: skip


def timed(works: dict[str, Work], repeats: int) -> dict[str, list[float]]:
    """Wall-clock seconds, by name, of rounds that run every one in turn; a first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            begun = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - begun)
    return {name: seconds[1:] for name, seconds in taken.items()}


def described(line: Line, binary: bool) -> Any:
    """The model as the server tells it."""
    return describe(line, IMAGE[0], input_name=None, output_name=None, transport="uint8", binary=binary)


def payloads(service: Pictures | Oip, encoding: Encoding, images: Tensor, batch: int) -> list[tuple[bytes, dict]]:
    """Body and headers of each call of a query."""
    if isinstance(service, Oip):
        return [service._request(part) for part in images.split(batch)]
    return [(body, {"content-type": "image/png"}) for body in encoding.encode(images)]


def check_alike(served: Tensor | None, direct: Tensor | None) -> None:
    """Raise where the served teacher is not the one in the file."""
    torch.testing.assert_close(served, direct, rtol=0, atol=1e-5)


class Bare:
    """Threads that each send what is left of the payloads over a connection of their own."""

    def __init__(self, case: Case, url: str, calls: list[tuple[bytes, dict]]) -> None:
        self._calls, self._concurrency = calls, case.concurrency
        address = urlsplit(url)
        self._path = address.path + ("" if case.transport == "hf" else "/infer")
        assert address.hostname is not None
        self._pool = urllib3.HTTPConnectionPool(
            address.hostname, address.port, maxsize=case.concurrency, block=True, retries=False
        )

    def send(self) -> None:
        """All payloads once; RuntimeError where one is not answered."""
        turn, left, failed = threading.Lock(), iter(self._calls), []

        def work() -> None:
            while True:
                with turn:
                    call = next(left, None)
                if call is None:
                    return
                reply = self._pool.urlopen(
                    "POST", self._path, call[0], {"accept-encoding": "identity", **call[1]}, preload_content=True
                )
                if reply.status != 200:
                    failed.append(reply.data)

        threads = [threading.Thread(target=work) for _ in range(self._concurrency)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise RuntimeError(f"the server refused {len(failed)} calls, the first with {failed[0][:200]!r}")


@contextlib.contextmanager
def serving(file: Path, latencies: Sequence[int], response: str = "probs") -> Iterator[list[str]]:
    """`mekd serve FILE` for each latency, at once; their http://HOST:PORT."""
    processes = []
    try:
        for latency in latencies:
            command = [sys.executable, "-m", "mekd", "serve", str(file), "--port", "0", "--response", response,
                       "--latency_ms", str(latency)]  # fmt: skip
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ.copy()))
        urls = []
        for process in processes:
            assert process.stdout is not None
            words = process.stdout.readline().split(" as ")
            if len(words) < 2:
                raise RuntimeError("mekd serve did not start; it says why above")
            urls.append(words[1].split("/v2/")[0])
        yield urls
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(20)


def versions() -> dict[str, Any]:
    """What the figures depend on besides torch."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        **{name: version(name) for name in ("onnxruntime-gpu", "onnxruntime", "urllib3", "uvicorn") if known(name)},
    }


def known(package: str) -> bool:
    """Whether it is installed under that name."""
    try:
        return bool(version(package))
    except ModuleNotFoundError:
        return False
