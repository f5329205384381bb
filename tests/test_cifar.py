"""CIFAR's python batches: read, and never run."""

import io
import os
import pickle
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from mekd.data import load
from mekd.data.arrays import DataError

#: Images in the training and in the test part of what is written here.
TRAIN, TEST = 12, 5


#: The pickler in Python, whose every opcode can be replaced.
Pickler: Any = vars(pickle)["_Pickler"]


class Python2Pickler(Pickler):
    """Writes protocol 2 as Python 2 did: text and bytes alike are its str."""

    dispatch: ClassVar = dict(Pickler.dispatch)

    def save_bytes(self, value: bytes | str) -> None:
        raw = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch[bytes] = save_bytes
    dispatch[str] = save_bytes


def python2(content: Any) -> bytes:
    """content as the authors of CIFAR pickled it, with the numpy of their time."""
    out = io.BytesIO()
    Python2Pickler(out, 2).dump(content)
    return out.getvalue().replace(b"numpy._core", b"numpy.core")


def python3(content: Any) -> bytes:
    """The same content, pickled today by somebody who kept to its bytes."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {kept(k): kept(v) for k, v in value.items()}
        if isinstance(value, list):
            return [kept(v) for v in value]
        return value.encode() if isinstance(value, str) else value

    return pickle.dumps(kept(content))


def cifar_content(hundred: bool) -> dict[str, dict[str, Any]]:
    """File name: its dictionary. Every image is told from every other by its first pixel."""
    parts = {"train": TRAIN, "test": TEST} if hundred else {f"data_batch_{i}": 3 for i in range(1, 6)}
    if not hundred:
        parts["test_batch"] = TEST
    random = np.random.default_rng(0)
    content: dict[str, dict[str, Any]] = {}
    seen = 0
    for name, count in parts.items():
        pixels = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        pixels[:, 0] = np.arange(seen, seen + count)
        labels = [(7 * i) % (100 if hundred else 10) for i in range(seen, seen + count)]
        names = ["fine_labels", "coarse_labels"] if hundred else ["labels"]
        content[name] = {
            "batch_label": "one of several",
            "data": pixels,
            **{key: [label // 5 if key == "coarse_labels" else label for label in labels] for key in names},
        }
        seen += count
    if hundred:
        content["meta"] = {"fine_label_names": [f"fine{i}" for i in range(100)], "coarse_label_names": []}
    else:
        content["batches.meta"] = {"label_names": [f"class{i}" for i in range(10)], "num_vis": 3072}
    return content


def write_cifar(
    folder: Path, hundred: bool, write: Callable[[Any], bytes] = python2, **replaced: dict[str, Any]
) -> Path:
    folder.mkdir()
    for name, content in cifar_content(hundred).items():
        (folder / name).write_bytes(write({**content, **replaced.get(name, {})}))
    return folder


@pytest.mark.parametrize("hundred", [False, True])
@pytest.mark.parametrize(
    "write",
    [
        # The files that everybody has.
        python2,
        # The same dictionaries, written today.
        python3,
    ],
)
def test_cifar_batches(tmp_path: Path, hundred: bool, write: Callable[[Any], bytes]) -> None:
    name, count = ("cifar100", TRAIN) if hundred else ("cifar10", 15)
    data = load(name, str(write_cifar(tmp_path / "set", hundred, write)), 32)
    content = cifar_content(hundred)
    assert data.train_images.shape == (count, 3, 32, 32)
    assert data.test_images.shape == (TEST, 3, 32, 32)
    # The five batches one behind the other, and the test images behind them.
    assert data.train_images[:, 0, 0, 0].tolist() == list(range(count))
    assert data.test_images[:, 0, 0, 0].tolist() == list(range(count, count + TEST))
    # Red, green and blue plane by plane, row by row.
    first = content["train" if hundred else "data_batch_1"]["data"][0]
    assert data.train_images[0, 1, 2, 3].item() == first[1024 + 2 * 32 + 3]
    classes = 100 if hundred else 10
    assert data.train_labels.tolist() == [7 * i % classes for i in range(count)]
    assert data.test_labels.tolist() == [7 * i % classes for i in range(count, count + TEST)]
    assert len(data.classes) == classes
    assert data.classes[-1] == ("fine99" if hundred else "class9")


def test_cifar_is_resized(tmp_path: Path) -> None:
    data = load("cifar10", str(write_cifar(tmp_path / "set", False)), 64)
    assert data.image == (3, 64, 64) and data.test_images.shape == (TEST, 3, 64, 64)


class Runs:
    """Pickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize(
    ("attack", "wants"),
    [
        # Code as such.
        (lambda marker: Runs(exec, f"open({marker!r}, 'w').close()"), "exec"),
        # A program.
        (lambda marker: Runs(os.system, f"touch '{marker}'"), "system"),
        # A function of numpy: the module is trusted, the function is not.
        (lambda marker: Runs(np.save, f"{marker}", 0), "save"),
        # A harmless class: nothing but arrays is needed.
        (lambda marker: Path(marker), "PosixPath"),
    ],
)
@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_pickle_that_wants_to_run_code_is_refused(
    tmp_path: Path, attack: Callable[[str], Any], wants: str, file: str
) -> None:
    marker = tmp_path / "was-run"
    folder = write_cifar(tmp_path / "set", False)
    attacked = {**cifar_content(False)[file], "more": attack(str(marker))}
    (folder / file).write_bytes(pickle.dumps(attacked, protocol=2))
    with pytest.raises(DataError, match=rf"{file} is no CIFAR batch.*{wants}"):
        load("cifar10", str(folder), 32)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    # The attack is one: without the guard it runs, or at least loads.
    pickle.loads((folder / file).read_bytes())
    assert wants == "PosixPath" or len(list(tmp_path.iterdir())) == 2


