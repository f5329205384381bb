"""Client and server are killed in the middle, and two processes are one run: nothing is lost but what was in flight."""

import random
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from forked import Server, is_killed
from mekd import files
from remote_run import total, words
from served import Served, metrics, serving

#: Sixteen calls of one image in flight, 20 ms each: 900 queries in two seconds or more; a tenth may be lost.
SETTINGS = {
    "oracle__batch": 1, "oracle__concurrency": 16, "oracle__budget": 900, "oracle__reserve": 0.2,
    "distill__holdout": 40, "oracle__patience": 120,
}  # fmt: skip
QUERIES = 900 - 180


@pytest.fixture(scope="module")
def expected(teacher_onnx: Path, processes: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to."""
    out = tmp_path_factory.mktemp("undisturbed")
    with serving(teacher_onnx) as server:
        done = processes.run(*words(server.url, out, "--yes", **SETTINGS))
        assert done.returncode == 0, done.stderr
        assert metrics(server.url)["mekd_images_computed_total"] == total(out)["queries"] == QUERIES
    return out


def assert_the_same(out: Path, expected: Path) -> None:
    found, wanted = files.load(out / "student.pt"), files.load(expected / "student.pt")
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
    for store in ("holdout", "replay"):
        for path in (expected / store).glob("*.npy"):
            assert np.array_equal(np.load(path), np.load(out / store / path.name)), path.name


def reach(server: Served, computed: float) -> None:
    """Wait until the server has computed so much."""
    deadline = time.monotonic() + 120
    while server.metrics()["mekd_images_computed_total"] < computed:
        assert time.monotonic() < deadline, "it is never reached"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_client_that_is_killed_loses_what_was_in_flight(
    teacher_onnx: Path, processes: Server, expected: Path, tmp_path: Path
) -> None:
    chance, at = random.Random(time.time_ns()), 0.0
    with serving(teacher_onnx, "--latency_ms", 20) as server:
        for _ in range(4):
            running = processes.begin(*words(server.url, tmp_path, "--yes", **SETTINGS))
            at += chance.randint(20, 150)
            reach(server, at)
            time.sleep(chance.random() / 50)
            running.send_signal(9)
            assert is_killed(running.wait()), "it was done before it was killed"
        done = processes.run(*words(server.url, tmp_path, "--yes", **SETTINGS))
        assert done.returncode == 0, done.stderr
        computed = server.metrics()["mekd_images_computed_total"]
    found = total(tmp_path)
    assert found["queries"] == QUERIES
    assert 0 < found["uncertain"] <= 4 * 2 * 16  # sent, or answered and not yet booked
    # What was booked as sent a moment before the kill may not have gone up.
    assert QUERIES < computed <= found["queries"] + found["uncertain"] <= 900
    assert_the_same(tmp_path, expected)


@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back_loses_what_was_in_flight(
    teacher_onnx: Path, processes: Server, expected: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serving(teacher_onnx, "--latency_ms", 20, port=port) as server:
        running = processes.begin(*words(server.url, tmp_path, "--yes", **SETTINGS))
        reach(server, 150)
        first = server.metrics()["mekd_images_computed_total"]
        server.kill()
    with serving(teacher_onnx, "--latency_ms", 20, port=port) as server:
        done = running.wait()
        assert done.returncode == 0, done.stderr
        second = server.metrics()["mekd_images_computed_total"]
    found = total(tmp_path)
    assert found["queries"] == QUERIES and 0 < found["uncertain"] <= 16
    assert second <= QUERIES - first + 16 and first + second <= found["queries"] + found["uncertain"]
    assert_the_same(tmp_path, expected)


@pytest.mark.slow
def test_two_processes_share_one_budget_and_one_rate(
    teacher_onnx: Path, processes: Server, expected: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()  # two processes train another generator
    shutil.copy(expected / "checkpoints" / "deprivatize.pt", tmp_path / "checkpoints")
    with serving(teacher_onnx) as server:
        settings = SETTINGS | {"oracle__rate": 150}
        begun = time.monotonic()
        for done in processes.together(2, *words(server.url, tmp_path, "--yes", stage="distill", **settings)):
            assert done.returncode == 0, done.stderr
        assert time.monotonic() - begun > QUERIES / 150 - 0.5, "each took the rate for itself"
        assert server.metrics()["mekd_images_computed_total"] == QUERIES
    found = total(tmp_path)
    assert found["queries"] == QUERIES and found["uncertain"] == 0
    for name in ("images", "values"):  # the same questions and answers, whoever asked
        one, two = (np.load(folder / "replay" / f"{name}.npy") for folder in (expected, tmp_path))
        assert np.array_equal(one, two), name
