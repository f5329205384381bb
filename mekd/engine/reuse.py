"""Generators and paid answers of other runs: what they decide of a configuration, and whether they fit it."""

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from mekd import files
from mekd.config import Config
from mekd.errors import UsageError
from mekd.oracle import replay
from mekd.settings import flatten, read_saved
from mekd.student import FILE
from mekd.teacher_config import OracleConfig

#: Of the oracle's settings, what a store's answers are a result of.
ANSWERS = ("response", "k", "decimals", "transport", "encoding", "quality", "unknown", "size", "mean", "std")

#: What a store says of where its answers come from.
ORIGIN = ("teacher", "teacher_name", "generator", "classes", "class_names", "seed", "answers")

#: What both rounds must have alike, so that the same images are private and the same ones held out.
ALIKE = ("data.name", "data.size", "data.local_fraction", "audit.holdout")


def adopted(config: Config) -> Config:
    """The configuration with what deprivatize.generator, distill.store and deprivatize.after decide of it.

    Raises UsageError where they are not there or do not fit.
    """
    if config.distill.store is not None:
        config = _with_store(config, Path(config.distill.store))
    if config.deprivatize.after is not None:
        config = _second_round(config)
    if config.deprivatize.generator is not None:
        saved = _trained(config.deprivatize.generator)
        depends = saved["depends"]
        kept = {f.name: depends[f"deprivatize.{f.name}"] for f in fields(config.deprivatize)
                if f"deprivatize.{f.name}" in depends and f.name not in ("dp", "clip")}  # fmt: skip
        recipe = replace(config.deprivatize, **kept, steps=saved["step"])
        data = replace(config.data, size=depends["data.size"], **_likely(config, depends))
        config = replace(config, deprivatize=recipe, data=data)
    return config


def _likely(config: Config, depends: dict[str, Any]) -> dict[str, Any]:
    """data.flip and data.shift where nobody says them: as a generator learnt."""
    return {name: depends.get(f"data.{name}") for name in ("flip", "shift") if getattr(config.data, name) is None}


def _trained(path: str, setting: str = "deprivatize.generator") -> dict[str, Any]:
    """The checkpoint of step 1 that a setting names; UsageError where it is another file, or not finished."""
    try:
        saved = files.load(generator_of(path, setting))
    except files.DamagedError as error:
        raise UsageError(f"{setting} is {path!r}: {error}") from error
    if "generator" not in saved.get("state", {}):
        raise UsageError(
            f"{setting} is {path!r}, which holds no generator; it must be the folder of a run that "
            "finished step 1, or its checkpoints/deprivatize.pt"
        )
    wanted = read_saved(Path(path) / "config.yaml").get("deprivatize.steps") or 0
    if saved["step"] < wanted:
        or_so = ", or accept it as it is with its checkpoints/deprivatize.pt" if setting.endswith("generator") else ""
        raise UsageError(
            f"{setting} is {path!r}, where step 1 stands at step {saved['step']} of {wanted}: finish that run first"
            + or_so
        )
    return saved


def generator_of(path: str, setting: str = "deprivatize.generator") -> Path:
    """The checkpoint of step 1 in another run's folder, or the file itself; UsageError where there is none."""
    given = Path(path)
    found = given / "checkpoints" / "deprivatize.pt" if given.is_dir() else given
    if not found.is_file():
        raise UsageError(
            f"{setting} is {path!r}; it must be the folder of a run that finished step 1, which holds "
            "checkpoints/deprivatize.pt, or that file"
        )
    return found


def channels_of(path: Path) -> int:
    """The channels of the images that a saved generator draws."""
    return int(files.load(path)["state"]["generator"]["last.weight"].shape[0])


def origin_of(store: str) -> dict[str, Any]:
    """What the answers of another run's folder are a result of; UsageError where there are none, or it is not known."""
    for name in ("replay", "holdout"):
        path = Path(store) / name / "replay.json"
        if not path.is_file():
            raise UsageError(
                f"distill.store is {store!r}; it must be the folder of a run that asked for its answers, which holds "
                f"{name}/replay.json (distill.replay above 0)"
            )
    origin: dict[str, Any] | None = _described(store, "replay").get("origin")
    if origin is None:
        raise UsageError(
            f"distill.store is {store!r}, whose answers do not say what they come from: an earlier version of mekd "
            "asked for them. Go on in that folder itself, where another student keeps them"
        )
    return origin


