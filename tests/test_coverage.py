"""Whether the first answers show enough classes, and what happens in a run's folder where they do not."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mekd import cli
from mekd.config import Config, DeprivatizeConfig
from mekd.engine import coverage, quote
from mekd.engine.coverage import describe, measure, plausible, suspicious
from mekd.oracle.response import Response
from remote_run import contents, total, words
from served import inside, metrics


def label(*classes: int) -> Response:
    return Response("label", indices=torch.tensor(classes))


def probs(*rows: list[float]) -> Response:
    return Response("probs", values=torch.tensor(rows))


def test_the_measures_of_some_answers() -> None:
    found = measure([label(0, 0, 0, 1), label(1, 2, 3)], 10)
    assert found["answers"] == 7 and found["classes"] == 10 and found["classes_met"] == 4
    assert found["majority_class"] == 0 and found["majority_share"] == pytest.approx(3 / 7, abs=1e-6)
    assert found["mean_confidence"] is None and not found["alike"]
    # Two classes met once, one met twice: 2 * 1 / (2 * 2) = 0.5, rounded to even.
    assert found["never_met"] == 0
    assert measure([label(*range(9))], 100)["never_met"] == 36  # 9 * 8 / 2
    assert measure([label(*range(9))], 12)["never_met"] == 3, "no more than there are"
    assert measure([probs([0.8, 0.2], [0.4, 0.6])], 2)["mean_confidence"] == pytest.approx(0.7)
    absent = Response("topk", torch.tensor([[0.9, 0.0], [0.0, 0.0]]), torch.tensor([[1, -1], [-1, -1]]))
    assert measure([absent], 3)["classes_met"] == 1
    assert "4 of 10 classes in 7 answers, the most frequent in 42.9 %" in describe(found)


@pytest.mark.parametrize(("answers", "classes"), [(1, 10), (10, 10), (1000, 10), (100, 1000), (1000, 1000)])
def test_as_many_classes_are_plausible_as_a_fair_draw_shows(answers: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(classes, (400, answers), generator=generator)
    shown = torch.zeros(400, classes).scatter_(1, drawn, 1.0).sum(1)
    assert plausible(answers, classes) == pytest.approx(float(shown.mean()), abs=4 * float(shown.std()) / 20 + 1e-6)


def test_what_betrays_a_mistake_is_said() -> None:
    chance = suspicious(measure([probs([0.26, 0.25, 0.25, 0.24], [0.24, 0.25, 0.25, 0.26])], 4))
    assert len(chance) == 1 and "0.25, which is chance" in chance[0]
    same = suspicious(measure([probs([0.9, 0.1]), probs([0.9, 0.1])], 2))
    assert len(same) == 1 and "never change" in same[0]
    assert not suspicious(measure([probs([0.9, 0.1], [0.2, 0.8])], 2))
    assert not suspicious(measure([label(1, 1, 1)], 2)), "one class may be all that is shown"


@pytest.fixture(scope="module")
def url(teacher_onnx: Path) -> Iterator[str]:
    with inside(teacher_onnx) as url:
        yield url


def run(url: str, out: Path, *more: object, **settings: Any) -> int:
    """A run of 400 queries, 20 held out: 40 answers are looked at, 20 of them of the store."""
    chosen = {"oracle__budget": 400, "distill__coverage": 1.0} | settings
    stages = ("deprivatize", "distill")
    return max(cli.main(words(url, out, "--yes", *more, stage=stage, **chosen)) for stage in stages)


@pytest.fixture(scope="module")
def stopped(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("coverage") / "out"
    assert run(url, out) == 3
    return out


@pytest.fixture
def out(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "out"))


def test_it_stops_before_much_is_spent_and_says_what_to_do(
    url: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert total(out)["queries"] == 36, "10 % of the store of 360, the holdout's 20 among them"
    before = metrics(url)
    assert run(url, out) == 3
    assert metrics(url) == before, "nothing is paid to stop again"
    said = capsys.readouterr().err
    assert "distill.coverage 1" in said and "--distill.coverage 0" in said and "--deprivatize.steps 6" in said
    found = json.loads((out / "coverage.json").read_text())
    assert found["stopped"] and found["answers"] == 36 and found["classes_met"] < found["least"]


def test_another_runs_generator_is_not_made_longer(
    url: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its recipe is what it was trained with, so another one is named, which works; and coverage 0 does."""
    other, new = tmp_path / "other", tmp_path / "new"
    taken = {"deprivatize__generator": out, "distill__coverage": 1.0, "oracle__budget": 400}
    assert cli.main(words(url, other, "--yes", stage="distill", **taken)) == 3
    said = capsys.readouterr().err
    assert "another --deprivatize.generator and another --out" in said and "--distill.coverage 0" in said
    assert "--deprivatize.steps" not in said and "--data.size" not in said
    assert cli.main(words(url, tmp_path / "longer", "--yes", stage="deprivatize", deprivatize__steps=5)) == 0
    assert cli.main(words(url, new, "--yes", stage="distill", **taken | {
        "deprivatize__generator": tmp_path / "longer", "distill__coverage": 0.1,
    })) == 0  # fmt: skip
    assert total(new)["queries"] == 380 and total(other)["queries"] == 36
    assert cli.main(words(url, other, "--yes", stage="distill", **taken | {"distill__coverage": 0})) == 0
    assert total(other)["queries"] == 380


