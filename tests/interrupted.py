"""A stage that is stopped at a step, as by Ctrl-C."""

import contextlib
from collections.abc import Iterator

import pytest

from mekd.engine import checkpoint


@contextlib.contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """What runs within is asked to stop before this step; checkpoint.Interrupted, or status 130, is the caller's."""
    checks = iter(range(1000))

    class Stop:
        def is_set(self) -> bool:
            return next(checks) >= step

        def clear(self) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_asked_to_stop", Stop())
        yield
