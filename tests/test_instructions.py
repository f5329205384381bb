"""No op of csrc/ takes more instructions than it did: times are too noisy here to say so."""

import csv
import shutil
from pathlib import Path

import pytest

from bench import instructions
from mekd import extension

ALLOWED = 1.03  # Python's own share varies a little
ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason=instructions.MISSING)
def test_no_op_takes_more_instructions_than_it_did() -> None:
    if extension.LOADED is None:
        pytest.skip(extension.WHY_NOT)
    if "AVX2" not in extension.possible():
        pytest.skip("the AVX2 build is what is counted, and torch finds no AVX2 in this processor")
    with open(ROOT / instructions.KEPT) as file:
        kept = {row["op"]: row for row in csv.DictReader(file)}
    if any(row["compiler"] != instructions.compiler() for row in kept.values()):
        pytest.skip(f"{instructions.KEPT} is of another compiler than {instructions.compiler()}")
    found = instructions.counted()
    more = {op: (n, int(kept[op]["instructions"])) for op, n in found.items()}
    assert not {op: pair for op, pair in more.items() if pair[0] > ALLOWED * pair[1]}, (
        "more instructions than before, found and kept; where that buys something: python -m bench instructions --keep"
    )
