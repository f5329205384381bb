"""mekd predict: a table of what a student says of photos, whatever lies beside them."""

import csv
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

import mekd.predict
from mekd import cli
from mekd.data.upright import decode
from mekd.oracle.session import ProviderError
from mekd.student import Preprocess

SIZE = 8


@pytest.fixture(scope="module")
def brightest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that names the strongest colour: logits are the channels' means, of 255."""
    return student(tmp_path_factory.mktemp("brightest") / "student.onnx", ["red", "green", "blue"])


def student(path: Path, classes: list[str], how: Preprocess | None = None, /, **left_out: str) -> Path:
    how = how or Preprocess(SIZE, SIZE, 3)
    node, value, helper = onnx.helper.make_node, onnx.TensorProto, onnx.helper
    nodes = [
        node("Cast", ["images"], ["float"], to=value.FLOAT),
        node("GlobalAveragePool", ["float"], ["mean"]),
        node("Flatten", ["mean"], ["flat"]),
        node("Div", ["flat", "most"], ["logits"]),
    ]
    kind = value.UINT8 if how.scale == 1 else value.FLOAT
    most = onnx.numpy_helper.from_array(np.float32(255 * how.scale), "most")
    images = helper.make_tensor_value_info("images", kind, ["batch", how.channels, how.size, how.size])
    logits = helper.make_tensor_value_info("logits", value.FLOAT, ["batch", how.channels])
    graph = helper.make_graph(nodes, "brightest", [images], [logits], [most])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {"classes": json.dumps(classes), "preprocess": how.json()} | left_out)
    onnx.save(model, path)
    return path


