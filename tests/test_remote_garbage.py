"""Answers and metadata that are none: a message, never a traceback, and what was paid is not paid again."""

import json
from pathlib import Path

import pytest

from fake_service import CLASSES, images
from mekd.oracle.answers import Meaning
from mekd.oracle.http import Line, ServiceError
from mekd.oracle.oip import Oip, describe
from mekd.oracle.response import AnswerError
from raw_server import pairs, reply, scripted, tensor
from remote_ask import NAMES, SHARES, ask, connect, paid


@pytest.fixture(params=["hf", "oip"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


GARBAGE = [
    b"", b"{", b"null", b"[]]", b"\xff\xfe", b"17", b'"text"', b"{}", b"[1]", b'[{"label": "cat"}]', b"[" * 60_000,
    b'[{"label": "cat", "score": null}]', b'[{"label": "cat", "score": "high"}]', b'[{"label": "cat", "score": NaN}]',
    b'[{"label": "cat", "score": 1' + b"0" * 400 + b"}]", b'[{"label": "cat", "score": Infinity}]', b"[[[]]]",
    b'{"outputs": 3}', b'{"outputs": [3]}', b'{"outputs": []}', b'{"outputs": [{}]}', b'{"outputs": null}',
    tensor([1], []), tensor([0.5] * 4, [1, 5]), tensor(SHARES, [4]), tensor(SHARES, [1, -1]), tensor("text", [1, 4]),
    tensor(SHARES, [1, 4], name="other"), tensor(SHARES, [1, 4], "BF16"), tensor(SHARES, [1, 4], "STRING"),
    tensor([1e400, 0, 0, 0], [1, 4]), tensor([float("nan")] * 4, [1, 4]), tensor([9**99] * 4, [1, 4], "INT64"),
    tensor(SHARES, [float("inf")]), tensor([None] * 4, [1, 4]), tensor([0.9, 0.9, 0.9, 0.9], [1, 4]),  # type: ignore[list-item]
    tensor([["a", "b"], ["c"]], [1, 4], "BYTES"), tensor([4], [1], "INT64"), tensor(SHARES * 2, [1, 8]),
    b'{"outputs": [{"name": "probs", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": -3}}]}',
    b'{"outputs": [{"name": "probs", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": "x"}}]}',
    b'{"outputs": [{"name": "probs", "shape": [1, 4], "datatype": "FP32", "parameters": 3}]}',
]  # fmt: skip


@pytest.mark.parametrize("body", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_no_answer(protocol: str, body: bytes) -> None:
    """It was paid once, and is not asked for again, whether it is the first answer or a later one."""
    for first in ({}, {"meaning": None}):
        with scripted(reply(200, body), reply(200, body)) as server:
            oracle = connect(protocol, server.url, None, **first)
            with pytest.raises(AnswerError, match=r"^the (teacher|first answer)") as error:
                oracle.query(images(1))
            oracle.close()
            assert len(server.requests) == 1
        assert len(str(error.value)) < 600
        assert (oracle.ledger.counts["queries"], oracle.ledger.counts["uncertain"]) == (0, 1)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_answers_is_refused(count: int, tmp_path: Path) -> None:
    with scripted(reply(200, tensor(SHARES * count, [count, CLASSES]))) as server:
        error = ask("oip", server.url, tmp_path, m=2, batch=2)
    assert isinstance(error, AnswerError) and f"answered {count} of 2 images" in str(error)
    assert paid(tmp_path) == (0, 2, 1)


def test_a_name_that_is_no_class(tmp_path: Path) -> None:
    body = reply(200, pairs(cat=0.5, yak=0.25))
    with scripted(body) as server:
        error = ask("hf", server.url, tmp_path / "error")
    assert isinstance(error, AnswerError)
    assert "'yak', which is not among the 4 classes" in str(error) and "--oracle.unknown rest" in str(error)
    with scripted(body) as server:
        answer = ask("hf", server.url, tmp_path / "rest", unknown="rest")
    assert answer.indices.tolist() == [[0, -1]] and answer.values.tolist() == [[0.5, 0.0]]
    assert paid(tmp_path / "rest") == (1, 0, 1)


def test_the_classification_extension(tmp_path: Path) -> None:
    values = ["0.25:1:dog", "0.5:0:cat", "0.875:3:elk", "0.125:0"]
    with scripted(reply(200, tensor(values, [2, 2], "BYTES")), reply(200, tensor(values[:3], [3], "BYTES"))) as server:
        answer = ask("oip", server.url, tmp_path, m=2, batch=2, k=2, meaning=Meaning("pairs", 1.0, "so"))
        assert answer.indices.tolist() == [[0, 1], [3, 0]] and answer.values.tolist() == [[0.5, 0.25], [0.875, 0.125]]
        error = ask("oip", server.url, tmp_path / "odd", m=2, batch=2, k=2, meaning=Meaning("pairs", 1.0, "so"))
    assert isinstance(error, AnswerError) and "3 classes for 2 images" in str(error)
    for wrong in (["0.5"], ["high:1"], [":"], ["0.5:12"], ["nan:1"]):
        with scripted(reply(200, tensor(wrong, [1, 1], "BYTES"))) as server:
            error = ask("oip", server.url, tmp_path / wrong[0], k=2, meaning=Meaning("pairs", 1.0, "so"))
        assert isinstance(error, AnswerError), (wrong, error)


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        (["0.5:0", "0.25:3", "0.125:1", "0.125:2"], None),
        # Logits: the best two of the first would pass for shares, those of the second for per cent.
        (["0.5:0", "0.25:3", "0.125:1", "-4:2"], "neither shares nor per cent"),
        (["0.5:0", "0.25:3", "0.05:1", "0.01:2"], "neither shares nor per cent"),
        (["9.5:0", "4.25:3", "1:1", "0.5:2"], "neither shares nor per cent"),
        (["50:0", "25:3", "12.5:1", "12.5:2"], "Say --oracle.output probs for per cent"),
    ],
)
def test_the_first_list_is_of_every_class(listed: list[str], said: str | None, tmp_path: Path) -> None:
    """Its sum tells whether the scores are shares; the lists after it are as short as was asked."""
    with scripted(
        reply(200, tensor(listed, [1, 4], "BYTES")), reply(200, tensor(listed[:2], [1, 2], "BYTES"))
    ) as server:
        answer = ask("oip", server.url, tmp_path, m=2, batch=1, k=2, meaning=None)
        asked = [json.loads(body)["outputs"][0]["parameters"] for _, _, body in server.requests]
    if said is None:
        assert answer.indices.tolist() == [[0, 3]] * 2 and answer.values.tolist() == [[0.5, 0.25]] * 2
        assert asked == [{"classification": 4}, {"classification": 2}]
    else:
        assert isinstance(answer, AnswerError) and said in str(answer) and asked == [{"classification": 4}]


def test_every_class_is_asked_for_until_an_answer_could_be_read(tmp_path: Path) -> None:
    """An answer that was refused tells nothing: the best two of these logits would pass for shares."""
    logits = ["0.5:0", "0.3:1", "-1:2", "-2:3"]
    body = reply(200, tensor(logits, [1, 4], "BYTES"))
    with scripted(body, body, reply(200, tensor(logits[:2], [1, 2], "BYTES"))) as server:
        oracle = connect("oip", server.url, tmp_path, k=2, meaning=None)
        for _ in range(2):
            with pytest.raises(AnswerError, match="neither shares nor per cent"):
                oracle.query(images(1))
        oracle.close()
        asked = [json.loads(body)["outputs"][0]["parameters"] for _, _, body in server.requests]
    assert asked == [{"classification": 4}] * 2


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_first_list_that_is_short_tells_nothing(count: int, tmp_path: Path) -> None:
    listed = ["0.5:0", "0.3:1", "0.1:2"][:count]
    with scripted(reply(200, tensor(listed, [1, count], "BYTES"))) as server:
        error = ask("oip", server.url, tmp_path, m=2, batch=1, k=2, meaning=None)
    assert isinstance(error, AnswerError) and paid(tmp_path) == (0, 1, 1)
    assert f"named {count} of 4 classes" in str(error) and "--oracle.response probs" in str(error)


def test_the_classification_extension_with_names(tmp_path: Path) -> None:
    """It answers class numbers, whatever names are listed; a name that it gives besides must be that of the list."""
    for n, values in enumerate((["0.9:3:elk", "0.05:1"], ["0.9:3", "0.05:1: dog"])):
        for unknown in ("error", "rest"):
            with scripted(reply(200, tensor(values, [1, 2], "BYTES"))) as server:
                answer = ask("oip", server.url, tmp_path / f"{n}{unknown}", k=2, unknown=unknown, names=NAMES)
            assert answer.indices.tolist() == [[3, 1]], answer
    for n, (value, said) in enumerate([
        ("0.9:3:dog", "the teacher calls class 3 'dog', and oracle.classes lists 'elk' for it"),
        ("0.9:4:yak", "the teacher answered class 4; there are 4"),
    ]):  # fmt: skip
        with scripted(reply(200, tensor([value], [1, 1], "BYTES"))) as server:
            error = ask("oip", server.url, tmp_path / str(n), k=2, unknown="rest", names=NAMES)
        assert isinstance(error, AnswerError) and said in str(error), error


@pytest.mark.parametrize(
    ("shape", "classes"),
    [([-1, 4], 4), ([-1, 4, 1, 1], 4), ([-1, 1, 1, 4], 4), ([4], None), ([-1, -1], None), ([-1, 4, -1, -1], None)],
)
def test_classes_are_the_numbers_of_an_image(shape: list[int], classes: int | None) -> None:
    body = json.dumps({"outputs": [{"name": "probs", "datatype": "FP32", "shape": shape}]})
    with scripted(*[reply(200, body)] * 3, reply(200, tensor(SHARES, [1, *shape[1:]]))) as server:
        line = Line(f"{server.url}/v2/models/m", {}, 5)
        model = describe(line, 1, input_name=None, output_name=None, transport="uint8", binary=None)
        assert model.classes == classes
        if classes:
            raw, _ = Oip(line, model, classes, mean=[0.0], std=[1.0], k=None).call(images(1))
            assert raw.scores is not None and raw.scores.tolist() == [SHARES]
        line.close()


METADATA = [
    b"{}", b"[]", b"null", b"", b"<html>", b"[" * 100_000, b'{"inputs": 3}', b'{"inputs": [3]}', b'{"inputs": [{}]}',
    b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": 3}]}', b'{"inputs": {"name": "x"}}', b'{"outputs": [[]]}',
    b'{"inputs": [{"name": "x", "datatype": ["FP32"], "shape": [1, 2, 3, 3]}]}',
    b'{"outputs": [{"name": "y"}], "versions": 3}', b'{"outputs": [{"name": "y", "shape": []}]}', b"\xff",
]  # fmt: skip


@pytest.mark.parametrize("body", METADATA, ids=range(len(METADATA)))
def test_metadata_that_say_nothing_or_nonsense(body: bytes) -> None:
    with scripted(*[reply(200, body)] * 3) as server:
        line = Line(f"{server.url}/v2/models/m", {}, 5)
        try:
            found = describe(line, 1, input_name=None, output_name=None, transport="uint8", binary=None)
        except ServiceError as error:
            assert body != b"{}" and ("teacher.url" in str(error) or "mekd sends UINT8" in str(error)), error
        else:
            assert found.classes is None
        finally:
            line.close()
