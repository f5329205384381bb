"""The commands of a report's page go on from the run as they stand, but for RUN and PHOTOS."""

import json
import shlex
from pathlib import Path

import pytest
from PIL import Image

from conftest import tiny_settings
from mekd import cli
from pages import of, parsed, section

#: The settings of each kind of run besides the small ones, and the queries it has paid when the commands are through.
KINDS = {
    "replay": (["--distill.replay", "40", "--distill.budget", "60"], 72 + 20 + 80),
    "budget": (["--oracle.budget", "200"], 400),
    "fresh": ([], 72 + 20 + 72),
    "trained": ([], 72 + 20 + 72),
    "store": (["--distill.replay", "40"], 0),
}


def queries() -> int:
    return int(json.loads(Path("RUN/summary.json").read_text())["queries"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_its_commands_go_on_from_the_run(
    kind: str, teacher_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("PHOTOS").mkdir()
    Image.new("RGB", (40, 30), "blue").save("PHOTOS/a.png")
    settings = tiny_settings(teacher_onnx)
    if kind == "trained":
        at = settings.index("--teacher.onnx")
        settings = [*settings[:at], *settings[at + 2 :], "--teacher.steps", "4"]
    more, paid = KINDS[kind]
    assert cli.main(["run", *settings, *more, "--audit.enabled", "false", "--out", "RUN"]) == 0
    if kind == "store":
        Path("RUN").rename("OTHER")
        learning = ["--distill.store", "OTHER", "--distill.steps", "4", "--engine.device", "cpu"]
        assert cli.main(["run", *learning, "--out", "RUN"]) == 0
    before, on = queries(), section(parsed(of(Path("RUN"))), "on")
    assert on is not None
    found = [element.text or "" for element in on.iter("pre")]
    assert len(found) == (2 if kind == "store" else 3)
    for command in found:
        name, *rest = shlex.split(command)
        assert name == "mekd" and cli.main(rest) == 0, command
        if "resnet20" in command:
            assert queries() == before  # the answers are paid
    assert queries() == paid
    assert Path("predictions.csv").read_text().count("\n") == 2
    assert Path("ANOTHER").exists() == Path("LONGER").exists() == (kind in ("fresh", "trained"))
