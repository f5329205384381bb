"""Clients that send too slowly, and pictures that are large: neither takes a served classifier from the others."""

import http.client
import json
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from serve_requests import FED, infer, tensor
from served import call, inside, metrics

pytest.importorskip("starlette", reason="starlette is not installed: pip install 'mekd[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'mekd[serve]'")

ONE = {"inputs": [tensor(FED)]}
HEAD = b"POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 4000\r\n"


def dripped(url: str, at_once: bytes, drop: bytes) -> bytes:
    """What a server answers that is sent some bytes, and then a drop every 50 ms until it has closed; within 10 s."""
    address = urlsplit(url)
    assert address.hostname and address.port
    found, until = b"", time.monotonic() + 10
    with socket.create_connection((address.hostname, address.port)) as line:
        line.sendall(at_once)
        line.settimeout(0.05)
        while time.monotonic() < until:
            try:
                if not (part := line.recv(1 << 16)):
                    return found
                found += part
            except TimeoutError:
                line.sendall(drop)
            except ConnectionError:
                return found
    raise AssertionError(f"it still waits, having said {found!r}")


@pytest.mark.parametrize("before", [b"", b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_a_head_that_drips_is_not_waited_for(small: Path, before: bytes) -> None:
    with inside(small, "--timeout", 0.5) as url:
        assert dripped(url, before + HEAD + b"X-More: ", b"a").count(b"HTTP/1.1 ") == bool(before)
        assert infer(url, ONE).status == 200


@pytest.mark.parametrize("length", [b"", b"Transfer-Encoding: chunked\r\n"])
def test_a_body_that_drips_is_not_waited_for(small: Path, length: bytes) -> None:
    head = HEAD.replace(b"Content-Length: 4000\r\n", length) if length else HEAD
    with inside(small, "--timeout", 0.5) as url:
        said = dripped(url, head + b"\r\n", b"1\r\n \r\n" if length else b" ")
        assert said.startswith(b"HTTP/1.1 408 ") and b"has not come whole in 0.5 s" in said
        assert metrics(url)['mekd_requests_total{status="408"}'] == 1
        assert infer(url, ONE).status == 200


def test_a_connection_that_is_kept_may_rest(small: Path) -> None:
    with inside(small, "--timeout", 0.3) as url:
        line = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
        for _ in range(3):
            line.request("POST", "/v2/models/echo/infer", json.dumps(ONE))
            assert line.getresponse().read()
            kept = line.sock
            time.sleep(0.6)
            assert line.sock is kept
        line.close()


def test_a_head_of_any_size_is_not_taken(small: Path) -> None:
    """By whatever parser uvicorn finds installed."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from mekd.serve import prepare

    server, listening, _ = prepare([str(small), "--port", "0"])
    listening.close()
    assert isinstance(server.config.http, type) and issubclass(server.config.http, H11Protocol)


def test_few_pictures_are_decoded_at_once(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a megabyte may be of 179 megapixels."""
    from mekd.serve import app

    now, most, lock = 0, 0, threading.Lock()

    def pixels(content: bytes, image: tuple[int, int, int]) -> np.ndarray:
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        time.sleep(0.1)
        with lock:
            now -= 1
        return np.zeros((*image[1:], image[0]), np.uint8)

    monkeypatch.setattr(app, "_pixels", pixels)
    with inside(small) as url:
        threads = [threading.Thread(target=call, args=(f"{url}/hf/echo", b"\xff\xd8\xff")) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(count for name, count in metrics(url).items() if name.startswith("mekd_requests_total")) == 8
    assert most == app.DECODES
