"""What the result of a stage depends on, and what a configuration's defaults mean on this machine."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from mekd.config import Config
from mekd.errors import UsageError
from mekd.settings import GONE, flatten
from mekd.teacher_config import PRECISIONS, TeacherConfig

#: Settings that an interrupted run may be resumed with: where things are, what they cost, how long it shall take, and
#: what runs the teacher, which changes its answers by rounding alone.
FREE = {
    "data.path", "data.workers", "data.on_error", "teacher.url", "teacher.name",
    "oracle.price", "oracle.provider", "oracle.batch", "oracle.precision", "oracle.cuda_graph",
    "deprivatize.steps", "deprivatize.budget", "deprivatize.generator", "deprivatize.after", "distill.budget",
    "distill.store", "distill.coverage", "evaluate.ask_teacher", "evaluate.path",
}  # fmt: skip
_ANSWERS = (
    "oracle.response", "oracle.k", "oracle.decimals", "oracle.transport", "oracle.output", "oracle.output_name",
    "oracle.num_classes", "oracle.classes", "oracle.mean", "oracle.std", "oracle.input_name", "oracle.size",
    "oracle.encoding", "oracle.quality", "oracle.unknown",
)  # fmt: skip
_COMPUTED = ("engine.device", "engine.batch_norm")
#: What changes the result of a stage, sections or settings; run.depends() adds the digests of what it begins with.
_DEPENDS = {
    "teacher": ("seed", "data", "teacher", *_COMPUTED),
    "deprivatize": ("seed", "data", "deprivatize", "audit.holdout", "engine.compile", *_COMPUTED),
    "holdout": ("seed", "distill.holdout", *_ANSWERS),
    "replay": ("seed", *_ANSWERS),  # a store may grow
    "distill": ("seed", "distill", *_ANSWERS, *_COMPUTED),
    "audit": ("seed", *_ANSWERS),
    "evaluate": _ANSWERS,  # what is asked there, of real images
    "pretrain": (
        "seed",
        "data",
        "audit.holdout",
        "distill.student",
        "distill.pretrain",
        "distill.batch",
        "distill.lr",
        "distill.weight_decay",
        "distill.precision",
        *_COMPUTED,
    ),
    "baseline": ("seed", "data", "audit.holdout", "distill", "evaluate.baseline_steps", *_ANSWERS, *_COMPUTED),
}


#: What was done before there were these settings: an older checkpoint says nothing of them, and its answers are paid.
LATER: Mapping[str, Any] = {"deprivatize.augment": False, "distill.augment": False}
#: Settings that came later and are left out at these values, so that a fingerprint is what it was before them.
ABSENT: Mapping[str, Any] = {
    "audit.holdout": 0, "distill.pretrain": 0, "deprivatize.dp": None, "deprivatize.clip": 1.0,
}  # fmt: skip


def differing(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two fingerprints do not have alike, by name: what it was and what it is."""
    saved = {key: value for key, value in saved.items() if key not in GONE or value != GONE[key]}
    before = {**LATER, **ABSENT}
    pairs = {
        key: (saved.get(key, before.get(key)), wanted.get(key, ABSENT.get(key)))
        for key in sorted(saved.keys() | wanted.keys())
    }
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def asks(config: Config) -> bool:
    """Whether step 1 asks the teacher: a label says nothing about confidence, so y = 1 for every image."""
    step1 = config.deprivatize
    return step1.generator is None and step1.alpha > 0 and config.oracle.response != "label"


def fingerprint(config: Config, stage: str) -> dict[str, Any]:
    """The settings that change a stage's result, by dotted name."""
    depends = _DEPENDS[stage]
    if stage == "deprivatize" and asks(config):
        depends = (*depends, *_ANSWERS)
    if stage == "distill" and config.distill.augment:
        depends = (*depends, "data.flip", "data.shift")
    if stage == "distill" and config.distill.pretrain:
        depends = (*depends, "data", "audit.holdout")
    flat = dict(flatten(dataclasses.asdict(config)))
    chosen = {key: value for key, value in flat.items() if key in depends or key.split(".")[0] in depends}
    found = {key: value for key, value in chosen.items() if key not in FREE and (key, value) not in ABSENT.items()}
    if "engine.device" in found:
        found["engine.device"] = found["engine.device"].split(":")[0]  # one card rounds as another
    return found


#: The image distance's weight where the teacher answers labels, whose codes are far from the student's for longer:
#: at the preset's the student is worse than by KL alone (docs/results.md).
LABELS_IMAGE = 4.0
#: The stages that take bfloat16 where it is faster: they lost less than three seeds differ by (docs/results.md).
BFLOAT16 = ("teacher", "deprivatize", "distill")


