"""NaN stops a run at once, saved: nothing is paid for black images, and no good checkpoint is written over."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ledger_teacher import accounts, metrics
from mekd import cli, files
from mekd.engine import deprivatize, distill
from mekd.engine.run import Run
from mekd.nets import Generator


def poisoned(function: Any, at: int, spoil: Any) -> Any:
    """The function, whose result is spoilt at its nth call."""
    calls = []

    def called(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        result = function(*arguments, **options)
        return spoil(result, arguments) if len(calls) == at else result

    return called


def nan_loss(losses: dict[str, Tensor], arguments: Any) -> dict[str, Tensor]:
    return {name: value * torch.nan for name, value in losses.items()}


def nan_weight(losses: dict[str, Tensor], arguments: Any) -> dict[str, Tensor]:
    """The loss is a number, its gradient was none."""
    student = arguments[0]
    with torch.no_grad():
        next(student.parameters()).fill_(torch.nan)
    return losses


def test_a_loss_that_is_no_number_names_itself_and_its_step(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deprivatize, "take_step", poisoned(deprivatize.take_step, 7, nan_loss))
    assert cli.main(["run", *tiny, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "deprivatize diverged: loss_d is nan at step 6" in said and "--out and a smaller --deprivatize.lr" in said
    assert files.load(tmp_path / "checkpoints" / "deprivatize.pt")["step"] == 4
    assert accounts(tmp_path)["deprivatize"]["queries"] == 7 * 8  # and none after it
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and [json.loads(line)["step"] for line in text.splitlines()] == [2, 4, 6]


@pytest.mark.parametrize("spoil", [nan_loss, nan_weight])
def test_a_student_of_nan_is_never_written(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spoil: Any
) -> None:
    """Weights that became NaN in the last step before a checkpoint are found before they are written over good ones."""
    with monkeypatch.context() as broken:
        broken.setattr(distill, "take_step", poisoned(distill.take_step, 8, spoil))
        assert cli.main(["run", *tiny, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert ("loss is nan at step 7" if spoil is nan_loss else "the student holds NaN or infinity at step 8") in said
    saved = files.load(tmp_path / "checkpoints" / "distill.pt")
    assert saved["step"] == 4 and all(x.isfinite().all() for x in saved["state"]["student"].values())
    assert not (tmp_path / "student.pt").exists() and not (tmp_path / "student.onnx").exists()
    asked = accounts(tmp_path)["distill"]["queries"]
    assert asked == 8 * 8
    # What made it NaN is gone: the same command goes on from the good checkpoint and pays for no answer twice.
    assert cli.main(["run", *tiny, "--out", str(tmp_path)]) == 0
    assert accounts(tmp_path)["distill"]["queries"] == 9 * 8
    assert all(value is not None for row in metrics(tmp_path) for value in row.values())


def test_a_generator_that_draws_nan_pays_for_nothing(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As pixels NaN would be black: the holdout and every step would be asked about black images."""
    load = Run.load_generator

    def broken(self: Run) -> Generator:
        generator = load(self)
        with torch.no_grad():
            generator.last.bias.fill_(torch.nan)  # type: ignore[union-attr]
        return generator

    assert cli.main(["deprivatize", *tiny, "--out", str(tmp_path)]) == 0
    monkeypatch.setattr(Run, "load_generator", broken)
    assert cli.main(["distill", *tiny, "--out", str(tmp_path)]) == 2
    assert "holdout: the generator draws NaN at step 0, nothing was sent" in capsys.readouterr().err
    assert accounts(tmp_path)["holdout"] == dict.fromkeys(accounts(tmp_path)["holdout"], 0)
