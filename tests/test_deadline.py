"""An exchange ends in time however slowly its answer comes, a handshake does too, and only those that are late do."""

import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mekd.oracle.http import Line, Lost, Refused
from raw_server import dripping, shaking
from served import inside

#: An answer of some 250 bytes, one every 20 ms.
DRIP = ("--drip_ms", "20")


def test_what_drips_is_lost_in_time(teacher_onnx: Path) -> None:
    with inside(teacher_onnx, *DRIP, "--response", "label") as url:
        line = Line(f"{url}/v2/models/teacher", {}, 0.5)
        body = b'{"inputs":[{"name":"images","shape":[1,1,16,16],"datatype":"UINT8","data":[' + b"0," * 255 + b"0]}]}"
        begun = time.monotonic()
        with pytest.raises(Lost, match=r"0\.5 s \(oracle\.timeout\)"):
            line.exchange("POST", "/infer", body)
        assert 0.4 < time.monotonic() - begun < 3
        assert line.exchange("GET", "").status == 200  # over a new connection
        line.close()


def test_exchanges_that_end_are_not_struck_later_and_their_thread_ends(teacher_onnx: Path) -> None:
    with inside(teacher_onnx) as url:
        line = Line(f"{url}/v2/models/teacher", {}, 0.4)
        for _ in range(4):  # the same connection beyond the first one's deadline
            assert line.exchange("GET", "").status == 200
            time.sleep(0.15)
        line.close()
        until = time.monotonic() + 5
        while line._watch._thread is not None:
            assert time.monotonic() < until
            time.sleep(0.02)


@pytest.mark.parametrize(
    "hello",
    [
        lambda line: time.sleep(3),
        dripping(b"\x16\x03\x03\x40\x00" + b"\x02" * 400),
    ],  # a record of 16 KB that comes byte by byte
    ids=["silent", "dripping"],
)
def test_a_handshake_that_is_never_over_is_refused_in_time(hello: Callable[[socket.socket], None]) -> None:
    with shaking(hello) as url:
        line = Line(url, {}, 0.5)
        begun = time.monotonic()
        with pytest.raises(Refused, match=r"takes no connection: no handshake of TLS in 0\.5 s \(oracle\.timeout\)"):
            line.exchange("GET", "")
        assert 0.4 < time.monotonic() - begun < 3
        line.close()
