"""A stand-in for the Hugging Face Hub on loopback: what huggingface_hub calls to make, fill, show and read a model."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

SHA = "0123456789abcdef0123456789abcdef01234567"
#: Tokens, and whether they may write.
TOKENS = {"hf_write": True, "hf_read": False}
TOKEN = "hf_write"


@dataclass
class Hub:
    """What the stand-in holds and what it was sent: repositories' files and whether they are private, requests."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    #: Method, path, headers and body.
    requests: list[tuple[str, str, str, bytes]] = field(default_factory=list)
    #: Parts of a path whose requests are answered with that status.
    fails: dict[str, int] = field(default_factory=dict)

    def received(self) -> bytes:
        """Every byte that came, but the token's own header; what came as base64 also as what it is."""
        parts = []
        for method, path, headers, body in self.requests:
            kept = [line for line in headers.splitlines() if not line.lower().startswith("authorization:")]
            parts += [method.encode(), path.encode(), "\n".join(kept).encode(), body]
        return b"\0".join([*parts, *(content for files in self.repos.values() for content in files.values())])


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does, where huggingface_hub looks at the answer."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, self.path, str(self.headers), body))
        for part, status in self.hub.fails.items():
            if part in path:
                return self._answer(status, {"error": "made up"})
        if path.startswith("/lfs/"):
            assert hashlib.sha256(body).hexdigest() == path[5:]
            self.hub.blobs[path[5:]] = body
            return self._answer(200, {})
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            return self._answer(
                401, {"error": "bad token"}, {"X-Error-Message": "Invalid credentials in Authorization header"}
            )
        if self.command in ("POST", "PUT") and not TOKENS.get(token):
            return self._answer(403, {"error": "read-only"})
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        for middle, does in (("/preupload/", self._preupload), ("/commit/", self._commit)):
            if path.startswith("/api/models/") and middle in path:
                return does(path[12:].split(middle)[0], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self._answer(200, {"objects": objects, "transfer": "basic"})
        if path.startswith("/api/models/"):
            return self._show(path[12:].partition("/revision/")[0], token)
        if "/resolve/" in path:
            repo, _, rest = path[1:].partition("/resolve/")
            return self._resolve(repo, rest.partition("/")[2], token)
        return self._answer(404, {"error": path})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            return self._answer(409, {"error": "exists"})
        self.hub.repos[name], self.hub.private[name] = {}, asked.get("visibility") == "private"
        return self._answer(200, {"url": f"{self.hub.url}/{name}"})

    def _preupload(self, repo: str, body: bytes) -> None:
        def mode(name: str) -> str:
            return "lfs" if name.endswith((".safetensors", ".onnx", ".png")) else "regular"

        files = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False, "oid": None}
                 for f in json.loads(body)["files"]]  # fmt: skip
        self._answer(200, {"files": files})

    def _commit(self, repo: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.repos[repo][value["path"]] = self.hub.blobs[value["oid"]]
        self._answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{SHA}", "commitOid": SHA})

    def _seen(self, repo: str, token: str) -> bool:
        return repo in self.hub.repos and (bool(token) or not self.hub.private.get(repo, False))

    def _show(self, repo: str, token: str) -> None:
        if not self._seen(repo, token):
            return self._answer(401, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
        files = [{"rfilename": name, "size": len(content)} for name, content in self.hub.repos[repo].items()]
        private = self.hub.private.get(repo, False)
        return self._answer(200, {"id": repo, "sha": SHA, "private": private, "siblings": files, "tags": []})

    def _resolve(self, repo: str, name: str, token: str) -> None:
        if not self._seen(repo, token) or name not in self.hub.repos[repo]:
            return self._answer(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
        content = self.hub.repos[repo][name]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": SHA}
        return self._send(200, content, headers)

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextlib.contextmanager
def standing_in() -> Iterator[Hub]:
    """The stand-in in a thread of its own, ended behind the with."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfThisHub", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The stand-in, as the hub that huggingface_hub finds, with a login that may write."""
    from huggingface_hub import constants

    with standing_in() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
