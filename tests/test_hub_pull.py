"""mekd pull against a stand-in: what comes down works, and what is damaged, foreign or in the way leaves nothing."""

import errno
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install 'mekd[hub]'")

import mekd
from conftest import tiny_settings
from hub_server import Hub
from mekd import cli, files
from mekd.hub import client
from mekd.hub import unpack as unpacking
from mekd.hub.pack import ALLOWED, pack
from mekd.hub.unpack import unpack, wanted


def test_what_was_pushed_is_pulled_and_works(
    pushed_run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["push", str(pushed_run), "alice/digits", "--yes", "--public", "--generator", "--store"]) == 0
    out, learned = tmp_path / "pulled", tmp_path / "learned"
    assert not hub.private["alice/digits"]
    assert cli.main(["pull", "alice/digits", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"mekd predict {out}/student.onnx" in said and f"--distill.store {out}" in said
    assert {p.name for p in tmp_path.iterdir()} == {"pulled", "no-token"} - {"no-token"} or not list(
        tmp_path.glob(".*")
    )
    pixels = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(mekd.load_student(out)(pixels), mekd.load_student(pushed_run)(pixels))
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "photo.png")
    table = tmp_path / "out.csv"
    assert cli.main(["predict", str(out / "student.onnx"), str(tmp_path / "photo.png"), "--out", str(table)]) == 0
    assert len(table.read_text().splitlines()) == 2
    # The store: another student, of the same answers as in the folder that paid for them.
    settings = {
        "distill.steps": 4,
        "distill.batch": 8,
        "distill.eval_every": 2,
        "distill.precision": "float32",
        "engine.device": "cpu",
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    for source, into in ((out, learned), (pushed_run, tmp_path / "there")):
        assert cli.main(["run", *words, "--distill.store", str(source), "--out", str(into)]) == 0
    mine, theirs = (files.load(folder / "student.pt") for folder in (learned, tmp_path / "there"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert json.loads((learned / "summary.json").read_text())["queries"] == 0


def test_a_pulled_generator_asks_a_teacher_of_ones_own(
    pushed_run: Path, hub: Hub, tmp_path: Path, teacher_onnx: Path
) -> None:
    assert cli.main(["push", str(pushed_run), "alice/digits", "--yes", "--generator"]) == 0
    out = tmp_path / "pulled"
    assert cli.main(["pull", "alice/digits", "--out", str(out)]) == 0
    words = tiny_settings(teacher_onnx)
    words += ["--distill.student", "resnet8", "--distill.replay", "40", "--deprivatize.generator", str(out)]
    assert cli.main(["run", *words, "--out", str(tmp_path / "run")]) == 0
    saved = files.load(out / "checkpoints" / "deprivatize.pt")
    assert "discriminator" not in saved["state"] and "seed" not in saved["depends"]
    assert (saved["depends"]["data.name"], saved["depends"]["data.resize"]) == ("digits", None)


@pytest.mark.parametrize("name", ["../student.onnx", "/etc/student.onnx", "a/../../b", "a\\..\\b"])
def test_a_name_that_leaves_the_folder_is_refused(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    hub.repos["mallory/x"] = {name: b"x", "student.onnx": b"x"}
    assert cli.main(["pull", "mallory/x", "--out", str(tmp_path / "in" / "pulled")]) == 2
    assert "leaves the folder" in capsys.readouterr().err
    assert not (tmp_path / "in").exists() and not any("resolve" in path for _, path, _, _ in hub.requests)


def test_what_is_not_ours_is_left_where_it_is(
    pushed_run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["push", str(pushed_run), "alice/x", "--yes"]) == 0
    hub.repos["alice/x"] |= {"pytorch_model.bin": b"x", "own_net.py": b"raise SystemExit", ".gitattributes": b""}
    assert cli.main(["pull", "alice/x", "--out", str(tmp_path / "pulled")]) == 0
    assert "left out, as mekd pushes none such: 'pytorch_model.bin', 'own_net.py'\n" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "pulled").iterdir()} <= {name.partition("/")[0] for name in ALLOWED}


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("alice/absent", None, ["alice/absent is not there", "log in"]),
        ("alice/other", {"pytorch_model.bin": b"x"}, ["holds no student"]),
        ("alice/cut", {"student.safetensors": b"\x10\0\0\0\0\0\0\0{"}, ["student.safetensors", "damaged"]),
        ("alice/cut", {"generator.safetensors": b"no"}, ["generator.safetensors is damaged"]),
        ("alice/cut", {"replay.safetensors": b"no"}, ["replay.safetensors is damaged"]),
        ("alice/cut", {"generator.safetensors": "EMPTY"}, ["generator.safetensors does not say how it was trained"]),
        ("alice/cut", {"holdout.safetensors": "EMPTY"}, ["holdout.safetensors is damaged"]),
    ],
)  # fmt: skip
def test_what_cannot_be_pulled_says_why_and_leaves_nothing(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: dict[str, bytes] | None,
    parts: list[str],
) -> None:  # fmt: skip
    from safetensors.torch import save

    if content is not None:
        hub.repos[name] = {
            file: save({"x": torch.zeros(2)}) if data == "EMPTY" else data for file, data in content.items()
        }
    (tmp_path / "in").mkdir()
    assert cli.main(["pull", name, "--out", str(tmp_path / "in" / "pulled")]) == 2
    said = capsys.readouterr().err
    assert [part for part in parts if part not in said] == [], said
    assert not list((tmp_path / "in").iterdir())


def test_a_folder_that_is_there_is_not_written_into(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("x")
    assert cli.main(["pull", "alice/x", "--out", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err and not hub.requests


def test_a_store_without_its_generator_says_what_is_missing(pushed_run: Path, tmp_path: Path) -> None:
    items = pack(pushed_run, tmp_path, generator=True, store=True)
    names, _ = wanted("a/b", [item.name for item in items if "generator" not in item.name])
    lines = unpack(tmp_path, names, tmp_path / "out")
    assert "its answers cannot be learnt from: generator.safetensors is missing" in lines


def _full(out: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _filled(out: Path) -> None:
    out.mkdir()
    (out / "student.onnx").write_bytes(b"another pull's")


@pytest.mark.parametrize(("meanwhile", "says"), [(_full, "No space left on device"), (_filled, "not empty")])
def test_a_full_disk_and_another_pull_into_the_same_folder_are_no_traceback(
    pushed_run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    meanwhile: Callable[[Path], None], says: str,
) -> None:  # fmt: skip
    assert cli.main(["push", str(pushed_run), "alice/x", "--yes"]) == 0
    out = tmp_path / "in" / "pulled"

    def unpacked(*given: object) -> list[str]:
        lines = unpack(*given)  # type: ignore[arg-type]
        meanwhile(out)
        return lines

    monkeypatch.setattr(unpacking, "unpack", unpacked)
    assert cli.main(["pull", "alice/x", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"--out is {str(out)!r}" in said and says in said and "choose another folder" in said
    assert {p.name: p.read_bytes() for p in out.parent.rglob("*") if p.is_file()} == (
        {"student.onnx": b"another pull's"} if meanwhile is _filled else {}
    )


@pytest.mark.parametrize(
    ("status", "said"), [(None, "cannot be reached"), (400, "did not give alice/x: it answered 400")]
)
def test_a_file_that_does_not_come_is_not_called_lost(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    status: int | None, said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its five tries
    hub.repos["alice/x"] = {"student.onnx": b"x"}
    if status is not None:
        hub.fails["/resolve/"] = status
    else:  # the hub goes away once it has said what there is
        gone = client.HfApi(endpoint="http://127.0.0.1:9")
        monkeypatch.setattr(client.HfApi, "hf_hub_download", partial(client.HfApi.hf_hub_download, gone))
    assert cli.main(["pull", "alice/x", "--out", str(tmp_path / "pulled")]) != 0
    told = capsys.readouterr().err
    assert said in told and "lost a file" not in told
    assert not list(tmp_path.iterdir())


def test_a_password_in_the_hubs_address_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.constants, "ENDPOINT", "https://me:secret@hub.example.com/mirror")
    assert client.address() == "https://hub.example.com/mirror"
