"""The model card of a run: what it says is so, and its examples run as they stand."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from conftest import tiny_settings
from mekd import audit, cli, report
from mekd import card as card_module
from mekd.card import card
from mekd.data.upright import decode
from mekd.engine.run import Run
from mekd.oracle.replay import Replay
from mekd.oracle.response import Response
from mekd.page import facts
from mekd.report import summarize
from mekd.student import Preprocess


def examples(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def saved_run(folder: Path, *more: str) -> Run:
    parsed = cli.parse(["--config", str(folder / "config.yaml"), "--out", str(folder), *more])
    assert parsed is not None
    return Run(*parsed)


def test_the_examples_run_as_they_stand(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the folder alone, wherever it lies; first as written, then with a photo that classes differ on."""
    folder = tmp_path / "handed-on"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)
    blocks = examples((folder / "README.md").read_text())
    assert len(blocks) == 2 and "onnxruntime" in blocks[0] and "mekd.load_student" in blocks[1]
    assert all(len(block.strip().splitlines()) <= 15 for block in blocks)
    session, classes = onnxruntime.InferenceSession("student.onnx"), list("0123456789")
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(noise[..., [0, 1, 2, 0]]).save("photo.png")  # what is transparent lies on white
    for photo in ('Image.new("RGB", (640, 480))', 'Image.open("photo.png")'):
        for block in blocks:
            code = block.replace('Image.new("RGB", (640, 480))', photo)
            assert photo in code
            exec(compile(code, "README.md", "exec"), {})
        names = capsys.readouterr().out.split()
        grey = np.zeros((1, 1, 16, 16), np.uint8)
        if "open" in photo:
            rgb = Image.fromarray(decode("photo.png", 16).transpose(1, 2, 0))
            grey = np.asarray(rgb.convert("L"))[None, None]
        expected = classes[session.run(None, {"images": grey})[0][0].argmax()]
        assert names == [expected, expected]


@pytest.mark.parametrize("how", [Preprocess(16, 20, 3), Preprocess(32, 37, 1), Preprocess(16, 16, 3)])
def test_the_examples_prepare_photos_as_decode_does(how: Preprocess, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).resize((90, 120)).save(tmp_path / "photo.png", exif=exif)  # smooth, as photos are
    lines = ["from PIL import Image, ImageOps", *card_module._photo(how)]
    found: dict[str, Any] = {}
    code = "\n".join(lines).replace('Image.new("RGB", (640, 480))', f"Image.open({str(tmp_path / 'photo.png')!r})")
    exec(code, found)
    pixels = np.asarray(found["photo"].convert("RGB")).astype(int)
    wanted = Image.fromarray(decode(tmp_path / "photo.png", how.size, how.resize).transpose(1, 2, 0))
    wanted = np.asarray(wanted.convert(found["photo"].mode).convert("RGB"))
    assert pixels.shape == (how.size, how.size, 3)
    assert np.abs(pixels - wanted).max() <= 2  # rounding


def test_the_card_says_what_was_measured(finished: Path) -> None:
    text = (finished / "README.md").read_text()
    run = saved_run(finished)
    summary = summarize(run)
    _, answer, _ = Replay(finished / "holdout", 20).read(slice(None))
    majority = float(torch.bincount(answer.labels).max()) / 20
    for part in (
        "# small, distilled from teacher.onnx",
        "| its answers | the 3 best classes and their probabilities, rounded to 3 decimals |",
        f"| queries | {summary['queries']:,} images, in {summary['calls']:,} calls |",
        f"| cost | {summary['cost']:,}, at 0.01 a query |",
        f"{100 * summary['holdout_agreement']:.2f} % of 20 generated images",
        f"agrees on {100 * majority:.2f} %",
        "| test accuracy | not measured",
        f"No private photo was sent; generated images were: {summary['queries']:,}.",
        "no promise that no generated image resembles",
        "runs the code of own_net.py",
    ):
        assert part in text, part
    assert summary["cost"] == round(0.01 * summary["queries"], 6) > 0
    assert "uncertain" not in text and "not known whether" not in text
    for name in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (finished / name).is_file()
    # What is handed on names no folder of this machine.
    assert str(finished.parent) not in text


