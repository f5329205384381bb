"""The whole job over a tree of JPEGs: by one process and by two, killed in mid-epoch, and with what is wrong in it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.tree import write
from forked import Server, is_killed
from ledger_teacher import accounts
from mekd import cli, data, files
from mekd.engine.run import Run
from test_parallel import DRIVER, torchrun
from test_resume import assert_equal_runs, assert_equal_trees

LOADERS = ("dali", "torchvision")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 + 40 digits as JPEGs in class folders."""
    folder = tmp_path_factory.mktemp("tree") / "digits"
    write(data.load("digits", None, 16), folder, 96, 40)
    return folder


@pytest.fixture(scope="module")
def words(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of all stages; its teacher was trained on the tree. 24 private images are three batches an epoch."""
    settings = {
        "data.name": "folder", "data.path": tree, "data.size": 16, "data.resize": 16, "data.local_fraction": 0.25,
        "data.workers": 1, "oracle.batch": 64, "teacher.arch": "resnet8", "teacher.steps": 6, "teacher.batch": 16,
        "deprivatize.steps": 9, "deprivatize.batch": 8, "deprivatize.width": 0.1, "deprivatize.alpha": 0.5,
        "distill.steps": 6, "distill.batch": 8, "distill.holdout": 20, "distill.eval_every": 3, "distill.replay": 40,
        "distill.coverage": 0,
        "engine.checkpoint_every": 5, "engine.log_every": 2, "engine.device": "cpu",
        "evaluate.enabled": "true", "evaluate.baseline_steps": 4,
    }  # fmt: skip
    given = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    out = tmp_path_factory.mktemp("teacher")
    for stage in ("teacher", "export"):
        assert cli.main([stage, *given, "--out", str(out)]) == 0
    return ["run", *given, "--teacher.onnx", str(out / "teacher.onnx")]


@pytest.fixture(scope="module")
def alone(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    assert cli.main([*words, "--out", str(out)]) == 0
    return out


def test_another_student_knows_the_names_of_the_folders(alone: Path, tree: Path, tmp_path: Path) -> None:
    """It may learn from the paid answers where the tree is not."""
    parsed = cli.parse(["--distill.store", str(alone), "--out", str(tmp_path / "second")])
    assert parsed is not None
    assert Run(*parsed).class_names == sorted(folder.name for folder in (tree / "train").iterdir())


@pytest.mark.slow
def test_two_processes_take_the_same_queries_and_a_kill_changes_nothing(
    words: list[str], alone: Path, tmp_path: Path
) -> None:
    """Undisturbed, and with one of them killed in the second epoch of the private images."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    undisturbed, killed = tmp_path / "two", tmp_path / "killed"
    for out, target in ((undisturbed, "mekd.engine.deprivatize:passes"), (killed, "mekd.engine.deprivatize:take_step")):
        done = torchrun(str(driver), target, "7", *words, "--out", str(out), restarts=1)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "driver.py.reached").exists()
    queries = [{stage: account["queries"] for stage, account in accounts(out).items()} for out in (alone, undisturbed)]
    assert queries[0] == queries[1] == {
        "deprivatize": 72, "holdout": 20, "replay": 40, "evaluate-test": 40, "evaluate-private": 24,
    }  # fmt: skip
    one, two = (json.loads((out / "evaluate.json").read_text()) for out in (alone, undisturbed))
    assert one["test_images"] == two["test_images"] == 40
    assert one["teacher_accuracy"] == two["teacher_accuracy"]
    for name in ("deprivatize", "distill"):
        a, b = (files.load(out / "checkpoints" / f"{name}.pt")["state"] for out in (killed, undisturbed))
        assert_equal_trees(a, b)


def test_killed_in_mid_epoch_the_data_goes_on_where_it_was(
    processes: Server, words: list[str], alone: Path, tmp_path: Path
) -> None:
    done = processes.killed("mekd.engine.deprivatize:take_step", 8, "after", *words, "--out", str(tmp_path))
    assert is_killed(done), done.stderr
    place = files.load(tmp_path / "checkpoints" / "deprivatize.pt")["processes"][0]["feeds"]["data"]
    assert place["step"] == 5, "the checkpoint stands in the second epoch of three batches"
    assert cli.main([*words, "--out", str(tmp_path)]) == 0
    uncertain = sum(account["uncertain"] for account in accounts(tmp_path).values())
    assert uncertain <= 8  # the last answer may not have been booked yet
    assert_equal_runs(tmp_path, alone, uncertain)


@pytest.mark.parametrize("loader", LOADERS)
def test_what_is_wrong_in_a_tree_is_named_before_a_query(
    words: list[str], tree: Path, tmp_path: Path, loader: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def copied(name: str) -> Path:
        folder = tmp_path / name
        subprocess.run(["cp", "-r", str(tree), str(folder)], check=True)
        return folder

    def said(folder: Path, *more: str) -> str:
        given = ["deprivatize", *words[1:], "--data.loader", loader, "--data.path", str(folder), *more]
        assert cli.main([*given, "--out", str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out" / "checkpoints").exists()
        assert not any(account["queries"] + account["uncertain"] for account in accounts(tmp_path / "out").values())
        return capsys.readouterr().err

    empty = copied("empty")
    for file in (empty / "train" / "3").iterdir():
        file.unlink()
    assert str(empty / "train" / "3") in said(empty)
    missing = copied("missing")
    subprocess.run(["rm", "-r", str(missing / "val" / "7")], check=True)
    assert "'7'" in said(missing) and "val" in said(missing)
    assert "24 images, fewer than the 32" in said(tree, "--deprivatize.batch", "32")
    assert "no such" in said(tmp_path / "nowhere") or "is missing" in said(tmp_path / "nowhere")
    broken = copied("broken")
    for file in (broken / "train").glob("*/*.jpg"):
        file.write_bytes(b"this is no picture")
    assert ".jpg" in said(broken) and str(broken) in said(broken)


def test_a_loader_is_chosen_by_name(
    words: list[str], alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without DALI the run stops; with torchvision it goes the same way over the same images."""
    assert cli.main([*words, "--data.loader", "torchvision", "--data.workers", "0", "--out", str(tmp_path / "tv")]) == 0
    ours, theirs = (json.loads((out / "evaluate.json").read_text()) for out in (tmp_path / "tv", alone))
    assert ours["teacher_accuracy"] == pytest.approx(theirs["teacher_accuracy"], abs=0.05)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert cli.main([*words, "--out", str(tmp_path / "none")]) == 2