def test_no_module_is_imported_by_a_name_that_a_pickle_gives(tmp_path: Path) -> None:
    """Of numpy too: importing numpy.f2py.__main__ starts a program, whatever name is then asked of it."""
    folder = write_cifar(tmp_path / "set", False)
    for module in ("numpy.f2py.__main__", "numpy.core", "numpy.rec"):
        (folder / "test_batch").write_bytes(f"c{module}\ndtype\n.".encode())
        with pytest.raises(DataError, match=rf"it wants {re.escape(module)}\.dtype"):
            load("cifar10", str(folder), 32)
    assert "numpy.f2py.__main__" not in sys.modules


@pytest.mark.parametrize(
    ("hundred", "file", "keep"),
    [
        # One of five batches was not unpacked.
        (False, "data_batch_4", None),
        (False, "batches.meta", None),
        (True, "train", None),
        (True, "meta", None),
        # The download stopped.
        (False, "data_batch_2", 0.5),
        (True, "test", 0.99),
        (False, "batches.meta", 0.0),
    ],
)
def test_damaged_cifar_files(tmp_path: Path, hundred: bool, file: str, keep: float | None) -> None:
    folder = write_cifar(tmp_path / "set", hundred)
    if keep is None:
        (folder / file).unlink()
    else:
        raw = (folder / file).read_bytes()
        (folder / file).write_bytes(raw[: int(keep * len(raw))])
    with pytest.raises(DataError, match=f"{file} is {'missing' if keep is None else 'no CIFAR batch'}"):
        load("cifar100" if hundred else "cifar10", str(folder), 32)


BATCH = "data_batch_1"


@pytest.mark.parametrize(
    ("file", "content", "parts"),
    [
        # Labels under another name: CIFAR-100's file under CIFAR-10's name.
        (BATCH, {"data": np.zeros((3, 3072), np.uint8), "fine_labels": [0] * 3}, [BATCH, "labels"]),
        # No images.
        (BATCH, {"labels": [0] * 3}, [BATCH, "data"]),
        # Images of another size.
        (BATCH, {"data": np.zeros((3, 1000), np.uint8), "labels": [0] * 3}, [BATCH, "no CIFAR batches"]),
        # Fewer labels than images.
        (
            BATCH,
            {"data": np.zeros((3, 3072), np.uint8), "labels": [0] * 2},
            ["15 train images but 14 labels"],
        ),
        # A label below, and one above the classes.
        (BATCH, {"data": np.zeros((3, 3072), np.uint8), "labels": [0, -1, 0]}, ["train", "-1", "10 classes"]),
        (BATCH, {"data": np.zeros((3, 3072), np.uint8), "labels": [0, 10, 0]}, ["train", "10", "10 classes"]),
        # No dictionary at all.
        (BATCH, ["data", "labels"], [BATCH, "no CIFAR batches"]),
        # No names.
        ("batches.meta", {"num_vis": 3072}, ["batches.meta", "label_names"]),
        # No dictionary, and no list in it.
        *(
            pytest.param(
                "batches.meta",
                content,
                ["batches.meta", "label_names"],
            )
            for content in (["airplane"], {"label_names": 10})
        ),
    ],
)
def test_cifar_files_that_do_not_fit(tmp_path: Path, file: str, content: Any, parts: list[str]) -> None:
    folder = write_cifar(tmp_path / "set", False)
    (folder / file).write_bytes(python2(content))
    with pytest.raises(DataError) as caught:
        load("cifar10", str(folder), 32)
    for part in parts:
        assert part in str(caught.value)
