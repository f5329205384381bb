"""The fingerprint: what the checkpoint of a stage depends on."""

import dataclasses
from typing import Any

import pytest

from flat_settings import settings
from mekd.config import Config, fingerprint

STAGES = ["teacher", "deprivatize", "distill", "baseline"]
#: May change when an interrupted run goes on: where things are, what they cost, and how long it shall take.
MAY_CHANGE = {
    "data.path": "/elsewhere",
    "data.workers": 9,
    "oracle.price": 0.01,
    "oracle.provider": "cuda",
    "deprivatize.steps": 1,
    "deprivatize.budget": 1,
    "distill.budget": 1,
    "engine.device": "cuda",
    "engine.checkpoint_every": 1,
    "engine.log_every": 1,
    "engine.progress": False,
}
SECTIONS = {
    "teacher": ["seed", "data", "teacher"],
    "deprivatize": ["seed", "data", "teacher", "oracle", "deprivatize"],
    "distill": ["seed", "data", "teacher", "oracle", "deprivatize", "distill"],
    "baseline": ["seed", "data", "teacher", "oracle", "distill", "evaluate"],
}


def replaced(key: str, value: Any) -> Config:
    section, _, name = key.rpartition(".")
    if not section:
        return dataclasses.replace(Config(), **{name: value})
    part = dataclasses.replace(getattr(Config(), section), **{name: value})
    return dataclasses.replace(Config(), **{section: part})


@pytest.mark.parametrize("stage", STAGES)
def test_the_fingerprint_is_what_a_stage_depends_on(stage: str) -> None:
    config = Config()
    wanted = {
        key: value
        for key, value in settings(config).items()
        if key.split(".")[0] in SECTIONS[stage] and key not in MAY_CHANGE
    }
    assert fingerprint(config, stage) == wanted
    assert wanted


@pytest.mark.parametrize("key", MAY_CHANGE)
@pytest.mark.parametrize("stage", STAGES)
def test_what_may_change_is_not_in_the_fingerprint(stage: str, key: str) -> None:
    changed = replaced(key, MAY_CHANGE[key])
    assert settings(changed) != settings(Config())
    assert fingerprint(changed, stage) == fingerprint(Config(), stage)


@pytest.mark.parametrize(
    ("key", "value", "stages"),
    [
        # Everything depends on the seed and on the images.
        ("seed", 1, STAGES),
        ("data.local_fraction", 0.2, STAGES),
        # A better teacher is another black box for all.
        ("teacher.steps", 1, STAGES),
        # Training the teacher is before any answer.
        ("oracle.decimals", 2, ["deprivatize", "distill", "baseline"]),
        # The baseline never sees the generator.
        ("deprivatize.lr", 1.0, ["deprivatize", "distill"]),
        # The generator never sees the student.
        ("distill.steps", 1, ["distill", "baseline"]),
        ("distill.code", "logits", ["distill", "baseline"]),
        # Only the baseline is part of the simulation.
        ("evaluate.baseline_steps", 1, ["baseline"]),
    ],
)
def test_what_must_not_change_is_in_the_fingerprint(key: str, value: Any, stages: list[str]) -> None:
    changed = replaced(key, value)
    assert [s for s in STAGES if fingerprint(changed, s) != fingerprint(Config(), s)] == stages
