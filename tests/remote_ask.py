"""An oracle at the other end of a line, for both protocols, and what its account says afterwards."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fake_service import CLASSES, IMAGE, images
from ledger_teacher import rows
from mekd.errors import MekdError, UsageError
from mekd.oracle.answers import Meaning
from mekd.oracle.hf import Pictures
from mekd.oracle.http import Line
from mekd.oracle.images import Encoding
from mekd.oracle.ledger import Ledger, totals
from mekd.oracle.oip import Model, Oip
from mekd.oracle.remote import RemoteOracle
from raw_server import pairs, reply, tensor

NAMES = ("cat", "dog", "owl", "elk")
MODEL = Model("x", "UINT8", False, "probs", CLASSES, None, False, False, (), None, "")
SHARES = [0.5, 0.25, 0.125, 0.125]
GOOD = {"hf": pairs(cat=0.5, dog=0.25), "oip": tensor(SHARES, [1, CLASSES])}


def good(protocol: str) -> bytes:
    return reply(200, GOOD[protocol])


def connect(
    protocol: str, url: str, folder: Path | None, *, timeout: float = 10.0, headers: dict[str, str] | None = None,
    budget: int | None = None, model: Model = MODEL, k: int | None = None, unknown: str = "error",
    names: Sequence[str] = (), **options: Any,
) -> RemoteOracle:  # fmt: skip
    line = Line(url, headers or {}, timeout)
    hf = protocol == "hf"
    oip = functools.partial(Oip, mean=[0.0], std=[1.0], k=k, names=names)
    service = Pictures(line, "png", CLASSES) if hf else oip(line, model, CLASSES)
    kind = "pairs" if hf or k else "probs"
    ledger = Ledger("s", folder, budget)
    ledger.rewind(0)
    options = {
        "meaning": Meaning(kind, 1.0, "so", NAMES, unknown),
        "response": "topk" if hf or k else "probs",
    } | options
    encoding = Encoding("png") if hf else Encoding()
    return RemoteOracle(service, IMAGE, CLASSES, k=2, encoding=encoding, ledger=ledger, **options)


def ask(protocol: str, url: str, folder: Path, m: int = 1, **options: Any) -> Any:
    """The answer to m images, or the error; the account is closed."""
    oracle = connect(protocol, url, folder, **options)
    try:
        return oracle.query(images(m))
    except (MekdError, UsageError) as error:
        return error
    finally:
        oracle.close()


def assert_right(protocol: str, answer: Any) -> None:
    if isinstance(answer, Exception):
        raise answer
    assert torch.equal(answer.values[0], torch.tensor(SHARES[:2] if protocol == "hf" else SHARES))


def paid(folder: Path) -> tuple[int, int, int]:
    """Queries, uncertain ones, attempts."""
    found = totals(folder, "s")
    return found["queries"], found["uncertain"], rows(folder, "SELECT count(*) FROM calls")[0][0]
