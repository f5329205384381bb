"""mekd watch: the page of a run while it goes on. It is served to this machine alone, and reads files, no more."""

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mekd import files, page, serve
from mekd.audited import audited
from mekd.engine.result import STUDENT
from mekd.engine.run import Run
from mekd.errors import MekdError, UsageError
from mekd.options import Parser
from mekd.page import HEADINGS, Page
from mekd.page.markup import text
from mekd.student import FILE

if TYPE_CHECKING:
    import socket

    import uvicorn
    from starlette.applications import Starlette

#: The names by which a browser may ask: a page elsewhere whose name points here has another one (DNS rebinding).
HOSTS = ("127.0.0.1", "localhost")
#: Seconds without a change from which on a run that is not finished is said to stand.
STANDS = 300
#: Lines of log.txt that are shown.
LINES = 5


def main(words: Sequence[str]) -> int:
    """Serve a run's page until interrupted or terminated; returns 0. Raises MekdError for what cannot be served."""
    return serve.until_stopped(*prepare(words))


def prepare(words: Sequence[str]) -> "tuple[uvicorn.Server, socket.socket, str]":
    """A server that can run, the socket that it listens on, and a line that says where the page is."""
    parser = Parser(prog="mekd watch", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="the run's folder, which need not be there yet")
    port = serve.number(0, 65535, whole=True)
    parser.add_argument("--port", type=port, default=8001, help="on 127.0.0.1; 0 chooses a free one (%(default)s)")
    options = parser.parse_args(list(words))
    serve.require_packages()
    folder = Path(options.run)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"RUN is {options.run!r}, a file; it must be a run's folder, such as runs/digits")
    import torch
    import uvicorn

    torch.set_num_threads(1)  # the cores are the run's
    config = uvicorn.Config(
        app(Watched(folder)), log_config=None, log_level="warning", access_log=False, ws="none", lifespan="off",
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    listening = serve.listen(HOSTS[0], options.port, f"--port {options.port}")
    address = f"http://{HOSTS[0]}:{listening.getsockname()[1]}/"
    return uvicorn.Server(config), listening, f"watching {files.shown(folder)} at {address} (Ctrl-C ends it)"


class Watched:
    """The page of a folder as it is now. What did not change since the last look is not read again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._turn = threading.Lock()
        self._seen: Any = None
        self._run: Run | None = None
        self._configured: Any = None
        self._page = Page(folder.name, dict.fromkeys(HEADINGS, ""))
        self._finished, self._wrong = False, ""

    def look(self) -> tuple[Page, str, bool]:
        """The page, a line about the run, and whether it is finished."""
        with self._turn:
            stamps = self._stamps()
            if not (self.folder / "config.yaml").is_file():
                head = f"<h1>{text(self.folder.name)}</h1><p>There is no run in this folder yet.</p>"
                self._page, self._finished = Page(self.folder.name, dict.fromkeys(HEADINGS, "") | {"head": head}), False
                return self._page, "waiting for the run to begin", False
            if stamps != self._seen:
                try:
                    self._page, self._finished = self._read(stamps)
                    self._seen, self._wrong = stamps, ""
                except Exception as error:  # whatever a folder in motion brings: the next look may find it whole
                    told = error if isinstance(error, MekdError) else f"{type(error).__name__}: {error}"
                    self._wrong = f"the folder cannot be read now, this is how it was before ({files.shown(told)})"
            return self._page, self._wrong or self._status(stamps), self._finished

    def _stamps(self) -> dict[str, tuple[int, int]]:
        """When each file that the page depends on was last written, and its size."""
        found = {}
        for pattern in ("*.json", "*.jsonl", "*.txt", "*.yaml", "student.*", "checkpoints/*.pt", "ledger/*.sqlite*"):
            for path in self.folder.glob(pattern):
                try:
                    stat = path.stat()
                except OSError:  # it was renamed just now
                    continue
                found[str(path)] = stat.st_mtime_ns, stat.st_size
        return found

    def _read(self, stamps: dict[str, tuple[int, int]]) -> tuple[Page, bool]:
        configured = stamps[str(self.folder / "config.yaml")]
        if self._run is None or self._configured != configured:
            from mekd.cli import parse

            parsed = parse(["--config", str(self.folder / "config.yaml"), "--out", str(self.folder)])
            assert parsed is not None
            self._run, self._configured = Run(*parsed), configured
        run = self._run
        done = self._is_finished(stamps)
        summary = run.read_json("summary.json") if done else None
        facts = page.gather(run, _names(run), summary, moving=True, log=_last_lines(self.folder / "log.txt"))
        return page.fitting(facts, audited(facts.audit)), done

    def _is_finished(self, stamps: dict[str, tuple[int, int]]) -> bool:
        """Whether the report was written after the last step was taken."""
        of = {name: stamps.get(str(self.folder / name), (0, 0))[0] for name in (*STUDENT, "summary.json")}
        return all(of.values()) and of["summary.json"] >= stamps.get(str(self.folder / "metrics.jsonl"), (0, 0))[0]

    def _status(self, stamps: dict[str, tuple[int, int]]) -> str:
        if self._finished:
            return "finished; report.html in the folder is this page as a file"
        still = time.time() - max(time_ns for time_ns, _ in stamps.values()) / 1e9
        if still > STANDS:
            return f"nothing was written for {still / 60:.0f} minutes: it takes long, or has ended (log.txt says why)"
        return "at work"


def app(watched: Watched) -> "Starlette":
    """The page, and what is new of it as JSON."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    headers = {
        "Content-Security-Policy": f"{page.policy(live=True)}; frame-ancestors 'none'", "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
    }  # fmt: skip

    def whole(request: Request) -> Response:
        return Response(page.document(watched.look()[0], live=True), 200, headers, "text/html")

    def news(request: Request) -> Response:
        now, status, finished = watched.look()
        content = {"title": now.title, "sections": now.sections, "status": status, "finished": finished}
        return Response(json.dumps(content), 200, headers, "application/json")

    routes = [Route("/", whole, methods=["GET"]), Route("/page.json", news, methods=["GET"])]
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False)
    return Starlette(routes=routes, middleware=[trusted])


def _names(run: Run) -> list[str]:
    """The names of the classes, as the student's file has them, or else the configuration; nobody is asked."""
    from safetensors import safe_open

    if (run.out / FILE).exists():
        with safe_open(run.out / FILE, "pt") as file:
            return list(json.loads((file.metadata() or {}).get("classes", "[]")))
    return run.class_names or []


def _last_lines(path: Path) -> list[str]:
    """The last lines of the log."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        return file.read().decode("utf-8", "replace").splitlines()[-LINES:]
