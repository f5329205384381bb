"""What a served classifier answers to an image: labels with scores, as Hugging Face's API does."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mekd.oracle.ort import OnnxOracle
from onnx_files import FLOAT, NAMES, asked, echo, pixels, values
from serve_requests import CLASSES, grey, photo_server, png
from served import Answer, call, inside, metrics

pytest.importorskip("starlette", reason="starlette is not installed: pip install 'mekd[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'mekd[serve]'")
Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install 'mekd[serve]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def photos(folder: Path) -> Iterator[tuple[Path, str]]:
    with photo_server(folder) as photos:
        yield photos


def as_pairs(path: Path, image: np.ndarray, **options: Any) -> dict[str, float]:
    """The probabilities of the file's oracle, by name."""
    oracle = OnnxOracle(path, "probs", providers="cpu", **options)
    return dict(zip(NAMES, values(oracle.query(torch.from_numpy(image)[None]))[0].tolist(), strict=False))


def test_an_image_up_and_labels_down(photos: tuple[Path, str]) -> None:
    path, url = photos
    image = pixels(1, seed=1)[0].numpy()
    answer = call(f"{url}/hf/photos", png(image), Content_Type="image/png").json()
    assert {pair["label"]: pair["score"] for pair in answer} == as_pairs(path, image)
    scores = [pair["score"] for pair in answer]
    assert len(answer) == CLASSES and scores == sorted(scores, reverse=True)

    def post(**parameters: Any) -> Answer:
        tree = {"inputs": base64.b64encode(png(image)).decode(), "parameters": parameters}
        return call(f"{url}/hf/photos", json.dumps(tree).encode(), Content_Type="application/json")

    assert post().json() == answer
    assert post(top_k=2).json() == answer[:2]
    for wrong in (0, -1, "2", 1.5):
        assert post(top_k=wrong).status == 400
    jpeg = png(image, format="JPEG")
    decoded = np.asarray(Image.open(io.BytesIO(jpeg))).transpose(2, 0, 1)
    answer = call(f"{url}/hf/photos", jpeg).json()
    assert {pair["label"]: pair["score"] for pair in answer} == as_pairs(path, decoded.copy())


def test_images_are_resized_and_converted(photos: tuple[Path, str]) -> None:
    path, url = photos
    image = pixels(1, seed=2)[0].numpy()
    large = png(image, (20, 12))
    fitted = np.array(Image.open(io.BytesIO(large)).resize((8, 8), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    answer = call(f"{url}/hf/photos", large).json()
    assert {pair["label"]: pair["score"] for pair in answer} == as_pairs(path, fitted.copy())
    single = image[:1]
    answer = call(f"{url}/hf/photos", png(single)).json()
    assert {pair["label"]: pair["score"] for pair in answer} == as_pairs(path, single.repeat(3, 0))


@pytest.mark.parametrize(
    "body", [b"", b"nothing", b"{}", b'{"inputs": "?"}', b"[1]", b"\x89PNG\r\n\x1a\nbroken", b'{"inputs": "AAAA"}']
)
def test_what_is_no_image(photos: tuple[Path, str], body: bytes) -> None:
    before = metrics(photos[1])["mekd_images_computed_total"]
    answer = call(f"{photos[1]}/hf/photos", body)
    assert answer.status == 400 and answer.json()["error"]
    assert metrics(photos[1])["mekd_images_computed_total"] == before


def test_other_formats_are_refused(photos: tuple[Path, str]) -> None:
    answer = call(f"{photos[1]}/hf/photos", png(pixels(1)[0].numpy(), format="BMP"))
    assert answer.status == 400


@pytest.mark.parametrize(
    ("options", "keep"),
    [
        (["--response", "label"], lambda pairs: pairs[:1]),
        (["--response", "topk", "--k", "3"], lambda pairs: pairs[:3]),
        (["--threshold", "0.2"], lambda pairs: [pair for pair in pairs if pair[1] >= 0.2]),
        (["--threshold", "1"], lambda pairs: []),
        (["--decimals", "2"], lambda pairs: [(label, round(score, 2)) for label, score in pairs]),
    ],
)
def test_what_is_given_away_of_an_image(
    small: Path, options: list[str], keep: Callable[[list[tuple[str, float]]], list[tuple[str, float]]]
) -> None:
    image = grey([200, 0, 255, 100, 3, 120])
    # Normalised, and by names that are the classes' numbers.
    oracle = asked(small, "probs", mean=(0.25,), std=(0.1,))
    probs = values(oracle.query(torch.from_numpy(image)[None]))[0]
    order = probs.argsort(descending=True).tolist()
    with inside(small, "--mean", 0.25, "--std", 0.1, *options) as url:
        pairs = [(pair["label"], pair["score"]) for pair in call(f"{url}/hf/echo", png(image)).json()]
        # A client can ask for less, and not for more.
        tree = {"inputs": base64.b64encode(png(image)).decode(), "parameters": {"top_k": 6}}
        assert len(call(f"{url}/hf/echo", json.dumps(tree).encode()).json()) == len(pairs)
    assert pairs == keep([(str(i), probs[i].item()) for i in order])


def test_channels_last(folder: Path) -> None:
    path = echo(folder / "last.onnx", shape=("m", 2, 1, 3), output=("scores", FLOAT, ["m", 6]))
    image = pixels(1, (3, 2, 1))[0].numpy()
    with inside(path) as url:
        assert call(f"{url}/v2/models/last").json()["inputs"][0]["shape"] == [-1, 2, 1, 3]
        answer = call(f"{url}/hf/last", png(image)).json()
    best = image.transpose(1, 2, 0).reshape(-1).argsort()[::-1]
    assert [pair["label"] for pair in answer] == [str(i) for i in best]
