"""The query batch: how many images the teacher gets at once. It is measured once, and kept with the run.

Another size may round the answers differently, so that a resumed run must not find another one.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from mekd import files
from mekd.errors import MekdError
from mekd.oracle.binding import out_of_memory
from mekd.oracle.session import ProviderError, one_line

LARGEST = 256


class BatchError(MekdError, ValueError):
    """The file of the query batch is damaged, or belongs to other settings."""


def find_batch(run: Callable[[int], object], image: tuple[int, int, int], largest: int = LARGEST) -> int:
    """The smallest power of two whose images per second come within 5 % of the best one's.

    run(m) answers m blank images and is waited for; image: (ch, H, W). The search takes about 3 s at most at 224 px,
    and 0.3 s for small images, unless a single image takes longer. It ends at a size that the memory does not hold;
    raises ProviderError where that is one image.
    """
    seconds = min(3.0, max(0.3, 3.0 * image[1] * image[2] / 224**2))
    rates, size, best_at, spent = dict[int, float](), 1, 1, 0.0
    while size <= largest:
        try:
            run(size)  # loads and chooses what this size needs, which is no part of its speed
            times = _times(run, size)
        except Exception as error:
            if not out_of_memory(error):
                raise
            if size == 1:
                raise ProviderError(
                    f"the teacher runs out of memory at a single image ({one_line(error)}): free some, or say "
                    "--oracle.provider cpu if it runs on a card"
                ) from error
            break
        took, spent = min(times), spent + sum(times) + min(times)
        rates[size] = size / took
        if rates[size] > 1.05 * rates[best_at]:
            best_at = size
        if size >= 4 * best_at or spent + 4 * took > seconds:  # no gain in two doublings; no time for the next one
            break
        size *= 2
    best = max(rates.values())
    return min(size for size, rate in rates.items() if rate >= 0.95 * best)


def stored_batch(path: Path, belongs: Mapping[str, str], asked: bool, find: Callable[[], int]) -> int:
    """The batch that path holds, or the one that find() gives, then written to path.

    belongs: what it was found for; asked: whether the run has sent queries. Raises BatchError for a damaged file, and
    for one that was found for something else once there are queries.
    """
    if path.exists():
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            batch, of = kept["batch"], kept["belongs"]
            if type(batch) is not int or batch < 1 or not isinstance(of, dict):
                raise ValueError(f"batch is {batch!r} of {of!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise BatchError(
                f"{path} is damaged ({error}); it must hold the query batch: delete it, and it is measured again"
            ) from error
        if of == dict(belongs):
            return batch
        if asked:
            differ = [f"{name} was {of.get(name)}, is {now}" for name, now in belongs.items() if of.get(name) != now]
            raise BatchError(
                f"{path} holds a query batch found for another setting ({'; '.join(differ)}), and the run's ledger "
                "holds queries. Go back to that setting; or delete the file to measure again: answers may then differ "
                "from the earlier ones in their last digits"
            )
    batch = find()
    files.write_text(path, json.dumps({"batch": batch, "belongs": dict(belongs)}, indent=1) + "\n")
    return batch


def _times(run: Callable[[int], object], size: int) -> list[float]:
    """The time of a run; a short one is repeated, since the shortest counts."""
    times: list[float] = []
    while not times or (len(times) < 3 and times[-1] < 0.02):
        start = time.perf_counter()
        run(size)
        times.append(time.perf_counter() - start)
    return times
