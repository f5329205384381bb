"""bench matrix: a row for each torch, in order, and what failed is in it."""

import pytest

from bench.matrix import PAGE, TITLES, put, said, why


def cells(torch: str, rest: str = "runs") -> dict[str, str]:
    return {**dict.fromkeys(TITLES, rest), "torch": torch}


def rows(page: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith("| 2.")]


def test_rows_are_put_in_order_and_the_text_stays() -> None:
    page = PAGE.read_text()
    for torch in ("2.10.0", "2.9.1", "2.14.1", "2.11.0"):
        page = put(cells(torch, "old"), page)
    page = put(cells("2.10.0"), page)
    found = {line.split(" ")[1]: line for line in rows(page)}
    assert list(found) == sorted(found, key=lambda release: [int(part) for part in release.split(".")])
    assert "runs" in found["2.10.0"] and "old" not in found["2.10.0"] and "old" in found["2.9.1"]
    assert all(line.count("|") == len(TITLES) + 1 for line in rows(page))
    outside = [line for line in page.splitlines() if not line.startswith("|")]
    assert outside == [line for line in PAGE.read_text().splitlines() if not line.startswith("|")]


@pytest.mark.parametrize(
    ("output", "told"),
    [
        # pytest: the counts, and the first error.
        ("E  TypeError: a|b\nE  ValueError: c\n1 failed, 7 passed", "FAILED: 1 failed, 7 passed, E  TypeError: a/b"),
        # A traceback, with a line of the launcher behind it.
        ("x.py:3\nmekd.errors.UsageError: no data\nRoot Cause", "FAILED: mekd.errors.UsageError: no data"),
        # Neither.
        ("killed", "FAILED: killed"),
        ("", "FAILED: nothing was printed"),
    ],
)  # fmt: skip
def test_what_failed_is_told(output: str, told: str) -> None:
    assert why(output) == told


def test_what_passed_is_counted() -> None:
    assert said("1 of 2 parts\n3 passed, 1 skipped in 2 s") == "3 passed"
    assert said("\n12 of 12 parts passed\n") == "12 of 12 parts passed"
    assert said("report: x/report.md") == "runs"
