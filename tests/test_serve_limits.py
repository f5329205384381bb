"""A served classifier under load and on purpose in trouble: keys, limits, the queue, faults and counts."""

import asyncio
import json
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_files import IMAGE, pixels
from serve_requests import FED, binary, infer, linear, raw, tensor
from served import Answer, call, inside, metrics

pytest.importorskip("starlette", reason="starlette is not installed: pip install 'mekd[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'mekd[serve]'")

ONE = {"inputs": [tensor(FED)]}


def at_once(count: int, ask: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(ask, range(count)))


def statuses(url: str, count: int) -> list[int | str]:
    """What requests one after the other end with."""
    found: list[int | str] = []
    for _ in range(count):
        try:
            found.append(infer(url, ONE).status)
        except IncompleteRead:
            found.append("cut")
    return found


# -- who may ask, and how much -----------------------------------------------------------------------------


def test_keys(small: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first\n\n sécond \n")
    with inside(small, "--keys", keys) as url:
        path, body = f"{url}/v2/models/echo/infer", json.dumps(ONE).encode()
        assert call(path, body, Authorization="Bearer first").status == 200
        assert call(path, body, X_Api_Key="sécond".encode()).status == 200  # type: ignore[arg-type]
        assert call(f"{url}/v2", Authorization="bearer first").status == 200
        for wrong in ({}, {"Authorization": "Bearer "}, {"Authorization": "Basic first"}, {"X_Api_Key": "firs"}):
            answer = call(path, body, **wrong)
            assert answer.status == 401 and "X-Api-Key" in answer.json()["error"]
            assert call(f"{url}/v2/models/echo", **wrong).status == 401
        counts = metrics(url)
    assert counts['mekd_requests_total{status="401"}'] == 4 and counts["mekd_images_computed_total"] == 2


def test_what_a_stranger_sends_is_not_kept(small: Path, tmp_path: Path) -> None:
    """Without a key no request takes memory, however much it brings."""
    keys = tmp_path / "keys"
    keys.write_text("first\n")
    part, count = b" " * 65536, 320
    with inside(small, "--keys", keys) as url:
        path = f"{url}/v2/models/echo/infer"
        tracemalloc.start()
        try:
            assert call(path, iter([part] * count)).status == 401  # type: ignore[arg-type]
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert call(path, json.dumps(ONE).encode(), X_Api_Key="first").status == 200
        assert metrics(url)["mekd_bytes_received_total"] >= len(part) * count
    assert most < len(part) * count / 4


def test_rate(small: Path) -> None:
    with inside(small, "--rate", 2) as url:
        assert statuses(url, 2) == [200, 200]
        answer = infer(url, ONE)
        assert answer.status == 429 and answer.headers["Retry-After"] == "1"
        # What costs nothing is not limited.
        assert call(f"{url}/v2/models/echo").status == 200
        counts = metrics(url)
        assert counts["mekd_requests_refused_total"] == 1 and counts["mekd_images_computed_total"] == 2
        time.sleep(0.6)
        assert infer(url, ONE).status == 200


def test_images_of_one_request(small: Path) -> None:
    with inside(small, "--max_batch", 2) as url:
        assert infer(url, {"inputs": [tensor([FED] * 2)]}).status == 200
        assert metrics(url)["mekd_images_computed_total"] == metrics(url)["mekd_images_answered_total"] == 2
        answer = infer(url, {"inputs": [tensor([FED] * 3)]})
        assert answer.status == 400 and "3 images; 2 are allowed" in answer.json()["error"]
        assert call(f"{url}/v2/models/echo/config").json()["max_batch_size"] == 2


def test_bytes_of_one_request(small: Path) -> None:
    whole = json.dumps(ONE).encode()
    with inside(small, "--max_body", len(whole)) as url:
        path = f"{url}/v2/models/echo/infer"
        assert call(path, whole).status == 200
        # Announced, and as it comes; far more than fits into what lies between the two.
        large = whole + b" " * 8_000_000
        for body in (whole + b" ", large, iter([large[:5_000_000], large[5_000_000:]])):
            answer = call(path, body)  # type: ignore[arg-type]
            assert answer.status == 413
            assert f"bytes; {len(whole):,} are allowed: send fewer images" in answer.json()["error"]
        assert f"{len(large):,} bytes" in answer.json()["error"]
        assert call(f"{url}/hf/echo", large).status == 413
        assert call(path, whole).status == 200
        counts = metrics(url)
    assert counts["mekd_images_computed_total"] == 2 and counts['mekd_requests_total{status="413"}'] == 4


def test_as_many_images_as_are_allowed_are_never_too_many_bytes() -> None:
    from mekd.serve.protocol import PICTURE, Spec, most_bytes

    for datatype, dtype, value in (("UINT8", np.uint8, 255), ("FP64", np.float64, -1.2345678901234567e-300)):
        photos = np.full((8, 3, 1000, 1000), value, dtype)
        text = len(json.dumps(photos[0, 0, 0].tolist())) * 3 * 8 * 1000
        assert text <= most_bytes(Spec("x", datatype, photos.shape[1:]), len(photos)) <= 1.3 * text + 2 * PICTURE


def test_a_full_queue(small: Path) -> None:
    # The two that wait go on together when the first has waited half a second.
    with inside(small, "--queue", 2, "--wait_ms", 500) as url:
        answers: list[Answer] = at_once(6, lambda i: infer(url, ONE))
        assert sorted(answer.status for answer in answers) == [200] * 2 + [503] * 4
        refused = next(answer for answer in answers if answer.status == 503)
        assert refused.headers["Content-Type"] == "text/plain"
        assert refused.json()["error"].endswith("Exceeds maximum queue size")
        counts = metrics(url)
    assert counts["mekd_requests_refused_total"] == 4 and counts["mekd_images_computed_total"] == 2


# -- putting requests together -----------------------------------------------------------------------------


def gathered(sizes: list[int], batch: int, wait: float, run: Callable[[np.ndarray], np.ndarray]) -> list[Any]:
    """What a Batcher answers requests of those sizes that come at once; every image is its request's number."""
    from mekd.serve.batcher import Batcher

    async def main() -> list[Any]:
        batcher = Batcher(run, batch, wait, 100)
        work = asyncio.create_task(batcher.work())
        asked = [batcher.ask(np.full((size, 1), number)) for number, size in enumerate(sizes)]
        answers = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 20)
        work.cancel()
        return list(answers)

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("sizes", "batch", "runs"),
    [
        ([1, 1, 1, 1], 4, [4]),  # full: nobody waits
        ([1, 1, 1], 2, [2, 1]),
        ([3, 2, 1], 4, [3, 3]),  # a request is not taken apart
        ([9, 1], 4, [9, 1]),  # one that is too large goes alone, and the model cuts it
        ([1, 1], 1, [1, 1]),
    ],
)
def test_requests_share_a_run(sizes: list[int], batch: int, runs: list[int]) -> None:
    seen: list[int] = []

    def run(images: np.ndarray) -> np.ndarray:
        assert threading.current_thread() is not threading.main_thread()
        seen.append(len(images))
        return images * 10

    answers = gathered(sizes, batch, 0.02, run)
    assert seen == runs
    assert [answer.tolist() for answer in answers] == [[[10 * i]] * size for i, size in enumerate(sizes)]


