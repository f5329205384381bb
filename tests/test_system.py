"""Where a system has less than Linux, as macOS does, something else stands in, and a run is the same."""

import errno
import math
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mekd import cli, doctor, system
from mekd.data import photo_cache
from mekd.oracle import ledger_file, replay

HERE = Path(__file__).parent.parent / "mekd"


@pytest.fixture
def poor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that Linux alone has; /proc is looked for in vain."""
    for owner, name in (
        (os, "posix_fallocate"), (os, "posix_fadvise"), (os, "sched_getaffinity"), (mmap, "MADV_WILLNEED"),
    ):  # fmt: skip
        monkeypatch.delattr(owner, name)
    read = Path.read_text

    def without_proc(path: Path, *words: str, **more: str) -> str:
        if str(path).startswith("/proc/"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return read(path, *words, **more)

    monkeypatch.setattr(Path, "read_text", without_proc)


def test_room_is_taken_and_what_a_file_holds_stays(poor: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_BLOCK", 5000)
    path, size = tmp_path / "f", 100_000
    path.write_bytes(b"begins" * 1000)
    with open(path, "r+b") as file:
        file.truncate(size // 2)  # a hole
        assert os.fstat(file.fileno()).st_blocks * 512 < size // 2
        system.allocate(file, size)
    content = path.read_bytes()
    assert content == (b"begins" * 1000).ljust(size, b"\0")
    assert path.stat().st_blocks * 512 >= size, "there are holes: the disk can still be full later"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_a_full_disk_is_an_error(poor: None) -> None:
    with open("/dev/full", "r+b", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        system.allocate(file, 4096)  # type: ignore[arg-type]


def test_cores_and_memory_where_nobody_tells(
    poor: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert system.cores() == 7
    assert 1e8 < system.memory() < 1e15
    monkeypatch.delattr(os, "sysconf")
    assert system.memory() == math.inf
    doctor.doctor()
    assert "7 cores, unknown memory" in capsys.readouterr().out


def test_a_store_is_filled_and_read_ahead(poor: None, tmp_path: Path) -> None:
    array = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, (4, 8))
    replay.will_need(array, torch.tensor([1, 3]))  # a wish: nothing happens
    assert not ledger_file._on_network(tmp_path)
    images = [torch.full((3, 4, 4), i, dtype=torch.uint8) for i in range(3)]
    from mekd.oracle.response import Response

    store = replay.Replay(tmp_path / "store", 3)
    answers = Response("probs", torch.full((3, 2), 0.5), None, None)
    store.write(0, torch.stack(images), answers)
    store.flush()
    found, _ = replay.Replay(tmp_path / "store", 3).read(slice(None))[:2]
    assert torch.equal(found, torch.stack(images))


def test_photos_are_decoded(poor: None, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install 'mekd[photos]'")
    for i in range(3):
        image.new("RGB", (8, 8), (i, 2 * i, 3 * i)).save(tmp_path / f"{i}.png")
    found = sorted(map(str, tmp_path.glob("*.png")))
    cache = photo_cache.PhotoCache(tmp_path / "cache", tmp_path, found, 8)
    assert [image[0, 0, 0].item() for image in cache.images[cache.rows]] == [0, 1, 2]
    assert sum(1 for _ in photo_cache._decoded(found, 8, None)) == 3


@pytest.mark.slow
def test_a_run_of_all_stages(poor: None, tiny: list[str], tmp_path: Path) -> None:
    assert cli.main(["run", *tiny, "--distill.replay", "40", "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.md").exists()


def test_a_slow_reader_gets_what_comes_later() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    os.set_blocking(read, False)  # where nothing came the test fails at once
    with open(read, "rb", buffering=0) as reader, open(write, "w") as stream:
        for _ in range(2000):
            system.say("x" * 99, stream)
        reader.read(1 << 20)
        system.say("and this", stream)
        assert reader.read(1 << 20).endswith(b"and this\n")
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream:
        for _ in range(2):
            system.say("nobody reads this", stream)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_a_screen_that_is_full_takes_the_next_line(tmp_path: Path) -> None:
    with open("/dev/full", "w") as stream:
        system.say("lost", stream)
        assert os.path.samestat(os.fstat(stream.fileno()), os.stat("/dev/full")), "it was let go"
        with open(tmp_path / "room", "wb") as room:
            os.dup2(room.fileno(), stream.fileno())
        system.say("and this", stream)
    assert (tmp_path / "room").read_text().endswith("and this\n")


def test_nothing_that_only_some_systems_have_is_imported() -> None:
    # What has a guard lives in mekd.system; filelock locks files everywhere.
    for path in HERE.rglob("*.py"):
        code = path.read_text("utf-8")
        for module in ("fcntl", "resource", "pwd", "grp", "termios"):
            assert f"import {module}\n" not in code, path
        if path.name != "system.py":
            for name in ("posix_fallocate", "sched_getaffinity", "sysconf", "os.uname"):
                assert name not in code, (path, name)
