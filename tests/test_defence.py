"""Answers of a server that defends itself: what stays, what changes, and that asking twice brings nothing."""

from pathlib import Path

import pytest
import torch

from mekd.errors import UsageError
from mekd.serve.defence import Defence
from mekd.serve.model import Model
from onnx_files import INT64, argmax, echo
from serve_requests import infer
from served import inside

pytest.importorskip("starlette", reason="starlette is not installed: pip install 'mekd[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'mekd[serve]'")


def probs(sharp: float = 3.0, rows: int = 400) -> torch.Tensor:
    return (sharp * torch.randn(rows, 10, generator=torch.Generator().manual_seed(0))).softmax(1)


@pytest.mark.parametrize("noise", [0.2, 0.9, 1.0])
def test_noise_keeps_the_best_class_and_a_distribution(noise: float) -> None:
    clean = probs()
    given = Defence(noise=noise)(clean)
    assert torch.equal(given.argmax(1), clean.argmax(1))
    assert torch.allclose(given.sum(1), torch.ones(len(given)), atol=1e-5) and given.min() >= 0
    apart = 0.5 * (given - clean).abs().sum(1).mean()
    assert 0.2 * noise < apart < noise
    assert torch.equal(given, Defence(noise=noise)(clean.flip(0)).flip(0)), "an answer is the same whenever it is asked"
    assert not torch.equal(given, Defence(noise=noise, seed=1)(clean))


def test_what_it_is_not_sure_of_it_misnames_and_nothing_else() -> None:
    clean = probs(1.0)
    given = Defence(mislead=0.4)(clean)
    unsure = clean.amax(1) < 0.4
    assert 0.1 < unsure.double().mean() < 0.9
    assert (given.argmax(1) != clean.argmax(1))[unsure].all() and torch.equal(given[~unsure], clean[~unsure])
    assert torch.allclose(given.sort(1).values, clean.sort(1).values), "as sure as it was"


def test_a_server_gives_defended_answers(teacher_onnx: Path) -> None:
    images = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    body = {"inputs": [{"name": "images", "datatype": "UINT8", "shape": [3, 1, 16, 16], "data": images.tolist()}]}
    answers = []
    for words in ([], ["--noise", "0.5"], ["--noise", "0.5"]):
        with inside(teacher_onnx, "--response", "probs", *words) as url:
            found = infer(url, body, name="teacher").json()
            answers.append(torch.tensor(found["outputs"][0]["data"]).view(3, 10))
    assert torch.equal(answers[1], answers[2]) and not torch.allclose(answers[0], answers[1], atol=0.05)
    assert torch.equal(answers[0].argmax(1), answers[1].argmax(1))


@pytest.mark.parametrize("response", [None, "logits"])
def test_what_cannot_be_defended_is_refused(response: str | None, teacher_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--noise and --mislead change probabilities, and --response is"):
        Model(teacher_onnx, response, defence=Defence(noise=0.1))
    if response is None:
        with pytest.raises(UsageError, match="answers classes alone: leave them out"):
            index = echo(tmp_path / "index.onnx", argmax(), output=("best", INT64, ["m"]))
            Model(index, "label", num_classes=6, defence=Defence(mislead=0.5))
