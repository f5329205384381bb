"""Probabilities that a teacher rounds: what is taken of them, and that the losses take what the oracle took."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mekd import cli
from mekd.functional import kd_loss
from mekd.losses import MEKDLoss
from mekd.oracle.answers import Meaning, Raw, establish, respond
from mekd.oracle.replay import Replay
from mekd.oracle.response import AnswerError, Response, answer, floor_of, rounding_step
from remote_run import total, words
from small_generator import Plain

TEACHER = """
import numpy as np

def shares(images):
    logits = np.random.default_rng(0).standard_normal((len(images), 10)) / 3
    powers = np.exp(logits + images.reshape(len(images), -1)[:, :10] / 500)
    return (powers / powers.sum(1, keepdims=True)).round(2)

def listed(images):
    return [[(str(n), 100 * p) for n, p in enumerate(row)] for row in shares(images)]
"""


def rounded(classes: int, decimals: int, m: int = 256, sharp: float = 1.0) -> np.ndarray:
    logits = sharp * np.random.default_rng(0).standard_normal((m, classes))
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return (powers / powers.sum(1, keepdims=True)).round(decimals).astype(np.float32)


def losses(response: Response, classes: int) -> list[Tensor]:
    """What both losses make of an answer, at the floor that a run gives them."""
    student, floor = torch.zeros(len(response), classes), floor_of(response.decimals)
    found = [kd_loss(student, **response.target, floor=floor, impl=impl) for impl in ("reference", None)]
    return [*found, MEKDLoss(Plain(classes), floor=floor)(student, **response.target)]


@pytest.mark.parametrize("decimals", [None, 1, 2, 4])
@pytest.mark.parametrize(("classes", "step"), [(10, 2), (300, 2), (1000, 3)])
def test_the_losses_take_what_the_oracle_took(classes: int, step: int, decimals: int | None) -> None:
    rows = rounded(classes, step)
    assert np.abs(rows.sum(1) - 1).max() > 0.011, "none of them is off"
    meaning = Meaning("probs", 1.0, "so", step=10.0**-step)
    for kind in ("probs", "topk"):
        answered = respond(Raw(scores=rows), meaning, classes, kind, min(classes, 30), decimals)
        assert all(loss.isfinite() for loss in losses(answered, classes))


def test_a_target_sums_to_what_the_losses_take() -> None:
    values = torch.tensor([[0.5, 0.31, 0.21], [0.5, 0.3, 0.17], [0.5, 0.3, 0.195], [0.5, 0.3, 0.2]])
    target = Response("probs", values).target["probs"]
    torch.testing.assert_close(target[:2], values[:2] / values[:2].sum(1, keepdim=True))
    assert torch.equal(target[2:], values[2:]), "what they take anyway is as it came down"
    # Of a list of the best a sum below 1 is what it leaves out.
    target, _ = Response("topk", values, torch.tensor([[0, 1, 2]] * 4)).target["topk"]
    torch.testing.assert_close(target[0], values[0] / 1.02)
    assert torch.equal(target[1:], values[1:])


@pytest.mark.parametrize("kind", ["probs", "topk"])
def test_where_decimals_says_it_nothing_is_divided(kind: str) -> None:
    """An API that is simulated rounds here, and the loss knows the step."""
    probs = torch.from_numpy(rounded(10, 7)).double()
    for decimals in (1, 2):
        response = answer(probs / probs.sum(1, keepdim=True), kind, output="probs", k=10, decimals=decimals)
        assert response.values is not None and (response.values.sum(1) - 1).abs().max() > 0.02
        target = response.target[kind]
        assert torch.equal(target if kind == "probs" else target[0], response.values)


def test_a_store_that_was_paid_before_is_read(tmp_path: Path) -> None:
    values = torch.from_numpy(rounded(10, 2))
    store = Replay(tmp_path / "replay", len(values))
    store.write(0, torch.zeros(len(values), 1, 2, 3, dtype=torch.uint8), Response("probs", values))
    _, response, _ = Replay(tmp_path / "replay", len(values)).read(slice(None))
    assert torch.equal(response.values, values)  # type: ignore[arg-type]
    assert all(loss.isfinite() for loss in losses(response, 10))


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher__python": "shares", "oracle__response": "probs"},
        {"teacher__python": "listed", "oracle__response": "probs", "oracle__output": "probs"},
        {"teacher__python": "listed", "oracle__response": "topk", "oracle__k": 10, "oracle__output": "probs"},
    ],
)
def test_a_run_with_a_teacher_that_rounds(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "teacher.py").write_text(TEACHER)
    own = (
        {"oracle__num_classes": 10}
        | settings
        | {"teacher__python": f"{tmp_path}/teacher.py:{settings['teacher__python']}"}
    )
    for stage in ("deprivatize", "distill"):
        assert cli.main(words("", tmp_path / "out", "--yes", stage=stage, **own)) == 0
    assert total(tmp_path / "out")["queries"] == 190
    assert (tmp_path / "out" / "student.onnx").exists()
    values = np.load(tmp_path / "out" / "replay" / "values.npy")
    assert np.abs(values.sum(1) - 1).max() > 0.015, "no row was off"


# -- how far the first answer may sum ----------------------------------------------------------------------


def scores(row: np.ndarray) -> Raw:
    return Raw(scores=row.astype(np.float32)[None])


@pytest.mark.parametrize("step", [0.1, 0.01, 1e-3, 1e-4, 1 / 255, 1 / 256, 0.0])
def test_the_step_is_in_the_values(step: float) -> None:
    row = np.random.default_rng(0).dirichlet(np.ones(7))
    row = (row / step).round() * step if step else row
    assert rounding_step(row.astype(np.float32)) == step
    assert rounding_step(np.zeros(3)) == rounding_step(np.zeros(0)) == 0


SIGMOIDS = np.random.default_rng(0).beta(0.3, 50, 1000)  # each by itself; they sum to about 6
NO_SHARES = {
    "sigmoids": SIGMOIDS,
    "rounded sigmoids": SIGMOIDS.round(2),
    "nearly nothing": np.full(1000, 1.8e-5) + np.arange(1000) * 1e-9,
    "nothing": np.zeros(1000),
    "small logits": np.linspace(0, 0.011, 1000),
    "off by more than a rounding": np.random.default_rng(0).dirichlet(np.ones(1000)) * 1.03,
}


@pytest.mark.parametrize("row", NO_SHARES.values(), ids=NO_SHARES)
def test_of_very_many_classes_the_sum_still_decides(row: np.ndarray) -> None:
    with pytest.raises(AnswerError, match=f"sums to {row.sum():.4g}, which is no distribution over 1000 classes"):
        establish(scores(row), 1000, "probs")
    listed = Raw(pairs=[list(enumerate(row.tolist()))])
    for response in ("topk", "probs"):
        with pytest.raises(AnswerError, match=f"with the sum {row.sum():.4g}, which are neither shares nor per cent"):
            establish(listed, 1000, response)


@pytest.mark.parametrize("scale", [1, 100])
def test_rounded_shares_are_taken(scale: int) -> None:
    for classes, decimals in ((10, 2), (100, 2), (1000, 3), (1000, 4)):
        for row in rounded(classes, decimals, m=20, sharp=3).astype(np.float64) * scale:
            meaning = establish(scores(row), classes, "probs", output="probs" if scale > 1 else "auto")
            assert (meaning.kind, meaning.scale, meaning.step) == ("probs", scale, 10.0**-decimals)
            listed = Raw(pairs=[list(enumerate(row.tolist()))])
            meaning = establish(listed, classes, "topk", output="probs" if scale > 1 else "auto")
            assert (meaning.kind, meaning.scale, meaning.step) == ("pairs", scale, 10.0**-decimals)
            assert f"names {classes} classes (0 " in meaning.note and f"with the sum {row.sum():.4g}: " in meaning.note


def test_shares_of_which_rounding_took_much_are_asked_about() -> None:
    row = np.full(1000, 0.0006)
    row[:40] = 0.01
    for raw in (scores(row.round(2)), Raw(pairs=[list(enumerate(row.round(2).tolist()))])):
        with pytest.raises(AnswerError, match=r"or --oracle.output probs if they are rounded shares"):
            establish(raw, 1000, "probs")
        meaning = establish(raw, 1000, "probs", output="probs")
        answered = respond(raw, meaning, 1000, "probs", 5, None)
        assert all(loss.isfinite() for loss in losses(answered, 1000))


def test_what_is_said_of_the_rounding_holds_for_the_first_answer() -> None:
    row = np.array([0.3, 0.2, 0.2, 0.1, 0.1] + [0.0] * 5)
    with pytest.raises(AnswerError, match="which is no distribution over 10 classes"):
        establish(scores(row), 10, "probs")
    meaning = establish(scores(row), 10, "probs", decimals=1)
    assert losses(respond(scores(row), meaning, 10, "probs", 5, 1), 10)[0].isfinite()


@pytest.mark.parametrize(("first", "step"), [([0.5, 0.25, 0.2512, 0.0], 1e-4), ([0.512345, 0.25, 0.237655, 0.0], 0)])
def test_later_answers_are_rounded_no_more_than_the_first(first: list[float], step: float) -> None:
    meaning = establish(scores(np.array(first)), 4, "probs")
    assert meaning.step == step
    with pytest.raises(AnswerError, match=r"a row sums to 1\.02"):
        respond(scores(np.array([0.5, 0.27, 0.25, 0.0])), meaning, 4, "probs", 2, None)
    meaning = establish(Raw(pairs=[list(enumerate(first))]), 4, "topk")
    with pytest.raises(AnswerError, match=r"sum to 1\.02; they must not exceed 1"):
        respond(Raw(pairs=[[(0, 0.5), (1, 0.27), (2, 0.25)]]), meaning, 4, "topk", 3, None)


def test_a_run_that_began_before_the_step_was_kept_goes_on_as_it_did(tmp_path: Path) -> None:
    meaning = Meaning(**{"kind": "probs", "scale": 1.0, "note": "as of an earlier version"})  # type: ignore[arg-type]
    assert len(respond(scores(np.array([0.5, 0.27, 0.25, 0.0])), meaning, 4, "probs", 2, None)) == 1
    assert meaning.kept() == {"kind": "probs", "scale": 1.0, "note": "as of an earlier version", "step": 0.01}
