"""huggingface_hub, and its errors as what a user can mend."""

import contextlib
from collections.abc import Iterator
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._validators import validate_repo_id

from mekd import __version__
from mekd.errors import MekdError, UsageError

#: What its HTTP client raises where nobody answers: httpx's or that of requests, by the version.
NETWORK: tuple[type[BaseException], ...] = (HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError)


class HubError(MekdError, RuntimeError):
    """The hub did not do what it was asked to."""


def api() -> HfApi:
    """The hub, as the user's own environment and login reach it."""
    return HfApi(library_name="mekd", library_version=__version__)


def address() -> str:
    """Where the hub is, without a password that stands in HF_ENDPOINT."""
    parts = urlsplit(constants.ENDPOINT)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def check_name(name: str) -> None:
    """UsageError where a name is not OWNER/NAME."""
    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise UsageError(
            f"NAME is {name!r}; it must be OWNER/NAME, such as alice/plants, of letters, digits, - _ and . ({error})"
        ) from error


def require_login() -> None:
    """UsageError where nobody is logged in."""
    if get_token() is None:
        raise UsageError("nobody is logged in: `hf auth login`, or set HF_TOKEN to a token that may write")


@contextlib.contextmanager
def _their_causes() -> Iterator[None]:
    """A file that could not be fetched for what kept it from being: an answer of the hub, or none."""
    try:
        yield
    except LocalEntryNotFoundError as error:
        raise error.__cause__ or ConnectionError(str(error)) from error


@contextlib.contextmanager
def told(name: str, does: str) -> Iterator[None]:
    """Errors of the hub while it does something to a repository as HubError, which names what to do; no token."""
    try:
        with _their_causes():
            yield
    except RevisionNotFoundError as error:
        raise HubError(f"{name} has no such revision: leave --revision out for its newest") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{name} is not there, or not to be seen with your login: check the name; for a private one log in "
            "(`hf auth login`, or HF_TOKEN)"
        ) from error
    except EntryNotFoundError as error:
        raise HubError(f"{name} lost a file while it was read; try again") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        raise HubError(f"{address()} did not {does} {name}: {_why(status)}") from error
    except NETWORK as error:
        raise HubError(
            f"{address()} cannot be reached ({type(error).__name__}): check the network, HF_ENDPOINT and "
            "HF_HUB_OFFLINE, then run the same command again"
        ) from error


def _why(status: int) -> str:
    if status == 401:
        return "it does not know your token (401): `hf auth login` again, or mend HF_TOKEN"
    if status == 403:
        return (
            "your token may not write there (403): take one that may write, of an owner whose repositories you may "
            "change"
        )
    if status == 409:
        return "there is one of that name (409): choose another, or add to it with --update"
    if status == 429:
        return "it was asked too often (429): wait some minutes"
    return f"it answered {status}; try again later"
