"""What docs/teachers.md tells to write and to type works as it is written there."""

import io
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mekd import cli, serve
from mekd.nets import build
from mekd.oracle.ledger import totals
from served import call, inside

PAGE = (Path(__file__).parent.parent / "docs" / "teachers.md").read_text("utf-8")
BLOCKS = re.findall(r"```(?:python|yaml)\n(.*?)```", PAGE, re.DOTALL)
TYPED = re.findall(r"^    ((?:mekd|curl) (?:.*\\\n)*.*)$", PAGE, re.MULTILINE)
COMMANDS = [shlex.split(command.replace("\\\n", " ")) for command in TYPED]
ADDRESS = "http://127.0.0.1:8000"
#: The runs of the page, made short: they ask a few hundred queries and take a few steps.
SHORT = [
    "--deprivatize.steps", "2", "--distill.steps", "2", "--distill.batch", "16", "--distill.holdout", "64",
    "--distill.eval_every", "2", "--distill.coverage", "0",
]  # fmt: skip
BUDGETS = {"3000": "700", "4000": "800"}
KEY = "one-long-secret"


def block(begins: str) -> str:
    """The only block of the page with these words in its beginning."""
    (found,) = [text for text in BLOCKS if begins in text[:200]]
    return found


def command(*words: str) -> list[str]:
    """The words behind mekd of the only command of the page that has all of these."""
    (found,) = [line for line in COMMANDS if all(word in line for word in words)]
    return found[1:]


@pytest.fixture
def address(teacher_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The server of the page; mine.yaml lies in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEACHER_KEY", KEY)
    Path("keys.txt").write_text(KEY + "\n")
    with inside(teacher_onnx, "--name", "digits", "--response", "probs", "--keys", "keys.txt") as url:
        content = block("{name: digits").replace(ADDRESS, url)
        Path("mine.yaml").write_text(content.replace("budget: 3000", f"budget: {BUDGETS['3000']}"))
        yield url


def run(words: list[str], address: str, *more: str) -> dict[str, int]:
    """A run of the page on that server, short; what it asked."""
    words = [BUDGETS.get(word, word.replace(ADDRESS, address)) for word in words]
    small = () if "--oracle.batch" in words else ("--oracle.batch", "8")
    assert cli.main([*words, *SHORT, *small, *more]) == 0
    out = Path(words[words.index("--out") + 1]) if "--out" in words else Path("runs/mine")
    return totals(out / "ledger", "holdout", "replay")


@pytest.mark.parametrize("words", COMMANDS, ids=[" ".join(words)[:60] for words in COMMANDS])
def test_every_option_exists(words: list[str], address: str) -> None:
    if words[:2] == ["mekd", "serve"]:
        serve._parser().parse_args(words[2:])
    elif words[0] == "mekd":
        settings = [word for word in words[2:] if word not in cli.FLAGS]
        assert cli.parse(settings) is not None


def test_from_a_quote_to_a_student_and_on(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command("quote"), *SHORT, "--oracle.batch", "8"]) == 0
    assert "the run: 700 queries at most, price 0.70 at most" in capsys.readouterr().out
    run_once = command("run", "--config", "mine.yaml", "--dry-run")
    assert cli.main([*run_once, *SHORT, "--oracle.batch", "8"]) == 0
    assert not Path("runs/mine/ledger").exists()
    assert "asked nothing" in capsys.readouterr().out

    first = next(words for words in COMMANDS if words[1:] == ["run", "--config", "mine.yaml", "--yes"])[1:]
    asked = run(first, address)
    said = capsys.readouterr().out
    assert "the first answer runs from" in said and "probabilities" in said
    assert asked["queries"] == 700 - 35 and asked["uncertain"] == 0
    assert KEY not in Path("runs/mine/config.yaml").read_text() + Path("runs/mine/log.txt").read_text()
    more = run(command("--oracle.budget"), address)
    assert more["queries"] == asked["queries"] + 95  # five more in reserve
    assert Path(f"runs/mine/student-{asked['queries'] - 64}.onnx").is_file()

    picture = io.BytesIO()
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(picture, "PNG")
    options = [word for word in command("serve", "runs/mine/student.onnx")[2:] if word not in ("--port", "8001")]
    with inside("runs/mine/student.onnx", *options) as url:
        assert len(call(f"{url}/hf/student", picture.getvalue()).json()) == 10
        assert call(f"{url}/metrics").status == 200


