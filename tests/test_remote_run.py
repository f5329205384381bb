"""Runs whose teacher is behind an address: the books, what is agreed to, what is kept secret, what never goes up."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from flat_settings import replaced
from mekd import cli, files
from mekd.config import Config, DataConfig
from mekd.engine.run import Run
from mekd.fingerprint import resolve
from remote_run import contents, total, words
from served import inside, metrics


@pytest.fixture(scope="module")
def url(teacher_onnx: Path) -> Iterator[str]:
    with inside(teacher_onnx) as url:
        yield url


@pytest.fixture(scope="module")
def books(url: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A run with a student, and what the server counted of it."""
    out = tmp_path_factory.mktemp("run") / "out"
    before = metrics(url)
    for stage in ("deprivatize", "distill"):
        assert cli.main(words(url, out, "--yes", stage=stage)) == 0
    return out, {name: count - before.get(name, 0) for name, count in metrics(url).items()}


@pytest.fixture
def out(books: tuple[Path, dict[str, float]], tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(books[0], tmp_path / "out"))


@pytest.fixture
def asked(url: str) -> Iterator[dict[str, float]]:
    """For a test that must not ask: what the server has counted before is what it has counted afterwards."""
    before = metrics(url)
    yield before
    assert metrics(url) == before, "the teacher was asked"


def store(out: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.load(path) for path in (out / "replay").glob("*.npy")}


def test_the_books_are_the_servers(books: tuple[Path, dict[str, float]]) -> None:
    out, server = books
    found = total(out)
    assert found["queries"] == 190 == server["mekd_images_answered_total"] == server["mekd_images_computed_total"]
    assert found["calls"] == server['mekd_requests_total{status="200"}']
    assert found["bytes_down"] == server["mekd_bytes_sent_total"] and found["uncertain"] == 0
    assert len(store(out)["images"]) == 170


def test_nothing_is_asked_before_somebody_agrees(
    url: str, asked: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(url, tmp_path)) == 2
    said = capsys.readouterr()
    assert "agree to the quote with --yes, since there is no terminal to be asked on" in said.err
    assert "the run: 200 queries at most" in said.out


