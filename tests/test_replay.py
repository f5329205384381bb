"""Answers that were paid for are kept on the disk as they came."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mekd.files import WriteError
from mekd.oracle.replay import Replay
from mekd.oracle.response import KINDS, Response, answer

COUNT, CLASSES, IMAGE = 11, 6, (3, 4, 5)


def drawn(
    kind: str = "probs", decimals: int | None = None, dtype: torch.dtype = torch.uint8
) -> tuple[Tensor, Response]:
    """COUNT images and the answers to them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (COUNT, *IMAGE), dtype=torch.uint8, generator=generator)
    if dtype != torch.uint8:
        images = torch.rand(COUNT, *IMAGE, generator=generator)
    logits = 3 * torch.randn(COUNT, CLASSES, generator=generator)
    return images, answer(logits, kind, output="logits", k=3, decimals=decimals)


def fill(store: Replay, images: Tensor, response: Response, batch: int = 4) -> None:
    for start in range(0, COUNT, batch):
        rows = slice(start, start + batch)
        store.write(start, images[rows], response[rows])


def check(found: tuple[Tensor, Response, Tensor], images: Tensor, response: Response) -> None:
    assert found[0].dtype == images.dtype and torch.equal(found[0], images)
    assert (found[1].kind, found[1].decimals) == (response.kind, response.decimals)
    assert (found[1].values is None, found[1].indices is None) == (response.values is None, response.indices is None)
    for one, other in zip(found[1].tensors(), response.tensors(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("decimals", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(tmp_path: Path, kind: str, decimals: int | None) -> None:
    images, response = drawn(kind, decimals)
    store = Replay(tmp_path / "replay", COUNT)
    fill(store, images, response)
    assert len(store) == COUNT
    check(store.read(slice(None)), images, response)
    store.state_dict()
    # Opened anew, as after a restart.
    again = Replay(tmp_path / "replay", COUNT)
    again.load_state_dict({"begun": True})
    check(again.read(slice(None)), images, response)
    check(again.read(slice(3, 8)), images[3:8], response[3:8])
    rows = torch.tensor([10, 0, 4, 4])
    check(again.read(rows), images[rows], response[rows])


def test_unrounded_images(tmp_path: Path) -> None:
    images, response = drawn(dtype=torch.float32)
    store = Replay(tmp_path, COUNT)
    fill(store, images, response)
    check(Replay(tmp_path, COUNT).read(slice(None)), images, response)


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    images, response = drawn()
    store = Replay(tmp_path, COUNT)
    fill(store, images, response)
    for rows in (slice(None), torch.arange(COUNT)):
        pixels, answers, _ = store.read(rows)
        pixels.zero_()
        answers.tensors()[0].zero_()
        check(store.read(slice(None)), images, response)


def test_rows_are_written_again_after_a_restart(tmp_path: Path) -> None:
    images, response = drawn("topk")
    fill(Replay(tmp_path, COUNT), images.flip(0), response[torch.arange(COUNT).flip(0)])
    store = Replay(tmp_path, COUNT)
    fill(store, images, response, batch=3)
    check(Replay(tmp_path, COUNT).read(slice(None)), images, response)


def test_half_a_store_keeps_its_half(tmp_path: Path) -> None:
    images, response = drawn()
    Replay(tmp_path, COUNT).write(4, images[4:8], response[4:8])
    check(Replay(tmp_path, COUNT).read(slice(4, 8)), images[4:8], response[4:8])


def test_the_space_is_taken_at_the_first_answer(tmp_path: Path) -> None:
    images, response = drawn()
    Replay(tmp_path, 50_000).write(0, images, response)
    for name, width in (("images", 60), ("values", 4 * CLASSES)):
        status = (tmp_path / f"{name}.npy").stat()
        assert status.st_size >= 50_000 * width
        # No holes: blocks of 512 bytes that the disk has really given.
        assert status.st_blocks * 512 >= status.st_size


@pytest.mark.parametrize("name", ["images", "values", "indices", "nuisance", "checks"])
def test_a_row_that_is_not_what_was_written_is_refused(tmp_path: Path, name: str) -> None:
    images, response = drawn("topk")
    n = torch.randn(COUNT, 3)
    Replay(tmp_path, COUNT).write(0, images, response, n)
    array = np.load(tmp_path / f"{name}.npy", mmap_mode="r+")
    array.view(np.uint8).reshape(COUNT, -1)[7, -1] ^= 1
    array.flush()
    store = Replay(tmp_path, COUNT)
    check(store.read(slice(0, 7)), images[:7], response[:7])
    for rows in (slice(5, 9), torch.tensor([10, 7])):
        with pytest.raises(ValueError, match=rf"row 7 of {tmp_path} is not what was written.*Put a copy"):
            store.read(rows)
    store.write(7, images[7:8], response[7:8], n[7:8])
    check(store.read(slice(None)), images, response)


def test_a_store_of_an_earlier_version_has_no_checks(tmp_path: Path) -> None:
    images, response = drawn()
    fill(Replay(tmp_path, COUNT), images, response)
    path = tmp_path / "replay.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"arrays": [name for name in about["arrays"] if name != "checks"]}))
    (tmp_path / "checks.npy").unlink()
    check(Replay(tmp_path, COUNT).read(slice(None)), images, response)
    fill(Replay(tmp_path, COUNT + 2, grows=True), images, response)
    check(Replay(tmp_path, COUNT + 2).read(slice(0, COUNT)), images, response)


@pytest.mark.parametrize("damage", ["cut", "emptied", "gone"])
def test_a_file_that_is_cut_short_is_named(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "replay"
    fill(Replay(folder, COUNT), *drawn())
    path = folder / "values.npy"
    if damage == "gone":
        path.unlink()
    else:
        os.truncate(path, 0 if damage == "emptied" else path.stat().st_size - 8)
    with pytest.raises(ValueError, match=r"values\.npy cannot be read .*missing or cut short"):
        Replay(folder, COUNT)


def test_an_empty_folder_is_not_made_by_looking(tmp_path: Path) -> None:
    store = Replay(tmp_path / "replay", COUNT)
    assert not (tmp_path / "replay").exists()
    with pytest.raises(ValueError, match="replay is missing, but its checkpoint is there"):
        store.load_state_dict({"begun": True})


@pytest.mark.parametrize("more", [1, 5000])
def test_a_store_grows_by_any_number(tmp_path: Path, more: int) -> None:
    images, response = drawn()
    fill(Replay(tmp_path, COUNT), images, response)
    grown = Replay(tmp_path, COUNT + more, grows=True)
    check(grown.read(slice(0, COUNT)), images, response)


def test_the_first_rows_of_a_longer_store(tmp_path: Path) -> None:
    images, response = drawn()
    fill(Replay(tmp_path, COUNT), images, response)
    part = Replay(tmp_path, 5, part=True)
    assert len(part) == 5
    check(part.read(slice(None)), images[:5], response[:5])
    part.will_need(torch.arange(5))
    with pytest.raises(ValueError, match=f"holds {COUNT} queries, the configuration says {COUNT + 1}"):
        Replay(tmp_path, COUNT + 1, part=True)


@pytest.mark.parametrize("count", [COUNT - 1, COUNT + 1])
def test_another_count(tmp_path: Path, count: int) -> None:
    fill(Replay(tmp_path, COUNT), *drawn())
    with pytest.raises(ValueError, match=f"holds {COUNT} queries, the configuration says {count}"):
        Replay(tmp_path, count)


@pytest.mark.parametrize(("kind", "decimals"), [("logits", None), ("label", None), ("probs", 2)])
def test_answers_of_another_kind_are_refused(tmp_path: Path, kind: str, decimals: int | None) -> None:
    images, response = drawn()
    fill(Replay(tmp_path, COUNT), images, response)
    with pytest.raises(ValueError, match="probs"):
        fill(Replay(tmp_path, COUNT), *drawn(kind, decimals))
    check(Replay(tmp_path, COUNT).read(slice(None)), images, response)


# -- a full disk -------------------------------------------------------------------------------------------


def refuse(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let the disk be full after so many files."""
    given = 0

    def allocate(handle: int, offset: int, length: int) -> None:
        nonlocal given
        given += 1
        if given > after:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", allocate)


def test_a_full_disk_is_known_before_anything_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, response = drawn()
    refuse(monkeypatch, after=0)
    with pytest.raises(WriteError, match=r"images.npy needs 0 MB \(.*No space left on device\); free some space"):
        Replay(tmp_path, COUNT).write(0, images[:4], response[:4])
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_at_the_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, response = drawn()
    store = Replay(tmp_path, COUNT)
    refuse(monkeypatch, after=1)
    with pytest.raises(WriteError, match=r"values.npy needs"):
        store.write(0, images[:4], response[:4])
    assert list(tmp_path.iterdir()) == []
    # With space again, the same store goes on.
    monkeypatch.undo()
    fill(store, images, response)
    check(store.read(slice(None)), images, response)


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[str]]]:
    """What happens where no file may pass 20 kB: the error's type, and the files that are left."""
    folder = tmp_path_factory.mktemp("limited")
    code = f"""
import json, resource, signal
from pathlib import Path
import torch
from mekd.oracle.replay import Replay
from mekd.oracle.response import Response
folder = Path({str(folder)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
found = {{}}
for name, image, classes in (("images", (1, 32, 32), 3), ("values", (1, 2, 2), 1000)):
    response = Response("probs", torch.full((2, classes), 1 / classes))
    try:
        Replay(folder / name, 40).write(0, torch.zeros(2, *image, dtype=torch.uint8), response)
        error = "none"
    except Exception as raised:
        error = type(raised).__name__
    found[name] = error, sorted(path.name for path in (folder / name).glob("*"))
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["images", "values"])
def test_the_kernel_refuses(limited: dict[str, tuple[str, list[str]]], name: str) -> None:
    error, left = limited[name]
    assert error == "WriteError" and left == []


def test_the_arrays_are_plain_npy_files(tmp_path: Path) -> None:
    # Other tools can read what was paid for.
    images, response = drawn("topk")
    store = Replay(tmp_path, COUNT)
    fill(store, images, response)
    store.state_dict()
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), images)
    np.testing.assert_array_equal(np.load(tmp_path / "indices.npy"), response.indices)
