"""What the result of a stage depends on, and what a configuration's defaults mean on this machine."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mekd.config import PRECISIONS, Config
from mekd.settings import flatten

#: Settings that an interrupted run may be resumed with: where things are, what they cost, how long it shall take, and
#: what runs the teacher, which changes its answers by rounding alone.
FREE = {
    "data.path", "data.workers", "data.on_error",
    "oracle.price", "oracle.provider", "oracle.batch", "oracle.precision", "oracle.cuda_graph",
    "deprivatize.steps", "deprivatize.budget", "distill.budget",
}  # fmt: skip
_ANSWERS = (
    "oracle.response", "oracle.k", "oracle.decimals", "oracle.transport", "oracle.output", "oracle.output_name",
    "oracle.num_classes", "oracle.classes", "oracle.mean", "oracle.std",
)  # fmt: skip
_COMPUTED = ("engine.device", "engine.batch_norm")
#: What changes the result of a stage, sections or settings; run.depends() adds the digests of what it begins with.
_DEPENDS = {
    "teacher": ("seed", "data", "teacher", *_COMPUTED),
    "deprivatize": ("seed", "data", "deprivatize", "engine.compile", *_COMPUTED),
    "holdout": ("seed", "distill.holdout", *_ANSWERS),
    "replay": ("seed", "distill.replay", *_ANSWERS),
    "distill": ("seed", "distill", *_ANSWERS, *_COMPUTED),
    "baseline": ("seed", "data", "distill", "evaluate.baseline_steps", *_ANSWERS, *_COMPUTED),
}


def asks(config: Config) -> bool:
    """Whether step 1 asks the teacher: a label says nothing about confidence, so y = 1 for every image."""
    return config.deprivatize.alpha > 0 and config.oracle.response != "label"


def fingerprint(config: Config, stage: str) -> dict[str, Any]:
    """The settings that change a stage's result, by dotted name."""
    depends = _DEPENDS[stage]
    if stage == "deprivatize" and asks(config):
        depends = (*depends, *_ANSWERS)
    flat = dict(flatten(dataclasses.asdict(config)))
    chosen = {key: value for key, value in flat.items() if key in depends or key.split(".")[0] in depends}
    found = {key: value for key, value in chosen.items() if key not in FREE}
    if "engine.device" in found:
        found["engine.device"] = found["engine.device"].split(":")[0]  # one card rounds as another
    return found


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
    return config
