"""Client and server are killed in the middle, and two processes are one run: nothing is lost but what was in flight."""

import contextlib
import random
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from forked import Running, Server, is_killed
from mekd import files
from remote_run import total, words
from served import metrics, serving

IN_FLIGHT, CLIENT_KILLS, SERVER_KILLS = 32, 20, 10
#: Calls of one image, 20 ms each; a client that is killed may lose what was sent and what was answered, not yet booked.
SETTINGS = {
    "oracle__batch": 1, "oracle__concurrency": IN_FLIGHT, "oracle__budget": 3900, "oracle__reserve": 1 / 3,
    "distill__holdout": 40, "oracle__patience": 120,
}  # fmt: skip
QUERIES = 2600
assert 3900 - QUERIES >= CLIENT_KILLS * 2 * IN_FLIGHT


@pytest.fixture(scope="module")
def expected(teacher_onnx: Path, processes: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to."""
    out = tmp_path_factory.mktemp("undisturbed")
    with serving(teacher_onnx) as server:
        done = processes.run(*words(server.url, out, "--yes", **SETTINGS))
        assert done.returncode == 0, done.stderr
        assert computed(server.url) == total(out)["queries"] == QUERIES
    return out


def assert_the_same(out: Path, expected: Path) -> None:
    found, wanted = files.load(out / "student.pt"), files.load(expected / "student.pt")
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
    for store in ("holdout", "replay"):
        for path in (expected / store).glob("*.npy"):
            assert np.array_equal(np.load(path), np.load(out / store / path.name)), path.name


def computed(url: str) -> float:
    return metrics(url)["mekd_images_computed_total"]


def reach(url: str, images: float, looks: Callable[[], object] = lambda: None) -> None:
    """Wait until the server has computed so much, with a look at something else now and then."""
    deadline = time.monotonic() + 120
    while computed(url) < images:
        assert time.monotonic() < deadline, "it is never reached"
        looks()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_client_that_is_killed_loses_what_was_in_flight(
    teacher_onnx: Path, processes: Server, expected: Path, tmp_path: Path
) -> None:
    chance = random.Random(time.time_ns())
    with serving(teacher_onnx, "--latency_ms", 20) as server:
        for _ in range(CLIENT_KILLS):
            begun = computed(server.url)
            running = processes.begin(*words(server.url, tmp_path, "--yes", **SETTINGS))
            reach(server.url, begun + chance.randint(1, 60))
            time.sleep(chance.random() / 50)
            running.send_signal(9)
            assert is_killed(running.wait()), "it was done before it was killed"
        done = processes.run(*words(server.url, tmp_path, "--yes", **SETTINGS))
        assert done.returncode == 0, done.stderr
        answered = computed(server.url)
    found = total(tmp_path)
    print(f"\n{CLIENT_KILLS} kills of the client: {found}, the server computed {answered:.0f}")
    assert found["queries"] == QUERIES
    assert 0 < found["uncertain"] <= CLIENT_KILLS * 2 * IN_FLIGHT
    # What was booked as sent a moment before the kill may not have gone up.
    assert QUERIES < answered <= found["queries"] + found["uncertain"] <= 3900
    assert_the_same(tmp_path, expected)


@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back_loses_what_was_in_flight(
    teacher_onnx: Path, processes: Server, expected: Path, tmp_path: Path
) -> None:
    chance = random.Random(time.time_ns())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"

    def serve() -> Running:
        running = processes.begin("serve", str(teacher_onnx), "--port", str(port), "--latency_ms", "20")
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                computed(url)
                return running
            assert not running.ended() and time.monotonic() < deadline, "it does not serve"
            time.sleep(0.05)

    def ask() -> Running:
        return processes.begin(*words(url, tmp_path, "--yes", **SETTINGS))

    def gave_up() -> bool:
        """Whether the client has; only for a call that was lost three times, and the same command goes on."""
        if not clients[-1].ended():
            return False
        done = clients[-1].wait()
        assert done.returncode == 3 and "whose fate is unknown" in done.stderr, done
        clients.append(ask())
        return True

    answered, server, clients = 0.0, serve(), [ask()]
    try:
        for _ in range(SERVER_KILLS):
            reach(url, chance.randint(100, 200), gave_up)
            time.sleep(chance.random() / 50)
            answered += computed(url)
            server.send_signal(9)
            server.wait()
            server = serve()
        while (done := clients[-1].wait()).returncode == 3:
            clients.append(ask())
        answered += computed(url)
    finally:
        server.send_signal(9)
        server.wait()
    assert done.returncode == 0, done.stderr
    found = total(tmp_path)
    print(f"\n{SERVER_KILLS} kills of the server: {found}, it computed {answered:.0f}, {len(clients)} clients")
    assert found["queries"] == QUERIES and 0 < found["uncertain"] <= SERVER_KILLS * IN_FLIGHT
    # Between the last look and the kill it may have answered what was in flight, and as much again.
    assert QUERIES - SERVER_KILLS * 2 * IN_FLIGHT <= answered <= found["queries"] + found["uncertain"]
    assert_the_same(tmp_path, expected)


@pytest.mark.slow
def test_two_processes_share_one_budget_and_one_rate(
    teacher_onnx: Path, processes: Server, expected: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()  # two processes train another generator
    shutil.copy(expected / "checkpoints" / "deprivatize.pt", tmp_path / "checkpoints")
    with serving(teacher_onnx) as server:
        settings = SETTINGS | {"oracle__rate": 300}
        begun = time.monotonic()
        for done in processes.together(2, *words(server.url, tmp_path, "--yes", stage="distill", **settings)):
            assert done.returncode == 0, done.stderr
        assert time.monotonic() - begun > QUERIES / 300 - 0.5, "each took the rate for itself"
        assert computed(server.url) == QUERIES
    found = total(tmp_path)
    assert found["queries"] == QUERIES and found["uncertain"] == 0
    for name in ("images", "values"):  # the same questions and answers, whoever asked
        one, two = (np.load(folder / "replay" / f"{name}.npy") for folder in (expected, tmp_path))
        assert np.array_equal(one, two), name
