"""The Python examples of the README and of docs/method.md run as they are written; its commands exist."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from mekd import cli, predict

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
EXAMPLES = [
    (page, text)
    for page in ("README.md", "docs/method.md")
    for text in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
]
TYPED = re.findall(r"^    (mekd (?:.*\\\n)*.*)$", README, re.MULTILINE)
COMMANDS = [shlex.split(command.replace("\\\n", " "), comments=True)[1:] for command in TYPED]


@pytest.mark.parametrize(("page", "text"), EXAMPLES, ids=[page for page, _ in EXAMPLES])
def test_example(page: str, text: str, teacher_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher.onnx").write_bytes(teacher_onnx.read_bytes())
    torch.manual_seed(0)
    exec(compile(text, page, "exec"), {})


def test_there_are_examples() -> None:
    assert {page for page, _ in EXAMPLES} == {"README.md", "docs/method.md"}


def test_readme_is_a_screen_and_a_half_and_says_what_does_not_hold() -> None:
    assert len(README.splitlines()) <= 100
    said = " ".join(README.split())
    assert "no private image sent is no promise" in said and "on CIFAR-10 it does not" in said


@pytest.mark.parametrize("words", COMMANDS, ids=[words[0] for words in COMMANDS])
def test_every_option_exists(words: list[str]) -> None:
    if words[0] == "predict":
        predict._parser().parse_args(words[1:])
    else:
        assert words[0] in ("quote", "run")
        assert cli.parse([word for word in words[1:] if word not in cli.FLAGS]) is not None


def test_make_knows_what_the_readme_says_of_it() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z]+)`", README))
    assert named and named <= targets
