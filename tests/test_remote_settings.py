"""Settings of a remote teacher that cannot be: refused before the first step, and by quote and --dry-run."""

import json
import sys
from pathlib import Path

import pytest

from mekd import cli
from mekd.engine import reach
from raw_server import reply, scripted
from remote_run import total, words

FUNCTION = """
def ask(images):
    raise AssertionError("the teacher was asked")
"""
ONE = json.dumps({
    "name": "m", "inputs": [{"name": "x", "datatype": "UINT8", "shape": [-1, 1, 16, 16]}],
    "outputs": [{"name": "p", "datatype": "FP32", "shape": [-1, 1]}],
}).encode()  # fmt: skip
FLOATING = json.dumps({
    "name": "m", "versions": ["1"],
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 1, 16, 16]}],
    "outputs": [{"name": "probs", "datatype": "FP32", "shape": [-1, 10]}],
}).encode()  # fmt: skip


@pytest.fixture(params=["run", "deprivatize", "quote", "dry run"])
def command(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def refused(command: str, url: str, out: Path, capsys: pytest.CaptureFixture[str], **settings: object) -> str:
    """What a command says that must refuse before it has trained anything."""
    more = {"run": ["--yes"], "dry run": ["--dry-run"]}.get(command, [])
    given = words(url, out, *more, stage="run" if command == "dry run" else command, **settings)
    assert cli.main(given) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err and not (out / "checkpoints").exists() and not (out / "ledger").exists()
    assert "deprivatize: 3 steps" not in said.out, "step 1 went first"
    return said.err


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"oracle__encoding": "png"}, "oracle.encoding is 'png'; it must be raw here"),
        ({"oracle__encoding": "jpeg", "oracle__transport": "float"}, "oracle.transport must be uint8"),
        ({"oracle__decimals": 9}, "oracle.decimals is 9; it must lie between 0 and 7"),
        ({"oracle__response": "topk", "oracle__k": 0}, "oracle.k is 0"),
        ({"oracle__rate": 5}, "pip install 'mekd[remote]'"),
        ({"oracle__image_rate": 5}, "pip install 'mekd[remote]'"),
        ({"oracle__rate": ".inf"}, "oracle.rate is inf; it must be finite"),
        ({"oracle__image_rate": ".inf"}, "oracle.image_rate is inf; it must be finite"),
        ({"oracle__timeout": ".inf"}, "oracle.timeout is inf; it must lie between 0 and 2000000"),
        ({"oracle__price": -3}, "oracle.price is -3.0; it must be finite and at least 0, or null"),
        ({"oracle__price": ".nan"}, "oracle.price is nan"),
        ({"oracle__std": "[0]"}, "oracle.std is [0.0]; it must hold numbers above 0"),
        ({"oracle__mean": "[.nan]"}, "oracle.mean is [nan]; it must hold finite numbers"),
        ({"oracle__mean": "[]"}, "oracle.mean is []"),
        ({"oracle__output": "logit"}, "oracle.output is 'logit'; it must be 'auto', 'logits' or 'probs'"),
        ({"oracle__unknown": "rest", "oracle__response": "label"}, "oracle.unknown is 'rest' and oracle.response 'lab"),
    ],
)
def test_what_a_teacher_cannot_be_asked_with(
    command: str, settings: dict[str, object], part: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if "pip install" in part:
        monkeypatch.setitem(sys.modules, "pyrate_limiter", None)
    file = tmp_path / "teacher.py"
    file.write_text(FUNCTION)
    own = {"teacher__python": f"{file}:ask", "oracle__num_classes": 10}
    assert part in refused(command, "", tmp_path / "out", capsys, **own, **settings)


def test_pictures_need_pillow(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    own = {"teacher__protocol": "hf", "oracle__num_classes": 10}
    assert "need Pillow" in refused(command, "http://127.0.0.1:1", tmp_path / "out", capsys, **own)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"oracle__response": "logits"}, "oracle.response is 'logits', and with protocol hf"),
        ({"oracle__response": "topk", "oracle__output": "logits"}, "oracle.output is 'logits', and a list of logits"),
        ({"oracle__response": "probs", "oracle__output": "logits"}, "oracle.output is 'logits', and a list of logits"),
    ],
)
def test_a_list_of_labels_and_scores_is_no_answer_to_that(
    command: str, settings: dict[str, object], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"teacher__protocol": "hf", "oracle__num_classes": 10, "oracle__encoding": "png"}
    with scripted() as server:
        assert part in refused(command, server.url, tmp_path / "out", capsys, **own, **settings)
        assert server.requests == []


@pytest.mark.parametrize(
    ("datatype", "response", "part"),
    [
        ("INT64", "probs", "output c is INT64, which is a class and no probs: say --oracle.response label"),
        ("INT64", "topk", "output c is INT64, which is a class and no topk"),
        ("BYTES", "logits", "output c is BYTES, which is a class and no logits"),
        (
            "BYTES",
            "label",
            "output c is BYTES, which is a class by its name: list the names with --oracle.classes",
        ),
        ("BF16", "label", "output c is BF16, and mekd reads FP32, FP16, FP64, whole numbers and BYTES"),
        ("BOOL", "probs", "output c is BOOL, and mekd reads"),
    ],
)
def test_an_output_whose_datatype_tells_that_it_is_no_answer(
    command: str, datatype: str, response: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = json.loads(FLOATING) | {"outputs": [{"name": "c", "datatype": datatype, "shape": [-1, 1]}]}
    with scripted(*[reply(200, json.dumps(said))] * 20) as server:
        own = {"oracle__num_classes": 10, "oracle__response": response}
        assert part in refused(command, server.url, tmp_path / "out", capsys, **own)
        assert not [line for line, _, _ in server.requests if "infer" in line]


@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_floating_model_takes_a_number_for_each_channel(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted(*[reply(200, FLOATING)] * 20) as server:
        said = refused(command, server.url, tmp_path / "out", capsys, **{f"oracle__{name}": "[0.5, 0.5]"})
    assert f"oracle.{name} is [0.5, 0.5], and the images have 1 channel: it must hold one number" in said


def test_one_class_is_no_teacher(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "names.txt").write_text("cat, dog, bird\n")
    (tmp_path / "teacher.py").write_text(FUNCTION)
    own = {"teacher__python": f"{tmp_path / 'teacher.py'}:ask", "oracle__classes": tmp_path / "names.txt"}
    assert "each name stands in a line of its own" in refused(command, "", tmp_path / "out", capsys, **own)
    with scripted(*[reply(200, ONE)] * 20) as server:
        for more in ({}, {"oracle__num_classes": 2}):
            said = refused(command, server.url, tmp_path / "out", capsys, **more)
            assert "holds 1 value an image; a teacher has at least 2 classes" in said


def test_what_was_asked_already_goes_on_as_it_began(tmp_path: Path) -> None:
    """Earlier versions took these settings, and what was paid with them is neither refused nor asked anew."""
    file = tmp_path / "teacher.py"
    file.write_text(
        "import numpy as np\n\ndef ask(images):\n    return images.reshape(len(images), -1).argmax(1) % 10\n"
    )
    own = {"teacher__python": f"{file}:ask", "oracle__num_classes": 10, "oracle__response": "label"}
    out, given = tmp_path / "out", own | {"oracle__output": "logit", "oracle__unknown": "rest"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reach, "_check_response", lambda run: None)
        for stage in ("deprivatize", "distill"):
            assert cli.main(words("", out, "--yes", stage=stage, **given)) == 0
    assert total(out)["queries"] == 190
    file.write_text(FUNCTION)
    assert cli.main(words("", out, "--yes", stage="distill", **given)) == 0
