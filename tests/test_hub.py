"""mekd push and mekd pull against a stand-in: what goes up, what never does, and that what comes down works."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install 'mekd[hub]'")

from huggingface_hub import constants

import mekd
from conftest import tiny_settings
from hub_server import Hub, standing_in
from mekd import cli, files
from mekd.engine import quote
from mekd.hub.pack import ALLOWED, pack
from mekd.hub.unpack import unpack, wanted

SECRET, TOKEN = "k3y-nobody-may-see", "hf_write"
STUDENT = {"README.md", "config.json", "student.onnx", "student.safetensors"}
PICTURES = {"curves.png", "confusion.png", "samples/classes.png", "samples/families.png"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with standing_in() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture(scope="session")
def pushed_run(teacher_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a store, whose student is one of mekd's."""
    out = tmp_path_factory.mktemp("private-place") / "run"
    words = [*tiny_settings(teacher_onnx), "--distill.student", "resnet8", "--distill.replay", "40"]
    assert cli.main(["run", *words, "--out", str(out)]) == 0
    return out


def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copied"))


def fill_with_what_is_private(run: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every kind of file that must stay, each with a mark of its own; the marks, secrets and folders."""
    marks = []

    def put(name: str, before: bytes = b"") -> None:
        mark = f"PRIVATE-{len(marks):03d}-{name}".encode()
        marks.append(mark)
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(before + mark)

    for name in (
        "samples/sent.png", "samples/nearest.png", "samples/mine.png", "photo.jpg", "photos/cache.npy",
        "photos/index.json",
        "ledger/replay.sqlite", "ledger/replay.sqlite-wal", "log.txt", "report.md", "report.html", "summary.json",
        "summary.csv",
        "metrics.jsonl", "confirmed.json", "teacher.json", "teacher.onnx", "oracle.json", "sent.json", "audit.json",
        "coverage.json", "profile/distill.json", "student.pt", "student-resnet8.onnx", "own_net.py", ".env",
        ".git/config",
        "checkpoints/teacher.pt", "checkpoints/pretrain.pt", "checkpoints/distill.pt", "pictures/0.npy",
        "tensorrt/a.engine",
        "replay@1/images.npy", "holdout@1/images.npy", "ledger/holdout@1.sqlite", "private/images.npy",
        "tracks/wandb/x",
    ):  # fmt: skip
        put(name)
    # What is pushed can hold more than its pixels and weights.
    for name in PICTURES:
        if (run / name).exists():
            (run / name).write_bytes((run / name).read_bytes() + b"PRIVATE-behind-its-end")
    marks.append(b"PRIVATE-behind-its-end")
    model = onnx.load(run / "student.onnx")
    model.doc_string, model.graph.node[0].doc_string = "PRIVATE-doc", "PRIVATE-node"
    entry = model.metadata_props.add()
    entry.key, entry.value = "path", "PRIVATE-prop"
    onnx.save(model, run / "student.onnx")
    marks += [b"PRIVATE-doc", b"PRIVATE-node", b"PRIVATE-prop"]
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(run / "student.safetensors", "pt") as file:
        about = file.metadata()
    save_file(load_file(run / "student.safetensors"), run / "student.safetensors", about | {"note": "PRIVATE-metadata"})
    marks.append(b"PRIVATE-metadata")
    # Secrets as a run's settings name them, and one that was written out against all advice.
    monkeypatch.setenv("SERVICE_KEY", SECRET)
    (run / "secret.txt").write_text("from-a-file-0123")
    config = (run / "config.yaml").read_text()
    headers = f"""headers:
    Authorization: 'Bearer {{env:SERVICE_KEY}}'
    X-Key: '{{file:{run}/secret.txt}}'
    X-Own: literal-key-55"""
    assert "headers: {}" in config
    (run / "config.yaml").write_text(config.replace("headers: {}", headers))
    marks += [SECRET.encode(), b"SERVICE_KEY", b"from-a-file-0123", b"literal-key-55", TOKEN.encode()]
    folders = (str(run), str(run.parent), f"{Path.home()}/", "site-packages")
    return [*marks, b"PRIVATE", *(word.encode() for word in folders)]


def discriminators(run: Path) -> list[bytes]:
    """The weights of D, which stays at home, as their bytes."""
    saved = files.load(run / "checkpoints" / "deprivatize.pt")["state"]["discriminator"]
    weights = [x for name, x in saved.items() if name.endswith("weight") and x.dim() > 1]
    assert weights
    # As they lie in a checkpoint, and as safetensors has them.
    return [bytes(x.untyped_storage()) for x in weights] + [x.contiguous().numpy().tobytes() for x in weights]


@pytest.mark.parametrize("more", [[], ["--generator"], ["--generator", "--store"]])
def test_nothing_private_is_ever_among_what_is_sent(
    pushed_run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    more: list[str],
) -> None:  # fmt: skip
    run = copied(pushed_run, tmp_path)
    private = fill_with_what_is_private(run, monkeypatch)
    assert cli.main(["push", str(run), "alice/digits", "--yes", *more]) == 0
    sent = hub.received()
    assert [mark for mark in private if mark in sent] == []
    stored = set(hub.repos["alice/digits"])
    pictures = {name for name in PICTURES if (run / name).exists()}
    wanted = STUDENT | pictures | ({"generator.safetensors"} if more else set())
    wanted |= {"holdout.safetensors", "replay.safetensors"} if "--store" in more else set()
    assert stored == wanted <= set(ALLOWED)
    assert not any(weights in sent for weights in discriminators(run)) and hub.private["alice/digits"]
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err and TOKEN not in said.out + said.err
    for name, content in hub.repos["alice/digits"].items():
        assert f"{len(content):>13,} bytes  {name}: " in said.out
    total = sum(map(len, hub.repos["alice/digits"].values()))
    assert f"{len(stored)} files, {total:,} bytes, to {hub.url}/alice/digits, private" in said.out


def test_the_marks_are_there_to_be_found(pushed_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would see a file that is sent as it lies there."""
    run = copied(pushed_run, tmp_path)
    private = fill_with_what_is_private(run, monkeypatch)
    there = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert [mark for mark in private if mark not in there] == [SECRET.encode(), TOKEN.encode(), *private[-2:]]
    assert any(weights in there for weights in discriminators(run))


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


@pytest.mark.parametrize(
    ("words", "change", "parts"),
    [
        (["NOWHERE", "alice/x"], "", ["RUN is", "no such folder"]),
        (["EMPTY", "alice/x"], "", ["student.safetensors is missing", "mekd distill"]),
        (["RUN", "digits"], "", ["NAME is 'digits'", "OWNER/NAME"]),
        (["RUN", "al ice/x"], "", ["NAME is 'al ice/x'"]),
        (["RUN", "alice/taken"], "", ["409", "--update"]),
        (["RUN", "alice/x"], "nobody", ["nobody is logged in", "HF_TOKEN"]),
        (["RUN", "alice/x"], "read-only", ["may not write", "403"]),
        (["RUN", "alice/x"], "unknown", ["does not know your token", "401"]),
        (["RUN", "alice/x"], "unreachable", ["cannot be reached", "HF_ENDPOINT"]),
        (["RUN", "alice/x"], "fails", ["answered 500", "alice/x was made and is empty: go on with --update"]),
        (["RUN", "alice/x", "--store"], "", ["--store", "add --generator"]),
        (["RUN", "alice/absent", "--update"], "", ["alice/absent is not there"]),
        (["RUN", "alice/open", "--update"], "", ["for everybody to see", "--public"]),
        (["RUN", "alice/x", "--privat"], "", ["--privat", "mekd push --help"]),
    ],
)  # fmt: skip
def test_what_cannot_be_pushed_says_why(
    pushed_run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], change: str, parts: list[str],
) -> None:  # fmt: skip
    hub.repos |= {"alice/taken": {}, "alice/open": {}}
    hub.private |= {"alice/taken": True, "alice/open": False}
    (tmp_path / "empty").mkdir()
    if change == "nobody":
        monkeypatch.delenv("HF_TOKEN")
    elif change in ("read-only", "unknown"):
        monkeypatch.setenv("HF_TOKEN", {"read-only": "hf_read", "unknown": "hf_other"}[change])
    elif change == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    elif change == "fails":
        hub.fails["/commit/"] = 500
    folders = {"NOWHERE": tmp_path / "nowhere", "EMPTY": tmp_path / "empty", "RUN": pushed_run}
    assert cli.main(["push", *(str(folders.get(word, word)) for word in words), "--yes"]) == 2
    said = capsys.readouterr()
    assert [part for part in parts if part not in said.err] == [], said.err
    assert "Traceback" not in said.err and "hf_" not in said.out + said.err
    assert not any(hub.repos.values())