def resolve(config: Config, kept: Mapping[str, Any], faster: Callable[[str], bool]) -> Config:
    """The configuration with what its defaults mean on this machine decided, once for the whole run.

    kept: the settings that the run was begun with, by dotted name, if it was: what was decided then stays.
    faster(device): whether bfloat16 is, measured; asked where nothing is kept.
    """
    engine = config.engine
    device = engine.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    mode = engine.compile
    if mode == "auto":
        mode = "default" if device.startswith("cuda") else "off"
    config = dataclasses.replace(config, engine=dataclasses.replace(engine, device=device, compile=mode))
    for stage in ("teacher", "deprivatize", "distill"):
        section = getattr(config, stage)
        if section.precision == "auto":
            known = kept.get(f"{stage}.precision")
            if known not in PRECISIONS[1:]:
                known = "bfloat16" if stage in BFLOAT16 and faster(device) else "float32"
            config = dataclasses.replace(config, **{stage: dataclasses.replace(section, precision=known)})
    data = config.data
    for name in ("flip", "shift"):  # of an earlier version's run they stay what its null was
        if getattr(data, name) is None and kept.get(f"data.{name}") is not None:
            data = dataclasses.replace(data, **{name: kept[f"data.{name}"]})
    config = dataclasses.replace(config, data=data.decided())
    for stage in ("deprivatize", "distill"):
        section, key = getattr(config, stage), f"{stage}.augment"
        if section.augment is None:  # an earlier version's run goes on as it began
            augment = kept.get(key, LATER[key]) if kept else stage == "distill" or config.deprivatize.dp is None
            config = dataclasses.replace(config, **{stage: dataclasses.replace(section, augment=augment)})
    step2 = config.distill
    if step2.image is None and step2.preset == "default" and config.oracle.response == "label":
        weight = kept.get("distill.image") if kept else LABELS_IMAGE
        config = dataclasses.replace(config, distill=dataclasses.replace(step2, image=weight))
    return _asked_as_it_is_reached(config, kept)


def _asked_as_it_is_reached(config: Config, kept: Mapping[str, Any]) -> Config:
    """What is asked of the teacher, by the kind of it and never by its price, and how images go up to it."""
    teacher, oracle, step2, simulation = config.teacher, config.oracle, config.distill, config.evaluate
    if teacher.remote and teacher.name is None:
        # At another address it may be another teacher: nobody but the user knows, and says so by its name.
        same = (kept.get("teacher.url"), kept.get("teacher.python")) == (teacher.url, teacher.python)
        name = kept.get("teacher.name") if same else None
        # It is handed on with the student: of a secret's file its name, and no folders of this machine.
        own = re.sub(r"(\{file:)[^{}]*[/\\]", r"\1", default_name(teacher))
        teacher = dataclasses.replace(teacher, name=name or own)
    hf = teacher.url is not None and teacher.protocol == "hf"
    if oracle.encoding == "auto":
        oracle = dataclasses.replace(oracle, encoding="png" if hf else "raw")
    if oracle.concurrency is None and teacher.remote:
        oracle = dataclasses.replace(oracle, concurrency=1 if teacher.python else 8)
    if simulation.ask_teacher is None:
        simulation = dataclasses.replace(simulation, ask_teacher=not teacher.remote and oracle.price is None)
    if simulation.baseline is None:  # it sends private images: to others only where that was said; dp counts none
        baseline = bool(simulation.ask_teacher) and not teacher.remote and config.deprivatize.dp is None
        simulation = dataclasses.replace(simulation, baseline=baseline)
    config = dataclasses.replace(config, teacher=teacher, oracle=oracle, evaluate=simulation)
    if step2.replay is None:
        count = store_size(config) if teacher.remote or oracle.budget is not None else 0
        before = kept.get("distill.replay") or 0
        if kept.get("oracle.budget") == oracle.budget:
            count = before or count  # another concurrency changes no result
        config = dataclasses.replace(config, distill=dataclasses.replace(step2, replay=max(count, before)))
    return config


def default_name(teacher: TeacherConfig) -> str:
    """Host and path of an address, or FILE:function, by which a remote teacher is known."""
    if teacher.python is not None:
        return Path(teacher.python).name
    parts = urlsplit(teacher.url or "")
    return parts.netloc.rpartition("@")[2] + parts.path.rstrip("/")


#: Images a call to the Open Inference Protocol, where nobody says.
OIP_BATCH = 64


def reserve_of(config: Config) -> int:
    """The queries of oracle.budget that are left for calls whose fate is unknown: two rounds of calls at least."""
    oracle = config.oracle
    assert oracle.budget is not None
    if not config.teacher.remote:  # a file always answers
        return 0
    return max(math.ceil(oracle.reserve * oracle.budget), 2 * (oracle.concurrency or 1))


def reserved_of_audit(config: Config) -> int:
    """The queries of audit.budget that are left for calls whose fate is unknown."""
    if not config.teacher.remote:
        return 0
    return min(config.audit.budget // 2, max(config.audit.budget // 20, 2 * (config.oracle.concurrency or 1)))


def images_a_call(config: Config) -> int:
    """Of a remote teacher, as asked for: pictures go alone, and what is in flight fits twice into the reserve."""
    teacher, oracle = config.teacher, config.oracle
    if teacher.url is not None and teacher.protocol == "hf":
        return 1
    batch = oracle.batch or (OIP_BATCH if teacher.url is not None else 1)
    if oracle.budget is None:
        return batch
    return max(1, min(batch, reserve_of(config) // (2 * (oracle.concurrency or 1))))


def store_size(config: Config) -> int:
    """The queries of a store that oracle.budget reaches for; UsageError where it is not given, or reaches for none."""
    oracle, step1 = config.oracle, config.deprivatize
    if oracle.budget is None:
        raise UsageError(
            "oracle.budget is null, and the teacher is remote: say how many queries the run may ask with "
            "--oracle.budget N, or the size of its store with --distill.replay N"
        )
    reserve = reserve_of(config)
    first = step1.steps * step1.batch if asks(config) else 0
    count = oracle.budget - config.distill.holdout - reserve - first - config.audit.budget
    if count < config.distill.batch:
        raise UsageError(
            f"oracle.budget is {oracle.budget}: after {config.distill.holdout} held out (distill.holdout), {reserve} "
            f"in reserve (oracle.reserve), {first} in step 1 and {config.audit.budget} for the audit (audit.budget), "
            f"{max(count, 0)} are left to learn from; it must be at least "
            f"{oracle.budget + config.distill.batch - count}, or distill.holdout smaller"
        )
    return count
