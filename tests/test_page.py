"""report.html: one file that says what the run is, loads nothing, and holds neither private images nor foreign code."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mekd import cli, page, plots
from mekd.audited import audited
from mekd.data.arrays import load
from mekd.engine.result import class_names
from mekd.engine.runlog import read_metrics
from mekd.page.chart import Line, chart
from mekd.page.facts import Class, Facts
from mekd.page.sections import public
from mekd.plots import PUBLIC, confused
from pages import of, parsed, pictures, saved_run, section, words

EVIL = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b", "'\\u2028\u202e", *"456789"]

#: Pictures that show private images.
PRIVATE = ("samples/sent.png", "samples/nearest.png")
assert not {*PRIVATE} & {*PUBLIC}


def facts_of(folder: Path, *more: str, names: list[str] | None = None) -> Facts:
    run = saved_run(folder, *more)
    summary = json.loads((folder / "summary.json").read_text())
    return page.gather(run, names or class_names(run), summary, confused(saved_run(folder)))


def test_a_page_says_what_the_run_found(finished: Path) -> None:
    tree, summary = parsed(of(finished)), json.loads((finished / "summary.json").read_text())
    tiles = words(section(tree, "tiles"))  # type: ignore[arg-type]
    assert f"{summary['queries']:,}" in tiles and f"cost {summary['cost']:,}" in tiles
    assert f"{100 * summary['holdout_agreement']:.2f} %" in tiles and "test accuracy" not in tiles
    paid = words(section(tree, "paid"))  # type: ignore[arg-type]
    assert "held out, to choose the student by 20" in paid and "learn from in every epoch 40" in paid
    assert f"in all, for the student {summary['queries']:,}" in paid
    for name, part in {
        "coverage": "of 10 classes", "audit": "Function.", "settings": "distill.replay 40", "confusion": "diagonal",
        "sent": "No private photo was sent", "classes": "held out", "on": "mekd predict RUN/student.onnx",
    }.items():  # fmt: skip
        found = section(tree, name)
        assert found is not None and part in words(found), name
    assert section(tree, "stages") is None and "not finished" not in words(tree)
    counts = confused(saved_run(finished)).counts
    cells = [e.text for e in section(tree, "confusion").iter("td") if e.text]  # type: ignore[union-attr]
    assert sum(int(cell) for cell in cells) == counts.sum() == 20


def test_a_page_is_one_file_that_loads_nothing(finished: Path) -> None:
    tree = parsed(of(finished))
    assert len(of(finished).encode()) <= page.LIMIT
    addresses = [e.get(name, "") for e in tree.iter() for name in ("src", "href", "action", "srcset", "data")]
    assert [address for address in addresses if address and not address.startswith("data:")] == []
    assert "http://" not in of(finished) and "https://" not in of(finished)
    (policy,) = (e.get("content", "") for e in tree.iter("meta") if e.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "connect-src" not in policy
    assert not [e.tag for e in tree.iter() if e.get("style") or any(name.startswith("on") for name in e.attrib)]


def test_nothing_of_this_machine_is_in_it(finished: Path) -> None:
    assert str(finished.parent) not in of(finished)
    assert "…/teacher.onnx" in of(finished) and "…/own_net.py:small" in of(finished)


def test_the_same_run_has_the_same_page(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    before = of(folder)
    (folder / "report.html").unlink()
    assert cli.main(["report", "--out", str(folder)]) == 0
    assert of(folder) == before


def test_every_picture_was_drawn_by_the_generator(finished: Path, tmp_path: Path) -> None:
    """Tiles are held-out images, pixel for pixel; what shows private images is in none of them."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    for name in PRIVATE:
        (folder / "samples").mkdir(exist_ok=True)
        Image.new("RGB", (77, 33), "red").save(folder / name)
    shown = facts_of(folder)
    html = page.document(page.fitting(shown, audited(shown.audit)))
    found = pictures(parsed(html))
    tiles = [picture for picture in found if picture.shape == (16, 16)]
    held = {image.tobytes() for image in np.load(folder / "holdout" / "images.npy")}
    private = load("digits", None, 16)
    known = {image.numpy().tobytes() for image in torch.cat([private.train_images, private.test_images])}
    assert len(tiles) >= 10 and {tile.tobytes() for tile in tiles} <= held
    assert not {tile.tobytes() for tile in tiles} & known
    assert [picture.shape[1] for picture in found if picture.shape != (16, 16)] == [1152]  # families.png
    for name in PRIVATE:
        assert name in html  # said to be left out


