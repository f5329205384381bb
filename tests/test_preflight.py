"""What can be known is said before the first step: nothing is trained, asked, paid for or written."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from mekd import cli
from mekd.config import Config, DataConfig, DeprivatizeConfig, EvaluateConfig, OracleConfig, TeacherConfig
from mekd.data import DataError
from mekd.engine.deprivatize import deprivatize
from mekd.engine.preflight import preflight
from mekd.engine.run import Run, StageError
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
        (["--distill.student", "no.where:make"], ["distill.student is 'no.where:make'", "no.where"]),
        (["--distill.student", "resnet18"], ["distill.student is 'resnet18'", "no network"]),
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


def test_a_step_1_that_asks_nothing_needs_no_teacher(tmp_path: Path) -> None:
    config = Config(
        data=DataConfig(name="digits", size=16), deprivatize=DeprivatizeConfig(steps=2, batch=8, width=0.1, alpha=0.0)
    )
    run = Run(config, tmp_path / "run")
    preflight(run, ["deprivatize"])
    deprivatize(run)
    assert run.num_classes == 10 and not run.teacher_onnx.exists() and not (run.out / "ledger").exists()
    # A user's own, which is not there yet: its classes have to be said.
    own = dataclasses.replace(config, teacher=TeacherConfig(onnx="later.onnx"))
    with pytest.raises(StageError, match=r"later\.onnx is missing"):
        preflight(Run(own, tmp_path / "own"), ["deprivatize"])
    said = Run(dataclasses.replace(own, oracle=OracleConfig(num_classes=7)), tmp_path / "own")
    preflight(said, ["deprivatize"])
    assert said.new_generator().num_classes == 7


@pytest.mark.parametrize("stages", [["deprivatize"], ["deprivatize", "distill"], ["evaluate"]])
def test_what_asks_needs_the_teacher_before_the_first_step(stages: list[str], tmp_path: Path) -> None:
    asking = DeprivatizeConfig(alpha=0.5)
    config = Config(data=DataConfig(name="digits", size=16), deprivatize=asking, evaluate=EvaluateConfig(enabled=True))
    with pytest.raises(StageError, match=r"teacher\.onnx is missing"):
        preflight(Run(config, tmp_path / "run"), stages)
    assert not (tmp_path / "run").exists()


def test_a_tree_is_not_shifted(tmp_path: Path) -> None:
    config = Config(data=DataConfig(name="folder", path=str(tmp_path), shift=True))
    with pytest.raises(DataError, match=r"data\.shift is true.*'folder'.*--data\.shift false"):
        _ = Run(config, tmp_path / "run").data


def test_an_own_checkpoint_is_exported_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    torch.save(build("resnet8", 7, 3).state_dict(), tmp_path / "mine.pt")
    words = ["export", "--teacher.arch", "resnet8", "--teacher.checkpoint", str(tmp_path / "mine.pt")]
    words += ["--data.size", "16", "--out", str(tmp_path / "run")]
    assert cli.main(words) == 2
    assert "oracle.num_classes is null" in capsys.readouterr().err
    assert cli.main([*words, "--oracle.num_classes", "7"]) == 0
    assert (tmp_path / "run" / "teacher.onnx").is_file()


def test_photos_without_a_teacher_say_who_can_be_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    assert cli.main(["run", "--data.path", str(tmp_path), "--data.size", "16", "--out", str(tmp_path / "run")]) == 2
    assert "have no labels: no teacher can be trained" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_tree_needs_val_for_what_is_tested_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "tree" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "tree" / "train" / name / "a.jpg")
    words = ["--data.path", str(tmp_path / "tree"), "--data.size", "16", "--out", str(tmp_path / "run")]
    assert cli.main(["teacher", *words]) == 2
    assert "val is missing" in capsys.readouterr().err
    few = ["--deprivatize.steps", "2", "--deprivatize.batch", "2", "--deprivatize.width", "0.1"]
    assert cli.main(["deprivatize", *words, *few, "--data.local_fraction", "1", "--engine.device", "cpu"]) == 0


@pytest.mark.parametrize("stage", ["teacher", "deprivatize", "distill"])
def test_a_tree_of_fewer_images_than_a_batch_is_known_before_the_first_step(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (20, 20), (9 * i, 90, 9)).save(tmp_path / name / f"{i}.png")
    words = ["--data.path", str(tmp_path), "--data.size", "16", "--data.loader", "torchvision", "--data.workers", "0"]
    words += [f"--{name}.batch={9 if name == stage else 4}" for name in ("teacher", "deprivatize", "distill")]
    words += ["--teacher.arch", "resnet8", "--teacher.steps", "2", "--deprivatize.steps", "2"]
    words += ["--data.local_fraction", "1", "--distill.pretrain", "4"]
    assert cli.main(["run", *words, "--out", str(tmp_path / "run")]) == 2
    assert f"{stage}.batch is 9: {tmp_path / 'train'} has 8 images, fewer than the 9" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_data_of_one_class_make_no_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        (tmp_path / "tree" / part / "cat").mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "tree" / part / "cat" / "a.jpg")
    words = ["--data.path", str(tmp_path / "tree"), "--data.size", "16", "--out", str(tmp_path / "run")]
    for stage in ("teacher", "deprivatize"):
        assert cli.main([stage, *words, "--data.local_fraction", "1", "--engine.device", "cpu"]) == 2
        assert "the teacher has 1 class, as the data has" in capsys.readouterr().err


def test_a_floating_teacher_without_mean_and_std_is_spoken_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    export(Classifier(build("resnet8", 10, 3)), tmp_path / "floating.onnx", (3, 16, 16), "float")
    data = DataConfig(name="photos", size=16)
    teacher = TeacherConfig(onnx=str(tmp_path / "floating.onnx"))
    run = Run(Config(data=data, teacher=teacher), tmp_path)
    assert any("oracle.mean 0, oracle.std 1" in note for note in run.teacher_notes)
    said = Run(Config(data=data, teacher=teacher, oracle=OracleConfig(mean=[0.5], std=[0.5])), tmp_path)
    assert not any("oracle.mean 0" in note for note in said.teacher_notes)


def test_what_evaluate_asks_must_fit_into_the_budget_too(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", *tiny, "--deprivatize.alpha", "0", "--evaluate.enabled", "true", "--evaluate.baseline", "false"]
    words += ["--out", str(tmp_path / "run")]
    assert cli.main([*words, "--oracle.budget", "200"]) == 2
    said = capsys.readouterr().err
    assert "evaluate asks 360" in said and "0 are left" in said and "--oracle.budget 560" in said
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert cli.main([*words, "--oracle.budget", "560", "--distill.replay", "180"]) == 0, "its advice works"


def test_the_audit_and_what_is_spent_count_beside_what_evaluate_asks(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of them alone would fit into what the store leaves; the audit would be stopped once evaluate is paid."""
    out = tmp_path / "run"
    words = [*tiny, "--deprivatize.alpha", "0", "--distill.replay", "100", "--out", str(out)]
    asking = ["--evaluate.enabled", "true", "--evaluate.baseline", "false", "--audit.budget", "60"]
    asking += ["--audit.enabled", "true"]
    assert cli.main(["run", *words, *asking, "--oracle.budget", "481"]) == 2
    said = capsys.readouterr().err
    assert "evaluate asks 360" in said and "the audit asks 60" in said and "361 are left" in said
    assert "--oracle.budget 540 with --distill.replay 100" in said and not out.exists()
    for stage in ("deprivatize", "distill"):
        assert cli.main([stage, *words, "--oracle.budget", "481"]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", *words, *asking, "--oracle.budget", "479"]) == 2
    said = capsys.readouterr().err
    assert "359 are left beside what is spent (120)" in said and "--oracle.budget 480" in said, said
    assert cli.main(["evaluate", *words, *asking, "--oracle.budget", "480"]) == 0, "its advice works"
    assert cli.main(["evaluate", *words, *asking, "--oracle.budget", "480"]) == 0, "it is paid"


@pytest.mark.parametrize("stage", ["evaluate", "audit", "report"])
def test_another_student_than_the_one_that_is_there_is_named(
    stage: str, tiny: list[str], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (finished / "config.yaml").read_bytes()
    words = [*tiny, "--distill.student", "resnet20", "--data.size", "32", "--evaluate.enabled", "true"]
    assert cli.main([stage, *words, "--out", str(finished)]) == 2
    said = capsys.readouterr().err
    assert "distill.student was own_net.py:small and is resnet20; data.size was 16 and is 32" in said
    assert "Set that back, or train this one with `mekd distill`" in said
    assert (finished / "config.yaml").read_bytes() == config
