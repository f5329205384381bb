"""The settings of a run as one dictionary, by their names with dots."""

import dataclasses
from typing import Any

from mekd.config import Config


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def settings(config: Config) -> dict[str, Any]:
    return flat(dataclasses.asdict(config))
