"""What booking a call costs the step that makes it, and what the thread beside it does meanwhile."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.timing import write_json
from mekd.oracle.ledger import Ledger
from mekd.oracle.response import Response

#: Images of a call and classes of its answer: CIFAR's, and ImageNet's.
CASES = (((128, 3, 32, 32), 10), ((256, 3, 224, 224), 1000))


def main(arguments: Sequence[str]) -> int:
    """Print, for a call of each case, the milliseconds in the step's path and those until all is on its way to disk."""
    parser = argparse.ArgumentParser(prog="python -m bench ledger", description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", help="also write the figures there")
    options = parser.parse_args(arguments)
    rows = []
    print(f"{'images of a call':<20}{'in the path':>13}{'booked in line':>16}   ms, medians of {options.repeats}")
    for shape, classes in CASES:
        images, answer = (
            torch.randint(0, 256, shape, dtype=torch.uint8),
            Response("probs", torch.rand(shape[0], classes)),
        )
        beside, in_line = (timed(images, answer, options.repeats, waits) for waits in (False, True))
        rows.append({"shape": list(shape), "classes": classes, "in_path_ms": beside, "in_line_ms": in_line})
        print(f"{'x'.join(map(str, shape)):<20}{beside:>13.2f}{in_line:>16.2f}")
    if options.json:
        write_json(Path(options.json), rows)
    return 0


def timed(images: Tensor, answer: Response, repeats: int, waits: bool) -> float:
    """The median time of a call's two entries; waits: until they are written, as a ledger without a thread would."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger("bench", Path(folder))
        taken = [once(ledger, images, answer, waits) for _ in range(repeats)]
        ledger.close()
    return 1e3 * statistics.median(taken)


def once(ledger: Ledger, images: Tensor, answer: Response, waits: bool) -> float:
    """The seconds of one call's entries; the writer is idle before."""
    wait: Callable[[], object] = lambda: ledger._booked and ledger._booked.result()  # noqa: E731
    wait()
    begun = time.perf_counter()
    sent = ledger.intend(images)
    ledger.record(sent, images, answer)
    if waits:
        wait()
    return time.perf_counter() - begun