@pytest.mark.parametrize("out", ["runs/kserve", "runs/hf"])
def test_a_run_on_an_address(out: str, address: str) -> None:
    assert run(command(out), address)["queries"] > 200


def sdk() -> tuple[dict[str, ModuleType], list[int]]:
    """A stand-in for boto3: it is busy once, and then answers two names in per cent; sides of the pictures it got."""

    class ThrottlingException(Exception):
        pass

    sides: list[int] = []
    first = iter([True])  # several threads call at once: one of them is the first

    def detect_custom_labels(ProjectVersionArn: str, Image: dict[str, bytes], MinConfidence: float) -> dict[str, Any]:
        if next(first, False):
            sides.append(0)
            raise ThrottlingException("slow down")
        picture = PIL_Image.open(io.BytesIO(Image["Bytes"]))
        sides.append(picture.size[0])
        best = int(np.asarray(picture).sum()) % 10
        labels = [{"Name": f"class {best}", "Confidence": 90.5}, {"Name": f"class {(best + 1) % 10}", "Confidence": 4}]
        return {"CustomLabels": [label for label in labels if label["Confidence"] >= MinConfidence]}

    PIL_Image = Image
    client = SimpleNamespace(
        detect_custom_labels=detect_custom_labels,
        exceptions=SimpleNamespace(ThrottlingException=ThrottlingException),
    )
    boto3, botocore, config = ModuleType("boto3"), ModuleType("botocore"), ModuleType("botocore.config")
    vars(boto3)["client"] = lambda name, config: client
    vars(config)["Config"] = SimpleNamespace
    return {"boto3": boto3, "botocore": botocore, "botocore.config": config}, sides


def test_an_sdk(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modules, sides = sdk()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    Path("teacher.py").write_text(block("Rekognition"))
    Path("names.txt").write_text("".join(f"class {i}\n" for i in range(10)))
    asked = run(command("runs/sdk"), address)
    assert asked["queries"] > 200 and asked["uncertain"] == 0
    assert sorted(sides) == [0] + [80] * asked["queries"]  # the busy one was free


def test_a_plain_post(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_URL", f"{address}/hf/digits")
    Path("teacher.py").write_text(block("JSON with a picture"))
    assert run(command("runs/post"), address)["queries"] > 200


def test_a_network_of_torch(address: str) -> None:
    torch.manual_seed(0)
    torch.save(build("resnet20", 10, 1).state_dict(), "weights.pt")
    Path("teacher.py").write_text(block("your own class"))
    assert run(command("runs/torch"), address)["queries"] > 100


def test_an_address_in_your_own_loop(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block("from pathlib import Path").replace(ADDRESS, address), "docs/teachers.md", "exec"), {})
    assert "torch.Size([200, 10]) 200 queries" in capsys.readouterr().out
    assert totals(Path("books"), "mine")["queries"] == 200


@pytest.mark.parametrize("response", ["probs", "label"])
def test_the_adversarial_robustness_toolbox(
    response: str, teacher_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("teacher.onnx").write_bytes(teacher_onnx.read_bytes())
    try:
        import art.estimators.classification  # noqa: F401
    except ImportError:
        for name in ("art", "art.estimators", "art.estimators.classification"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules["art.estimators.classification"])["BlackBoxClassifier"] = Toolbox
    names: dict[str, Any] = {}
    exec(compile(block("art.estimators").replace('"probs"', f'"{response}"'), "docs/teachers.md", "exec"), names)
    found = names["classifier"].predict(np.random.default_rng(0).random((5, 1, 16, 16), np.float32))
    assert found.shape == (5, 10) and np.allclose(found.sum(1), 1, atol=1e-5)
    assert response == "probs" or set(np.unique(found)) == {0.0, 1.0}
    assert names["oracle"].ledger.spent == 5


class Toolbox:
    """What the toolbox's class does with its function: a few images at a time, in the range of clip_values."""

    def __init__(
        self, predict_fn: Any, input_shape: tuple[int, ...], nb_classes: int, clip_values: tuple[float, float]
    ) -> None:
        self.predict_fn, self.nb_classes, self.clip_values = predict_fn, nb_classes, clip_values

    def predict(self, x: np.ndarray, batch_size: int = 2) -> np.ndarray:
        assert self.clip_values[0] <= x.min() and x.max() <= self.clip_values[1]
        parts = [self.predict_fn(x[start : start + batch_size]) for start in range(0, len(x), batch_size)]
        return np.concatenate(parts).astype(np.float32)
