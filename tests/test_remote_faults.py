"""What goes wrong between a client and a server, over a bare socket: what it costs, and what the user is told."""

import gzip
import json
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_service import IMAGE, images
from mekd.errors import MekdError, UsageError
from mekd.oracle import remote
from mekd.oracle.http import Denied, Line, ServiceError
from mekd.oracle.remote import ServiceGone
from raw_server import chunked, dripping, reply, scripted, silent, tensor
from remote_ask import GOOD, ask, assert_right, connect, good, paid


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that failed is repeated at once."""
    monkeypatch.setattr(remote, "PAUSE_S", 0.001)


@pytest.fixture(params=["hf", "oip"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


REFUSALS = [
    reply(429, "slow"),
    reply(429, "slow", Retry_After="0"),
    reply(429, "slow", Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
    reply(429, "slow", Retry_After="soon"),
    reply(503, "Exceeds maximum queue size", Content_Type="text/plain"),
    reply(503, '{"error": "inference request rejected: Exceeds maximum queue size"}', Content_Type="text/plain"),
    # An error page that is larger than any answer: its status says all.
    reply(429, b"<html>" + b"x" * 2_000_000),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=range(len(REFUSALS)))
def test_what_is_refused_is_free_and_asked_again(protocol: str, refusal: bytes, tmp_path: Path) -> None:
    with scripted(refusal, refusal, good(protocol), good(protocol)) as server:
        # A page that is not read whole costs the connection, and what the server still had to say.
        assert_right(protocol, ask(protocol, server.url, tmp_path))
    assert paid(tmp_path) == (1, 0, 3)


def test_retry_after_is_obeyed(protocol: str, tmp_path: Path) -> None:
    with scripted(reply(429, Retry_After="1"), good(protocol)) as server:
        begun = time.monotonic()
        assert_right(protocol, ask(protocol, server.url, tmp_path))
        assert 1 <= time.monotonic() - begun < 10


def cut(connection: socket.socket) -> bytes | None:
    """Half of an answer, and the line is gone."""
    connection.sendall(reply(200, GOOD["hf"])[:-9])
    return None


LOSSES: list[tuple[Any, str]] = [
    (reply(500, '{"error": "the model fell over"}'), "answered 500: the model fell over"),
    (reply(500, "Traceback (most recent call last):\n" + "  File\n" * 999 + "ValueError: no\n"), "500: ValueError: no"),
    (reply(502, "<h1>Bad gateway</h1>"), "answered 502"),
    (reply(503, "upstream is down"), "answered 503: upstream is down"),
    (reply(504), "answered 504"),
    (reply(408, Connection="close"), "answered 408"),
    (reply(500, b"\xff" * 3_000_000), "answered 500"),
    (cut, "the connection broke"),
    (None, "the connection broke"),
    (b"HTTP/2 what?\r\n\r\n", "the connection broke"),
    (silent, r"no whole answer in 0.5 s \(oracle.timeout\)"),
    (reply(200, b"no gzip at all", Content_Encoding="gzip"), "the connection broke"),
    # Bytes that come one by one are no answer in time, in the head and in the body, whether the line stays or not.
    (dripping(reply(200, b" " * 400)), r"no whole answer in 0.5 s"),
    (dripping(reply(200, b" " * 400, Connection="close")), r"no whole answer in 0.5 s"),
    (lambda line: (line.sendall(reply(200, b" " * 400)[:-400]), dripping(b" " * 400)(line))[1], "no whole answer"),
    (
        lambda line: (
            line.sendall(reply(200, b" " * 400, Connection="close")[:-400]),
            dripping(b" " * 400)(line),
        )[1],
        "no whole answer",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "said"), LOSSES, ids=range(len(LOSSES)))
def test_what_is_lost_is_uncertain_and_asked_again(protocol: str, loss: Any, said: str, tmp_path: Path) -> None:
    with scripted(loss, good(protocol)) as server:
        begun = time.monotonic()
        assert_right(protocol, ask(protocol, server.url, tmp_path / "again", timeout=0.5))
        assert time.monotonic() - begun < 5, "the time-out is for the whole"
        assert server.connections == 2, "a connection that saw a fault is not used again"
    assert paid(tmp_path / "again") == (1, 1, 2)
    if protocol == "hf":
        return
    with scripted(loss, loss, loss, loss) as server:
        error = ask(protocol, server.url, tmp_path / "gone", timeout=0.5)
        assert isinstance(error, ServiceGone) and error.status == 3
        assert re.search(said, str(error)), error
        assert "whose fate is unknown; they are booked as uncertain" in str(error)
    assert paid(tmp_path / "gone") == (0, 3, 3)


def test_a_peer_that_takes_no_connection_costs_nothing(protocol: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    error = ask(protocol, f"http://127.0.0.1:{port}", tmp_path, patience=0.05)
    assert isinstance(error, ServiceGone) and f"127.0.0.1:{port} takes no connection" in str(error)
    assert "oracle.patience" in str(error) and paid(tmp_path)[:2] == (0, 0)


#: What the user has to mend: the answer, what is said, and the queries that may have been billed.
MISTAKES: list[tuple[bytes, str, int]] = [
    (reply(400, '{"error": "unexpected shape"}'), "answered 400: unexpected shape$", 1),
    (reply(422, '{"detail": "no such field"}'), "answered 422: no such field$", 1),
    (reply(401, "who are you?"), "answered 401: who are you\\?. Check the key in oracle.headers", 0),
    (reply(403), "answered 403. Check the key in oracle.headers", 0),
    (reply(404, "no such model"), "answered 404: no such model. Check the path of teacher.url", 0),
    (reply(307, Location="http://elsewhere.example/v2"), "sends elsewhere .307., to 'http://elsewhere.example/v2'", 0),
    (reply(301), "sends elsewhere .301., to 'nowhere'; mekd does not follow", 0),
]


@pytest.mark.parametrize(("answer", "said", "uncertain"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_not_repeated(protocol: str, answer: bytes, said: str, uncertain: int, tmp_path: Path) -> None:
    with scripted(answer, good(protocol)) as server:
        error = ask(protocol, server.url, tmp_path)
        assert isinstance(error, ServiceError) and not isinstance(error, ServiceGone) and error.status == 2
        assert re.search(said, str(error)), error
        assert len(server.requests) == 1
    assert paid(tmp_path) == (0, uncertain, 1)


def test_a_redirect_is_not_followed_and_shows_no_secret(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEKD_TEST_TOKEN", "hush-1234567")
    with scripted() as other, scripted(reply(302, Location=f"{other.url}/?key=hush-1234567")) as server:
        error = ask(protocol, f"{server.url}/?key={{env:MEKD_TEST_TOKEN}}", tmp_path)
        assert "key=hush-1234567" in server.requests[0][0]
        assert f"to '{other.url}/?key={{env:MEKD_TEST_TOKEN}}'" in str(error) and "hush" not in str(error)
        assert not other.connections


ECHOES: list[Callable[[str], bytes]] = [
    lambda token: reply(401, f"the token {token} is wrong"),
    lambda token: reply(401, json.dumps({"error": f"Bearer {token}"})),
    lambda token: reply(500, f"headers: {token}"),
    # Cut where messages are cut: a part of it is a secret too.
    *(lambda token, n=n: reply(400, "x" * n + token) for n in (280, 290, 298, 1985, 1995, 65530)),
    lambda token: reply(200, json.dumps({"error": f"the token {token} has expired"})),
    lambda token: reply(200, json.dumps("y" * 110 + token)),
    lambda token: reply(200, json.dumps([{"label": token, "score": 0.5}])),
    lambda token: reply(200, tensor([1], [1, 1], name=token)),
    lambda token: reply(200, tensor([1], [1], token)),
    lambda token: reply(200, token),
    lambda token: reply(302, Location=token),
    lambda token: b"HTTP/1.1 " + token.encode() + b"\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("echo", ECHOES, ids=range(len(ECHOES)))
def test_a_token_that_the_server_echoes_is_in_no_message(
    protocol: str, echo: Callable[[str], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz"
    monkeypatch.setenv("MEKD_TEST_TOKEN", token)
    with scripted(*[echo(token)] * 3) as server:
        error = ask(protocol, server.url, tmp_path, headers={"Authorization": "Bearer {env:MEKD_TEST_TOKEN}"})
        assert server.requests[0][1]["authorization"] == f"Bearer {token}"
    assert isinstance(error, MekdError), error
    parts = [token[at : at + 8] for at in range(len(token) - 7)]
    while error is not None:  # what a traceback would show besides
        assert not [part for part in parts if part in str(error)], str(error)
        error = error.__cause__
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(token.encode() in content for content in files)


def certificate(folder: Path) -> Path:
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("openssl, which makes the certificate, is not installed: apt-get install openssl")
    key, made = folder / "key.pem", folder / "made.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", made, "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    both = folder / "both.pem"
    both.write_text(key.read_text() + made.read_text())
    return both


def test_a_certificate_that_nobody_trusts_ends_it_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)
    with scripted(good("hf"), context=context) as server:
        error = ask("hf", server.url, tmp_path / "refused")
        assert isinstance(error, ServiceError) and not isinstance(error, ServiceGone)
        assert "shows no certificate that is trusted here, and nothing was sent" in str(error)
        assert "SSL_CERT_FILE" in str(error) and not server.requests
        assert paid(tmp_path / "refused") == (0, 0, 1)
        monkeypatch.setenv("SSL_CERT_FILE", str(both))
        assert_right("hf", ask("hf", server.url, tmp_path / "trusted"))
    # A slow answer over TLS ends in time too.
    with scripted(dripping(reply(200, b" " * 400, Connection="close")), good("hf"), context=context) as server:
        begun = time.monotonic()
        assert_right("hf", ask("hf", server.url, tmp_path / "slow", timeout=0.5))
        assert time.monotonic() - begun < 5
    assert paid(tmp_path / "slow") == (1, 1, 2)


def test_garbage_is_not_read_whole(protocol: str, tmp_path: Path) -> None:
    """10 MB, announced, and not: in chunks, and until the line is closed."""
    sent: list[int] = []

    def endless(connection: socket.socket) -> None:
        connection.sendall(reply(200, length=False, Connection="close"))
        try:
            for _ in range(160):
                sent.append(connection.send(b"x" * 65536))
        except OSError:
            pass

    for n, answer in enumerate([reply(200, b"x" * 10_000_000), endless]):
        with scripted(answer) as server:
            error = ask(protocol, server.url, tmp_path / str(n))
        assert isinstance(error, ServiceError) and "the rest was not read" in str(error), error
        assert "Is teacher.url the address of the model" in str(error)
        assert paid(tmp_path / str(n)) == (0, 1, 1)
    time.sleep(0.1)
    assert sum(sent) < 9_000_000


@pytest.mark.parametrize("encoding", ["chunked", "gzip", "deflate", "both"])
def test_answers_may_be_chunked_and_compressed(protocol: str, encoding: str, tmp_path: Path) -> None:
    import zlib

    body = GOOD[protocol]
    pressed = zlib.compress(body) if encoding == "deflate" else gzip.compress(body)
    answers = {
        "chunked": chunked(body),
        "both": chunked(pressed).replace(b"\r\n", b"\r\nContent-Encoding: gzip\r\n", 1),
    }
    with scripted(answers.get(encoding, reply(200, pressed, Content_Encoding=encoding))) as server:
        assert_right(protocol, ask(protocol, server.url, tmp_path))
        assert server.requests[0][1]["accept-encoding"] == "identity"
    bomb = gzip.compress(b" " * 50_000_000)
    with scripted(reply(200, bomb, Content_Encoding="gzip")) as server:
        error = ask(protocol, server.url, tmp_path / "bomb")
    assert isinstance(error, ServiceError) and "the rest was not read" in str(error)


def test_pixels_go_up_as_pixels(tmp_path: Path) -> None:
    """What a float transport holds is no pixel: a uint8 input would get 0 and 1 for it."""
    with scripted(good("oip")) as server:
        assert_right("oip", ask("oip", server.url, tmp_path / "pixels"))
        sent = json.loads(server.requests[0][2])["inputs"][0]
    assert sent["datatype"] == "UINT8" and sent["data"] == images(1).flatten().tolist()
    with scripted(good("oip")) as server:
        with pytest.raises(UsageError, match=r"oracle\.transport is 'float', but the model takes UINT8"):
            connect("oip", server.url, tmp_path / "float", transport="float").query(torch.zeros(1, *IMAGE))
        assert not server.requests


def test_secrets_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEKD_TEST_TOKEN", raising=False)
    with scripted(good("hf")) as server:
        error = ask("hf", server.url, tmp_path, headers={"X-Key": "{env:MEKD_TEST_TOKEN}"})
        assert isinstance(error, UsageError) and "oracle.headers X-Key needs the environment variable" in str(error)
        (tmp_path / "key").write_text("two\nlines\n")
        error = ask("hf", server.url, tmp_path, headers={"X-Key": f"{{file:{tmp_path}/key}}"})
        assert isinstance(error, UsageError) and "takes one line" in str(error) and "two" not in str(error)
        assert not server.connections
    assert paid(tmp_path)[:2] == (0, 0)


def test_a_key_file_may_have_a_byte_order_mark(protocol: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"\xef\xbb\xbfsk-1234\r\n")
    with scripted(good(protocol)) as server:
        headers = {"Authorization": f"Bearer {{file:{tmp_path}/key}}"}
        assert_right(protocol, ask(protocol, server.url, tmp_path / "books", headers=headers))
        assert server.requests[0][1]["authorization"] == "Bearer sk-1234"


@pytest.mark.parametrize(
    ("path", "headers", "secret", "said"),
    [
        ("", {"X-Key": "\u201csk-1\u201d"}, "", "oracle.headers X-Key is '\u201csk-1\u201d', and no header can hold"),
        ("", {"X-Key": "one\ntwo"}, "", "oracle.headers X-Key is 'one\\ntwo'"),
        ("", {"X Key": "sk-1"}, "", "oracle.headers has the name 'X Key'"),
        ("", {"X-Key": "{env:MEKD_TEST_TOKEN}"}, "\ufeffhush-1", "X-Key is '{env:MEKD_TEST_TOKEN}', and its secret"),
        ("/?key={env:MEKD_TEST_TOKEN}", {}, "hush 1", "teacher.url is 'http://127.0.0.1:"),
        ("/?key={env:MEKD_TEST_TOKEN}", {}, "hush#1/../x?y", "they must be ASCII without blanks and without #"),
        ("/?key={env:MEKD_TEST_TOKEN}", {}, "hush-\u00e9", "which is no address with what its secrets hold"),
    ],
)
def test_what_no_request_can_hold_is_free_and_found_before(
    path: str, headers: dict[str, str], secret: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEKD_TEST_TOKEN", secret)
    with scripted(good("hf")) as server:
        with pytest.raises(UsageError) as found:
            Line(server.url + path, headers, 5).check()
        error = ask("hf", server.url + path, tmp_path, headers=headers)
        assert not server.connections
    assert isinstance(error, UsageError) and said in str(error) == str(found.value), error
    assert "hush" not in str(error) and paid(tmp_path) == (0, 0, 1)


def test_an_address_that_no_request_can_hold() -> None:
    for url, said in [
        ("http://127.0.0.1/v2/models/my model", "no address can hold ' ': leave it out, or write %20 for it"),
        ("http://127.0.0.1/v2/models/mod\u00e8le", "or write %C3%A8 for it"),
        ("http://127.0.0.1/infer?name=a b", "or write %20 for it"),
        ("http://127.0.0.1/v2/models/m#part", "no address can hold '#': leave it out, or write %23 for it"),
        ("http://my host/v2/models/m", "no address can hold ' '"),
    ]:
        with pytest.raises(UsageError, match=r"^teacher\.url is ") as error:
            Line(url, {}, 5)
        assert said in str(error.value)


def test_a_request_that_cannot_be_written_costs_nothing() -> None:
    with scripted(good("hf")) as server:
        with pytest.raises(Denied, match="cannot be written, and nothing was sent"):
            Line(server.url, {}, 5).exchange("GET\n", "")
        assert not server.requests
