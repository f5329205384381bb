"""Two runs do not work in one folder at a time, and one that was killed is in nobody's way."""

import time
from pathlib import Path

import pytest
from filelock import FileLock

from forked import Server, is_killed
from mekd import cli
from mekd.engine import folder
from mekd.engine.folder import alone

HELD = "where another run is at work"
SHORT = "import sys\nfrom mekd.engine import folder\nfolder.PATIENCE = 0.2\nfrom mekd.cli import main\n"


def contents(out: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stage", ["run", "deprivatize", "distill", "report"])
def test_the_second_run_is_refused_and_writes_nothing(
    stage: str, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folder, "PATIENCE", 0.2)
    out = tmp_path / "run"
    out.mkdir()
    with FileLock(out / "run.lock"):
        before = contents(out)
        assert cli.main([stage, *tiny, "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert HELD in said and str(out) in said and "another --out" in said and contents(out) == before
    assert cli.main(["deprivatize", *tiny, "--out", str(out), "--dry-run"]) == 0


def test_while_a_run_works_and_once_it_is_killed(processes: Server, tiny: list[str], tmp_path: Path) -> None:
    """In step 1 without queries, where no ledger is locked either."""
    out = tmp_path / "run"
    words = ["deprivatize", *tiny, "--deprivatize.alpha", "0", "--out", str(out)]
    first = processes.begin(*words, "--deprivatize.steps", "100000")
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (out / "metrics.jsonl").exists():
            time.sleep(0.01)
        second = processes.run(*words, code=SHORT + "raise SystemExit(main(sys.argv[1:]))")
        assert second.returncode == 2 and HELD in second.stderr, second
        both = processes.together(2, *words, code=SHORT + "raise SystemExit(main(sys.argv[1:]))")
        assert [done.returncode for done in both] == [2, 2] and HELD in both[0].stderr, both
        assert not first.ended()
    finally:
        first.send_signal(9)
        assert is_killed(first.wait())
    step = ["--deprivatize.steps", "100000", "--engine.checkpoint_every", "1"]
    went_on = processes.killed("mekd.engine.checkpoint:Checkpoint.save", 2, "after", *words, *step)
    assert is_killed(went_on), went_on  # it was let in


def test_what_a_killed_run_leaves_running_holds_nobody_up(processes: Server, tmp_path: Path) -> None:
    """As a loader's processes, which notice within seconds."""
    code = (
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom mekd.engine.folder import alone\n"
        "with alone(Path(sys.argv[1])):\n"
        "    if os.fork() == 0:\n        time.sleep(3)\n        os._exit(0)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert is_killed(processes.run(str(tmp_path / "run"), code=code))
    with alone(tmp_path / "run"):
        assert (tmp_path / "run" / "run.lock").is_file()
    assert not list((tmp_path / "run").iterdir())


def test_a_run_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyError), alone(tmp_path / "there" / "a" / "b"):
        assert (tmp_path / "there" / "a" / "b").is_dir()
        raise KeyError
    assert not list((tmp_path / "there").iterdir())


def test_a_folder_that_cannot_be_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["deprivatize", "--out", str(tmp_path / "file" / "run")]) == 2
    assert "--out is" in (said := capsys.readouterr().err) and "Not a directory" in said
