"""The fingerprint: what changes the result of a stage, and nothing else."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

import mekd
from flat_settings import replaced, settings
from mekd.config import Config, DistillConfig, TeacherConfig
from mekd.fingerprint import FREE, LABELS_IMAGE, fingerprint, resolve

STAGES = ["teacher", "deprivatize", "holdout", "replay", "distill", "baseline"]
#: May change when an interrupted run goes on: where things are, what they cost, what computes the teacher, how long it
#: shall take.
MAY_CHANGE = {
    "data.path": "/elsewhere",
    "data.workers": 9,
    "data.on_error": "skip",
    "oracle.price": 0.01,
    "oracle.provider": "cuda",
    "oracle.batch": 7,
    "oracle.precision": "float16",
    "oracle.cuda_graph": True,
    "oracle.budget": 9,
    "oracle.reserve": 0.1,
    "oracle.concurrency": 3,
    "oracle.rate": 2.0,
    "oracle.image_rate": 2.0,
    "oracle.timeout": 1.0,
    "oracle.patience": 1.0,
    "oracle.headers": {"x": "{env:KEY}"},
    "oracle.binary": True,
    "oracle.base64": True,
    "teacher.url": "http://elsewhere/v2/models/plants",
    "deprivatize.steps": 1,
    "deprivatize.budget": 1,
    "distill.budget": 1,
    "engine.checkpoint_every": 1,
    "engine.log_every": 1,
    "engine.progress": False,
    "engine.profile": True,
    "engine.track": ["wandb"],
}


@pytest.mark.parametrize("key", MAY_CHANGE)
@pytest.mark.parametrize("stage", STAGES)
def test_what_may_change_is_not_in_the_fingerprint(stage: str, key: str) -> None:
    changed = replaced(key, MAY_CHANGE[key])
    assert settings(changed) != settings(Config())
    assert fingerprint(changed, stage) == fingerprint(Config(), stage)


@pytest.mark.parametrize(
    ("key", "value", "stages"),
    [
        # Everything depends on the seed.
        ("seed", 1, STAGES),
        # The images are what the teacher of an experiment, the generator and the baseline learn from.
        ("data.local_fraction", 0.2, ["teacher", "deprivatize", "baseline"]),
        # How a teacher was trained is in its digest.
        ("teacher.steps", 1, ["teacher"]),
        # Other answers are other answers.
        ("oracle.decimals", 2, ["deprivatize", "holdout", "replay", "distill", "baseline"]),
        ("oracle.output_name", "scores", ["deprivatize", "holdout", "replay", "distill", "baseline"]),
        # The generator's weights are in its digest, which the stages after it depend on.
        ("deprivatize.lr", 1.0, ["deprivatize"]),
        # Paid answers know nothing of the student.
        ("distill.student", "resnet20", ["distill", "baseline"]),
        ("distill.lr", 1.0, ["distill", "baseline"]),
        ("distill.holdout", 5, ["holdout", "distill", "baseline"]),
        ("distill.code", "logits", ["distill", "baseline"]),
        # Only the baseline is part of the simulation.
        ("evaluate.baseline_steps", 1, ["baseline"]),
        # Another processor rounds otherwise; another card of the same kind does not count.
        ("engine.device", "cuda:1", ["teacher", "deprivatize", "distill", "baseline"]),
        ("engine.batch_norm", "synchronised", ["teacher", "deprivatize", "distill", "baseline"]),
        # Another dropout is drawn where D is compiled.
        ("engine.compile", "default", ["deprivatize"]),
    ],
)
def test_what_must_not_change_is_in_the_fingerprint(key: str, value: Any, stages: list[str]) -> None:
    asking = replaced("deprivatize.alpha", 0.5)
    changed = replaced(key, value, asking)
    assert [s for s in STAGES if fingerprint(changed, s) != fingerprint(asking, s)] == stages


def test_a_step_1_that_asks_nothing_depends_on_no_teacher() -> None:
    silent = replaced("deprivatize.alpha", 0.0)
    assert not [key for key in fingerprint(silent, "deprivatize") if key.startswith("oracle.")]
    assert fingerprint(silent, "deprivatize") == fingerprint(replaced("oracle.k", 3, silent), "deprivatize")


def test_two_cards_of_a_kind_are_one() -> None:
    one, other = (fingerprint(replaced("engine.device", device), "distill") for device in ("cuda:0", "cuda:1"))
    assert one == other


#: Advice that a resumed run refuses, and need not take: it is given before anything was paid for or saved, or names
#: another folder, or another student of the answers in it (the page's commands: tests/test_page_commands.py).
BEFORE = {
    "data.name", "data.path", "data.loader", "data.size", "data.flip", "data.shift", "data.local_fraction",
    "teacher.onnx", "teacher.python", "teacher.arch", "teacher.checkpoint", "teacher.lr",
    "oracle.response", "oracle.output", "oracle.output_name", "oracle.num_classes", "oracle.classes",
    "oracle.mean", "oracle.std", "oracle.transport", "oracle.decimals", "oracle.size", "oracle.input_name",
    "oracle.unknown", "distill.replay",
    "deprivatize.alpha", "deprivatize.augment", "deprivatize.lr", "deprivatize.width", "deprivatize.d_width",
    "deprivatize.dropout", "distill.lr", "distill.student", "distill.checkpoint", "distill.steps",
    "evaluate.enabled", "audit.holdout", "engine.device",
}  # fmt: skip


def test_every_setting_that_a_message_advises_is_accepted_on_resume() -> None:
    advised = set()
    for path in Path(mekd.__file__).parent.rglob("*.py"):
        text = path.read_text("utf-8")
        advised |= set(re.findall(r"--([a-z0-9_]+\.[a-z0-9_]+)", text))
        advised |= set(re.findall(r"(?:set|say|choose a \w+|raise) ([a-z0-9_]+\.[a-z0-9_]+)", text))
    refused = {key for stage in STAGES for key in fingerprint(Config(), stage)}
    assert {"data.on_error", "oracle.batch", "oracle.provider"} <= advised and refused.isdisjoint(FREE)
    assert advised & refused - BEFORE == set(), "advised, but a resumed run refuses them"


def test_labels_have_an_image_weight_of_their_own() -> None:
    def weight(config: Config, kept: dict[str, Any]) -> float | None:
        return resolve(config, kept, lambda device: False).distill.image

    labels = replaced("oracle.response", "label")
    assert weight(labels, {}) == LABELS_IMAGE
    assert weight(Config(), {}) is None  # the preset's
    paper = dataclasses.replace(labels.distill, preset="paper")
    assert weight(dataclasses.replace(labels, distill=paper), {}) is None
    own = dataclasses.replace(labels.distill, image=7.0)
    assert weight(dataclasses.replace(labels, distill=own), {}) == 7.0
    # A run that began before goes on as it began.
    assert weight(labels, {"seed": 0}) is None
    assert weight(labels, {"distill.image": None}) is None
    assert weight(labels, {"distill.image": LABELS_IMAGE}) == LABELS_IMAGE


def test_a_teachers_name_tells_no_folder_of_this_machine() -> None:
    """It goes up with a student, into its card and its files."""
    for url, name in (
        ("https://x.org/{file:/home/me/keys/acme}/models/a?key={env:KEY}", "x.org/{file:acme}/models/a"),
        ("https://x.org/{env:TENANT}/models/a", "x.org/{env:TENANT}/models/a"),
        ("https://x.org/models/a", "x.org/models/a"),
    ):
        config = Config(teacher=TeacherConfig(url=url), distill=DistillConfig(replay=100))
        assert resolve(config, {}, lambda device: False).teacher.name == name
        kept = {"teacher.url": url, "teacher.name": "an older name"}
        assert resolve(config, kept, lambda device: False).teacher.name == "an older name"