@pytest.mark.parametrize(
    ("settings", "named", "not_named"),
    [
        ({"after": "first"}, ["--deprivatize.steps 18", "--deprivatize.lr"], ["width", "--data.size"]),
        ({"dp": 8.0}, ["--deprivatize.width", "--data.size", "spends deprivatize.dp anew"], ["--deprivatize.steps"]),
        ({}, ["--deprivatize.steps 18", "--deprivatize.width", "--data.size"], ["deprivatize.dp"]),
    ],
)
def test_what_another_setting_decides_is_not_advised(
    settings: dict[str, Any], named: list[str], not_named: list[str]
) -> None:
    config = Config(deprivatize=DeprivatizeConfig(steps=9, **settings))
    said = coverage._advice(SimpleNamespace(config=config))  # type: ignore[arg-type]
    assert [part for part in named if part not in said] == [] == [part for part in not_named if part in said]


def test_told_to_go_on_it_goes_on(url: str, out: Path) -> None:
    before = metrics(url)["mekd_images_answered_total"]
    assert run(url, out, distill__coverage=0) == 0
    assert metrics(url)["mekd_images_answered_total"] - before == 380 - 36, "paid once"
    assert total(out)["queries"] == 380 and not json.loads((out / "coverage.json").read_text())["stopped"]


@pytest.mark.parametrize(
    ("settings", "anew"), [({"deprivatize__steps": 5}, False), ({"deprivatize__d_width": 1.0}, True)], ids=str
)
def test_another_generator_asks_anew_and_the_old_answers_stay_booked(
    url: str, out: Path, settings: dict[str, Any], anew: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    old = contents(out / "replay")
    before = metrics(url)["mekd_images_answered_total"]
    assert run(url, out, **settings, distill__coverage=0.1) == 0
    said = capsys.readouterr().out
    assert "generation 1: its answers stay booked" in said and ("begins anew" in said) == anew
    # The budget is that of the run: what the first generation took is not there for the second.
    assert total(out)["queries"] == 380 == 36 + metrics(url)["mekd_images_answered_total"] - before
    assert contents(out / "replay@1") == old and (out / "checkpoints" / "holdout@1.pt").exists()
    assert (out / "checkpoints" / "deprivatize@1.pt").exists() == anew
    assert run(url, out, **settings, distill__coverage=0.1) == 0
    assert total(out)["queries"] == 380


def test_another_generators_images_are_shown_and_agreed_to_anew(
    url: str, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    asked: list[str] = []

    def answer(question: str) -> str:
        asked.append(question)
        return "no"

    monkeypatch.setattr(quote, "_somebody", lambda: True)
    monkeypatch.setattr("builtins.input", answer)
    first, before = json.loads((out / "sent.json").read_text()), metrics(url)
    longer: dict[str, Any] = {"oracle__budget": 400, "distill__coverage": 1.0, "deprivatize__steps": 5}
    assert cli.main(words(url, out, **longer)) == 2
    assert len(asked) == 1 and "sent.png" in asked[0], "the budget had been agreed to, these images had not"
    assert "the images were not agreed to" in capsys.readouterr().err and metrics(url) == before
    second = json.loads((out / "sent.json").read_text())
    assert second["generator"] != first["generator"] and (out / "samples" / "sent.png").exists()
    assert json.loads((out / "sent@1.json").read_text()) == first and (out / "samples" / "sent@1.png").exists()
    assert cli.main(words(url, out, **longer | {"deprivatize__steps": 6})) == 2 and len(asked) == 2
    assert json.loads((out / "sent.json").read_text())["generator"] not in (first["generator"], second["generator"])
    assert cli.main(words(url, out, **longer)) == 2
    assert "stands at step 6, and deprivatize.steps is 5" in capsys.readouterr().err and metrics(url) == before


def test_the_end_of_the_input_is_no_yes(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends(question: str) -> str:
        raise EOFError

    monkeypatch.setattr(quote, "_somebody", lambda: True)
    monkeypatch.setattr("builtins.input", ends)
    assert cli.main(words(url, tmp_path / "out")) == 2
    assert "nothing was asked: agree to the quote" in capsys.readouterr().err


def test_a_refusal_changes_no_file(url: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(out)
    longer: dict[str, Any] = {"distill__coverage": 1.0, "deprivatize__steps": 5}
    assert cli.main(words(url, out, "--yes", **longer, oracle__budget=60)) == 2
    assert "earlier generations took 36" in capsys.readouterr().err
    assert cli.main(words(url, out, "--yes", **longer, distill__student="torchvision:resnet1")) == 2
    assert cli.main(words(url, out, **longer, oracle__budget=900)) == 2, "nobody agreed"
    assert {**contents(out), "log.txt": b""} == {**before, "log.txt": b""}, "only the quote was logged"
