"""One HTTP exchange at a time with the host of a teacher: what failed before it was sent, and what may have been paid.

urllib3 does the protocol. It repeats nothing and follows no redirect: each attempt is an entry of the ledger.
"""

import functools
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPException, InvalidURL
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from mekd.errors import MekdError, UsageError
from mekd.oracle.address import Secrets, address, check_address, header

_CHUNK = 1 << 16
_PAGE = 1 << 16  # bytes of an error's body that are read


class Refused(Exception):
    """The attempt was certainly refused and cost nothing; after: seconds that the server asks to wait, if it does."""

    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after


class Lost(Exception):
    """The attempt was sent, and whether it was answered, and billed, is unknown."""


class ServiceError(MekdError, RuntimeError):
    """The service cannot be asked as it was asked, or answers what cannot be used."""


class Denied(ServiceError):
    """The service cannot be asked as it was asked, and the attempt certainly cost nothing."""


class Unreachable(ServiceError):
    """What costs nothing could not be asked of the service now; later it may be."""


class Reply(NamedTuple):
    """Status, headers by their names in lower case, and body."""

    status: int
    headers: dict[str, str]
    body: bytes


class Line:
    """Connections to one host, one for each thread that exchanges.

    url: with secrets as they are written; headers: sent with every exchange. timeout: seconds for a whole exchange, of
    whatever size and however slowly it comes, and as many for a handshake of TLS before it. Nothing is connected before
    the first exchange.
    """

    def __init__(self, url: str, headers: Mapping[str, str], timeout: float) -> None:
        check_address(url)
        _ = _urllib3()
        self.url, self.timeout = url, timeout
        self.secrets = Secrets()
        self._headers = dict(headers)
        self._own = threading.local()
        self._open: set[Any] = set()
        self._lock = threading.Lock()
        self._watch = _Watch(timeout)

    def exchange(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, *,
        limit: int = 1 << 20,
    ) -> Reply:  # fmt: skip
        """Send one request and read its answer, of limit bytes at most; path follows the address.

        Raises UsageError and Refused where nothing was sent, Lost where its fate is unknown, Denied for a host that
        cannot be asked at all or a request that cannot be written, ServiceError for an answer that is too large; of
        what is no answer, the first bytes are read. Statuses are the caller's to judge.
        """
        urllib3 = _urllib3()
        url = address(self.secrets, self.url)
        sent = {"accept-encoding": "identity", "user-agent": "mekd"} | dict(headers or {})
        sent |= {name: header(self.secrets, name, value) for name, value in self._headers.items()}
        target = url.path.rstrip("/") + path + (f"?{url.query}" if url.query else "")
        connection = self._connect(url)
        begun = self._watch.begin(connection.sock)
        try:
            try:
                connection.request(method, target or "/", body=body, headers=sent, preload_content=False)
            except (ValueError, InvalidURL) as error:  # of its line and headers; sending bytes raises none of both
                said = self.secrets.hide(_said(error))
                raise Denied(
                    f"the request to {self._host()} cannot be written, and nothing was sent: {said}. Look at "
                    "teacher.url and oracle.headers"
                ) from None
            response = connection.getresponse()
            parts, size, answers = [], 0, response.status == 200
            most = limit if answers else _PAGE
            announced = response.headers.get("content-length", "")
            if answers and announced.isdigit() and int(announced) > limit:
                raise ServiceError(self._too_large(int(announced), limit))
            while size <= most and (part := response.read(min(_CHUNK, most + 1 - size), decode_content=True)):
                parts.append(part)
                size += len(part)
                if answers and size > limit:
                    raise ServiceError(self._too_large(size, limit))
                if time.monotonic() > begun.until:
                    raise TimeoutError
            if begun.struck:
                raise TimeoutError
            found = {name.lower(): value for name, value in response.headers.items()}
            reply = Reply(response.status, found, b"".join(parts))
        except ServiceError:
            self._drop(connection)
            raise
        except (urllib3.exceptions.HTTPError, HTTPException, OSError, ValueError) as error:
            self._drop(connection)
            if begun.struck or isinstance(error, TimeoutError):
                raise Lost(f"no whole answer in {self.timeout:g} s (oracle.timeout)") from None
            raise Lost(self.secrets.hide(f"the connection broke: {_said(error)}")) from None
        finally:
            self._watch.end(begun)
        late = begun.struck or size > most
        if late or reply.status >= 500 or reply.headers.get("connection", "").lower() == "close":
            self._drop(connection)  # servers reset what is pooled after a fault of theirs
        return reply

    def check(self) -> None:
        """Raise UsageError for a secret that is not there, and for what no request can hold; nothing is connected."""
        address(self.secrets, self.url)
        for name, value in self._headers.items():
            header(self.secrets, name, value)

    def beside(self, url: str) -> "Line":
        """A line to another address of the same host, with the same headers and time-out."""
        return Line(url, self._headers, self.timeout)

    def close(self) -> None:
        """End all connections."""
        with self._lock:
            for connection in self._open:
                connection.close()
            self._open.clear()
        self._watch.look()

    def _connect(self, url: Any) -> Any:
        """This thread's connection, open; Refused where the host does not take it, Denied where it never will."""
        urllib3 = _urllib3()
        connection = getattr(self._own, "connection", None)
        if connection is not None and connection.is_connected:
            return connection
        if connection is not None:
            self._drop(connection)
        kind = urllib3.connection.HTTPSConnection if url.scheme == "https" else urllib3.connection.HTTPConnection
        more = {"cert_reqs": "CERT_REQUIRED", "ssl_context": self._tls} if url.scheme == "https" else {}
        # An idle socket waits for the whole exchange at most; what drips is ended by the deadline.
        connection = kind(unquote(url.hostname), url.port, timeout=self.timeout, **more)
        try:
            connection.connect()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            connection.close()
            said = self.secrets.hide(_said(error))
            if _is_about_certificates(error):
                raise Denied(
                    f"{self._host()} shows no certificate that is trusted here, and nothing was sent: "
                    f"{said}. Check the address; for one of your own, set SSL_CERT_FILE in the environment to its file"
                ) from None
            raise Refused(f"{self._host()} takes no connection: {said}") from None
        self._own.connection = connection
        with self._lock:
            self._open.add(connection)
        return connection

    @functools.cached_property
    def _tls(self) -> ssl.SSLContext:
        """The context that urllib3 would make, whose handshakes are under the deadline too."""
        context: ssl.SSLContext = _urllib3().util.ssl_.create_urllib3_context()
        context.load_default_certs()
        context.sslsocket_class = _watched(self._watch, self.timeout)
        return context

    def _drop(self, connection: Any) -> None:
        with self._lock:
            self._open.discard(connection)
        self._own.connection = None
        connection.close()

    def _host(self) -> str:
        return self.secrets.hide(urlsplit(self.url).netloc)

    def _too_large(self, size: int, limit: int) -> str:
        return (
            f"{self._host()} answers with {size:,} bytes or more, where at most {limit:,} can be meant; the rest was "
            "not read. Is teacher.url the address of the model, and teacher.protocol right?"
        )


