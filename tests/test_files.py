"""A reader finds the old file or the new one, never half of one."""

import errno
import io
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from mekd import files
from mekd.config import Config
from mekd.engine.run import Run
from mekd.engine.runlog import RunLog
from mekd.files import WriteError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def breaks(error: BaseException) -> Callable[[BinaryIO], None]:
    """A fill that writes a part, then raises."""

    def fill(file: BinaryIO) -> None:
        file.write(b"half")
        file.flush()
        raise error

    return fill


def test_write_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    files.write(path, lambda file: file.write(b"one"))
    assert path.read_bytes() == b"one"
    files.write(path, lambda file: file.write(b"second"))
    assert path.read_bytes() == b"second" and names(path.parent) == ["file"]
    files.write_text(path, "größer ✓\n")
    assert path.read_bytes() == "größer ✓\n".encode()


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fill(file: BinaryIO) -> None:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"

    files.write(path, fill)
    assert path.read_bytes() == b"new"


def test_the_data_reach_the_disk_before_the_name_does_and_that_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, steps = tmp_path / "file", []  # what was done, and to which file
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        steps.append(("fsync", os.fstat(handle).st_ino))
        fsync(handle)

    def renamed(source: Path, target: Path) -> None:
        steps.append(("replace", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    files.write(path, lambda file: file.write(b"four"))
    file, folder = path.stat().st_ino, tmp_path.stat().st_ino
    assert steps == [("fsync", file), ("replace", file), ("fsync", folder)]


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("enforce fail")], ids=["OSError", "torch"]
)
def test_a_failing_fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, earlier: bool) -> None:
    path = tmp_path / "file"
    if earlier:
        path.write_bytes(b"old")
    # torch makes a RuntimeError of a full disk.
    monkeypatch.setattr(torch, "save", lambda state, file: breaks(error)(file))
    with pytest.raises(WriteError, match="could not be written") as caught:
        files.save(path, {})
    assert str(path) in str(caught.value) and "Free some space" in str(caught.value)
    assert ("the earlier one stays" in str(caught.value)) == earlier
    assert names(tmp_path) == (["file"] if earlier else [])
    assert not earlier or path.read_bytes() == b"old"
    assert error in (caught.value.__cause__, getattr(caught.value.__cause__, "__cause__", None))


