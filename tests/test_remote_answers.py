"""What a service's answers mean, told by the first of them, and what goes up to it."""

from typing import Any

import numpy as np
import pytest
import torch

from mekd.oracle.answers import Meaning, Pair, Raw, establish, respond
from mekd.oracle.images import Encoding, resized
from mekd.oracle.response import AnswerError, Response

NAMES = ("cat", "dog", "owl", "elk")
C = len(NAMES)


def scores(*rows: list[float]) -> Raw:
    return Raw(scores=np.array(rows, dtype=np.float32))


def pairs(*images: list[Pair]) -> Raw:
    return Raw(pairs=list(images))


def named(meaning_of: Raw, then: Raw | None = None, *, k: int = 3, response: str = "topk", **more: Any) -> Response:
    """An answer, read as the first one says."""
    meaning = establish(meaning_of, C, response, classes=NAMES, **more)
    return respond(then or meaning_of, meaning, C, response, k, None)


@pytest.mark.parametrize(
    ("raw", "output", "kind", "scale"),
    [
        (scores([0.5, 0.25, 0.25, 0.0]), "auto", "probs", 1),
        (scores([0.5, 0.25, 0.25, 0.0]), "probs", "probs", 1),
        (scores([0.5, 0.25, 0.25, 0.0]), "logits", "logits", 1),
        # Rounded to two decimals.
        (scores([0.33, 0.33, 0.33, 0.0]), "auto", "probs", 1),
        # A sure answer, and one that a softmax has pushed a rounding above 1.
        (scores([1.0, 0.0, 0.0, 0.0]), "auto", "probs", 1),
        (scores([1.0000001, 0.0, 0.0, 0.0]), "auto", "probs", 1),
        (scores([50.0, 25.0, 25.0, 0.0]), "probs", "probs", 100),
        (scores([-1.0, 3.0, 0.5, 0.1]), "auto", "logits", 1),
        (scores([9.0, 3.0, 0.5, 0.1]), "auto", "logits", 1),
        (scores([float("-inf"), 3.0, 0.5, 0.1]), "auto", "logits", 1),
        (scores([0.2, 0.1, 0.1, 0.05]), "logits", "logits", 1),
    ],
)
def test_the_first_scores_tell_what_they_are(raw: Raw, output: str, kind: str, scale: float) -> None:
    meaning = establish(raw, C, "probs", output=output)
    assert (meaning.kind, meaning.scale) == (kind, scale)
    assert meaning.note.startswith("the first answer runs from")


@pytest.mark.parametrize(
    ("raw", "output", "flag"),
    [
        # Each row is a distribution by one reading and logits by another.
        (scores([50.0, 25.0, 25.0, 0.0]), "auto", "--oracle.output probs for per cent, or logits"),
        (scores([0.2, 0.1, 0.1, 0.05]), "auto", "--oracle.output logits"),
        (scores([0.9, 0.9, 0.9, 0.9]), "auto", "--oracle.output logits"),
        (scores([-1.0, 3.0, 0.5, 0.1]), "probs", "--oracle.output logits"),
        (scores([0.5, 0.5]), "auto", "--oracle.num_classes"),
        (scores([0.1] * 10), "auto", "--oracle.output_name"),
        (scores([float("nan"), 0.0, 0.0, 1.0]), "auto", "NaN"),
        (scores([float("inf"), 0.0, 0.0, 1.0]), "logits", "NaN or infinity"),
    ],
)
def test_what_stays_open_names_the_flag(raw: Raw, output: str, flag: str) -> None:
    with pytest.raises(AnswerError) as error:
        establish(raw, C, "probs", output=output)
    assert flag in str(error.value)


def test_other_kinds_than_the_response_name_the_flag() -> None:
    for raw, response, flag in [
        (Raw(indices=np.array([2])), "probs", "--oracle.response label"),
        (Raw(names=["owl"]), "topk", "--oracle.response label"),
        (Raw(names=["owl"]), "label", "--oracle.classes FILE"),
        (pairs([("cat", 0.5)]), "logits", "--oracle.response topk"),
        (pairs([("cat", 0.5)]), "probs", "--oracle.response topk"),
        (pairs([("cat", -0.5)]), "topk", "neither shares nor per cent"),
        (pairs([("cat", 150.0)]), "topk", "neither shares nor per cent"),
        (pairs([("cat", 70.0), ("dog", 60.0)]), "topk", "neither shares nor per cent"),
    ]:
        with pytest.raises(AnswerError) as error:
            establish(raw, C, response)
        assert flag in str(error.value)


def test_scores_are_read_as_they_are_meant() -> None:
    answer = named(scores([50.0, 25.0, 25.0, 0.0]), response="probs", output="probs")
    assert answer.values is not None and answer.values.tolist() == [[0.5, 0.25, 0.25, 0.0]]
    answer = named(scores([-1.0, 3.0, 0.5, 0.1]), response="probs")
    assert torch.equal(answer.values, torch.tensor([[-1.0, 3.0, 0.5, 0.1]]).softmax(-1))  # type: ignore[arg-type]
    assert named(scores([0.1, 0.2, 0.6, 0.1]), response="label").labels.tolist() == [2]
    with pytest.raises(AnswerError, match=r"its logits cannot be had: --oracle\.response probs"):
        named(scores([0.1, 0.2, 0.6, 0.1]), response="logits")
    with pytest.raises(AnswerError, match="they must lie between 0 and 1"):  # the second answer is none
        named(scores([0.1, 0.2, 0.6, 0.1]), scores([3.0, -2.0, 1.0, 1.0]), response="probs")