def test_what_was_agreed_to_is_asked_about_again_only_beyond_it(
    url: str, asked: dict[str, float], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = files.load(out / "student.pt")
    for settings, status in (({}, 0), ({"oracle__budget": 201}, 2), ({}, 0), ({"oracle__price": 0.5}, 0)):
        assert cli.main(words(url, out, stage="distill", **settings)) == status, capsys.readouterr().err
        said = capsys.readouterr()
        assert ("at most" in said.out) == (status == 2)
    again = files.load(out / "student.pt")
    assert all(torch.equal(kept[key], again[key]) for key in kept) and len(store(out)["images"]) == 170


def test_a_larger_budget_grows_the_store(url: str, out: Path, tmp_path: Path) -> None:
    before, paid = metrics(url), store(out)
    assert cli.main(words(url, out, "--yes", stage="distill", oracle__budget=300)) == 0
    grown = store(out)
    assert len(grown["images"]) == 300 - 20 - 15 and paid.keys() == grown.keys()
    assert all(np.array_equal(grown[name][:170], paid[name]) for name in paid)
    more = metrics(url)["mekd_images_computed_total"] - before["mekd_images_computed_total"]
    assert more == 95 and total(out)["queries"] == 285 and total(out)["uncertain"] == 0
    # The student begins anew: it is that of a run which had the larger budget from the first.
    fresh = tmp_path / "fresh"
    (fresh / "checkpoints").mkdir(parents=True)
    shutil.copy(out / "checkpoints" / "deprivatize.pt", fresh / "checkpoints")
    assert cli.main(words(url, fresh, "--yes", stage="distill", oracle__budget=300)) == 0
    one, other = files.load(out / "student.pt"), files.load(fresh / "student.pt")
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_quote_and_dry_run_pay_nothing(
    url: str, asked: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(url, tmp_path, stage="quote", oracle__price=0.5, oracle__rate=2)) == 0
    said = capsys.readouterr().out
    assert "distill: 190 queries, 190 calls" in said and "price 95.00" in said and "price 100.00 at most" in said
    assert cli.main(words(url, tmp_path, "--dry-run")) == 0
    assert "every stage went through; the teacher was asked nothing" in capsys.readouterr().out
    assert not (tmp_path / "student.pt").exists() and not (tmp_path / "ledger").exists()


def test_evaluate_asks_a_remote_teacher_nothing(url: str, asked: dict[str, float], out: Path) -> None:
    assert cli.main(words(url, out, stage="evaluate", evaluate__enabled="true")) == 0
    found = json.loads((out / "evaluate.json").read_text())
    assert found["simulation_queries"] == 0 and found["student_accuracy"] is not None
    assert cli.main(words(url, out, "--yes", stage="report", evaluate__enabled=True)) == 0
    report = (out / "report.md").read_text()
    assert "send real images" not in report and "of which none was sent" in report
    assert "the class of the label (rows)" in report or "No pictures" in report
    assert found["teacher_accuracy"] is None and found["baseline_accuracy"] is None
    page = (out / "report.html").read_text()
    assert "<dt>test accuracy</dt>" in page and "the class of the label (rows)" in page and "plain baseline" not in page


def test_real_images_are_agreed_to_of_their_own(
    url: str, asked: dict[str, float], out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The budget was agreed to, and that photos of one's own go up as well was not."""
    simulated = {"evaluate__enabled": "true", "oracle__budget": 2000, "distill__replay": 170}
    (out / "confirmed.json").write_text(json.dumps({"queries": 2000}))
    for real, said in (("ask_teacher", "your labelled test images"), ("baseline", "your PRIVATE images")):
        run = Path(shutil.copytree(out, tmp_path / real))
        others = {"evaluate__ask_teacher": "false", "evaluate__baseline": "false"} | {f"evaluate__{real}": "true"}
        assert cli.main(words(url, run, stage="evaluate", **simulated, **others)) == 2
        captured = capsys.readouterr()
        assert f"evaluate sends {said} to the teacher" in captured.out and "agree to the quote" in captured.err


def test_the_card_counts_real_images_by_the_books(url: str, out: Path) -> None:
    """They were sent, whether or not a simulation came to its end, or is that of an earlier student."""
    simulated = {"evaluate__enabled": "true", "oracle__budget": 2000, "distill__replay": 170}
    simulated |= {"evaluate__baseline": "true", "evaluate__baseline_steps": 1}
    assert cli.main(words(url, out, "--yes", stage="evaluate", **simulated)) == 0
    (out / "evaluate.json").unlink()
    assert cli.main(["report", "--out", str(out)]) == 0
    card = (out / "README.md").read_text()
    assert "sent 144 real images" in card and "No private photo was sent" not in card


def test_private_images_are_sent_only_where_that_was_said() -> None:
    remote = replaced("evaluate.ask_teacher", True, replaced("teacher.url", "http://127.0.0.1:1/v2/models/x"))
    remote = replaced("oracle.budget", 5000, remote)
    assert resolve(remote, {}, lambda _: False).evaluate.baseline is False
    assert resolve(replaced("evaluate.baseline", True, remote), {}, lambda _: False).evaluate.baseline is True
    assert resolve(replaced("evaluate.ask_teacher", True), {}, lambda _: False).evaluate.baseline is True


def test_another_address_is_another_teacher_unless_its_name_is_said(
    url: str, asked: dict[str, float], out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ["--teacher.name", "the-same"]
    command = words(url.replace("127.0.0.1", "localhost"), out, "--yes", stage="distill")
    place = command.index("--teacher.name")
    assert command[place : place + 2] == named
    without = command[:place] + command[place + 2 :]
    assert cli.main(without) == 2
    said = capsys.readouterr().err
    assert "--teacher.name the-same, if it is the same teacher at another address" in said, said
    assert cli.main(command) == 0


def test_best_classes_are_asked_for_by_number_where_names_are_listed(
    teacher_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, other = tmp_path / "names.txt", tmp_path / "other.txt"
    names.write_text("".join(f"digit {n}\n" for n in range(10)))
    other.write_text("".join(f"digit {n}\n" for n in reversed(range(10))))
    best = {"oracle__response": "topk", "oracle__k": 3}
    with inside(teacher_onnx, "--classes", names, "--response", "probs") as url:
        assert cli.main(words(url, tmp_path / "out", "--yes", oracle__classes=other, **best)) == 2
        assert "and oracle.classes lists 'digit" in capsys.readouterr().err
        assert cli.main(words(url, tmp_path / "out", "--yes", oracle__classes=names, **best)) == 0
    found = store(tmp_path / "out")
    assert found["indices"].shape == (170, 3) and found["indices"].min() >= 0


def test_best_logits_are_not_taken_for_shares(
    teacher_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server whose scores are logits lists the best of them, which may look like per cent: one image is paid."""
    best = {"oracle__response": "topk", "oracle__k": 3}
    with inside(teacher_onnx) as url:
        assert cli.main(words(url, tmp_path / "out", "--yes", **best)) == 2
        assert "--oracle.output logits has the whole output asked for" in capsys.readouterr().err
        assert metrics(url)["mekd_images_answered_total"] == 1
        assert cli.main(words(url, tmp_path / "out", "--yes", oracle__output="logits", **best)) == 0
    found = store(tmp_path / "out")
    assert found["indices"].shape == (170, 3)
    assert found["values"][:, 0].min() > 0.1 and found["values"].sum(1).max() <= 1.001, "shares of a softmax"


def test_secrets_are_in_no_file_and_no_message(
    teacher_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    key, other = "sk-QwErTyUiOpAsDfGh", "sk-ZxCvBnMlKjHgFdSa"
    (tmp_path / "keys").write_text(f"{key}\n")
    out = tmp_path / "out"
    headers = ["--oracle.headers", '{Authorization: "Bearer {env:MEKD_TEST_KEY}"}']
    with inside(teacher_onnx, "--keys", tmp_path / "keys") as url:
        monkeypatch.setenv("MEKD_TEST_KEY", other)
        assert cli.main(words(url, out, "--yes", *headers)) == 2
        monkeypatch.setenv("MEKD_TEST_KEY", key)
        assert cli.main(words(url, out, "--yes", *headers)) == 0
        assert metrics(url)["mekd_images_computed_total"] == total(out)["queries"] == 190
    said = capfd.readouterr()
    assert "answered 401" in said.err and "oracle.headers" in said.err
    assert not [secret for secret in (key, other) if secret in said.out + said.err]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["queries"] == 190 and summary["uncertain"] == 0
    found = contents(out)
    assert b"{env:MEKD_TEST_KEY}" in found["config.yaml"]
    assert not [name for name, content in found.items() for one in (key, other) if one.encode() in content]


RECORDER = """
import os, threading, numpy as np
turn = threading.Lock()
def ask(images):
    with turn:
        np.save(os.path.join({path!r}, str(len(os.listdir({path!r})))), images)
    pixels = images.reshape(len(images), -1).astype(np.float64)
    scores = np.exp(pixels @ np.linspace(-1, 1, 2560).reshape(256, 10) / 2e4)
    return (scores / scores.sum(1, keepdims=True)).astype(np.float32)
"""


def test_no_private_image_goes_up(tmp_path: Path) -> None:
    """Every image that was sent, against every private one: by a function, which sees what an SDK would."""
    recorded, file = tmp_path / "sent", tmp_path / "teacher.py"
    recorded.mkdir()
    file.write_text(RECORDER.format(path=str(recorded)))
    settings = {"teacher__python": f"{file}:ask", "oracle__num_classes": 10, "evaluate__enabled": "true"}
    for stage in ("deprivatize", "distill", "evaluate"):
        assert cli.main(words("", tmp_path / "out", "--yes", stage=stage, **settings)) == 0
    sent = np.concatenate([np.load(path) for path in recorded.iterdir()]).transpose(0, 3, 1, 2)
    assert len(sent) == total(tmp_path / "out")["queries"] == 190
    data = Run(Config(data=DataConfig(name="digits", size=16)), tmp_path / "other").data
    private = np.concatenate([images.numpy() for images, _ in data.once("local", 256)])
    test = np.concatenate([images.numpy() for images, _ in data.once("test", 256)])
    real = np.concatenate([private, test]).reshape(-1, 256).astype(np.float32)
    flat = sent.reshape(-1, 256).astype(np.float32)
    assert len(private) > 100 and real.max() > 100, "these are no pixels"
    squares = (flat**2).sum(1)[:, None] + (real**2).sum(1)[None] - 2 * flat @ real.T
    assert squares.min() / 256 > 100, "an image that was sent is a real one, but for 10 steps of 255 a pixel"
