"""The address of a teacher and the headers that go with it: secrets put in, and what no request can hold refused."""

import os
import re
from pathlib import Path
from urllib.parse import SplitResult, quote, urlsplit

from mekd.errors import UsageError

_SECRET = re.compile(r"\{(env|file):([^{}]+)\}")
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NO_VALUE = re.compile(r"[^\t\x20-\x7e\x80-\xff]")


class Secrets:
    """{env:NAME} and {file:PATH} in settings: expanded when something is sent, and hidden in what is said of it."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def expand(self, setting: str, text: str) -> str:
        """The text with its secrets; UsageError names the setting whose secret is not there."""

        def found(match: re.Match[str]) -> str:
            kind, name = match.groups()
            if kind == "env":
                value = os.environ.get(name)
            else:
                try:
                    value = Path(name).expanduser().read_text("utf-8-sig").strip()  # as editors save it
                except (OSError, UnicodeDecodeError):
                    value = None
            if not value:
                what = f"the environment variable {name}" if kind == "env" else f"the file {name}"
                wrong = "missing or empty" if kind == "env" else "missing, empty or no text in UTF-8"
                raise UsageError(f"{setting} needs {what}, which is {wrong}: set it, then run again")
            if "\n" in value or "\r" in value:
                raise UsageError(f"{setting} takes one line; {match.group()} holds several")
            self._known[value] = match.group()
            return value

        return _SECRET.sub(found, text)

    def hide(self, text: str) -> str:
        """A message without any secret that was expanded."""
        for value in sorted(self._known, key=len, reverse=True):
            text = text.replace(value, self._known[value])
        return text


def check_address(url: str) -> None:
    """Raise UsageError for what is no address of http or https, or holds a user and password; nothing is expanded."""
    try:
        parts = urlsplit(_SECRET.sub("secret", url))
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"teacher.url is {url!r}, which is no address ({error}): http://HOST:PORT/PATH") from error
    if "@" in parts.netloc:
        raise UsageError(
            "teacher.url holds a user or a password; it is written to the run's folder, so it must not. Send them as a "
            "header: --oracle.headers '{Authorization: \"Basic {env:NAME}\"}'"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise UsageError(f"teacher.url is {url!r}; it must begin with http:// or https:// and a host")
    if "#" in _SECRET.sub("secret", url):  # what is behind it would not be sent
        raise UsageError(f"teacher.url is {url!r}, and no address can hold '#': leave it out, or write %23 for it")
    if found := _unsendable(parts):
        raise UsageError(
            f"teacher.url is {url!r}, and no address can hold {found!r}: leave it out, or write {quote(found)} for it"
        )


def address(secrets: Secrets, url: str) -> SplitResult:
    """teacher.url with its secrets, in parts; UsageError for a secret that is not there or that no address can hold."""
    try:
        whole = secrets.expand("teacher.url", url)
        parts = urlsplit(whole)
        _ = parts.port  # ValueError where it is no number
        fits = bool(parts.hostname) and _unsendable(parts) is None and "#" not in whole
    except ValueError:
        fits = False
    if not fits:
        raise UsageError(
            f"teacher.url is {url!r}, which is no address with what its secrets hold: they must be ASCII without "
            "blanks and without #, and anything else in them written as %XX"
        )
    return parts


def header(secrets: Secrets, name: str, value: str) -> str:
    """One of oracle.headers with its secrets; UsageError for a secret that is not there, or what no header can hold."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"oracle.headers has the name {name!r}; a header's name is of letters, digits and -, such as Authorization"
        )
    sent = secrets.expand(f"oracle.headers {name}", value)
    if found := _NO_VALUE.search(_SECRET.sub("", value)):
        raise UsageError(
            f"oracle.headers {name} is {value!r}, and no header can hold {found.group()!r}: write it in one line of "
            "latin-1"
        )
    if _NO_VALUE.search(sent):
        raise UsageError(
            f"oracle.headers {name} is {value!r}, and its secret holds a character that no header can: look whether "
            "it was copied whole and alone, as one line of latin-1"
        )
    return sent


def _unsendable(parts: SplitResult) -> str | None:
    """The first character of an address that cannot be sent: a blank, a control character, or in the path no ASCII."""
    found = re.search(r"[\x00-\x20\x7f]", parts.netloc) or re.search(r"[^\x21-\x7e]", f"{parts.path}{parts.query}")
    return found.group() if found else None