class _Exchange:
    """A connection in use until a moment of time.monotonic(); struck: whether it was ended for being late."""

    def __init__(self, line: socket.socket, until: float) -> None:
        self.socket = line  # a connection that will close lets go of it before its answer is read
        self.until, self.struck = until, False


class _Watch:
    """Ends connections when their time is up, whatever they are doing: one thread, while anything is in use."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._changed = threading.Condition()
        self._open: dict[_Exchange, None] = {}  # all may take as long, so the oldest is due first
        self._thread: threading.Thread | None = None

    def begin(self, line: socket.socket) -> _Exchange:
        with self._changed:
            begun = _Exchange(line, time.monotonic() + self._seconds)
            self._open[begun] = None
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="deadlines", daemon=True)
                self._thread.start()
        return begun

    def end(self, exchange: _Exchange) -> None:
        """It is not struck afterwards."""
        with self._changed:
            self._open.pop(exchange, None)

    def look(self) -> None:
        """Let the thread end if nothing is in use."""
        with self._changed:
            self._changed.notify()

    def _work(self) -> None:
        with self._changed:
            while self._open:
                oldest = next(iter(self._open))
                if (left := oldest.until - time.monotonic()) > 0:
                    self._changed.wait(left)
                    continue
                del self._open[oldest]
                oldest.struck = True
                with suppress(OSError):
                    oldest.socket.shutdown(socket.SHUT_RDWR)
            self._thread = None


def _watched(watch: _Watch, seconds: float) -> type[ssl.SSLSocket]:
    """A socket whose handshake a watch ends: a server that drips it would never come to the time-out of one read."""

    class Watched(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:
            begun, late = watch.begin(self), TimeoutError(f"no handshake of TLS in {seconds:g} s (oracle.timeout)")
            try:
                super().do_handshake(block)
            except OSError as error:
                if begun.struck or isinstance(error, TimeoutError):
                    raise late from None
                raise
            finally:
                watch.end(begun)
            if begun.struck:
                raise late

    return Watched


def judged(line: Line, reply: Reply) -> Reply:
    """The reply, if it is an answer; Refused, Lost, Denied or ServiceError by its status, in the server's words."""
    if reply.status == 200:
        return reply
    said = words(reply._replace(body=line.secrets.hide(reply.body.decode("utf-8", "replace")).encode()))
    status = f"{line._host()} answered {reply.status}" + (f": {said}" if said else "")
    if reply.status == 429 or (reply.status == 503 and "queue" in said.lower()):
        raise Refused(status, _retry_after(reply))
    if reply.status in (408, 500, 502, 503, 504):
        raise Lost(status)
    if 300 <= reply.status < 400:
        where = line.secrets.hide(reply.headers.get("location", "nowhere"))[:300]
        raise Denied(
            f"{line._host()} sends elsewhere ({reply.status}), to {where!r}; mekd "
            "does not follow, since images and keys would go there too. Give that address with --teacher.url if it is "
            "the right one"
        )
    if reply.status in (401, 403):
        raise Denied(f"{status}. Check the key in oracle.headers")
    if reply.status == 404:
        raise Denied(f"{status}. Check the path of teacher.url")
    raise ServiceError(status)