def test_what_comes_from_outside_is_text(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    log = ["<svg onload=alert(1)>"]
    more = ["--teacher.onnx", "a/<b>evil.onnx", "--distill.student", "</title><script>x.py:make"]
    shown = dataclasses.replace(facts_of(folder, *more, names=EVIL), log=log)
    for one in (shown, dataclasses.replace(shown, summary=None)):
        tree = parsed(page.document(page.fitting(one, ["| a <i> | b | c |", "|---|---|---|", "- **<u>d</u>**"])))
        assert len(list(tree.iter("script"))) == 1 and len(list(tree.iter("title"))) == 1
        assert not [e for e in tree.iter() if e.tag in ("b", "u", "i") and "evil" in words(e)]
        assert not [e.attrib for e in tree.iter() if {"onerror", "onload"} & set(e.attrib)]
        assert not [e for e in tree.iter("img") if e.get("src") == "x"]
        said = words(tree)
        assert "<b>evil.onnx" in said and "title><script>x.py:make" in said
        assert all(name in said for name in EVIL[:3])


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("data.path", "/home/me/photos", "…/photos"),
        ("data.path", "photos", "photos"),
        ("distill.student", "timm:mobilenetv3_small_050", "timm:mobilenetv3_small_050"),
        ("distill.student", "/home/me/nets.py:small", "…/nets.py:small"),
        ("teacher.arch", "/home/me/clients/acme/nets.py:make", "…/nets.py:make"),
        ("teacher.arch", "torchvision:resnet18", "torchvision:resnet18"),
        ("teacher.checkpoint", "/home/me/clients/acme.pt", "…/acme.pt"),
        ("teacher.url", "https://x.org/a?key={file:/home/me/k}", "https://x.org/a?key={file:…/k}"),
        ("teacher.url", "https://x.org/a?key={env:KEY}&v=2", "https://x.org/a?key={env:KEY}&v=…"),
        ("teacher.url", "https://x.org/a?{env:KEY}", "https://x.org/a?{env:KEY}"),
        ("teacher.url", "https://x.org/a?sk-12345&v=2;x", "https://x.org/a?…&v=…;…"),
        ("teacher.url", "https://x.org/a?c2stMTIzNDU=", "https://x.org/a?…"),
        ("teacher.url", "https://x.org/a?c2stMTIzNA==&sk%3D1", "https://x.org/a?…&…"),
        ("teacher.url", "https://x.org/a?key={env:KEY}sk-12345", "https://x.org/a?key=…"),
        ("teacher.url", "https://x.org/a?{sk-12345&k={file:/me/a;b}&l=", "https://x.org/a?…&k={file:…/a;b}&…"),
        ("teacher.url", "https://me:sk@1@x.org/a#sk-12345", "https://…@x.org/a#…"),
        ("oracle.headers", {"A": "Bearer {env:KEY}", "b": "{file:/me/k}"}, "A: Bearer {env:KEY}; b: {file:…/k}"),
        ("oracle.headers", {"A": "Bearer sk-12345", "b": "x {env:KEY}"}, "A: …; b: …"),
        ("oracle.headers", {}, ""),
        ("oracle.price", None, "null"),
        ("data.flip", True, "true"),
    ],
)
def test_settings_as_others_may_see_them(key: str, value: Any, shown: str) -> None:
    assert public(key, value) == shown