def test_nobody_waits_longer_than_asked() -> None:
    start = time.monotonic()
    gathered([1], 4, 0.2, lambda images: images)
    assert 0.2 <= time.monotonic() - start < 5
    start = time.monotonic()
    gathered([4], 4, 30, lambda images: images)
    assert time.monotonic() - start < 5


def test_a_run_that_fails_fails_its_own_requests_alone() -> None:
    def run(images: np.ndarray) -> np.ndarray:
        if (images == 1).any():
            raise ValueError("no such image")
        return images

    answers = gathered([1, 1, 1], 1, 0, run)
    assert [isinstance(answer, ValueError) for answer in answers] == [False, True, False]


def test_requests_that_cannot_be_put_together_or_told_apart_fail_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(images: Any) -> Any:
        raise MemoryError("no room for the batch")

    with monkeypatch.context() as patch:
        patch.setattr(np, "concatenate", full)
        answers = gathered([1, 1, 2], 2, 0.02, lambda images: images)
    assert [isinstance(answer, MemoryError) for answer in answers] == [True, True, False]
    # A row too few would be another request's answer.
    answers = gathered([1, 1, 2], 2, 0.02, lambda images: images[: 2 - int(images[0, 0] == 0)])
    assert [isinstance(answer, ValueError) for answer in answers] == [True, True, False]