def words(reply: Reply) -> str:
    """What a server says in the body of an error, in a line, whatever its type."""
    text = reply.body.decode("utf-8", "replace")
    if text.startswith("Traceback "):
        text = text.strip().rpartition("\n")[2]  # what went wrong stands last
    text = text[:2000]
    if found := re.search(r'"(?:error|message|detail)"\s*:\s*"((?:[^"\\]|\\.)*)"', text):
        text = found.group(1)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text[:300]


def _retry_after(reply: Reply) -> float | None:
    value = reply.headers.get("retry-after")
    if value is None:
        return None
    urllib3 = _urllib3()
    try:
        return float(urllib3.Retry(total=0).parse_retry_after(value))
    except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError):  # no date, or one that no clock shows
        return None


def _is_about_certificates(error: BaseException) -> bool:
    return isinstance(error, _urllib3().exceptions.SSLError) or "certificate" in str(error).lower()


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return re.sub(r"^<?[\w.]+ object at 0x[0-9a-f]+>?: |^\w+\(host=.*?\): ", "", text) or type(error).__name__


def _urllib3() -> Any:
    try:
        import urllib3
        import urllib3.connection
    except ImportError as error:
        raise UsageError("a teacher behind an address needs urllib3: pip install 'mekd[remote]'") from error
    return urllib3