def photo(path: Path, colour: tuple[int, ...], side: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side + 5), colour).save(path)
    return path


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_photos_of_any_folders(brightest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any depth, name and format; what cannot be read is named and counted; nothing hidden is looked at."""
    root = tmp_path / "photos"
    photo(root / "b.png", (0, 0, 255))
    photo(root / "a" / "deep er" / "ä,ö.bmp", (0, 255, 0))
    photo(root / "a" / "red.PNG", (255, 0, 51))
    photo(root / ".cache" / "no.png", (1, 2, 3))
    photo(root / "__MACOSX" / "no.png", (1, 2, 3))
    photo(root / "unnamed.png", (255, 0, 0)).rename(root / "unnamed")
    (root / "notes.txt").write_text("no photo")
    (root / "cut.png").write_bytes((root / "b.png").read_bytes()[:60])
    (root / "a" / "round").symlink_to(root)
    out = tmp_path / "predictions.csv"
    assert cli.main(["predict", str(brightest), str(root), "--out", str(out), "--batch", "2"]) == 0
    said = capsys.readouterr()
    rows = table(out)
    named = {str(Path(row["file"]).relative_to(root)): row["class"] for row in rows}
    assert named == {"a/deep er/ä,ö.bmp": "green", "a/red.PNG": "red", "b.png": "blue", "unnamed": "red"}
    assert said.out == f"{out}: 4 photos; 2 files left out\n"
    assert sorted(line.split(": ")[0] for line in said.err.splitlines()) == ["left out", "left out"]
    assert "notes.txt" in said.err and "cut.png" in said.err
    # red.PNG: logits 1, 0, 0.2.
    wanted = np.exp([1, 0.2, 0]) / np.exp([1, 0.2, 0]).sum()
    row = next(row for row in rows if row["file"].endswith("red.PNG"))
    assert list(row) == ["file", "class", "probability", "second", "second_probability", "third", "third_probability"]
    assert [row["class"], row["second"], row["third"]] == ["red", "blue", "green"]
    found = [float(row[name]) for name in ("probability", "second_probability", "third_probability")]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_folder_that_cannot_be_read_is_named(
    brightest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its photos would else be missing without a word; by a stand-in, as root may read everything."""
    root, scandir = tmp_path / "photos", os.scandir
    photo(root / "b.png", (0, 0, 255))
    photo(root / "closed" / "c.png", (0, 0, 255))
    closed = [str(root / "closed")]

    def refusing(path: str) -> Any:
        if os.fspath(path) in closed:
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    out = tmp_path / "out.csv"
    assert cli.main(["predict", str(brightest), str(root), "--out", str(out)]) == 0
    said = f"{closed[0]}, a folder that cannot be read (Permission denied)"
    assert f"left out: {said}\n" in capsys.readouterr().err and len(table(out)) == 1
    closed.append(str(root))
    assert cli.main(["predict", str(brightest), str(root), "--out", str(out)]) == 2
    assert f"no file in it; left out was {root}, a folder that cannot be read" in capsys.readouterr().err


def test_a_single_photo_and_few_classes(tmp_path: Path) -> None:
    """As many columns as there are classes; a grey student sees what Pillow calls grey."""
    levels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    Image.fromarray(levels).save(tmp_path / "photo.png")
    file = student(tmp_path / "grey.onnx", ["only"], Preprocess(SIZE, SIZE, 1))
    out = tmp_path / "out" / "one.csv"
    assert cli.main(["predict", str(file), str(tmp_path / "photo.png"), "--out", str(out)]) == 0
    assert table(out) == [{"file": str(tmp_path / "photo.png"), "class": "only", "probability": "1.000000"}]
    seen = []

    class Session:
        def run(self, outputs: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            seen.append(inputs["images"])
            return [np.zeros((len(inputs["images"]), 1), np.float32)]

    model = mekd.predict.open_model(file)._replace(session=Session())
    mekd.predict.predict(model, [tmp_path / "photo.png"], out, 1)
    assert np.array_equal(seen[0][0, 0], np.asarray(Image.open(tmp_path / "photo.png").convert("L")))


def test_photos_are_prepared_as_the_file_says(tmp_path: Path) -> None:
    """Resized to more than is seen, cropped, and of the range that the file takes."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(tmp_path / "photo.png")
    file = student(tmp_path / "student.onnx", ["r", "g", "b"], Preprocess(SIZE, 12, 3, 1 / 255))
    out = tmp_path / "out.csv"
    assert cli.main(["predict", str(file), str(tmp_path / "photo.png"), "--out", str(out)]) == 0
    pixels = decode(tmp_path / "photo.png", SIZE, 12)[None].astype(np.float32) / 255
    logits = onnxruntime.InferenceSession(file).run(None, {"images": pixels})[0][0]
    assert table(out)[0]["class"] == "rgb"[logits.argmax()]
    assert float(table(out)[0]["probability"]) == pytest.approx((np.exp(logits) / np.exp(logits).sum()).max(), abs=1e-6)


def test_many_photos_stay_in_order(brightest: Path, tmp_path: Path) -> None:
    """More batches than are decoded ahead, the last of them short."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    for i in range(31):
        photo(tmp_path / "photos" / f"{i:02}.png", colours[i % 3], 200 if i % 5 == 0 else 9)
    out = tmp_path / "out.csv"
    assert cli.main(["predict", str(brightest), str(tmp_path / "photos"), "--out", str(out), "--batch", "4"]) == 0
    assert [row["class"] for row in table(out)] == [["red", "green", "blue"][i % 3] for i in range(31)]
    assert [Path(row["file"]).name for row in table(out)] == [f"{i:02}.png" for i in range(31)]


def test_nothing_is_written_where_nothing_can_be_read(
    brightest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    out = tmp_path / "out.csv"
    out.write_text("what was there")
    assert cli.main(["predict", str(brightest), str(tmp_path / "photos"), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "a.jpg: it is empty" in said and "none of the 1 files could be read" in said
    assert out.read_text() == "what was there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "photos"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["none.onnx", "photos"], ["FILE.onnx is 'none.onnx'", "no such file"]),
        (["photos/a.png", "photos"], ["a.png", "ONNX"]),
        (["OTHER", "photos"], ["does not say preprocess", "student.onnx of a run's folder"]),
        (["STUDENT", "nowhere"], ["PHOTOS is 'nowhere'", "no such file or folder"]),
        (["STUDENT", "empty"], ["PHOTOS is 'empty'", "no file in it"]),
        (["STUDENT", "photos", "--out", "photos"], ["--out is 'photos'", "must be a file"]),
        (["STUDENT", "photos", "--batch", "0"], ["--batch: it is '0'", "at least 1"]),
        (["STUDENT"], ["PHOTOS", "mekd predict --help"]),
    ],
)
def test_mistakes_are_named(
    words: list[str], parts: list[str], brightest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "photos" / "a.png", (1, 2, 3))
    (tmp_path / "empty").mkdir()
    other = student(tmp_path / "other.onnx", ["a"])
    model = onnx.load(other)
    del model.metadata_props[1]
    onnx.save(model, other)
    given = {"STUDENT": str(brightest), "OTHER": str(other)}
    assert cli.main(["predict", *(given.get(word, word) for word in words)]) == 2
    said = capsys.readouterr().err
    assert [part for part in parts if part not in said] == [], said
    assert said.count("\n") == 1 and not (tmp_path / "predictions.csv").exists()


def test_a_table_that_cannot_be_written_promises_no_checkpoint(
    brightest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo(tmp_path / "a.png", (1, 2, 3))
    words = ["predict", str(brightest), str(tmp_path / "a.png"), "--out", str(tmp_path / "a.png" / "out.csv")]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "out.csv could not be written" in said and "a run goes on from its last checkpoint" in said


@pytest.mark.parametrize(
    ("said", "part"),
    [
        ({"classes": "["}, "JSONDecodeError"),
        ({"classes": '"red"'}, "no list of names"),
        ({"classes": '["red", "green"]'}, "it names 2 classes, and answers ['batch', 3]"),
        ({"preprocess": '{"size": 8}'}, "KeyError: 'resize'"),
        ({"preprocess": "[]"}, "TypeError"),
    ],
)
def test_a_file_that_says_what_cannot_be_is_named(
    said: dict[str, str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = student(tmp_path / "student.onnx", ["red", "green", "blue"], **said)
    photo(tmp_path / "a.png", (1, 2, 3))
    assert cli.main(["predict", str(file), str(tmp_path / "a.png"), "--out", str(tmp_path / "out.csv")]) == 2
    told = capsys.readouterr().err
    assert "no student.onnx as `mekd distill` writes it" in told and part in told, told


def test_a_card_that_does_not_start_is_left_out_by_an_option_that_is_there(
    brightest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = mekd.predict.open_session

    def without_driver(path: Path, provider: str) -> Any:
        if provider != "cpu":
            raise ProviderError(
                "CUDAExecutionProvider was asked for. Use --oracle.provider cpu to run on the processor"
            )
        return real(path, provider)

    monkeypatch.setattr(mekd.predict, "open_session", without_driver)
    photo(tmp_path / "a.png", (1, 2, 3))
    words = ["predict", str(brightest), str(tmp_path / "a.png"), "--out", str(tmp_path / "out.csv")]
    assert cli.main(words) == 2
    assert "Use --provider cpu to run" in capsys.readouterr().err
    assert cli.main([*words, "--provider", "cpu"]) == 0 and len(table(tmp_path / "out.csv")) == 1


def test_the_student_of_a_run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the folder's file alone; without --out the table is predictions.csv."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(finished / "student.onnx", tmp_path)
    photo(tmp_path / "photos" / "a.png", (200, 10, 10), 64)
    assert cli.main(["predict", "student.onnx", "photos"]) == 0
    (row,) = table(tmp_path / "predictions.csv")
    assert row["class"] in "0123456789" and 0 < float(row["third_probability"]) <= float(row["probability"]) <= 1
