"""Paid answers and a trained generator are used again: by another student in the same folder, and by other runs."""

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mekd import cli, files
from mekd.engine import quote
from mekd.engine.again import another_student
from mekd.engine.result import preprocess_of
from mekd.engine.run import Run
from mekd.fingerprint import LATER
from mekd.nets import build
from mekd.oracle.export import Classifier, export
from mekd.settings import GONE
from remote_run import SETTINGS, contents, total, words
from served import inside, metrics

#: A run that learns from what another one paid for: no teacher, no data.
LEARNING = {
    "distill.steps": 4, "distill.batch": 8, "distill.eval_every": 2, "distill.student": "resnet8",
    "distill.precision": SETTINGS["distill.precision"], "engine.device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def url(teacher_onnx: Path) -> Iterator[str]:
    with inside(teacher_onnx) as url:
        yield url


@pytest.fixture(scope="module")
def paid(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("paid") / "out"
    assert cli.main(words(url, out, "--yes")) == 0
    return out


@pytest.fixture
def asked(url: str) -> Iterator[None]:
    before = metrics(url)
    yield
    assert metrics(url) == before, "the teacher was asked"


def learn(out: Path, **settings: Any) -> int:
    chosen = LEARNING | {key.replace("__", "."): value for key, value in settings.items()}
    return cli.main(["run", *(str(w) for key, value in chosen.items() for w in (f"--{key}", value)), "--out", str(out)])


def test_another_run_learns_from_the_answers_of_one(paid: Path, asked: None, tmp_path: Path) -> None:
    before = contents(paid)
    assert learn(tmp_path / "other", distill__store=paid, distill__student="resnet20", distill__tau=2.0) == 0
    assert contents(paid) == before, "nothing is written there"
    other = tmp_path / "other"
    summary = json.loads((other / "summary.json").read_text())
    assert summary["queries"] == 0 and (other / "student.onnx").exists() and not (other / "replay").exists()
    card = (other / "README.md").read_text()
    assert "# resnet20, distilled from the-same\n" in card and "trained on" not in card
    assert "# answers of another run, 16 px" in (other / "report.md").read_text()
    page = (other / "report.html").read_text()
    assert "learned from 170 answers that another run paid for" in page and "--distill.replay 340" not in page
    weights = files.load(other / "student.pt")
    assert learn(other, distill__store=paid, distill__student="resnet20", distill__tau=2.0) == 0
    assert all(torch.equal(weights[name], value) for name, value in files.load(other / "student.pt").items())


def test_it_is_the_student_that_its_own_folder_would_have_made(paid: Path, asked: None, tmp_path: Path) -> None:
    own = Path(shutil.copytree(paid, tmp_path / "own"))
    assert cli.main(words("http://127.0.0.1:9", own, "--yes", stage="report")) == 0
    assert learn(tmp_path / "other", distill__store=paid, distill__steps=6, distill__eval_every=3) == 0
    mine, theirs = (files.load(folder / "student.pt") for folder in (tmp_path / "other", own))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_fewer_answers_make_the_student_that_fewer_would_have_made(
    url: str, paid: Path, asked: None, tmp_path: Path
) -> None:
    one, same = tmp_path / "one", tmp_path / "same"
    assert learn(one, distill__store=paid, distill__replay=20) == 0
    other = Path(shutil.copytree(paid, tmp_path / "cut"))
    for path in (other / "replay").glob("*.npy"):
        rows = np.load(path)
        np.save(path, np.concatenate([rows[:20], rows[:1].repeat(len(rows) - 20, 0)]))
    assert learn(same, distill__store=other, distill__replay=20) == 0
    first, second = (files.load(folder / "student.pt") for folder in (one, same))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((one / "summary.json").read_text())["queries"] == 0


def test_another_run_asks_with_the_generator_of_one(url: str, paid: Path, tmp_path: Path) -> None:
    out = tmp_path / "other"
    assert cli.main(words(url, out, "--yes", deprivatize__generator=paid, data__name="photos", seed=1)) == 0
    assert not (out / "checkpoints" / "deprivatize.pt").exists() and not (out / "photos").exists()
    assert total(out)["queries"] == 190


def test_where_the_private_images_are_there_too_what_is_sent_is_shown(
    url: str, paid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run's generator draws other images of another seed: they are agreed to in the run that sends them."""
    pytest.importorskip("matplotlib")
    asked: list[str] = []
    monkeypatch.setattr(quote, "_somebody", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    out = tmp_path / "other"
    assert cli.main(words(url, out, deprivatize__generator=paid, seed=1)) == 0
    assert len(asked) == 2 and "queries?" in asked[0] and str(out / "samples" / "sent.png") in asked[1]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"distill__store": "NOWHERE"}, ["distill.store is", "nowhere'", "replay/replay.json"]),
        ({"deprivatize__generator": "NOWHERE"}, ["deprivatize.generator is", "checkpoints/deprivatize.pt"]),
        ({"distill__store": "PAID", "distill__replay": 171}, ["distill.replay is 171", "holds 170 answers: say fewer"]),
        ({"distill__store": "PAID", "oracle__decimals": 2}, ["oracle.decimals is 2", "leave oracle.decimals out"]),
        ({"distill__store": "PAID", "oracle__response": "label"}, ["oracle.response is 'label'", "'probs'"]),
        ({"distill__store": "PAID", "teacher__onnx": "ANOTHER"}, ["teacher.onnx is", "another teacher's, the-same"]),
        ({"distill__store": "PAID", "deprivatize__generator": "OTHER"}, ["another one than drew"]),
        ({"deprivatize__generator": "INTERRUPTED"}, ["stands at step 1 of 3: finish that run first"]),
        ({"distill__store": "UNFINISHED"}, ["0 of 170 answers of replay are there: finish that run first"]),
        ({"distill__store": "OLD"}, ["do not say what they come from"]),
        ({"deprivatize__generator": "JSON"}, ["deprivatize.generator is", "replay.json is damaged or no checkpoint"]),
        ({"deprivatize__generator": "STORE"}, ["deprivatize.generator is", "holds no generator"]),
        ({"deprivatize__generator": "PAID", "teacher__onnx": "SEVEN"}, ["made for 10 classes", "has 7"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_says_why(
    paid: Path, asked: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any],
    parts: list[str],
) -> None:  # fmt: skip
    def folder(name: str) -> Path:
        return Path(shutil.copytree(paid, tmp_path / name))

    def made(name: str) -> str:
        if name == "ANOTHER" or name == "SEVEN":
            torch.manual_seed(9)
            path = tmp_path / "another.onnx"
            export(Classifier(build("resnet8", 7 if name == "SEVEN" else 10, 1)), path, (1, 16, 16))
            return str(path)
        if name == "OTHER":
            path = folder("other") / "checkpoints" / "deprivatize.pt"
            saved = files.load(path)
            saved["state"]["average"]["module.last.bias"] += 1
            files.save(path, saved)
            return str(tmp_path / "other")
        if name == "INTERRUPTED":
            path = folder("interrupted") / "checkpoints" / "deprivatize.pt"
            files.save(path, {**files.load(path), "step": 1})
            return str(tmp_path / "interrupted")
        if name == "UNFINISHED":
            (folder("unfinished") / "checkpoints" / "replay.pt").unlink()
            return str(tmp_path / "unfinished")
        if name == "OLD":
            path = folder("old") / "replay" / "replay.json"
            path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "origin"}))
            return str(tmp_path / "old")
        given = {"JSON": "replay/replay.json", "STORE": "checkpoints/replay.pt", "PAID": ""}
        return str(paid / given[name]) if name in given else str(tmp_path / "nowhere")

    chosen = {key: made(value) if str(value).isupper() else value for key, value in settings.items()}
    assert learn(tmp_path / "run", **chosen) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in parts), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["replay", "holdout"])
