"""Answers that no checkpoint holds yet go on only under the teacher and the reading that they came of."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from ledger_teacher import accounts
from mekd import cli
from remote_run import total, words

TEACHER = """
import os
from pathlib import Path
import numpy as np
from mekd.oracle.http import Refused

def classify(images):
    left = Path(os.environ["LEFT"])
    count = int(left.read_text())
    if count == 0:
        raise Refused("the service is gone")
    left.write_text(str(count - 1))
    kind = os.environ.get("KIND", "scores")
    if kind == "names":
        return ["cat"] * len(images)
    if kind == "pairs":
        return [[(str(i), 0.3 / (i + 1)) for i in range(5)] for _ in images]
    scores = np.random.default_rng(int(images.sum())).random((len(images), 10)).astype(np.float32)
    return scores / scores.sum(1, keepdims=True)
"""
#: A call holds one image, and they go one after another; nothing is waited for.
SETTINGS = {
    "teacher__url": "null", "oracle__num_classes": 10, "oracle__batch": 1, "oracle__concurrency": 1,
    "oracle__patience": 0.01, "oracle__output": "probs", "distill__replay": 30,
    "deprivatize__steps": 2, "distill__steps": 2,
}  # fmt: skip


class Place:
    """A run's folder, and a teacher that answers so many calls more and is gone then."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.out, self._left, self._patch = folder / "out", folder / "left", patch
        self.teacher = folder / "teacher.py"
        self.teacher.write_text(TEACHER)
        patch.setenv("LEFT", str(self._left))

    def run(self, answers: int, kind: str = "scores", stage: str = "distill", **settings: Any) -> int:
        self._patch.setenv("KIND", kind)
        self._left.write_text(str(answers))
        chosen = SETTINGS | {"teacher__python": f"{self.teacher}:classify"} | settings
        return cli.main(words("", self.out, "--yes", stage=stage, **chosen))


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder after step 1, which asked nothing."""
    folder = tmp_path_factory.mktemp("generator")
    with pytest.MonkeyPatch.context() as patch:
        place = Place(folder, patch)
        assert place.run(0, stage="deprivatize") == 0
    return place.out


@pytest.fixture
def place(generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A copy of that."""
    place = Place(tmp_path, monkeypatch)
    shutil.copytree(generator, place.out)
    return place


def test_another_teachers_answers_are_not_gone_on_from(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run(12) == 3 and accounts(place.out)["holdout"]["queries"] == 12
    config = (place.out / "config.yaml").read_text()
    capsys.readouterr()
    assert place.run(1000, teacher__name="another") == 2
    said = capsys.readouterr().err
    assert "teacher" in said and "another --out" in said and "--teacher.name the-same" in said, said
    assert total(place.out)["queries"] == 12 and (place.out / "config.yaml").read_text() == config
    assert place.run(1000) == 0 and total(place.out)["queries"] == 20 + 30


def test_another_reading_is_not_mixed_in(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run(12, oracle__output="logits") == 3
    for settings in ({"oracle__output": "probs"}, {"oracle__output": "logits", "oracle__response": "label"}):
        capsys.readouterr()
        assert place.run(1000, **settings) == 2
        said = capsys.readouterr().err
        assert "oracle.output was 'logits' and is 'probs'" in said or "oracle.response was 'probs'" in said, said
    assert total(place.out)["queries"] == 12
    assert place.run(1000, oracle__output="logits") == 0 and total(place.out)["queries"] == 50


def test_advice_after_a_first_answer_that_cannot_be_used_works(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only uncertain attempts are booked: another response may come, and they stay in the books."""
    assert place.run(1000, kind="pairs") == 2
    assert "--oracle.response topk" in capsys.readouterr().err
    assert (total(place.out)["queries"], total(place.out)["uncertain"]) == (0, 1)
    assert place.run(1000, kind="pairs", oracle__response="topk", oracle__k=5) == 0
    assert (total(place.out)["queries"], total(place.out)["uncertain"]) == (50, 1)


def test_step_1_keeps_what_its_answers_are_of_too(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.out = place.out.with_name("asking")
    settings = {"deprivatize__alpha": 0.2, "engine__checkpoint_every": 100}
    assert place.run(12, stage="deprivatize", **settings) == 3 and total(place.out)["queries"] == 12
    capsys.readouterr()
    assert place.run(1000, stage="deprivatize", oracle__output="logits", **settings) == 2
    assert "oracle.output was 'probs' and is 'logits'" in capsys.readouterr().err
    assert place.run(1000, stage="deprivatize", **settings) == 0 and total(place.out)["queries"] == 16


def test_evaluate_keeps_what_its_answers_are_of_too(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run(1000) == 0
    settings = {"evaluate__enabled": "true", "evaluate__ask_teacher": "true", "oracle__budget": 2000}
    assert place.run(7, stage="evaluate", **settings) == 3
    capsys.readouterr()
    assert place.run(1000, stage="evaluate", oracle__decimals=2, **settings) == 2
    assert "oracle.decimals was None and is 2" in capsys.readouterr().err
    assert accounts(place.out)["evaluate-test"]["queries"] == 7
    assert place.run(1000, stage="evaluate", **settings) == 0
    assert accounts(place.out)["evaluate-test"]["queries"] == 360


def test_an_account_without_such_a_file_goes_on(place: Place) -> None:
    """It is of an earlier version's run."""
    assert place.run(12) == 3
    (place.out / "ledger" / "holdout.answers").unlink()
    assert place.run(1000) == 0 and total(place.out)["queries"] == 50


def test_a_damaged_file_is_named(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run(12) == 3
    (place.out / "ledger" / "holdout.answers").write_text("{")
    assert place.run(1000) == 2 and "holdout.answers is damaged" in capsys.readouterr().err