@pytest.mark.parametrize(("scale", "output"), [(1, "auto"), (1, "probs"), (100, "probs")])
def test_pairs_are_shares_or_per_cent_of_any_number(scale: float, output: str) -> None:
    """Best first whatever order they come in; an image may have fewer than k, none, or more."""
    first = [("owl", 0.125 * scale), ("cat", 0.75 * scale)]
    answer = named(
        pairs(first), k=2, output=output,
        then=pairs(
            first, [], [("elk", 0.5 * scale)], [("dog", 0.25 * scale), ("owl", 0.5 * scale), ("elk", 0.125 * scale)]
        ),
    )  # fmt: skip
    assert answer.indices is not None and answer.values is not None
    assert answer.indices.tolist() == [[0, 2], [-1, -1], [3, -1], [2, 1]]
    assert answer.values.tolist() == [[0.75, 0.125], [0, 0], [0.5, 0], [0.5, 0.25]]
    assert answer.labels.tolist() == [0, -1, 3, 2]


@pytest.mark.parametrize(
    ("first", "output", "said"),
    [
        # What the best logits of a network look like, and what may as well be per cent.
        ([("owl", 9.1), ("cat", 4.2)], "auto", "per cent, or logits? Say --oracle.output probs for per cent"),
        ([("owl", 97.5)], "auto", "per cent, or logits?"),
        ([("owl", 9.1), ("cat", 4.2)], "logits", "--oracle.response label"),
        ([("owl", 0.9), ("cat", 0.25)], "logits", "--oracle.response label"),
        # Labels that may come together.
        ([("owl", 0.9), ("cat", 0.8)], "auto", "neither shares nor per cent"),
        ([("owl", 0.9), ("cat", 0.8)], "probs", "neither shares nor per cent"),
    ],
)
def test_a_list_that_may_be_logits_is_asked_about(first: list[Pair], output: str, said: str) -> None:
    with pytest.raises(AnswerError) as error:
        establish(pairs(first), C, "topk", output=output)
    assert said in str(error.value)


def test_the_best_of_any_scores_is_the_label() -> None:
    first = pairs([("owl", 9.1), ("cat", 4.2)], [("dog", -3.0), ("elk", -1.5)], [("cat", 0.9), ("dog", 0.95)])
    assert named(first, response="label").labels.tolist() == [2, 3, 1]
    with pytest.raises(AnswerError, match="nan"):
        named(first, pairs([("cat", float("nan"))]), response="label")


def test_equal_shares_come_in_the_order_of_the_classes() -> None:
    answer = named(pairs([("elk", 0.25), ("owl", 0.25), ("cat", 0.25), ("dog", 0.25)]))
    assert answer.indices is not None and answer.indices.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("then", "said"),
    [
        (pairs([("cat", 0.25), ("cat", 0.25)]), "named 'cat' twice for one image"),
        (pairs([("cat", 0.75), ("dog", 0.75)]), "sum to 1.5; they must not exceed 1"),
        (
            pairs([("cat", 55.0)]),
            "'cat' with 55; it must lie in 0 to 1, since the first answer names 1 classes (cat 0.5)",
        ),
        (pairs([("cat", -0.25)]), "it must lie in 0 to 1"),
        (pairs([("cat", float("nan"))]), "it must lie in 0 to 1"),
        (pairs([("yak", 0.25)]), "--oracle.classes FILE, or let its mass be missing with --oracle.unknown rest"),
        (pairs([("0", 0.25)]), "'0', which is not among the 4 classes"),
        (scores([0.5, 0.25, 0.25, 0.0]), "in another shape than at first"),
        (Raw(indices=np.array([1])), "in another shape than at first"),
    ],
)
def test_pairs_that_cannot_be_used(then: Raw, said: str) -> None:
    with pytest.raises(AnswerError) as error:
        named(pairs([("cat", 0.5)]), then)
    assert said in str(error.value)


def test_an_unknown_name_may_be_the_rest() -> None:
    answer = named(pairs([("yak", 0.5), ("cat", 0.25), ("gnu", 0.125)]), unknown="rest")
    assert answer.indices is not None and answer.values is not None
    assert answer.indices.tolist() == [[0, -1, -1]] and answer.values.tolist() == [[0.25, 0, 0]]


@pytest.mark.parametrize("raw", [pairs([("yak", 0.75), ("cat", 0.25)]), Raw(names=["yak"])])
def test_the_best_of_what_is_listed_is_no_label(raw: Raw) -> None:
    with pytest.raises(AnswerError, match=r"no label: list it, and say --oracle\.unknown error"):
        named(raw, response="label", unknown="rest")