@pytest.mark.parametrize(
    "error",
    # Memory that runs out while pictures are drawn is no full disk.
    [
        ValueError("no"),
        KeyboardInterrupt(),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_fill_that_fails_otherwise_leaves_nothing_either(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(type(error)):
        files.write(path, breaks(error))
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_lines_are_added_and_a_full_disk_is_said(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.txt"
    for line in ("größer ✓", "two"):
        files.append(path, line)
    assert path.read_text("utf-8") == "größer ✓\ntwo\n"
    with pytest.raises(WriteError, match=r"log.txt could not be written .*Not a directory"):
        files.append(path / "run" / "log.txt", "three")
    if Path("/dev/full").exists():
        full = tmp_path / "full.txt"
        full.symlink_to("/dev/full")
        with pytest.raises(WriteError, match=r"full.txt could not be written .*No space left"):
            files.append(full, "three")
        for name in ("log.txt", "metrics.jsonl"):
            (tmp_path / name).symlink_to("/dev/full")
        run = Run(Config(), tmp_path)
        for write in (lambda: run.log("line"), lambda: RunLog(run, "teacher", 2, 1, {}).write(1, loss=1.0)):
            with pytest.raises(WriteError, match="Free some space"):
                write()


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(WriteError, match="Is a directory"):
        files.write_text(tmp_path / "file", "text")
    assert names(tmp_path) == ["file"]


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(WriteError, match="runs/file could not be written"):
        files.write_text(tmp_path / "runs" / "file", "text")
    assert (tmp_path / "runs").read_text() == "a file"


def test_a_part_left_by_a_kill_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".file.part").write_bytes(b"a long rest of an earlier attempt")
    files.write(tmp_path / "file", lambda file: file.write(b"new"))
    assert (tmp_path / "file").read_bytes() == b"new" and names(tmp_path) == ["file"]


# -- save and load -----------------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "a.pt"
    state: dict[str, Any] = {
        "weights": OrderedDict(w=torch.randn(3, 4), n=torch.tensor(7)),
        "half": torch.randn(5).half(),
        "step": 12,
        "seconds": 0.5,
        "name": "distill",
        "none": None,
        "rows": [1, (2, 3)],
    }
    files.save(path, state)
    again = files.load(path)
    assert list(again) == list(state) and names(path.parent) == ["a.pt"]
    assert torch.equal(again["weights"]["w"], state["weights"]["w"]) and torch.equal(again["half"], state["half"])
    assert [again[k] for k in ("step", "seconds", "name", "none", "rows")] == [12, 0.5, "distill", None, [1, (2, 3)]]


@pytest.mark.parametrize("content", [b"", b'{"held": ["a', b"[]", b"\xff", b"[" * 5000])
def test_a_small_result_that_is_damaged_is_named(tmp_path: Path, content: bytes) -> None:
    run = Run(Config(), tmp_path)
    assert run.read_json("held.json") is None
    run.write_json("held.json", {"held": ["a"]})
    assert run.read_json("held.json") == {"held": ["a"]}
    (tmp_path / "held.json").write_bytes(content)
    with pytest.raises(files.DamagedError, match=r"held.json is damaged .*: put a copy back; or delete it"):
        run.read_json("held.json")


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    files.save(path, {"step": 1, "weights": torch.arange(10)})
    # In a process of its own, because the kernel refuses every file beyond the limit.
    code = f"""
import resource, signal
from pathlib import Path
import torch
from mekd import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (100, 5_000, 150_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        files.save(Path({str(path)!r}), {{"step": 2, "weights": torch.zeros(50_000)}})
        print("written")
    except files.WriteError as error:
        print("refused", str(error)[:200].replace(chr(10), " "))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all(line.startswith(f"refused {path} could not be written") for line in lines), lines
    assert names(tmp_path) == ["a.pt"]
    again = files.load(path)
    assert again["step"] == 1 and torch.equal(again["weights"], torch.arange(10))


def test_a_missing_file_is_called_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.load(tmp_path / "a.pt")


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "half", "zeros", "a bit of a weight"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.pt"
    weights = torch.randn(1000)
    files.save(path, {"weights": weights})
    whole = path.read_bytes()
    at = whole.index(weights.numpy().tobytes()) + 2001
    changed = {
        "empty": b"",
        "text": b"not a checkpoint\n",
        "cut": whole[:-1],
        "half": whole[: len(whole) // 2],
        "zeros": bytes(len(whole)),
        "a bit of a weight": bytes(byte ^ (i == at) for i, byte in enumerate(whole)),
    }
    path.write_bytes(changed[damage])
    with pytest.raises(ValueError, match=r"is damaged or no checkpoint .*; put a copy back, or start") as caught:
        files.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("content", "kind"), [([1, 2], "list"), (torch.zeros(2), "Tensor"), (None, "NoneType")])
def test_what_is_no_dict_is_no_checkpoint(tmp_path: Path, content: object, kind: str) -> None:
    path = tmp_path / "a.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"holds a {kind}, not a dict; it is no checkpoint"):
        files.load(path)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path, form: str) -> None:
    path, target = tmp_path / "a.pt", tmp_path / "made"
    buffer = io.BytesIO()
    if form == "torch":
        torch.save({"step": 1, "bomb": Bomb(target)}, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=False)
    else:
        pickle.dump({"step": 1, "bomb": Bomb(target)}, buffer, protocol=2)  # torch's own
        pickle.loads(buffer.getvalue())
    assert target.is_dir(), "the file is harmless, and tests nothing"
    target.rmdir()
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="is damaged or no checkpoint"):
        files.load(path)
    assert not target.exists()


def test_what_cannot_be_opened_is_not_called_damaged(tmp_path: Path) -> None:
    # A folder stands for all that open() refuses; root may read any file.
    (tmp_path / "a.pt").mkdir()
    with pytest.raises((OSError, ValueError), match="Is a directory") as caught:
        files.load(tmp_path / "a.pt")
    assert "delete" not in str(caught.value)
