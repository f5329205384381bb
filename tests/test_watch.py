"""mekd watch: a run's page while it goes on, for this machine alone, from files that it only reads."""

import contextlib
import fcntl
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mekd import cli, serve, watch
from mekd.oracle.ledger import Ledger
from mekd.oracle.response import Response
from pages import parsed, section, words
from served import call


@contextlib.contextmanager
def watching(folder: Path) -> Iterator[str]:
    """`mekd watch folder --port 0` in a thread: its address."""
    threads = torch.get_num_threads()
    server, listening, line = watch.prepare([str(folder), "--port", "0"])
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield line.split(" at ")[1].split()[0]
    finally:
        server.should_exit = True
        thread.join()
        torch.set_num_threads(threads)


def news(url: str) -> dict[str, Any]:
    answer = call(f"{url}page.json")
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json()
    return found


def said(page: dict[str, Any], part: str) -> str:
    return words(parsed(f"<!DOCTYPE html><title>x</title>{page['sections'][part]}"))


def begun(finished: Path, folder: Path) -> Path:
    """The folder of a run that is at work in step 1."""
    folder.mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    shutil.copy(finished / "config.yaml", folder)
    shutil.copy(finished / "checkpoints" / "deprivatize.pt", folder / "checkpoints")
    (folder / "metrics.jsonl").write_text(
        '{"stage": "deprivatize", "step": 2, "loss_d": 1.3, "loss_g": 0.7}\n{"stage": "'
    )
    (folder / "log.txt").write_text("2026-01-01 00:00:00 deprivatize 2/9 <b>bold</b>\n")
    return folder


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_from_before_its_beginning_to_its_end(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "soon" / "run"
    with watching(folder) as url:
        assert "no run in this folder yet" in news(url)["sections"]["head"] and not folder.exists()
        assert news(url)["status"] == "waiting for the run to begin"
        begun(finished, folder)
        page = news(url)
        assert "step 1, the generator 2 of 9 steps" in said(page, "stages") and page["status"] == "at work"
        assert "deprivatize 2/9 <b>bold</b>" in said(page, "stages")
        assert page["sections"]["classes"].count("<img") == 40 and "by its last checkpoint" in said(page, "classes")
        assert page["sections"]["curves"].count("<svg") > 0 and not page["finished"]
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('deprivatize", "step": 4, "loss_d": 1.2, "loss_g": 0.8}\n')
        assert "step 1, the generator 4 of 9 steps" in said(news(url), "stages")
        shutil.copytree(finished, folder, dirs_exist_ok=True)
        page = news(url)
        assert page["finished"] and page["status"].startswith("finished") and page["sections"]["stages"] == ""
        queries = json.loads((finished / "summary.json").read_text())["queries"]
        assert f"queries {queries:,}" in said(page, "tiles") and "mekd predict" in said(page, "on")
        assert "answers" in said(page, "classes") and "Function." in said(page, "audit")
        (folder / "config.yaml").write_text("deprivatize: {steps: [")  # half of it
        page = news(url)
        assert "cannot be read now" in page["status"] and f"queries {queries:,}" in said(page, "tiles")


def test_nothing_is_written_or_locked(finished: Path, tmp_path: Path) -> None:
    """While a run holds its ledger, and when one is killed, whose write-ahead log stays."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(folder / "ledger")
    account = Ledger("holdout", folder / "ledger")
    images = torch.zeros(3, 1, 16, 16, dtype=torch.uint8)
    account.record(account.intend(images), images, Response("label", indices=torch.zeros(3, dtype=torch.long)))
    account.settle()
    with watching(folder) as url:
        assert "held out, to choose the student by 3" in said(news(url), "paid")
        with open(folder / "ledger" / "holdout.lock", "rb") as lock, pytest.raises(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the run has it still
        account.close()
        before = contents(folder)
        (folder / "metrics.jsonl").touch()
        before |= {str(folder / "metrics.jsonl"): contents(folder)[str(folder / "metrics.jsonl")]}
        assert "student by 3" in said(news(url), "paid") and contents(folder) == before
        Ledger("holdout", folder / "ledger").close()  # another run may begin meanwhile


def test_only_this_machine_may_ask(finished: Path) -> None:
    with watching(finished) as url:
        host = url.removeprefix("http://").rstrip("/")
        assert host.startswith("127.0.0.1:")
        for name in ("evil.example", f"evil.example:{host.partition(':')[2]}", "127.0.0.1.evil.example", ""):
            for path in ("", "page.json"):
                assert call(url + path, Host=name).status == 400, name
        assert call(f"{url}page.json", Host="localhost:1").status == 200
        assert call(f"{url}page.json", b"{}").status == 405 and call(f"{url}../config.yaml").status == 404
        answer = call(url)
        tree = parsed(answer.body.decode())
        assert tree.get("data-live") == "1" and section(tree, "status") is not None
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "connect-src 'self'" in policy and "unsafe" not in policy
        assert answer.headers["cache-control"] == "no-store" and answer.headers["x-content-type-options"] == "nosniff"
    _, listening, _ = watch.prepare([str(finished), "--port", "0"])
    with listening:
        assert listening.getsockname()[0] == "127.0.0.1"


def test_mistakes(finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["watch", str(finished), "--port", port]) == 2
    told = capsys.readouterr().err
    assert f"--port {port} cannot be listened on" in told and "--port 0 finds one" in told and "--host" not in told
    for given, parts in {
        (): ["RUN", "mekd watch --help"],
        (str(finished / "config.yaml"),): ["config.yaml", "a file", "a run's folder"],
        (str(finished), "--port", "70000"): ["70000", "65535"],
        (str(finished), "--host", "0.0.0.0"): ["--host"],
    }.items():
        assert cli.main(["watch", *given]) == 2
        told = capsys.readouterr().err
        assert told.startswith("mekd watch: ") and [part for part in parts if part not in told] == []
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    assert cli.main(["watch", str(finished)]) == 2
    assert "pip install 'mekd[serve]'" in capsys.readouterr().err


def test_a_run_that_stands_is_said_to(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = watch.Watched(begun(finished, tmp_path / "run"))
    assert watched.look()[1] == "at work"
    now = watch.time.time()
    monkeypatch.setattr(watch.time, "time", lambda: now + 600)
    assert "nothing was written for 10 minutes" in watched.look()[1]
