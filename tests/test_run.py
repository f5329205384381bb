"""The whole job, small: its folder, its figures, and the promise that no private image leaves the machine."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ledger_teacher import accounts
from mekd import cli, files
from mekd.data import load, local_images
from mekd.engine.preflight import preflight
from mekd.engine.run import Run
from mekd.engine.stages import STAGES
from mekd.nets import Generator, build
from mekd.oracle.base import Oracle
from mekd.oracle.ort import OnnxOracle
from mekd.oracle.response import Response


def run_stages(words: list[str], out: Path, **options: Any) -> Run:
    parsed = cli.parse([*words, "--out", str(out)])
    assert parsed is not None
    run = Run(*parsed, **options)
    preflight(run, list(STAGES))
    for stage in STAGES.values():
        stage(run)
    return run


class Recorder(Oracle):
    """An oracle that keeps every image it passes on: what the provider of the teacher gets to see."""

    def __init__(self, oracle: Oracle, seen: list[Tensor]) -> None:
        self.__dict__.update(vars(oracle))
        self._inner, self._seen = oracle, seen

    def _send(self, images: Tensor) -> Response:
        self._seen.append(images.clone())
        return self._inner._send(images)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["--oracle.response", "probs"], id="probs"),
        # No query in step 1, and the code is a standardised one-hot vector.
        pytest.param(["--oracle.response", "label"], id="label"),
        # The missing mass is filled up; three decimals, as an API would give.
        pytest.param(["--oracle.response", "topk", "--oracle.k", "3", "--oracle.decimals", "3"], id="topk"),
        pytest.param(["--oracle.response", "logits", "--distill.preset", "paper"], id="logits-paper"),
        # Asked once, kept on disk, reused.
        pytest.param(
            ["--distill.replay", "40", "--distill.keep", "uint8", "--deprivatize.ema", "0.9"], id="replay-ema"
        ),
        # Replayed images are moved at home.
        pytest.param(["--distill.replay", "40", "--distill.augment", "true"], id="augment"),
    ],
)
def test_no_private_image_is_sent_and_the_ledger_counts_every_query(
    tiny: list[str], tmp_path: Path, words: list[str]
) -> None:
    seen: list[Tensor] = []
    run_stages([*tiny, *words], tmp_path, wrap_oracle=lambda oracle: Recorder(oracle, seen))
    sent = torch.cat(seen)
    data = load("digits", None, 16)
    private = local_images(data, 0.1, 0)
    distance = (sent.flatten(1).float()[:, None] - private.flatten(1).float()[None]).abs().amax(-1)
    assert distance.min() > 8, "a sent image is a private one, or within 8 grey levels of one in every pixel"

    booked = accounts(tmp_path).values()
    assert sum(account["queries"] for account in booked) == len(sent)
    assert sum(account["calls"] for account in booked) == len(seen)
    assert sum(account["bytes_up"] for account in booked) == sent.nbytes
    steps, labels = 9 * 8, "label" in words
    fresh = 0 if "--distill.replay" in words else steps
    assert len(sent) == (0 if labels else steps) + 20 + (40 if "--distill.replay" in words else fresh)
    assert not list((tmp_path / "ledger").glob("evaluate*"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["queries"] == len(sent) and summary["student_accuracy"] is None


def test_the_check_for_private_images_can_fail(tiny: list[str], tmp_path: Path) -> None:
    """The same watch over the simulation, which does send private images, finds them."""
    seen: list[Tensor] = []
    words = [*tiny, "--evaluate.enabled", "true", "--evaluate.baseline_steps", "2"]
    # Rounded to one decimal, a row may sum to 0.8 or to 1.2: step 2 and the simulation are told.
    words += ["--oracle.response", "probs", "--oracle.decimals", "1"]
    run_stages(words, tmp_path, wrap_oracle=lambda oracle: Recorder(oracle, seen))
    private = local_images(load("digits", None, 16), 0.1, 0)
    sent = {image.numpy().tobytes() for image in torch.cat(seen)}
    assert all(image.numpy().tobytes() in sent for image in private)


def test_a_run_leaves_what_a_person_looks_for(tiny: list[str], tmp_path: Path) -> None:
    words = [*tiny, "--evaluate.enabled", "true", "--evaluate.baseline_steps", "4"]
    run = run_stages([*words, "--oracle.price", "0.01", "--evaluate.ask_teacher", "true"], tmp_path)
    expected = ["config.yaml", "log.txt", "metrics.jsonl", "summary.csv", "summary.json", "curves.png", "confusion.png"]
    expected += ["report.md", "samples/classes.png", "student.onnx", "student.pt", "ledger/distill.sqlite"]
    assert [name for name in expected if not (tmp_path / name).is_file()] == []
    assert not [path for path in tmp_path.rglob("*.part*")]

    summary = json.loads((tmp_path / "summary.json").read_text())
    for key in ("teacher_accuracy", "student_accuracy", "baseline_accuracy", "agreement", "holdout_agreement"):
        assert 0 <= summary[key] <= 1
    assert summary["queries"] == 9 * 8 + 20 + 9 * 8
    assert summary["bytes_up"] == summary["queries"] * 16 * 16
    assert summary["bytes_down"] == summary["queries"] * 10 * 4
    assert summary["cost"] == pytest.approx(summary["queries"] * 0.01)
    assert summary["simulation_queries"] == 360 + 144
    assert set(summary["seconds"]) == {"deprivatize", "holdout", "distill", "baseline"}
    with open(tmp_path / "summary.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["agreement"]) == summary["agreement"] and float(row["seconds_distill"]) > 0

    # The student's two files and the reported accuracy are one and the same network.
    data = load("digits", None, 16)
    student = build("resnet8", 10, 1)
    student.load_state_dict(files.load(tmp_path / "student.pt"))
    with torch.inference_mode():
        logits = student.eval()(data.test_images / 127.5 - 1)
    answered = OnnxOracle(tmp_path / "student.onnx", "logits").query(data.test_images)
    assert torch.allclose(answered.values, logits, atol=1e-3 * float(logits.abs().max()))  # type: ignore[arg-type]
    assert summary["student_accuracy"] == pytest.approx(float((logits.argmax(1) == data.test_labels).float().mean()))
    assert (np.array(json.loads((tmp_path / "evaluate.json").read_text())["confusion"]).sum()) == 360

    # Everything is done: a second run trains nothing, asks nothing, and reports the same.
    before = (tmp_path / "metrics.jsonl").read_bytes(), accounts(tmp_path)
    for stage in STAGES.values():
        stage(run)
    assert before == ((tmp_path / "metrics.jsonl").read_bytes(), accounts(tmp_path))
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_teacher_and_export_stages(tmp_path: Path) -> None:
    """The stages that an experiment begins with: a teacher is trained, exported, and answers as torch does."""
    words = ["--data.name", "digits", "--data.size", "16", "--teacher.arch", "resnet8", "--teacher.steps", "12"]
    words += ["--teacher.batch", "16", "--engine.device", "cpu", "--teacher.resize", "20", "--out", str(tmp_path)]
    assert cli.main(["teacher", *words]) == 0
    assert cli.main(["export", *words]) == 0
    teacher = build("resnet8", 10, 1)
    teacher.load_state_dict(files.load(tmp_path / "checkpoints" / "teacher.pt")["state"]["teacher"])
    images = load("digits", None, 16).test_images[:32]
    with torch.inference_mode():
        resized = torch.nn.functional.interpolate(images / 255, size=(20, 20), mode="bilinear")
        expected = teacher.eval()((resized - 0.5) / 0.5)
    answered = OnnxOracle(tmp_path / "teacher.onnx", "logits").query(images).values
    assert answered is not None
    assert torch.allclose(answered, expected, atol=1e-4 * float(expected.abs().max()))


def test_seeds_decide_everything(tiny: list[str], tmp_path: Path) -> None:
    """Two runs of one seed are equal bit for bit; another seed gives another student."""
    students = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run_stages([*tiny, "--seed", seed], tmp_path / name)
        students.append(files.load(tmp_path / name / "student.pt"))
    a, b, c = students
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_the_average_of_the_generator_is_what_step_2_draws_with(tiny: list[str], tmp_path: Path) -> None:
    run = run_stages([*tiny, "--deprivatize.ema", "0.5"], tmp_path)
    saved = files.load(run.checkpoint("deprivatize"))["state"]
    used: Generator = run.load_generator()
    assert torch.equal(used.linear.weight, saved["average"]["module.linear.weight"])
    assert not torch.equal(used.linear.weight, saved["generator"]["linear.weight"])
