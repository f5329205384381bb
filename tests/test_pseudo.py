"""Private images at home: they teach the student in the second half of its steps, as an average of it labels them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mekd import cli
from mekd.engine import distill
from mekd.engine.pseudo import average_of, pseudo_labels
from mekd.engine.run import Run
from mekd.nets import build


def losses(out: Path) -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if row["stage"] == "distill" and "kl" in row}


def test_they_join_in_the_second_half(tiny: list[str], tmp_path: Path) -> None:
    words = [*tiny, "--distill.steps", "8", "--engine.log_every", "1", "--deprivatize.alpha", "0"]
    without, joined = tmp_path / "without", tmp_path / "joined"
    for out, share in ((without, "0"), (joined, "0.5")):
        for stage in ("deprivatize", "distill"):
            assert cli.main([stage, *words, "--distill.pseudo_labels", share, "--out", str(out)]) == 0
    a, b = losses(without), losses(joined)
    assert [a[step]["loss"] == b[step]["loss"] for step in (1, 2, 3, 4)] == [True] * 4
    assert "pseudo" not in b[4] and all(b[step]["pseudo"] > 0 for step in (5, 6, 7, 8))
    assert a[8]["loss"] != b[8]["loss"]


def test_other_private_images_make_another_student(tiny: list[str], tmp_path: Path) -> None:
    words = [*tiny, "--distill.pseudo_labels", "0.5", "--deprivatize.alpha", "0", "--out", str(tmp_path)]
    assert cli.main(["deprivatize", *words]) == 0 and cli.main(["distill", *words]) == 0
    parsed = cli.parse(words)
    assert parsed is not None
    run = Run(*parsed)
    depends = run.depends("distill")
    assert depends["data.local_fraction"] == 0.1 and "data.path" not in depends


def test_without_private_images_nothing_is_asked(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    assert cli.main(["deprivatize", *tiny, "--out", str(out)]) == 0
    words = [*tiny, "--data.name", "photos", "--data.path", str(tmp_path / "nowhere")]
    words += ["--deprivatize.generator", str(out), "--distill.pseudo_labels", "0.5", "--out", str(other)]
    assert cli.main(["distill", *words]) == 2
    assert "nowhere" in capsys.readouterr().err and not (other / "ledger").exists()


def test_labels_are_the_averages_and_it_stays_as_it_is() -> None:
    torch.manual_seed(0)
    student = build("resnet8", 10, 1)
    average = average_of(student)
    average.update_parameters(student)
    images = torch.randn(4, 1, 16, 16)
    expected = student.eval()(images).softmax(1)
    before = {name: value.clone() for name, value in average.state_dict().items()}
    student.train()
    torch.testing.assert_close(pseudo_labels(average, images, "float32"), expected)
    assert all(torch.equal(before[name], value) for name, value in average.state_dict().items())


def test_their_loss_counts_as_much_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """take_step's total against the definition: the paid part's loss, and k/m of the KL on k more images."""
    from mekd import functional
    from mekd.losses import MEKDLoss
    from mekd.nets import Generator

    torch.manual_seed(0)
    loss = MEKDLoss(Generator(10, 16, 1, 0.1))
    images, more = torch.randn(8, 1, 16, 16), torch.randn(4, 1, 16, 16)
    probs, labels = torch.randn(8, 10).softmax(1), torch.randn(4, 10).softmax(1)
    student = build("resnet8", 10, 1)
    optimizer = torch.optim.SGD(student.parameters(), 0.0)
    found = distill.take_step(student, optimizer, loss, images, {"probs": probs}, home=(more, labels))
    logits = student(torch.cat([images, more]))
    expected = loss(logits[:8], probs=probs) + 0.5 * functional.kd_loss(logits[8:], probs=labels)
    torch.testing.assert_close(found["loss"], expected, rtol=1e-4, atol=1e-5)
