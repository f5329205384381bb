"""What a server says of its model: kept by the run, which goes on by it where the server is away, and only there."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mekd import cli
from mekd.oracle.http import Line, Refused, Reply
from remote_run import contents, total, words
from served import inside, metrics

BEST: dict[str, Any] = {"oracle__response": "topk", "oracle__k": 3}
GONE = Refused("HOST takes no connection: refused")


@pytest.fixture(scope="module")
def url(teacher_onnx: Path) -> Iterator[str]:
    with inside(teacher_onnx, "--response", "probs", "--max_batch", "8") as url:
        yield url


@pytest.fixture(scope="module")
def done(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a student, of lists that the server makes."""
    out = tmp_path_factory.mktemp("metadata") / "out"
    for stage in ("deprivatize", "distill"):
        assert cli.main(words(url, out, "--yes", stage=stage, **BEST)) == 0
    return out


@pytest.fixture
def out(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "out"))


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """answers(what, *ends): GET of a path that ends so is answered with a status, or with what is raised."""
    exchange = Line.exchange

    def answers(what: int | Exception, *ends: str) -> None:
        def instead(line: Line, method: str, path: str, *more: Any, **options: Any) -> Reply:
            if method != "GET" or not f"{line.url}{path}".endswith(ends):
                return exchange(line, method, path, *more, **options)
            if isinstance(what, Exception):
                raise what
            return Reply(what, {}, b"for a test")

        monkeypatch.setattr(Line, "exchange", instead)

    return answers


@pytest.mark.parametrize(("path", "what"), [("/v2", 503), ("/v2", GONE), ("/config", 500)], ids=str)
def test_a_server_that_is_away_for_a_moment_is_asked_as_before(
    url: str, out: Path, path: str, what: int | Exception, answers: Callable[..., None]
) -> None:
    answers(what, path)
    before = metrics(url)["mekd_images_answered_total"]
    assert cli.main(words(url, out, "--yes", stage="distill", oracle__budget=210, **BEST)) == 0
    assert metrics(url)["mekd_images_answered_total"] - before == total(out)["queries"] - 190 > 0
    assert total(out)["uncertain"] == 0
    assert json.loads((out / "teacher.json").read_text())["most"] == 8


@pytest.mark.parametrize("path", ["/v2", "/config"])
def test_it_is_not_guessed_at_what_a_server_offers(
    url: str, path: str, tmp_path: Path, answers: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    for status in (503, 404, 405, 501):
        answers(status, path)
        code = cli.main(words(url, tmp_path / "out", stage="quote", **BEST))
        said = capsys.readouterr().err
        assert code == (2 if status == 503 else 0), said
        assert status != 503 or (f"{path} does not say what the server offers" in said and "try again later" in said)
    assert not (tmp_path / "out").exists()


def test_another_address_is_not_taken_for_what_is_kept(
    url: str, tmp_path: Path, answers: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(words(url, out, stage="quote")) == 0
    assert not out.exists(), "a quote writes nothing"
    assert cli.main(words(url, out, "--yes", stage="deprivatize")) == 0
    kept, settings = contents(out), {"teacher__url": f"{url}/v2/models/WRONG", "deprivatize__steps": 5}
    for change in (lambda: None, lambda: answers(GONE, "/v2/models/WRONG")):
        change()
        assert cli.main(words(url, out, "--yes", stage="run", **settings)) == 2
        said = capsys.readouterr()
        assert "answered 404" in said.err or "Is the server running" in said.err
        assert "deprivatize: 5 steps" not in said.out and contents(out) == kept


def test_a_key_that_is_wrong_is_said_before_anything_is_trained(
    url: str, out: Path, tmp_path: Path, answers: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    assert cli.main(words(url, new, "--yes", stage="deprivatize", deprivatize__steps=2)) == 0
    answers(401, "/v2/models/teacher")
    assert cli.main(words(url, new, "--yes")) == 2
    assert "Check the key in oracle.headers" in capsys.readouterr().err
    # What was paid stays of use where the key ran out.
    assert cli.main(words(url, out, stage="distill", distill__lr=0.05, **BEST)) == 0
    assert "so it was when it was last looked at, for now" in capsys.readouterr().out


def test_other_settings_are_not_read_from_what_is_kept(
    url: str, out: Path, answers: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    answers(GONE, "/v2/models/teacher")
    assert cli.main(words(url, out, stage="distill", **BEST)) == 0
    assert cli.main(words(url, out, stage="distill", oracle__output_name="another", **BEST)) == 2
    assert "Is the server running" in capsys.readouterr().err


def test_a_folder_of_an_earlier_version_goes_on(
    url: str, out: Path, answers: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    kept = json.loads((out / "teacher.json").read_text())
    of = kept.pop("of")
    (out / "teacher.json").write_text(json.dumps(kept))
    answers(GONE, "/v2/models/teacher", "/v2/models/other")
    elsewhere = {"teacher__url": f"{url}/v2/models/other", "teacher__name": "another"}
    assert cli.main(words(url, out, stage="distill", **elsewhere, **BEST)) == 2
    assert cli.main(words(url, out, stage="distill", **BEST)) == 0
    assert json.loads((out / "teacher.json").read_text()) == {"of": of, **kept}


@pytest.mark.parametrize("damage", ["", '{"versions": 3}'], ids=range(2))
def test_a_damaged_file_is_named(
    url: str, out: Path, damage: str, answers: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    (out / "teacher.json").write_text(damage)
    answers(GONE, "/v2/models/teacher")
    assert cli.main(words(url, out, stage="distill", **BEST)) == 2
    said = capsys.readouterr().err
    assert "Is the server running" in said and f"{out / 'teacher.json'}, what it last said, is damaged" in said


def test_what_is_kept_holds_no_key(url: str, tmp_path: Path) -> None:
    out, address = tmp_path / "out", f"{url}/v2/models/teacher?key=sk-QwErTyUiOp"
    assert cli.main(words(url, out, "--yes", stage="deprivatize", teacher__url=address)) == 0
    assert json.loads((out / "teacher.json").read_text())["of"]["address"] == f"{url[7:]}/v2/models/teacher"
    assert "sk-QwErTyUiOp" not in (out / "teacher.json").read_text()
