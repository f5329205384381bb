"""bench tune: the fastest tile wins, and the table that it writes is the one that the kernels read."""

import json
from typing import Any

import pytest
import torch

from bench.tune import DTYPES, candidates, main, tune
from mekd.kernels import tuning


def test_the_fastest_tile_of_each_class_wins() -> None:
    table: dict[str, Any] = json.loads(tuning.FILE.read_text())
    before = json.loads(tuning.FILE.read_text())
    asked = []

    def measure(kernel: str, dtype: torch.dtype, classes: int) -> float:
        """Two warps are fastest, but for rows of 512, where nothing but the first tile runs."""
        size = "more" if classes > tuning.LONGEST else str(classes)
        tile = table[kernel]["sm_99"][str(dtype).removeprefix("torch.")][size]
        asked.append(tile)
        if size == "512" and tile != before[kernel]["sm_100"][str(dtype).removeprefix("torch.")][size]:
            raise RuntimeError("out of resources")
        return 1.0 if tile[2] == 2 else 2.0

    used: list[None] = []
    tune(table, "sm_99", ["dkd"], measure, lambda: used.append(None))
    for dtype in DTYPES:
        sizes = table["dkd"]["sm_99"][str(dtype).removeprefix("torch.")]
        assert sizes["16"][2] == 2  # four warps before
        assert sizes["512"] == before["dkd"]["sm_100"][str(dtype).removeprefix("torch.")]["512"]
    assert len(used) > len(asked)
    assert {kernel: table[kernel] for kernel in table if kernel != "dkd"} == {
        kernel: before[kernel] for kernel in before if kernel != "dkd"
    }


def test_candidates_loop_where_the_row_does() -> None:
    fixed = list(candidates([1, 1024, 4, 1], loops=False))
    assert fixed[0] == [1, 1024, 4, 1] and {tile[1] for tile in fixed} == {1024} and {tile[3] for tile in fixed} == {1}
    assert {tile[1] for tile in candidates([1, 1024, 4, 1], loops=True)} == {512, 1024, 2048}
    assert all(tile[0] >= 1 and 1 <= tile[2] <= 32 for tile in candidates([1, 8192, 32, 1], loops=True))


def test_the_file_is_written_as_it_lies_there() -> None:
    assert tuning.dumps(tuning.table()) == tuning.FILE.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and it would be tuned")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "no CUDA device is visible" in capsys.readouterr().out