def test_it_goes_on_after_a_commit_that_failed(pushed_run: Path, hub: Hub) -> None:
    hub.fails["/commit/"] = 500
    assert cli.main(["push", str(pushed_run), "alice/x", "--yes"]) == 2
    hub.fails.clear()
    assert cli.main(["push", str(pushed_run), "alice/x", "--yes", "--update"]) == 0
    assert set(hub.repos["alice/x"]) >= STUDENT


def test_nothing_is_sent_before_somebody_agrees(
    pushed_run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["push", str(pushed_run), "alice/x"]) == 2
    assert "--yes" in capsys.readouterr().err and not hub.requests
    asked: list[str] = []
    monkeypatch.setattr(quote, "_somebody", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "n")
    assert cli.main(["push", str(pushed_run), "alice/x"]) == 2
    assert len(asked) == 1 and not hub.requests
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert cli.main(["push", str(pushed_run), "alice/x"]) == 0


@pytest.mark.parametrize("what", ["run", "home", "secret", "literal"])
def test_a_card_that_tells_of_this_machine_is_not_sent(
    pushed_run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:  # fmt: skip
    run = copied(pushed_run, tmp_path)
    fill_with_what_is_private(run, monkeypatch)
    told = {"run": str(run), "home": f"{Path.home()}/photos", "secret": SECRET, "literal": "literal-key-55"}[what]
    with open(run / "README.md", "a") as file:
        file.write(f"\nFrom {told}.\n")
    assert cli.main(["push", str(run), "alice/x", "--yes"]) == 2
    said = capsys.readouterr().err
    assert "README.md holds" in said and "nothing was sent" in said and SECRET not in said and "literal-key" not in said
    assert not hub.requests


def test_a_student_does_not_go_up_with_the_card_of_an_earlier_one(
    pushed_run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(pushed_run, tmp_path)
    card = (run / "README.md").read_text()
    words = ["--config", str(run / "config.yaml"), "--out", str(run)]
    assert cli.main(["distill", *words, "--distill.student", "resnet20"]) == 0
    assert cli.main(["push", str(run), "alice/x", "--yes"]) == 2
    said = capsys.readouterr().err
    assert "README.md is missing: `mekd report` writes it" in said and not hub.requests
    assert (run / "README-resnet8.md").read_text() == card
    assert cli.main(["report", "--out", str(run)]) == 0 and "# resnet20" in (run / "README.md").read_text()


@pytest.mark.parametrize("name", ["student.onnx", "samples/classes.png", "samples", "README.md"])
def test_a_link_is_not_followed(
    pushed_run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = copied(pushed_run, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    (run / name).rename(elsewhere)
    (run / name).symlink_to(elsewhere)
    assert cli.main(["push", str(run), "alice/x", "--yes"]) == 2
    assert "is a link" in capsys.readouterr().err and not hub.requests


def test_code_of_the_users_own_stays(
    finished: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["push", str(finished), "alice/own", "--yes"]) == 0
    assert "without own_net.py, whose code makes it" in capsys.readouterr().out
    assert "own_net.py" not in hub.repos["alice/own"] and b"nn.Conv2d(channels" not in hub.received()
    assert b"own_net.py, which makes the network and is not in this repository" in hub.repos["alice/own"]["README.md"]
    assert cli.main(["pull", "alice/own", "--out", str(tmp_path / "own")]) == 0
    assert "code of whoever made it" in capsys.readouterr().out


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
    assert {p.name for p in (tmp_path / "pulled").iterdir()} <= {*STUDENT, "samples", *PICTURES}


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


@pytest.mark.slow
def test_the_command_itself_finds_the_hub_by_its_environment(pushed_run: Path, hub: Hub, tmp_path: Path) -> None:
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path),
    }
    for words in (
        ["push", str(pushed_run), "alice/x", "--yes"],
        ["pull", "alice/x", "--out", str(tmp_path / "pulled")],
    ):
        done = subprocess.run([sys.executable, "-m", "mekd", *words], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
    assert mekd.load_student(tmp_path / "pulled").classes == tuple("0123456789")