def test_the_card_says_what_else_there_is(finished: Path, tmp_path: Path) -> None:
    """Coverage where it was written; what is uncertain; test accuracy, and that real images were sent for it."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    run = saved_run(folder)
    run.write_json("coverage.json", {"classes_met": 7, "classes": 10, "majority_share": 0.625})
    summary = summarize(run) | {
        "uncertain": 3, "student_accuracy": 0.9125, "teacher_accuracy": 0.99, "agreement": 0.925,
        "simulation_queries": 360,
    }  # fmt: skip
    text = card(run, summary, [("Curves.", "curves.png"), ("Nothing.", "samples/none.png")])
    assert "| classes met | 7 of 10 by the first answers, of which the most frequent took 62.50 % |" in text
    assert "3 more of which it is not known" in text
    assert "| test accuracy | 91.25 % (the teacher: 99.00 %) |" in text and "not measured" not in text
    assert "| agreement on test images | 92.50 % |" in text
    assert "sent 360 real images" in text and "No private photo was sent" not in text
    assert "samples/none.png" not in text
    # Answers of another run: what was asked for them is not said to be nothing.
    other = saved_run(folder, "--distill.store", str(finished))
    shutil.rmtree(folder / "holdout")
    text = card(other, summary | {"simulation_queries": 0}, [])
    assert "| queries | 40 answers of another run, run; by this one " in text
    assert "stands in the card of that run" in text
    (folder / "coverage.json").unlink()
    assert "classes met" not in card(other, summary, [])


def test_answers_that_name_no_class_are_none_of_class_0(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a service with a threshold answers: 8 of the 20 that are held out name class 3, and then not even these."""
    run = saved_run(shutil.copytree(finished, tmp_path / "run"))
    images, _ = report.held_out(run)
    for named in (8, 0):
        values, indices = torch.zeros(20, 3), torch.full((20, 3), -1)
        values[:named, 0], indices[:named, 0] = 0.9, 3
        answer = Response("topk", values, indices)
        monkeypatch.setattr(Replay, "read", lambda *_, answer=answer: (images, answer, None))
        found = audit._codes(run)["codes"]
        assert found["chance"] == summarize(run)["majority_share"] == named / 20
        assert found["nats_most"] == 0 <= found["nats"]
    monkeypatch.setattr(facts, "mapped", lambda *_: (images.numpy(), answer))
    report.report(run)
    assert "always names the most frequent class agrees on 0.00 %" in (run.out / "README.md").read_text()


def test_what_the_user_wrote_into_the_card_stays(finished: Path, tmp_path: Path) -> None:
    """Licence and metadata in the card that is written anew; as it was, once there was more that the user wrote."""
    run = saved_run(shutil.copytree(finished, tmp_path / "run"))
    path, summary = run.out / "README.md", summarize(run)
    written = path.read_text()
    pictures = [("Curves.", "curves.png")]
    assert "## Pictures" in written
    licence = "## License\n\nMIT, by me.\n\n### Terms\n\nof the service"
    begin, end = written.index("## Licence"), written.index("## Pictures")
    mine = "---\nlicense: mit\n---\n" + written[:begin] + licence + "\n\n" + written[end:]
    path.write_text(mine)
    card_module.write(run, card(run, summary | {"calls": 12345}, pictures))
    text = path.read_text()
    assert text.startswith("---\nlicense: mit\n---\n# small") and "in 12,345 calls" in text
    assert text.count("licen") == 1 and f"\n{licence}\n\n## Pictures\n" in text and "Not chosen yet" not in text
    assert (run.out / "README-before.md").read_text() == mine  # of an earlier version it could hold more
    for more in ("\nBeware.\n", "\nBe aware.\n"):
        path.write_text(text + more)
        card_module.write(run, card(run, summary, []))
        assert path.read_text().endswith(f"{licence}\n")
    assert (run.out / "README-before-2.md").read_text().endswith("Beware.\n")
    assert (run.out / "README-before-3.md").read_text().endswith("Be aware.\n")
    card_module.write(run, card(run, summary, pictures))  # nobody wrote into that one
    assert f"\n{licence}\n\n## Pictures\n" in path.read_text() and not (run.out / "README-before-4.md").exists()


def test_the_names_of_classes_may_hold_anything(finished: Path, tmp_path: Path) -> None:
    """As two dollars, between which matplotlib would look for a formula."""
    folder, names = shutil.copytree(finished, tmp_path / "run"), tmp_path / "names.txt"
    names.write_text("\n".join(["$5 & under $9", "$^$", "a_b", "x|y", "\\frac", "100 %", "{", "<b>", "#", "é"]))
    assert cli.main(["report", "--out", str(folder), "--oracle.classes", str(names)]) == 0
    assert "($5 & under $9, $^$, a_b, x|y, " in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--teacher.onnx", "mine.onnx"], "mine.onnx, an ONNX file"),
        (["--teacher.url", "https://example.com/v2/models/a"], "example.com/v2/models/a, asked over HTTP, by the Open"),
        (["--teacher.url", "https://x.org/a", "--teacher.protocol", "hf"], "x.org/a, asked over HTTP, by Hugging"),
        (["--teacher.python", "sdk.py:ask"], "sdk.py:ask, asked through a Python function"),
        (["--teacher.arch", "resnet20"], "resnet20, trained on digits for this run"),
        (["--teacher.arch", "clients/acme/nets.py:make"], "nets.py:make, trained on digits for this run"),
    ],
)
def test_the_teacher_and_how_it_was_reached(words: list[str], said: str, tmp_path: Path) -> None:
    settings = [*tiny_settings(Path("none.onnx")), "--oracle.budget", "1000", "--oracle.num_classes", "10"]
    at = settings.index("--teacher.onnx")
    parsed = cli.parse([*settings[:at], *settings[at + 2 :], *words, "--out", str(tmp_path)])
    assert parsed is not None
    run = Run(*parsed)
    assert f"{run.teacher_name}, {card_module._reached(run)}".startswith(said)
