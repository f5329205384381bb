"""Damaged and malicious files: clear errors, no code, bounded memory (bench/fuzz.py has more cases)."""

import codecs
import gzip
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import fuzz, loss_calls
from mekd import checks, cli, testing
from mekd.data import DataError, arrays
from mekd.data.upright import decode
from mekd.oracle.replay import Replay, StoreError
from mekd.oracle.response import Response


@pytest.mark.parametrize("name", fuzz.PARSERS)
def test_damaged_files_are_read_or_refused(name: str) -> None:
    counts, examples = fuzz.run(name, 12, seed=1)
    assert set(counts) <= {"read", "refused"}, examples
    assert counts["refused"] > 0


def test_random_calls_of_the_losses_are_right_or_refused() -> None:
    counts, examples = loss_calls.outcomes(range(600), seed=2)
    assert set(counts) <= {*loss_calls.FINE}, examples
    assert counts["near"] < 3 and counts["right"] > 300 and counts["refused"] > 100


def test_a_wrong_value_and_an_unclear_error_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = testing.result
    monkeypatch.setattr(testing, "result", lambda *given: [x + 0.1 for x in kept(*given)])
    monkeypatch.setattr(checks, "check_tensor", lambda name, x: None)
    counts, examples = loss_calls.outcomes(range(300), seed=2)
    assert counts["wrong"] > 60 and counts["AttributeError"] > 0, examples


def test_the_fuzzer_sees_what_must_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(folder: Path) -> None:
        content = (folder / "checkpoint.pt").read_bytes()
        try:
            torch.load(io.BytesIO(content), weights_only=True)
        except Exception as error:
            raise KeyError("no error of ours") from error

    monkeypatch.setitem(fuzz.PARSERS, "checkpoint", (fuzz._checkpoint, bad))
    counts, examples = fuzz.run("checkpoint", 10, seed=1)
    assert counts["KeyError"] > 0 and "KeyError" in examples


def test_a_small_file_that_unpacks_to_any_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "LARGEST", 1 << 20)
    fuzz._idx(tmp_path)
    with gzip.open(tmp_path / "t10k-labels-idx1-ubyte.gz", "wb") as file:
        file.write(bytes(1 << 21))
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.gz cannot be read \(it unpacks to more than"):
        arrays.load("mnist", str(tmp_path), 16)


class _Call:
    """Pickles as a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("what", ["array", "subtype", "code", "import"])
def test_a_pickle_takes_no_memory_and_runs_nothing(what: str, tmp_path: Path) -> None:
    fuzz._cifar(tmp_path)
    rebuild = np.empty(0).__reduce__()[0]
    data = {
        "array": _Call(np.ndarray, (1 << 40,)),  # a terabyte
        "subtype": _Call(rebuild, np.ndarray, (1 << 40,), b"b"),
        "code": _Call(exec, "open('ran', 'w')"),
        "import": _Call(codecs.decode, b"x", "rot13"),
    }[what]
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": data, b"labels": [0]}, protocol=2))
    with pytest.raises(DataError, match=r"data_batch_1.*CIFAR batch"):
        arrays.load("cifar10", str(tmp_path), 16)
    assert not Path("ran").exists()


def test_a_picture_that_claims_a_billion_pixels_is_refused(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "large.png"
    Image.new("L", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = (40000).to_bytes(4, "big") * 2  # the header's width and height
    content[29:33] = __import__("zlib").crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"large.png is larger than Pillow opens"):
        decode(path, 16)


def test_a_store_that_does_not_say_what_it_holds(tmp_path: Path) -> None:
    store = Replay(tmp_path, 4)
    store.write(
        0, torch.zeros(4, 1, 8, 8, dtype=torch.uint8), Response("label", None, torch.zeros(4, dtype=torch.int64))
    )
    store.flush()
    good = json.loads((tmp_path / "replay.json").read_text())
    for text in ("{", "[]", "null", json.dumps({**good, "kind": "x"}), json.dumps({**good, "arrays": ["../secret"]})):
        (tmp_path / "replay.json").write_text(text)
        with pytest.raises(StoreError, match=r"replay.json is damaged"):
            Replay(tmp_path, 4)


def test_a_setting_without_a_value_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("oracle: {timeout: }\n")
    assert cli.main(["run", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "oracle.timeout is null, which it may not be" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text("oracle: {budget: }\n")
    assert cli.parse(["--config", str(tmp_path / "run.yaml")]) is not None