def rows_of(store: str, name: str) -> int:
    """The answers in the folder NAME of another run; UsageError where not all of them are there yet."""
    path = Path(store) / "checkpoints" / f"{name}.pt"
    found = _described(store, name)
    stands = files.load(path)["state"]["place"]["rows"] if path.is_file() else 0
    if stands < found["count"]:
        raise UsageError(
            f"distill.store is {store!r}, where {stands} of {found['count']} answers of {name} are there: finish that "
            "run first"
        )
    return int(found["count"])


def _described(store: str, name: str) -> dict[str, Any]:
    """What the answers in the folder NAME of another run say of themselves; UsageError where that is damaged."""
    try:
        found = replay.described(Path(store) / name)
        origin = found.get("origin")
        if origin is not None and not (set(ORIGIN) <= set(origin) and set(origin["answers"]) <= set(ANSWERS)):
            raise ValueError("it does not say what its answers come from")
        if origin is not None and not isinstance(found["count"], int):
            raise ValueError("it does not say how many there are")
        return found
    except (replay.StoreError, KeyError, TypeError, ValueError) as error:
        why = error.__cause__ if isinstance(error, replay.StoreError) else error
        raise UsageError(
            f"distill.store is {store!r}, whose {name}/replay.json is damaged ({why}): put a copy of it back, or give "
            "another run's folder"
        ) from error


def _with_store(config: Config, store: Path) -> Config:
    origin, step2 = origin_of(str(store)), config.distill
    oracle, default = asdict(config.oracle), asdict(OracleConfig())
    for name, value in origin["answers"].items():
        if oracle[name] not in (default[name], value):
            raise UsageError(
                f"oracle.{name} is {oracle[name]!r}, and the answers in distill.store {str(store)!r} were given with "
                f"{value!r}: leave oracle.{name} out"
            )
    config = replace(config, oracle=replace(config.oracle, **origin["answers"]))
    if config.deprivatize.generator is None:
        generator_of(str(store))
        config = replace(config, deprivatize=replace(config.deprivatize, generator=str(store)))
    answers, holdout = (rows_of(str(store), name) for name in ("replay", "holdout"))
    if (step2.replay or 0) > answers:
        raise UsageError(
            f"distill.replay is {step2.replay}, and distill.store {str(store)!r} holds {answers} answers: say fewer, "
            "or leave distill.replay out to learn from all of them"
        )
    answers = step2.replay or answers
    simulation = config.evaluate
    if config.teacher.onnx is None:  # there is nobody to ask
        simulation = replace(simulation, ask_teacher=False, baseline=False)
    return replace(config, distill=replace(step2, replay=answers, holdout=holdout), evaluate=simulation)


def _second_round(config: Config) -> Config:
    """The configuration with the sizes of deprivatize.after's networks; UsageError where it does not fit."""
    step1, depends = config.deprivatize, first_round(config)["depends"]
    kept = {name: depends[f"deprivatize.{name}"] for name in ("nuisance", "width", "d_width")}
    data = replace(config.data, **_likely(config, depends))
    config = replace(config, deprivatize=replace(step1, **kept), data=data)
    before = read_saved(Path(str(step1.after)) / "config.yaml")
    flat = dict(flatten(asdict(replace(config, data=config.data.decided()))))
    alike = ALIKE if flat["data.local_fraction"] == 1 and not config.audit.holdout else (*ALIKE, "seed")
    for name in alike:
        now = flat[name]
        if before.get(name) != now:
            raise UsageError(
                f"{name} is {now!r}, and in deprivatize.after {step1.after!r} it was {before.get(name)!r}: other "
                f"images would be private in the second round than in the first. Say --{name} {before.get(name)}"
            )
    return config


def first_round(config: Config) -> dict[str, Any]:
    """The checkpoint of step 1 that deprivatize.after goes on from; UsageError where it is no finished run."""
    folder = Path(str(config.deprivatize.after))
    before = read_saved(folder / "config.yaml")
    if not before or not (folder / FILE).is_file():
        raise UsageError(
            f"deprivatize.after is {str(folder)!r}; it must be the folder of a run with a student, which holds "
            f"config.yaml and {FILE}: finish that run first"
        )
    saved = _trained(before.get("deprivatize.generator") or str(folder), "deprivatize.after")
    if "deprivatize.dp" in saved["depends"]:
        raise UsageError(
            f"deprivatize.after is {str(folder)!r}, whose step 1 has an epsilon (deprivatize.dp), which a second round "
            "would void: leave deprivatize.after out"
        )
    return saved


def digest_of(after: str | None) -> str | None:
    """A hash of a first round's student, which is a result of all that the second round takes of it."""
    return None if after is None else files.digest(Path(after) / FILE)
