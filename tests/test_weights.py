"""Weights that a user gives: what torch.save wrote in any of the usual ways, or a message that says what to do."""

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mekd.files import WeightsError, load_weights

NET = nn.Linear(2, 3)


def saved(content: Any, **how: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(content, path, **how)


def prefixed(prefix: str) -> dict[str, Any]:
    return {prefix + name: value for name, value in NET.state_dict().items()}


@pytest.mark.parametrize(
    "write",
    [
        saved(NET.state_dict()),
        saved(NET.state_dict(), _use_new_zipfile_serialization=False),
        saved({"epoch": 3, "state_dict": NET.state_dict()}),
        saved({"epoch": 3, "model": nn.DataParallel(NET).state_dict()}),
        saved({"model_state_dict": prefixed("_orig_mod.")}),
        saved(prefixed("module._orig_mod.")),
        saved(dict(NET.named_parameters())),
    ],
    ids=["plain", "old", "state_dict", "model", "compiled", "both", "parameters"],
)
def test_weights_in_the_usual_ways(tmp_path: Path, write: Callable[[Path], object]) -> None:
    write(tmp_path / "w.pt")
    other = nn.Linear(2, 3)
    other.load_state_dict(load_weights(tmp_path / "w.pt", "teacher.checkpoint"))
    assert torch.equal(other.weight, NET.weight) and torch.equal(other.bias, NET.bias)


def test_a_prefix_that_is_part_of_some_names_stays(tmp_path: Path) -> None:
    torch.save({"module.weight": torch.ones(1), "bias": torch.ones(1)}, tmp_path / "w.pt")
    assert list(load_weights(tmp_path / "w.pt", "teacher.checkpoint")) == ["module.weight", "bias"]


def cut(path: Path) -> None:
    torch.save(NET.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: None, "no such file"),
        (saved(NET), r"more than weights \(torch.nn.modules.linear.Linear\): a whole pickled .* torch.save\(model"),
        (saved(NET, _use_new_zipfile_serialization=False), "more than weights"),
        (saved({"state_dict": NET.state_dict(), "args": argparse.Namespace(a=1)}), r"weights \(argparse.Namespace\)"),
        (lambda path: torch.jit.script(NET).save(str(path)), r"a TorchScript module; .*torch.jit.load\(FILE"),
        (lambda path: path.write_bytes(bytes([2] + 7 * [0]) + b"{}   "), "a safetensors file; .*safetensors.torch"),
        (cut, "which torch cannot read .*cut short or no file of torch.save$"),
        (lambda path: path.write_bytes(b""), "an empty file; it must be a file of torch.save"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "a pointer of git-lfs"),
        (lambda path: path.mkdir(), "a folder; it must be"),
        (lambda path: path.write_bytes(pickle.dumps({"weight": [1.0]})), "which torch cannot read"),
        (saved([torch.zeros(1)]), "which holds a list; it must hold weights by name"),
        (saved({}), "which holds a dict of nothing; it must"),
        (saved({"step": 1, "state": {"net": {}}}), "which holds a dict of step, state; it must hold weights by name"),
    ],
)  # fmt: skip
def test_what_holds_no_weights_that_can_be_taken(tmp_path: Path, write: Callable[[Path], object], says: str) -> None:
    path = tmp_path / "w.pt"
    write(path)
    kept = path.read_bytes() if path.is_file() else None
    with pytest.raises(WeightsError, match=f"teacher.checkpoint is '.*w.pt',? ?.*{says}") as caught:
        load_weights(path, "teacher.checkpoint")
    said = str(caught.value)
    assert "delete" not in said and "\n" not in said
    assert kept is None or path.read_bytes() == kept


def test_an_onnx_file_is_told_where_it_belongs(tmp_path: Path) -> None:
    (tmp_path / "w.onnx").write_bytes(b"\x08\x08\x12\x00")
    with pytest.raises(WeightsError, match=r"an ONNX file is given with --teacher.onnx"):
        load_weights(tmp_path / "w.onnx", "distill.checkpoint")


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return Path.mkdir, (tmp_path / "made",)  # type: ignore[return-value]

    torch.save({"state_dict": NET.state_dict(), "bomb": Bomb()}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="Reading it would run code of the file"):
        load_weights(tmp_path / "w.pt", "teacher.checkpoint")
    assert not (tmp_path / "made").exists()