def test_names_may_be_numbers_where_no_classes_are_listed() -> None:
    meaning = establish(pairs([("3", 0.5)]), C, "topk")
    answer = respond(pairs([("3", 0.5), ("0", 0.25)]), meaning, C, "topk", 2, None)
    assert answer.indices is not None and answer.indices.tolist() == [[3, 0]]
    for name in ("4", "-1", "1.0", "", "9" * 5000, "²"):
        with pytest.raises(AnswerError, match="not among the 4 classes"):
            respond(pairs([(name, 0.5)]), meaning, C, "topk", 2, None)


def test_every_class_named_is_a_distribution() -> None:
    whole = pairs([("dog", 0.5), ("cat", 0.25), ("elk", 0.0), ("owl", 0.25)])
    answer = named(whole, response="probs")
    assert answer.kind == "probs" and answer.values is not None and answer.values.tolist() == [[0.25, 0.5, 0.25, 0.0]]
    with pytest.raises(AnswerError, match=r"named 1 of 4 classes: --oracle\.response topk"):
        named(whole, pairs([("dog", 1.0)]), response="probs")
    assert named(whole, response="label").labels.tolist() == [1]
    with pytest.raises(AnswerError, match=r"named no class for an image: --oracle\.response topk"):
        named(whole, pairs([]), response="label")


def test_labels_by_index_and_by_name() -> None:
    assert named(Raw(indices=np.array([[3], [0]], np.int32)), response="label").labels.tolist() == [3, 0]
    assert named(Raw(names=["elk", "cat"]), response="label").labels.tolist() == [3, 0]
    for wrong in (4, -1):
        with pytest.raises(AnswerError, match=f"answered class {wrong}; there are 4"):
            named(Raw(indices=np.array([0])), Raw(indices=np.array([wrong])), response="label")
    with pytest.raises(AnswerError, match="'yak', which is not among the 4 class names"):
        named(Raw(names=["elk"]), Raw(names=["yak"]), response="label")


def test_values_are_rounded_as_the_api_is_said_to() -> None:
    meaning = Meaning("pairs", 1.0, "so", NAMES)
    answer = respond(pairs([("cat", 0.123456)]), meaning, C, "topk", 1, 2)
    assert answer.values is not None and answer.values.tolist() == [[pytest.approx(0.12)]] and answer.decimals == 2


# -- what goes up ------------------------------------------------------------------------------------------


def pixels(channels: int, side: int = 16, m: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (m, channels, side, side), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_student_sees_what_a_jpeg_left(channels: int) -> None:
    images = pixels(channels)
    for kind in ("raw", "png"):
        assert Encoding(kind).shown(images) is images
    seen = Encoding("jpeg", quality=90).shown(images)
    assert seen.shape == images.shape and seen.dtype == torch.uint8 and not torch.equal(seen, images)
    files = Encoding("jpeg", quality=90).encode(images)
    assert isinstance(files, list) and all(file.startswith(b"\xff\xd8") for file in files)
    from io import BytesIO

    from PIL import Image

    for image, file in zip(seen, files, strict=True):
        theirs = torch.from_numpy(np.array(Image.open(BytesIO(file)))).reshape(16, 16, channels)
        assert torch.equal(image, theirs.permute(2, 0, 1))
    assert torch.equal(Encoding("jpeg", 90).shown(images), seen)
    worse = Encoding("jpeg", quality=10).shown(images)
    assert (worse.float() - images.float()).abs().mean() > (seen.float() - images.float()).abs().mean()
    larger = Encoding("jpeg", quality=95, size=40).shown(images)
    assert larger.shape == images.shape, "at its own size, whatever went up"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_is_the_pixels_themselves(channels: int) -> None:
    from io import BytesIO

    from PIL import Image

    images = pixels(channels)
    for image, file in zip(images, Encoding("png").encode(images), strict=True):
        assert isinstance(file, bytes)
        theirs = torch.from_numpy(np.array(Image.open(BytesIO(file)))).reshape(16, 16, channels)
        assert torch.equal(image, theirs.permute(2, 0, 1))


def test_resized_is_the_same_everywhere() -> None:
    images = pixels(3)
    assert resized(images, None) is images and resized(images, 16) is images
    for size in (5, 8, 32, 224):
        once = resized(images, size)
        assert once.shape == (3, 3, size, size) and once.dtype == torch.uint8
        assert torch.equal(once, resized(images, size))
        # An image does not depend on those that it comes with, nor on threads.
        assert torch.equal(once[1:2], resized(images[1:2], size))
        threads = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            assert torch.equal(once, resized(images, size))
        finally:
            torch.set_num_threads(threads)
    flat = torch.full((1, 1, 16, 16), 201, dtype=torch.uint8)
    assert resized(flat, 37).unique().tolist() == [201]


def test_unrounded_images_are_resized_unrounded() -> None:
    """transport float: they lie in [-1, 1], and a pixel's type would turn them black."""
    images = torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16)
    larger = resized(images, 32)
    assert larger.dtype == torch.float32 and larger.shape == (1, 1, 32, 32)
    assert larger.min() < -0.9 and larger.max() > 0.9
