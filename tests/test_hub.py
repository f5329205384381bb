"""mekd push against a stand-in: what goes up, what never does, and why it is refused; pull: test_hub_pull.py."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install 'mekd[hub]'")

from huggingface_hub import constants

import mekd
from hub_server import TOKEN, Hub
from mekd import cli, files
from mekd.engine import folder, quote
from mekd.hub import pack
from mekd.hub.pack import ALLOWED

SECRET = "k3y-nobody-may-see"
STUDENT = {"README.md", "config.json", "student.onnx", "student.safetensors"}
PICTURES = {"curves.png", "confusion.png", "samples/classes.png", "samples/families.png"}


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
        (["RUN", "alice/taken", "--update", "--public"], "", ["alice/taken is private", "leave --public out"]),
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


def test_a_run_at_work_is_not_pushed(
    pushed_run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its student.safetensors may be of one student, and its student.onnx of another."""
    monkeypatch.setattr(folder, "PATIENCE", 0.2)
    run = copied(pushed_run, tmp_path)
    with folder.alone(run):
        assert cli.main(["push", str(run), "alice/x", "--yes"]) == 2
        assert f"RUN is {str(run)!r}, where a run is at work" in capsys.readouterr().err and not hub.requests
        assert (run / "run.lock").exists()

    def agree(*_: object) -> None:
        with folder.alone(run):  # no run waits until somebody has answered
            pass

    monkeypatch.setattr(quote, "agree", agree)
    assert cli.main(["push", str(run), "alice/x"]) == 0


def test_a_disk_that_is_full_is_no_traceback(
    pushed_run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pack, "_made", full)
    assert cli.main(["push", str(pushed_run), "alice/x", "--yes"]) == 2
    assert "No space left on device" in (said := capsys.readouterr().err) and "free some space" in said
    assert not hub.requests


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
