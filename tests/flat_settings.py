"""The settings of a run as one dictionary, by their names with dots."""

import dataclasses
from typing import Any

from mekd.config import Config


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) and key != "headers" else {prefix + key: value}
        )
    return found


def settings(config: Config) -> dict[str, Any]:
    return flat(dataclasses.asdict(config))


def replaced(key: str, value: Any, config: Config | None = None) -> Config:
    """A configuration, by default the default one, with one setting changed."""
    config = config or Config()
    section, _, name = key.rpartition(".")
    if not section:
        return dataclasses.replace(config, **{name: value})
    part = dataclasses.replace(getattr(config, section), **{name: value})
    return dataclasses.replace(config, **{section: part})