def large(shown: Facts, side: int = 224, letters: int = 10_000) -> Facts:
    """The same facts with noise for images, which nothing makes smaller, long names, and a long log."""
    noise = torch.randint(0, 256, (10, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    classes = [Class("x" * letters, 10, noise.roll(i, -1)) for i in range(20)]
    metrics = [
        {"stage": stage, "step": i, "loss": 0.1 + i % 7, "image": 0.1, "kl": 0.2, "loss_d": 1.0, "loss_g": 1.0}
        for stage in ("teacher", "deprivatize", "distill", "baseline") for i in range(0, 500_000, 50)
    ]  # fmt: skip
    names = ["y" * letters] * 1000
    return dataclasses.replace(shown, classes=classes, metrics=metrics, names=names, shown=list(range(20)))


def test_a_page_stays_below_its_limit(finished: Path) -> None:
    """Pictures are made smaller until it does, and left out where nothing else helps; the words alone are few."""
    shown = large(facts_of(finished))
    confusion = dataclasses.replace(shown, confusion=shown.confusion._replace(counts=np.ones((1000, 1000), int)))  # type: ignore[union-attr]
    sizes = {}
    for limit in (page.LIMIT, 1_000_000, 700_000):
        found = page.fitting(confusion, [], limit)
        assert len(page.document(found).encode()) <= limit
        first = pictures(section(parsed(page.document(found)), "classes"))[0]  # type: ignore[arg-type]
        sizes[limit] = first.shape[0]
    assert sizes[page.LIMIT] > sizes[1_000_000] >= sizes[700_000] >= 16
    none = page.document(page.fitting(confusion, [], 1))
    assert "too large" in none and len(none.encode()) < 600_000 and "<img" not in none


def test_a_class_that_was_not_met_is_named(finished: Path) -> None:
    shown = facts_of(finished)
    classes = [Class("nobody", 0, torch.empty(0, 1, 16, 16, dtype=torch.uint8)), *shown.classes]
    tree = parsed(page.document(page.fitting(dataclasses.replace(shown, classes=classes), [])))
    assert "nobody 0 answers none: this class was not met" in words(section(tree, "classes"))  # type: ignore[arg-type]


def test_an_unfinished_run_has_a_page(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    for path in [*folder.glob("student.*"), *folder.glob("report.*"), folder / "summary.json", folder / "audit.json"]:
        path.unlink()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"stage": "distill", "st')
    assert cli.main(["report", "--out", str(folder)]) == 0
    assert "not finished" in capsys.readouterr().out
    tree = parsed(of(folder))
    stages = words(section(tree, "stages"))  # type: ignore[arg-type]
    assert "step 2, the student 9 of 9 steps" in stages and "answers to learn from 40 of 40 queries" in stages
    assert "not finished" in words(tree) and section(tree, "on") is None and section(tree, "audit") is None
    for path in [folder / "holdout", folder / "replay", folder / "ledger"]:
        shutil.rmtree(path)
    (folder / "coverage.json").unlink()
    assert cli.main(["report", "--out", str(folder)]) == 0
    assert section(parsed(of(folder)), "classes") is None
    (folder / "metrics.jsonl").unlink()
    assert cli.main(["report", "--out", str(folder)]) == 2
    assert "nothing to report yet" in capsys.readouterr().err


def test_a_private_epsilon_leaves_the_audit_out(finished: Path) -> None:
    shown = facts_of(finished)
    said = audited(shown.audit)
    plain = page.fitting(shown, said).sections["audit"]
    assert "Membership" in plain and "nearest.png shows private photos" in plain
    noised = dataclasses.replace(shown, noise={"epsilon": 8.0})
    assert "Membership" not in page.fitting(noised, []).sections["audit"]
    assert "epsilon does not count" in page.fitting(noised, []).sections["audit"]
    assert "Not measured" in page.fitting(dataclasses.replace(shown, audit=None), []).sections["audit"]


def test_without_pillow_it_says_so(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mekd.page.pictures.importlib.util.find_spec", lambda name: None)
    html = page.document(page.fitting(facts_of(finished), []))
    assert "mekd[plot]" in html and "<img" not in html


@pytest.mark.parametrize("response", ["label", "logits"])
def test_every_kind_of_run_has_a_page(response: str, tiny: list[str], tmp_path: Path) -> None:
    """With labels and a simulation, fresh queries, which curves are drawn against, and without an audit."""
    more = ["--evaluate.enabled", "true", "--evaluate.baseline_steps", "2", "--audit.enabled", "false"]
    assert cli.main(["run", *tiny, *more, "--oracle.response", response, "--out", str(tmp_path)]) == 0
    tree, summary = parsed(of(tmp_path)), json.loads((tmp_path / "summary.json").read_text())
    tiles = words(section(tree, "tiles"))  # type: ignore[arg-type]
    assert f"test accuracy {100 * summary['student_accuracy']:.2f} %" in tiles and "plain baseline" in tiles
    assert "Not measured" in words(section(tree, "audit"))  # type: ignore[arg-type]
    assert "private images, for the plain baseline 144" in words(section(tree, "paid"))  # type: ignore[arg-type]
    paid = [json.loads(e.get("data-lines", "")) for e in tree.iter("svg") if e.get("data-across") == "queries"]
    step1 = 72 if response == "logits" else 0
    assert [step1 + 20 + 8 * step for step in (3, 6, 9)] in [line["x"] for lines in paid for line in lines]


def test_a_chart_has_the_points_that_were_measured() -> None:
    line = Line("loss", [(100.0 * i, 2.0 / (i + 1)) for i in range(1000)])
    svg = chart("Loss", [line], "steps", log=True)
    data = json.loads(parsed(f"<!DOCTYPE html><title>x</title>{svg}").find(".//svg").get("data-lines"))  # type: ignore[union-attr, arg-type]
    assert len(data[0]["x"]) <= 300 and data[0]["x"][-1] == 99900.0 and data[0]["y"][-1] == 0.002
    for points in ([(0.0, 0.0)], [(5.0, 3.0), (5.0, 3.0)], [(0.0, -1e9), (1.0, 1e-12)], [(1.0, 1.0), (2.0, 1.0)]):
        for log in (False, True):
            assert "nan" not in chart("x", [Line("a", points), Line("b", [])], "steps", log=log).lower()


def test_metrics_that_are_cut_short_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"stage": "a", "step": 1}\n7\n{"step": 2}\n\xff\xfe\n{"stage": "a", "step": 3}\n{"stage": "a", "st'
    )
    assert [row["step"] for row in read_metrics(path)] == [1, 3]
    assert read_metrics(tmp_path / "none") == []


def test_the_curves_are_drawn_of_metrics_that_are_cut_short(tmp_path: Path) -> None:
    """As the page's are: the line that a full disk or a kill cut short was a traceback of `mekd report`."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed: pip install 'mekd[plot]'")
    plots.there()
    rows = [{"stage": "distill", "step": step, "image": 0.1, "kl": 0.2, "agreement": None} for step in (1, 2)]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"stage": "baseline", "st')
    figure = plots._curves(SimpleNamespace(out=tmp_path))  # type: ignore[arg-type]
    (line, _) = figure.axes[0].lines
    assert list(line.get_xdata()) == [1, 2]
    pyplot.close(figure)
