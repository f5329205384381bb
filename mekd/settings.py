"""Settings by their dotted names, and as YAML."""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mekd.config import Config
from mekd.errors import UsageError

#: Settings that were taken out, as they helped nothing (docs/results.md), and their values that did nothing.
GONE: Mapping[str, Any] = {"distill.candidates": 1, "distill.pseudo_labels": 0.0}

#: What a setting of each type is, in words.
MEANT: Mapping[Any, str] = {
    list[float]: "a list of numbers, such as [0.5, 0.5]",
    list[str]: "a list of words, such as [wandb]",
    dict[str, str]: 'text by name, such as {X-Api-Key: "{env:KEY}"}',
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text (a number in quotes is text)",
}


def flatten(tree: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Settings by section as pairs of a dotted name and a value; a setting may be a mapping itself."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        within = isinstance(value, Mapping)
        found += [(f"{key}.{name}", one) for name, one in value.items()] if within else [(key, value)]
    return found


def known_keys() -> list[str]:
    """Every setting by its dotted name."""
    return [key for key, _ in flatten(dataclasses.asdict(Config()))]


def check_keys(tree: Mapping[str, Any], source: str) -> None:
    """Raise UsageError for a key that no setting has, with the nearest one that does."""
    known = known_keys()
    sections = {key.split(".")[0] for key in known}
    for key, value in tree.items():
        if key in sections and key not in known and not isinstance(value, Mapping):
            raise UsageError(f"{source}: {key} must be a section of settings, not {value!r}")
    for key, value in flatten(tree):
        if key in GONE:
            raise UsageError(
                f"{source}: {key} was taken out, as it made no student better (docs/results.md); leave it out, and "
                "begin a run that had it anew, with another --out"
            )
        if key not in known:
            raise UsageError(f"{source}: there is no setting {key!r}; {nearest(str(key))}")
        if value is None and not may_be_null(key):
            raise UsageError(f"{source}: {key} is null, which it may not be; leave the line out for its default")
        check_text(f"{source}: {key}", value)


def check_text(name: str, value: object) -> None:
    """Raise UsageError for text that is empty, or that the parser would take for a comment or a name of nothing."""
    if value == "":
        raise UsageError(
            f"{name} is '', which names nothing: give a value, or leave it out for its default (a variable of the "
            "shell that is not set becomes this)"
        )
    if isinstance(value, str) and value.startswith(("#", "&")):
        raise UsageError(
            f"{name} is {value!r}, which reads as null, as # begins a comment and & a name: a path may begin with ./, "
            "and anything else must begin otherwise"
        )


def may_be_null(key: str) -> bool:
    """Whether a setting, by its dotted name, has a meaning without a value."""
    return type(None) in get_args(_kind(key))


def must_be(key: str) -> str:
    """What may be given for a setting, by its dotted name, in words."""
    kind = _kind(key)
    meant = next(words for one, words in MEANT.items() if one in (kind, *get_args(kind)))
    return f"{meant}, or null" if may_be_null(key) else meant


def _kind(key: str) -> Any:
    kind: Any = Config
    for name in key.split("."):
        kind = get_type_hints(kind)[name]
    return kind


def nearest(key: str) -> str:
    """The settings most like a mistyped one, as the end of a sentence."""
    known = known_keys()
    by_leaf = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    close = by_leaf or difflib.get_close_matches(key, known, n=2, cutoff=0.5)
    return f"the nearest is {' or '.join(close)}" if close else f"there are {', '.join(known)}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file of settings; UsageError for one that is no mapping, or has unknown keys or one key twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        """yes, no, on and off stay words, as on the command line: engine.compile may be off."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: list[Any] = []
            for key, _ in node.value:
                if key.value in seen:
                    said = f"{key.value} stands here a second time, and would hide the first"
                    raise yaml.constructor.ConstructorError(None, None, said, key.start_mark)
                seen.append(key.value)
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {
        first: [(tag, word) for tag, word in rules if tag != "tag:yaml.org,2002:bool" or first in "tTfF"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"--config is {str(path)!r}; no such file, and none of mekd's own, such as digits")
    try:
        tree = yaml.load(file.read_text("utf-8-sig"), Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no YAML in UTF-8: {error}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{path} must hold settings by name, it holds a {type(tree).__name__}")
    for key, off in GONE.items():
        section, name = key.split(".")
        if isinstance(tree.get(section), dict) and tree[section].get(name, off) == off:
            tree[section].pop(name, None)
    check_keys(tree, str(path))
    return tree


def read_saved(path: Path) -> dict[str, Any]:
    """The settings that a run was saved with, by dotted name; empty where there are none that can be read."""
    import yaml

    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return dict(flatten(tree)) if isinstance(tree, dict) else {}


def dump_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
