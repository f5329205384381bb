"""`mekd serve` as a command: its line, its signals, and what it says of mistakes."""

import signal
import socket
import urllib.error
from pathlib import Path

import pytest

from mekd import cli, serve
from onnx_files import echo
from serve_requests import FED, infer, tensor
from served import serving

pytest.importorskip("starlette", reason="starlette is not installed: pip install 'mekd[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'mekd[serve]'")

ONE = {"inputs": [tensor(FED)]}


# -- the command -------------------------------------------------------------------------------------------


def test_the_command(small: Path) -> None:
    with serving(small, "--name", "ein Tier") as served:
        assert served.line == f"serving echo.onnx as {served.url}/v2/models/ein%20Tier and /hf/ein%20Tier"
        assert served.name == "ein Tier" and not served.url.endswith(":0")
        assert infer(served.url, ONE, name="ein%20Tier").status == 200
        assert served.metrics()["mekd_images_answered_total"] == 1
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(20) == 0


def test_a_server_that_is_killed_can_come_back(small: Path) -> None:
    with serving(small) as served:
        port = int(served.url.rpartition(":")[2])
        served.kill()
        with pytest.raises(urllib.error.URLError):
            served.metrics()
    with serving(small, port=port) as again:
        assert again.url == served.url and again.metrics()["mekd_images_answered_total"] == 0
        again.process.send_signal(signal.SIGINT)
        assert again.process.wait(20) == 0


def test_what_the_command_says_comes_out_of_the_helper() -> None:
    with pytest.raises(RuntimeError, match=r"status 2.*no such file"), serving("nowhere.onnx"):
        pass


@pytest.fixture
def files(small: Path, tmp_path: Path) -> Path:
    """A folder of files to be refused, and one to be served."""
    (tmp_path / "echo.onnx").write_bytes(small.read_bytes())
    (tmp_path / "page.onnx").write_text("<html>log in</html>")
    (tmp_path / "cut.onnx").write_bytes(small.read_bytes()[:100])
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "three").write_text("a\nb\nc\n")
    echo(tmp_path / "open.onnx", shape=("m", 1, "h", "w"))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["nowhere.onnx"], ["nowhere.onnx", "no such file"]),
        (["page.onnx"], ["page.onnx", "a web page", "must be an ONNX model"]),
        (["cut.onnx"], ["cut.onnx", "no ONNX model"]),
        (["open.onnx"], ["open.onnx", "--image CH H W"]),
        (["echo.onnx", "--image", "1", "3", "2"], ["(1, 3, 2)", "(1, 2, 3)"]),
        (["echo.onnx", "--response", "topk", "--k", "7"], ["--k is 7", "between 1 and 6"]),
        (["echo.onnx", "--k", "2"], ["--k is 2", "--response", "topk"]),
        (["echo.onnx", "--output", "probs"], ["--output"]),
        (["echo.onnx", "--output_name", "other"], ["'other'", "--output_name", "scores"]),
        (["echo.onnx", "--keys", "nowhere"], ["--keys", "nowhere", "one a line"]),
        (["echo.onnx", "--keys", "empty"], ["--keys", "empty", "one a line"]),
        (["echo.onnx", "--keys", "binary"], ["--keys", "binary", "UTF-8"]),
        (["echo.onnx", "--keys", "."], ["--keys", "one a line"]),
        (["echo.onnx", "--classes", "nowhere"], ["--classes", "nowhere", "one a line"]),
        (["echo.onnx", "--classes", "three"], ["--classes", "3 were expected", "6 classes"]),
        (["echo.onnx", "--std", "0"], ["--std is 0.0", "above 0"]),
        (["echo.onnx", "--mean", "1", "2"], ["--mean is 1.0 2.0", "1 or 1 numbers"]),
        (["echo.onnx", "--fail_rate", "0.7", "--cut_rate", "0.7"], ["--fail_rate", "1.4", "at most 1"]),
        (["echo.onnx", "--name", "a/b"], ["--name", "a/b"]),
        (["echo.onnx", "--port", "70000"], ["--port", "70000", "between 0 and 65535"]),
        (["echo.onnx", "--batch", "none"], ["--batch", "none", "at least 1"]),
        (["echo.onnx", "--host", "203.0.113.1"], ["--host 203.0.113.1", "Choose"]),
        (["echo.onnx", "--response", "all"], ["--response", "all", "topk"]),
        (["echo.onnx", "--prot", "1"], ["--prot", "mekd serve --help"]),
        ([], ["FILE.onnx", "mekd serve --help"]),
    ],
)
def test_mistakes(
    files: Path, words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    assert cli.main(["serve", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("mekd serve: ") and said.count("\n") == 1 and "oracle" not in said
    assert [part for part in parts if part not in said] == []


def test_a_port_in_use(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", str(small), "--port", port]) == 2
    said = capsys.readouterr().err
    assert f"--port {port}" in said and "Address already in use" in said and "--port 0" in said


def test_the_packages_are_named(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    assert cli.main(["serve", str(small)]) == 2
    assert "starlette and uvicorn cannot be imported: pip install 'mekd[serve]'" in capsys.readouterr().err


def test_the_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0 and "\n  serve " in capsys.readouterr().out
    assert cli.main(["sevre"]) == 2 and "serve" in capsys.readouterr().err
