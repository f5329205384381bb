"""What can be known is said before the first step: nothing is trained, asked, paid for or written."""

from pathlib import Path

import pytest
import torch

from mekd import cli
from mekd.nets import build
from mekd.oracle.export import Classifier, export


@pytest.fixture(scope="module")
def eleven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("eleven") / "teacher.onnx"
    export(Classifier(build("resnet8", 11, 1)), path, (1, 16, 16))
    return path


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        # An experiment compares the classes of the data with those of the teacher.
        (["--evaluate.enabled", "true", "--teacher.onnx", "ELEVEN"], ["11 classes", "data 10", "evaluate"]),
        (["--distill.student", "timm:resnet18"], ["distill.student is 'timm:resnet18'", "no network"]),
        (["--distill.student", "torchvision:resnet1"], ["distill.student", "nearest"]),
        (["--distill.checkpoint", "nowhere.pt"], ["distill.checkpoint is 'nowhere.pt'", "no such file"]),
        (["--distill.checkpoint", "TEXT"], ["distill.checkpoint", "torch cannot read"]),
        (["--data.size", "48"], ["data.size is 48", "16, 32, 64"]),
        (["--teacher.onnx", "TEXT"], ["TEXT", "ONNX"]),
        (["--oracle.response", "topk", "--oracle.k", "11"], ["k is 11", "10 classes"]),
        (["--distill.code", "onehot"], ["distill.code", "onehot"]),
        (["--oracle.num_classes", "7"], ["7"]),
        (["--deprivatize.budget", "3"], ["deprivatize.budget is 3", "alpha 0"]),
        (["--engine.device", "cuda:7"], ["cuda:7"]),
        (["--engine.device", "mps"], ["engine.device is 'mps'"]),
    ],
)
def test_a_run_that_cannot_end_does_not_begin(
    tiny: list[str],
    eleven: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    parts: list[str],
) -> None:  # fmt: skip
    text = tmp_path / "TEXT"
    text.write_text("this is no model")
    given = [{"ELEVEN": str(eleven), "TEXT": str(text)}.get(word, word) for word in words]
    assert cli.main(["run", *tiny, *given, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert [part for part in parts if part not in said] == [], said
    assert "Traceback" not in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists(), "a refused run has written something"


def test_an_experiment_whose_teacher_is_trained_is_looked_at_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--data.name", "digits", "--data.size", "16", "--out", str(tmp_path / "run")]
    assert cli.main([*words, "--teacher.arch", "resnet9"]) == 2
    assert "teacher.arch is 'resnet9'" in capsys.readouterr().err
    assert cli.main([*words, "--teacher.checkpoint", str(tmp_path / "none.pt")]) == 2
    assert "teacher.checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
