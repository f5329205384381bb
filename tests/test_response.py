"""What an answer may be, and what the losses are told of it."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mekd.functional import kd_loss
from mekd.metrics import accuracy, confusion
from mekd.oracle.response import KINDS, AnswerError, Response, answer, concatenate, floor_of, from_names

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 0.0], [-3.0, 4.0, 4.5, 1.0], [0.0, 0.0, 0.0, 1e-3]])


def softmax64(logits: Tensor) -> np.ndarray:
    """The truth, in float64 and without torch."""
    exps = np.exp(logits.double().numpy() - logits.double().numpy().max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


# -- answer() ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decimals", [None, 0, 2, 4])
def test_logits_are_given_as_they_are_or_rounded(decimals: int | None) -> None:
    response = answer(LOGITS * 1.23457, "logits", output="logits", decimals=decimals)
    expected = (LOGITS * 1.23457).numpy()
    if decimals is not None:
        expected = np.round(expected.astype(np.float64), decimals)
    assert response.kind == "logits" and response.indices is None and response.decimals == decimals
    np.testing.assert_allclose(response.values, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("output", ["logits", "probs"])
@pytest.mark.parametrize("decimals", [None, 1, 3])
def test_probs(output: str, decimals: int | None) -> None:
    probs = softmax64(LOGITS)
    scores = LOGITS if output == "logits" else torch.from_numpy(probs)
    response = answer(scores, "probs", output=output, decimals=decimals)
    expected = probs if decimals is None else np.round(probs, decimals)
    assert response.values is not None and response.values.dtype == torch.float32 and response.indices is None
    np.testing.assert_allclose(response.values, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("output", ["logits", "probs"])
@pytest.mark.parametrize("k", [1, 3, 4])
def test_topk_is_best_first(output: str, k: int) -> None:
    probs = softmax64(LOGITS)
    response = answer(LOGITS if output == "logits" else torch.from_numpy(probs), "topk", output=output, k=k)
    order = np.argsort(-probs, axis=-1, kind="stable")[:, :k]
    assert response.values is not None and response.indices is not None and response.indices.dtype == torch.int64
    np.testing.assert_allclose(response.values, np.take_along_axis(probs, order, -1), rtol=1e-6)
    # Rows 0 and 1 have no equal classes; in row 2 only the best is told from the rest.
    np.testing.assert_array_equal(response.indices[:2], order[:2])
    assert response.indices[2, 0] == 3


def test_topk_is_chosen_before_it_is_rounded() -> None:
    # 0.36 and 0.38 both round to 0.4: the order must be that of the unrounded values.
    response = answer(torch.tensor([[0.36, 0.38, 0.26]]), "topk", output="probs", k=2, decimals=1)
    assert response.indices is not None and response.indices.tolist() == [[1, 0]]
    assert response.labels.tolist() == [1]
    torch.testing.assert_close(response.values, torch.tensor([[0.4, 0.4]]))


@pytest.mark.parametrize("output", ["logits", "probs"])
def test_label_is_the_best_class_alone(output: str) -> None:
    scores = LOGITS if output == "logits" else LOGITS.softmax(-1)
    response = answer(scores, "label", output=output, decimals=2)
    assert response.values is None and response.indices is not None and response.indices.dtype == torch.int64
    assert response.indices.tolist() == [0, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_come_down_as_float32(dtype: torch.dtype) -> None:
    response = answer(LOGITS.to(dtype), "logits", output="logits")
    assert response.values is not None and response.values.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_refused(kind: str, bad: float) -> None:
    scores = LOGITS.clone()
    scores[1, 2] = bad
    with pytest.raises(AnswerError, match="NaN or infinity for 1 of 3 images"):
        answer(scores, kind, output="logits", k=2)


def test_overflow_of_float32_is_refused() -> None:
    with pytest.raises(AnswerError, match="infinity for 1 of 1"):
        answer(torch.tensor([[1e300, 0.0]], dtype=torch.float64), "probs", output="logits")


def test_minus_infinity_masks_a_class() -> None:
    response = answer(torch.tensor([[1.0, -math.inf, 1.0]]), "probs", output="logits")
    assert response.values is not None and response.values.tolist() == [[0.5, 0.0, 0.5]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_masks_every_class_is_refused(kind: str) -> None:
    scores = LOGITS.clone()
    scores[1] = -math.inf
    with pytest.raises(AnswerError):
        answer(scores, kind, output="logits", k=2)


@pytest.mark.parametrize("kind", ["probs", "topk", "label"])
@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([0.5, 0.3, 0.5], "sums to 1.3"),
        ([0.5, 0.1, 0.1], "sums to 0.7"),
        ([0.0, 0.0, 0.0], "sums to 0"),
        # Sums to 1, so only the sign gives it away.
        ([0.7, 0.5, -0.2], "run from -0.2"),
        ([99.1, 0.5, 0.4], r"run from 0.2 to 99.1 and a row sums to 100; they must lie between 0 and 1"),
    ],
)
def test_what_is_no_distribution_is_refused(kind: str, row: list[float], says: str) -> None:
    scores = torch.tensor([[0.2, 0.3, 0.5], row])
    with pytest.raises(AnswerError, match=says) as caught:
        answer(scores, kind, output="probs", k=2)
    assert "--oracle.output logits" in str(caught.value)


def test_half_precision_probabilities_are_accepted() -> None:
    # A row of 1000 float16 probabilities sums to 1 only roughly.
    torch.manual_seed(0)
    probs = torch.randn(8, 1000).softmax(-1).half()
    response = answer(probs, "probs", output="probs")
    assert response.values is not None and torch.equal(response.values, probs.float())


@pytest.mark.parametrize(
    ("sum_of_row", "options", "taken"),
    [
        (1.009, {}, True),
        (1.011, {}, False),
        (1.019, {"decimals": 2}, True),  # 1e-2, and half of 0.01 for each of four values
        (1.031, {"decimals": 2}, False),
        (0.971, {"decimals": 2}, True),
        (1.019, {"step": 0.01}, True),
        (1.031, {"step": 0.01}, False),
        (1.019, {"decimals": 3}, False),
    ],
)
def test_how_far_from_1_a_row_may_sum(sum_of_row: float, options: dict[str, float], taken: bool) -> None:
    scores = torch.tensor([[0.25] * 4, [sum_of_row - 0.6, 0.1, 0.2, 0.3]])
    if taken:
        assert len(answer(scores, "probs", output="probs", **options)) == 2  # type: ignore[arg-type]
        return
    with pytest.raises(
        AnswerError, match=r"a row must sum to 1 within 0.0\d+\. Start anew .* --oracle.decimals N if it rounds"
    ):
        answer(scores, "probs", output="probs", **options)  # type: ignore[arg-type]


def test_a_value_above_1_is_no_probability_however_coarse_the_rounding() -> None:
    with pytest.raises(AnswerError, match="to 3 and a row"):
        answer(torch.tensor([[3.0] + [0.0] * 9]), "probs", output="probs", decimals=0)


def test_what_rounding_puts_below_0_is_0() -> None:
    response = answer(torch.tensor([[1 + 5e-7, -5e-7]]), "probs", output="probs")
    assert response.values is not None and response.values.min() == 0


@pytest.mark.parametrize("kind", ["probs", "topk", "label"])
def test_probabilities_of_nan_are_refused(kind: str) -> None:
    scores = torch.tensor([[0.5, 0.5], [math.nan, 0.5]], dtype=torch.float16)
    with pytest.raises(AnswerError, match="NaN or infinity for 1 of 2"):
        answer(scores, kind, output="probs", k=2)


def test_logits_cannot_be_had_of_probabilities() -> None:
    with pytest.raises(AnswerError, match=r"answers probabilities.*--oracle.response probs"):
        answer(LOGITS.softmax(-1), "logits", output="probs")


# -- Response ----------------------------------------------------------------------------------------------


def make(kind: str, decimals: int | None = None) -> Response:
    return answer(LOGITS, kind, output="logits", k=2, decimals=decimals)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_the_same_whatever_is_answered(kind: str) -> None:
    labels = make(kind).labels
    assert labels.dtype == torch.int64 and labels.tolist() == [0, 2, 3]


@pytest.mark.parametrize("kind", ["logits", "probs", "topk"])
def test_confidence_is_the_top_probability(kind: str) -> None:
    np.testing.assert_allclose(make(kind).confidence, softmax64(LOGITS).max(-1), rtol=1e-6)


def test_confidence_of_a_label_is_one() -> None:
    confidence = make("label").confidence
    assert confidence.dtype == torch.float32 and confidence.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("kind", "bytes_of_a_row"), [("logits", 16), ("probs", 16), ("topk", 2 * 4 + 2 * 8), ("label", 8)]
)
def test_nbytes(kind: str, bytes_of_a_row: int) -> None:
    assert make(kind).nbytes == 3 * bytes_of_a_row
    assert make(kind)[1:].nbytes == 2 * bytes_of_a_row


@pytest.mark.parametrize("kind", KINDS)
def test_target_is_an_argument_of_the_loss(kind: str) -> None:
    response = make(kind)
    target = response.target
    name = {"label": "labels"}.get(kind, kind)
    assert list(target) == [name]
    parts = target[name]
    given = parts if isinstance(parts, tuple) else (parts,)
    for part, own in zip(given, response.tensors(), strict=True):
        assert torch.equal(part, own)
    student = torch.zeros(3, 4)
    expected = {  # against a uniform student the loss is log C less the teacher's entropy
        "logits": math.log(4) + float((softmax64(LOGITS) * np.log(softmax64(LOGITS))).sum(-1).mean()),
        "label": math.log(4),
    }
    expected["probs"] = expected["logits"]
    loss = float(kd_loss(student, tau=1.0, **target))
    assert math.isfinite(loss)
    if kind in expected:
        assert loss == pytest.approx(expected[kind], rel=1e-5)


@pytest.mark.parametrize("kind", ["probs", "topk"])
def test_a_row_rounded_to_zeros_prefers_no_class(kind: str) -> None:
    # Ten classes near 0.1 with no decimals: the first row vanishes, the second is certain.
    scores = torch.full((2, 10), 0.1)
    scores[1] = 0.0
    scores[1, 7] = 1.0
    response = answer(scores, kind, output="probs", k=4, decimals=0)
    assert response.values is not None and response.values[0].sum() == 0
    target = response.target[kind]
    values = target[0] if isinstance(target, tuple) else target
    width = 10 if kind == "probs" else 4
    torch.testing.assert_close(values[0], torch.full((width,), 1 / width))
    assert values[1].max() == 1 and values[1].sum() == 1
    # The answer itself stays what came down.
    assert response.values[0].sum() == 0
    assert kd_loss(torch.randn(2, 10), tau=2.0, **response.target).isfinite()


def test_entries_that_an_answer_lacks() -> None:
    # Whole; one entry; one that was rounded to nothing; none.
    values = torch.tensor([[0.6, 0.3], [0.4, math.nan], [0.0, 9.0], [0.7, 0.7]])
    response = Response("topk", values, torch.tensor([[2, 0], [1, -1], [3, -1], [-1, -1]]))
    assert response.labels.tolist() == [2, 1, 3, -1]
    torch.testing.assert_close(response.confidence, torch.tensor([0.6, 0.4, 0.0, 0.0]))
    target, indices = response.target["topk"]
    torch.testing.assert_close(target, torch.tensor([[0.6, 0.3], [0.4, 0.0], [1.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(indices, response.indices)  # type: ignore[arg-type]
    for rest in ("spread", "drop", "tail"):
        losses = kd_loss(torch.randn(4, 5), **response.target, rest=rest, reduction="none")
        assert losses.isfinite().all() and (losses[3] == 0) == (rest != "spread")
    # Nobody agrees with an answer that names no class.
    assert accuracy(torch.tensor([2, 1, 3, 0]), response.labels) == 0.75
    assert confusion(response.labels, torch.tensor([2, 1, 0, 0]), 5).sum() == 3


def test_a_row_of_logits_that_sums_to_zero_is_left_alone() -> None:
    response = answer(torch.tensor([[1.0, -1.0], [-2.0, 1.0]]), "logits", output="logits")
    assert torch.equal(response.target["logits"], torch.tensor([[1.0, -1.0], [-2.0, 1.0]]))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_slices_put_together_are_the_whole(kind: str) -> None:
    whole = make(kind, decimals=3)
    parts = [whole[:1], whole[1:]]
    assert [len(part) for part in parts] == [1, 2]
    again = concatenate(parts)
    assert again.kind == kind and again.decimals == whole.decimals and len(again) == 3
    assert len(again.tensors()) == len(whole.tensors())
    for own, other in zip(whole.tensors(), again.tensors(), strict=True):
        assert own.dtype == other.dtype and torch.equal(own, other)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_chosen_in_every_part(kind: str) -> None:
    whole, rows = make(kind), torch.tensor([2, 0])
    for own, other in zip(whole.tensors(), whole[rows].tensors(), strict=True):
        assert torch.equal(own[rows], other)


def test_to_keeps_everything() -> None:
    moved = make("topk", decimals=2).to("meta")
    assert moved.kind == "topk" and moved.decimals == 2
    assert [t.device.type for t in moved.tensors()] == ["meta", "meta"]


@pytest.mark.parametrize(("decimals", "floor"), [(None, 2.0**-25), (0, 0.5), (2, 0.005), (7, 5e-8)])
def test_floor_is_half_the_rounding_step(decimals: int | None, floor: float) -> None:
    assert floor_of(decimals) == pytest.approx(floor, rel=1e-12)


# -- from_names() ------------------------------------------------------------------------------------------


def test_names_become_indices() -> None:
    indices = from_names(["cat", "emu", "cat"], ["ant", "cat", "emu"])
    assert indices.dtype == torch.int64 and indices.tolist() == [1, 2, 1]


def test_an_unknown_name_is_named() -> None:
    with pytest.raises(AnswerError, match="'yak', which is not among the 3 class names"):
        from_names(["cat", "yak"], ["ant", "cat", "emu"])
