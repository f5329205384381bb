"""What a function of the user's may give, and that anything else ends in a sentence."""

import sys
from typing import Any

import numpy as np
import pytest
import torch

from fake_service import connect, images, scores
from mekd.oracle.function import Function, read
from mekd.oracle.http import Lost
from mekd.oracle.response import AnswerError


class Odd:
    """Raises whatever is done with it."""

    def __float__(self) -> float:
        raise RuntimeError("no number")

    def __str__(self) -> str:
        raise RuntimeError("no name")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_scores_may_be_a_tensor_of_any_floating_dtype(dtype: torch.dtype) -> None:
    def teacher(pixels: np.ndarray) -> torch.Tensor:
        asked = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return torch.from_numpy(scores(asked)).to(dtype).requires_grad_()

    oracle = connect(Function(teacher))
    answer = oracle.query(images(3))
    assert answer.values is not None and answer.values.dtype == torch.float32
    np.testing.assert_allclose(answer.values, scores(images(3)), atol=4e-3)
    assert oracle.ledger.counts["uncertain"] == 0
    oracle.close()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_it_does_to_its_images_stays_with_it(layout: torch.memory_format, channels: int) -> None:
    """They are those of the query, which are booked and learnt from: with one channel, or channels last, the memory."""

    def teacher(pixels: np.ndarray) -> np.ndarray:
        np.subtract(255, pixels, out=pixels)
        return np.full((len(pixels), 2), 0.5)

    sent = images(2)[:, :1].expand(-1, channels, -1, -1).clone().to(memory_format=layout)
    before = sent.clone()
    Function(teacher).call(sent)
    assert torch.equal(sent, before)


def test_an_exit_in_it_is_no_end_that_looks_well() -> None:
    """sys.exit() of a helper of the user's would end the command with status 0."""

    def teacher(pixels: np.ndarray) -> np.ndarray:
        sys.exit()

    with pytest.raises(Lost, match=r"teacher.python raised SystemExit"):
        Function(teacher).call(images(1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_classes_may_be_a_tensor_of_whole_numbers(dtype: torch.dtype) -> None:
    raw = read(torch.tensor([3, 0], dtype=dtype))
    assert raw.indices is not None and raw.indices.tolist() == [3, 0]


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        (None, "NoneType"), (3, "int"), ("owl", "str"), ([], "list"), ({"owl": 0.5}, "dict"), ([[("owl",)]], "list"),
        ([[("owl", Odd())]], "list"), ([[(Odd(), 0.5)]], "list"), ([[("owl", 10**400)]], "list"), ([[3]], "list"),
        (np.array([Odd()], dtype=object), "ndarray of object, shape (1,)"),
        (np.zeros((2, 3, 4)), "ndarray of float64, shape (2, 3, 4)"),
        (torch.zeros(2, 3, 4, dtype=torch.bfloat16), "Tensor of torch.bfloat16, shape (2, 3, 4)"),
        (torch.zeros(2, 3, device="meta"), "Tensor of torch.float32, shape (2, 3)"),
        (torch.eye(3).to_sparse(), "Tensor of torch.float32, shape (3, 3)"),
        (torch.zeros(2, 3, dtype=torch.complex64), "of complex64, shape (2, 3)"),
    ],
    ids=range(16),
)  # fmt: skip
def test_anything_else_ends_in_a_sentence(found: Any, shown: str) -> None:
    with pytest.raises(AnswerError) as error:
        read(found)
    assert f"{shown}; it must give scores (m, C) of floats" in str(error.value).replace("torch.complex", "complex")
