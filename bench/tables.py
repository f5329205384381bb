"""Tables of measured rows: CSV files that several processes add to, and the settings that their rows were made with."""

import csv
import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, str]]:
    """The rows of the table, none where there is no file yet."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append(table: Path, row: dict[str, Any], columns: Sequence[str]) -> None:
    """Add a row to the table, which other processes add to as well; its first six columns say what was measured."""
    table.parent.mkdir(parents=True, exist_ok=True)
    with open(table, "a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        key = [str(row[name]) for name in columns[:6]]
        if key in [[other[name] for name in columns[:6]] for other in read(table)]:
            return  # another process was faster
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not os.fstat(file.fileno()).st_size:
            writer.writeheader()
        writer.writerow(row)


def settings(folder: Path) -> dict[str, str]:
    """The settings that a folder's rows were made with, by what they are of: they do not hold them themselves."""
    path = folder / "settings.json"
    return json.loads(path.read_text()) if path.exists() else {}


def keep_settings(folder: Path, of: str, words: str) -> None:
    """Write down that the rows of something were made with these settings."""
    with open(folder / "settings.json", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        kept = json.loads(file.read() or "{}")
        if of not in kept:
            file.truncate(0)
            file.write(json.dumps(dict(sorted({**kept, of: words}.items())), indent=1) + "\n")
