"""What a remote teacher is sent is agreed to by whom it goes to, and anew where that is somebody else."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mekd import cli
from mekd.config import AuditConfig, Config, DataConfig, DistillConfig, EvaluateConfig
from mekd.engine import quote
from mekd.engine.run import Run
from mekd.errors import UsageError
from mekd.teacher_config import OracleConfig, TeacherConfig
from remote_run import total, words


class Images:
    """A data set of so many images, which nobody looks at."""

    def count(self, part: str) -> int:
        return 40


@pytest.fixture
def config() -> Config:
    return Config(
        data=DataConfig(name="photos", size=16), teacher=TeacherConfig(protocol="hf"),
        oracle=OracleConfig(num_classes=10), distill=DistillConfig(holdout=20, replay=100, batch=8),
        evaluate=EvaluateConfig(enabled=True, ask_teacher=False, baseline=True), audit=AuditConfig(budget=0),
    )  # fmt: skip


def confirm(config: Config, out: Path, host: str, agreed: bool = False, **evaluate: Any) -> None:
    teacher = replace(config.teacher, url=f"https://{host}/models/m")
    run = Run(replace(config, teacher=teacher, evaluate=replace(config.evaluate, **evaluate)), out)
    run.__dict__["data"] = Images()
    quote.confirm(run, ["distill", "evaluate"], agreed)


def test_private_images_go_to_nobody_else_than_was_agreed_to(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    confirm(config, tmp_path, "a.example", agreed=True)
    confirm(config, tmp_path, "a.example")
    capsys.readouterr()
    with pytest.raises(UsageError, match="agree to the quote"):
        confirm(config, tmp_path, "b.example")
    assert "your PRIVATE images to the teacher, b.example/models/m" in capsys.readouterr().out
    confirm(config, tmp_path, "b.example", agreed=True, baseline=False)
    with pytest.raises(UsageError, match="agree to the quote"):  # what a.example may get is not b.example's
        confirm(config, tmp_path, "b.example")


def test_a_teachers_name_lets_drawn_images_alone_go_to_another_address(config: Config, tmp_path: Path) -> None:
    named = replace(config, teacher=replace(config.teacher, name="the-same"))
    confirm(named, tmp_path, "a.example", agreed=True)
    confirm(named, tmp_path, "b.example", baseline=False)
    with pytest.raises(UsageError, match="agree to the quote"):
        confirm(named, tmp_path, "b.example")
    other = replace(config, teacher=replace(config.teacher, name="another"))
    with pytest.raises(UsageError, match="agree to the quote"):
        confirm(other, tmp_path, "a.example", baseline=False)


def test_an_earlier_versions_agreement_holds_for_drawn_images(config: Config, tmp_path: Path) -> None:
    (tmp_path / "confirmed.json").write_text(json.dumps({"queries": 160, "real_images": ["PRIVATE images"]}))
    confirm(config, tmp_path, "a.example", baseline=False)
    with pytest.raises(UsageError, match="agree to the quote"):
        confirm(config, tmp_path, "a.example")


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_an_agreement_that_cannot_be_read_is_none(config: Config, tmp_path: Path, content: str) -> None:
    (tmp_path / "confirmed.json").write_text(content)
    with pytest.raises(UsageError, match="agree to the quote"):
        confirm(config, tmp_path, "a.example")
    confirm(config, tmp_path, "a.example", agreed=True)
    confirm(config, tmp_path, "a.example")


def test_nobody_is_asked_where_nobody_reads(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(UsageError, match="there is no terminal to be asked on"):
        confirm(config, tmp_path, "a.example")


def test_what_step_1_sends_while_it_learns_is_agreed_to_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing can be looked at then, and that is what the question and the quote say; step 2 asks again."""
    teacher = tmp_path / "teacher.py"
    teacher.write_text("import numpy as np\ndef ask(x):\n    return np.eye(10, dtype='f')[x.sum((1, 2, 3)) % 10]\n")
    asked: list[str] = []
    replies = iter(["y", "n", "y", "n"])
    monkeypatch.setattr(quote, "_somebody", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or next(replies))
    settings = {
        "teacher__url": "null", "teacher__python": f"{teacher}:ask", "oracle__num_classes": 10, "deprivatize__steps": 2,
        "deprivatize__alpha": 0.2, "distill__replay": 30,
    }  # fmt: skip
    out = tmp_path / "out"
    assert cli.main(words("", out, **settings)) == 2
    said = capsys.readouterr()
    assert "deprivatize sends what the generator draws while it learns from your images" in said.out
    assert "nothing was asked" in said.err and "--deprivatize.alpha 0" in said.err
    assert total(out)["queries"] == 0 and len(asked) == 2 and "nobody can look at before" in asked[1]
    assert cli.main(words("", out, **settings)) == 2
    assert len(asked) == 4 and "nobody can look at before" in asked[2] and "sent.png" in asked[3]
    assert total(out)["queries"] == 16
