"""The stages teacher and export: whose black box teacher.onnx is, and what is refused rather than taken for it."""

from pathlib import Path

import pytest
import torch

from mekd import cli
from mekd.nets import build
from mekd.oracle.ledger import Ledger
from mekd.oracle.ort import OnnxOracle
from mekd.oracle.response import Response

IMAGES = torch.randint(0, 256, (6, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.main(words) == 2
    return capsys.readouterr().err


def weights(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    torch.save(build("resnet8", 10, 1).state_dict(), path)
    return path


def asked(out: Path) -> None:
    """Book six queries, as a stage would."""
    account = Ledger("holdout", out / "ledger")
    account.record(account.intend(IMAGES), IMAGES, Response("label", None, torch.zeros(6, dtype=torch.int64)))
    account.close()


def test_a_second_export_is_of_the_same_teacher_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, other, out = weights(tmp_path / "mine.pt", 0), weights(tmp_path / "other.pt", 1), tmp_path / "run"
    words = ["--data.name", "digits", "--data.size", "16", "--teacher.arch", "resnet8", "--engine.device", "cpu"]
    words = ["export", *words, "--out", str(out), "--teacher.checkpoint"]
    assert cli.main([*words, str(mine)]) == 0 == cli.main([*words, str(mine)])
    assert f"{out / 'teacher.onnx'} is there\n" in capsys.readouterr().out
    before = OnnxOracle(out / "teacher.onnx", "logits").query(IMAGES).values
    assert before is not None
    for more, name in (([str(other)], "checkpoint"), ([str(mine), "--teacher.mean", "[0.2]"], "mean")):
        said = fails([*words, *more], capsys)
        assert f"{out / 'teacher.onnx'} is of another configuration: teacher.{name} was" in said
        assert "delete it to export it anew" in said
    said = fails(["distill", "--out", str(out), "--teacher.arch", "resnet20"], capsys)
    assert "teacher.arch was 'resnet8' and is 'resnet20'" in said
    (out / "teacher.onnx").unlink()  # as it advises
    assert cli.main([*words, str(other)]) == 0
    after = OnnxOracle(out / "teacher.onnx", "logits").query(IMAGES).values
    assert after is not None and not torch.allclose(before, after)
    other.unlink()
    assert cli.main([*words, str(other)]) == 0, "the exported one is there"
    asked(out)
    said = fails([*words, str(mine)], capsys)
    assert "6 answers are of it" in said and "delete" not in said
    # Of an export from before, nothing is known.
    (out / "exported.json").unlink()
    assert cli.main([*words, str(mine)]) == 0
    assert "nobody knows what it was made of; delete it" in capsys.readouterr().out


def test_a_trained_teacher_is_made_anew_with_its_black_box(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data.name", "digits", "--data.size", "16", "--teacher.arch", "resnet8", "--teacher.batch", "16"]
    words += ["--engine.device", "cpu", "--oracle.num_classes", "10", "--out", str(tmp_path), "--teacher.steps"]
    saved, box = tmp_path / "checkpoints" / "teacher.pt", tmp_path / "teacher.onnx"
    for stage in ("teacher", "export"):
        assert cli.main([stage, *words, "2"]) == 0
    assert f"{box} is of another configuration: teacher.steps was 2" in fails(["teacher", *words, "3"], capsys)
    (tmp_path / "exported.json").unlink()  # an export from before
    said = fails(["teacher", *words, "3"], capsys)
    assert "teacher.steps was 2 and is 3" in said and f"or delete the file and {box}, to make both anew" in said
    old = box.read_bytes()
    for path in (saved, box):
        path.unlink()
    for stage in ("teacher", "export"):
        assert cli.main([stage, *words, "3"]) == 0
    assert box.read_bytes() != old
    asked(tmp_path)
    saved.rename(saved.with_name("gone.pt"))
    assert "6 answers are of it" in fails(["teacher", *words, "2"], capsys), "it would be trained for nothing"
    saved.with_name("gone.pt").rename(saved)
    (tmp_path / "exported.json").unlink()
    assert "delete" not in fails(["teacher", *words, "2"], capsys), "its answers are paid"


@pytest.mark.parametrize("name", ["oracle.num_classes", "oracle.classes"])
def test_a_teacher_that_is_trained_here_has_the_classes_of_the_data(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names.txt").write_text("".join(f"class {i}\n" for i in range(12)))
    said = {"oracle.num_classes": "12", "oracle.classes": str(tmp_path / "names.txt")}[name]
    out = tmp_path / "run"
    words = ["--data.name", "digits", "--data.size", "16", "--teacher.arch", "resnet8", "--teacher.steps", "1"]
    words += ["--teacher.batch", "16", "--engine.device", "cpu", "--out", str(out)]
    for stage in ("run", "teacher"):
        found = fails([stage, *words, f"--{name}", said], capsys)
        assert f"{name} says 12 classes" in found and "those of the data, 10" in found
    assert not out.exists()
    assert cli.main(["teacher", *words]) == 0
    found = fails(["export", *words, f"--{name}", said], capsys)
    assert "teacher.pt does not fit teacher.arch 'resnet8' with 12 classes" in found
    assert cli.main(["export", *words]) == 0


def test_a_scale_of_other_channels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data.name", "digits", "--data.size", "16", "--teacher.arch", "resnet8", "--engine.device", "cpu"]
    for name in ("mean", "std"):
        found = fails(["teacher", *words, "--out", str(tmp_path / "run"), f"--teacher.{name}", "[0.5, 0.5]"], capsys)
        assert f"teacher.{name} is [0.5, 0.5], and the images have 1 channel: it must hold one number" in found