@pytest.mark.parametrize("batch", [1, 8])
def test_answers_do_not_depend_on_each_other(tmp_path: Path, batch: int) -> None:
    path = linear(tmp_path / "photos.onnx")
    images = pixels(24).numpy()
    alone = np.concatenate([raw(path, image[None]) for image in images])
    head = {"name": "pixels", "datatype": "UINT8", "shape": [3, *IMAGE], "parameters": {"binary_data_size": 576}}

    with inside(path, "--batch", batch, "--wait_ms", 20) as url:

        def ask(i: int) -> bytes:
            tree = {"inputs": [head], "parameters": {"binary_data_output": True}}
            return binary(infer(url, tree, images[3 * i : 3 * i + 3].tobytes(), "photos"))[1]

        answered = np.frombuffer(b"".join(at_once(8, ask)), np.float32).reshape(24, -1)
    if batch == 1:
        assert answered.tobytes() == alone.tobytes()
    np.testing.assert_allclose(answered, alone, rtol=1e-5, atol=1e-5)


# -- faults ------------------------------------------------------------------------------------------------


def test_faults_are_drawn_by_the_seed_and_counted(small: Path) -> None:
    rates = ["--fail_rate", 0.25, "--cut_rate", 0.25, "--refuse_rate", 0.25]
    fates: dict[int, list[int | str]] = {}
    for seed in (1, 1, 2):
        with inside(small, *rates, "--seed", seed) as url:
            found = statuses(url, 60)
            counts = metrics(url)
        assert fates.setdefault(seed, found) == found
        ends = {fate: found.count(fate) for fate in (200, 500, 503, "cut")}
        assert sum(ends.values()) == 60 and min(ends.values()) >= 5
        assert counts["mekd_images_answered_total"] == ends[200]
        assert counts["mekd_images_computed_total"] == 60 - ends[503]
        assert counts["mekd_requests_refused_total"] == ends[503]
        assert counts['mekd_requests_total{status="500"}'] == ends[500]
        assert counts['mekd_requests_total{status="200"}'] == ends[200] + ends["cut"]
    assert fates[1] != fates[2]


def test_each_fault_alone(small: Path) -> None:
    with inside(small, "--refuse_rate", 1) as url:
        answer = infer(url, ONE)
        assert answer.status == 503 and answer.headers["Content-Type"] == "text/plain"
        assert "Exceeds maximum queue size" in answer.json()["error"]
        assert call(f"{url}/v2/models/echo").status == 200  # metadata do not fail
    with inside(small, "--cut_rate", 1) as url:
        whole = len(json.dumps(ONE))
        with pytest.raises(IncompleteRead) as cut:
            infer(url, ONE)
        assert cut.value.partial and cut.value.expected
        assert metrics(url)["mekd_bytes_sent_total"] == len(cut.value.partial)
        assert metrics(url)["mekd_bytes_received_total"] == whole
    with inside(small, "--fail_rate", 1) as url:
        assert infer(url, ONE).status == 500
        assert infer(url, {}).status == 400  # a client's fault stays one


def test_latency_overlaps(small: Path) -> None:
    with inside(small, "--latency_ms", 400) as url:
        start = time.monotonic()
        answers = at_once(5, lambda i: infer(url, ONE).status)
        took = time.monotonic() - start
    assert answers == [200] * 5 and 0.4 <= took < 1.6


def test_a_body_that_drips(small: Path) -> None:
    with inside(small, "--drip_ms", 2) as url:
        start = time.monotonic()
        answer = infer(url, ONE)
        took = time.monotonic() - start
        assert answer.json()["outputs"][0]["shape"] == [1, 6] and took > 0.002 * len(answer.body)
        start = time.monotonic()
        assert metrics(url)["mekd_images_answered_total"] == 1  # a thousand bytes that do not drip
        assert time.monotonic() - start < 2


def test_bytes_are_counted(small: Path) -> None:
    with inside(small) as url:
        sent = infer(url, ONE).body + infer(url, {}).body
        call(f"{url}/v2")
        counts = metrics(url)
    assert counts["mekd_bytes_received_total"] == len(json.dumps(ONE)) + 2
    assert counts["mekd_bytes_sent_total"] == len(sent)
    totals = {name: count for name, count in counts.items() if name.startswith("mekd_requests_total")}
    assert totals == {'mekd_requests_total{status="200"}': 1, 'mekd_requests_total{status="400"}': 1}