@pytest.mark.parametrize("damage", ["cut", "null", "origin", "count"])
def test_a_damaged_description_is_named(
    name: str, damage: str, paid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(paid, tmp_path / "other"))
    path = other / name / "replay.json"
    text, told = path.read_text(), json.loads(path.read_text())
    made = {"cut": text[: len(text) // 2], "null": "null", "origin": json.dumps({**told, "origin": {"answers": 3}})}
    path.write_text(made.get(damage) or json.dumps({**told, "count": "many"}))
    assert learn(tmp_path / "run", distill__store=other) == 2
    said = capsys.readouterr().err
    assert f"distill.store is '{other}', whose {name}/replay.json is damaged" in said and "put a copy" in said


def test_the_doctor_says_what_learning_from_a_store_needs(
    paid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its classes are the store's; the photos, whatever they show, have none. No teacher is trained."""
    images = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install 'mekd[photos]'")
    for i in range(3):
        (tmp_path / "photos").mkdir(exist_ok=True)
        images.new("RGB", (20, 20), (i, 9 * i, 90)).save(tmp_path / "photos" / f"{i}.png")
    settings = LEARNING | {"data.path": tmp_path / "photos", "distill.store": paid}
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    assert cli.forecast([*words, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "photos, 16 px, 10 classes" in said and "\nteacher, " not in said and "it fits" in said
    assert "distill: 0 queries" in said


def test_the_same_folder_keeps_its_answers_for_another_student(
    url: str, asked: None, paid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(paid, tmp_path / "out"))
    first = (out / "student.onnx").read_bytes()
    assert cli.main(words(url, out, "--yes", distill__student="resnet20")) == 0
    assert "distill.student changed; the answers stay" in capsys.readouterr().out
    assert (out / "student-resnet8.onnx").read_bytes() == first != (out / "student.onnx").read_bytes()
    assert (out / "student-resnet8.safetensors").exists()
    assert cli.main(words(url, out, "--yes", distill__student="resnet20", distill__kl_tau=2.0)) == 0
    assert cli.main(words(url, out, "--yes", distill__student="resnet20", distill__kl_tau=3.0)) == 0
    assert {"student-resnet8.pt", "student-resnet20.pt", "student-resnet20-2.pt"} <= {p.name for p in out.iterdir()}
    assert json.loads((out / "summary.json").read_text())["queries"] == 190
    with sqlite3.connect(out / "ledger" / "replay.sqlite") as database:
        assert database.execute("SELECT sum(queries) FROM calls").fetchone() == (170,)


def with_fingerprints(paid: Path, out: Path, change: Callable[[str, dict[str, Any]], dict[str, Any]]) -> Path:
    """A copy of a run whose checkpoints depend on what change makes of their stage and of what they depended on."""
    shutil.copytree(paid, out)
    for path in (out / "checkpoints").glob("*.pt"):
        saved = files.load(path)
        files.save(path, saved | {"depends": change(path.stem, saved["depends"])})
    return out


@pytest.mark.parametrize(("learnt", "resize"), [({"data.resize": 20}, 20), ({"data.name": "folder"}, 18), ({}, 16)])
def test_a_student_takes_photos_as_they_were_for_the_generator(
    paid: Path, tmp_path: Path, learnt: dict[str, Any], resize: int
) -> None:
    """Of data that is not at hand, or of other settings here, the images that were asked about were made so."""
    first = with_fingerprints(paid, tmp_path / "first", lambda stage, depends: depends | learnt)
    parsed = cli.parse(["--distill.store", str(first), "--data.resize", "40", "--out", str(tmp_path / "second")])
    assert parsed is not None and preprocess_of(Run(*parsed)).resize == resize


def test_answers_that_an_earlier_version_paid_for_are_not_paid_again(
    url: str, asked: None, paid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoints know nothing of settings that came later."""

    def earlier_ones(stage: str, depends: dict[str, Any]) -> dict[str, Any]:
        later = {*LATER, *({"data.flip", "data.shift"} if stage == "distill" else ())}
        return {key: value for key, value in depends.items() if key not in later}

    out = with_fingerprints(paid, tmp_path / "out", earlier_ones)
    lines = (out / "config.yaml").read_text().splitlines()
    earlier = [line for line in lines if not line.strip().startswith("augment:")]
    assert len(earlier) == len(lines) - 2
    (out / "config.yaml").write_text("\n".join(earlier))
    before = files.load(out / "student.pt")
    assert cli.main(words(url, out, "--yes")) == 0
    assert "changed; the answers stay" not in capsys.readouterr().out, "it goes on as it began"
    assert all(torch.equal(before[name], value) for name, value in files.load(out / "student.pt").items())
    assert cli.main(words(url, out, "--yes", distill__augment="true")) == 0
    assert "distill.augment changed; the answers stay" in capsys.readouterr().out
    assert (out / "student-resnet8.onnx").exists()


def test_a_run_that_names_settings_that_were_taken_out_is_not_paid_again(
    url: str, asked: None, paid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    had = ("holdout", "replay", "distill")
    out = with_fingerprints(paid, tmp_path / "out", lambda stage, depends: depends | (GONE if stage in had else {}))
    config = yaml.safe_load((out / "config.yaml").read_text())
    config["distill"] |= {key.split(".")[1]: value for key, value in GONE.items()}
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    before = (out / "student.onnx").read_bytes()
    assert cli.main(["run", "--config", str(out / "config.yaml"), "--out", str(out), "--yes"]) == 0
    assert "changed; the answers stay" not in capsys.readouterr().out
    assert (out / "student.onnx").read_bytes() == before
    config["distill"]["candidates"] = 4
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["run", "--config", str(out / "config.yaml"), "--out", str(out), "--yes"]) == 2
    assert "distill.candidates was taken out" in capsys.readouterr().err


def test_only_what_is_learnt_may_change() -> None:
    saved = {"distill.student": "resnet8", "distill.replay": 100, "distill.holdout": 20, "oracle.k": 5}

    def why(**changed: Any) -> str | None:
        return another_student(saved, saved | {key.replace("__", "."): value for key, value in changed.items()})

    assert why() is None and why(oracle__k=6) is None and why(distill__holdout=10) is None
    assert why(distill__replay=90) is None, "a store does not shrink"
    assert why(distill__replay=0, distill__student="resnet20") is None, "fresh queries are paid again"
    assert "grows from 100 answers to 200" in str(why(distill__replay=200))
    assert "distill.student changed" in str(why(distill__student="resnet20"))
    assert "data.flip, distill.augment changed" in str(why(distill__augment=True, data__flip=True))
