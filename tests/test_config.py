"""Settings: where they come from, what is refused and how, and that the shipped files are right."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from flat_settings import flat, settings
from mekd.cli import parse
from mekd.config import Config, DistillConfig
from mekd.losses import MEKDLoss
from mekd.settings import dump_yaml, read_yaml

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: pip install 'mekd[run]'")
pytest.importorskip("jsonargparse", reason="jsonargparse is not installed: pip install 'mekd[run]'")

SHIPPED = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def write(folder: Path, text: str) -> str:
    file = folder / "mine.yaml"
    file.write_text(text)
    return str(file)


def parsed(*words: str) -> tuple[Config, Path]:
    result = parse(list(words))
    assert result is not None
    return result


# The shipped files.


def test_files_are_shipped() -> None:
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_parse(path: Path) -> None:
    config, out = parsed("--config", str(path))
    assert out == Path("runs") / path.stem
    wanted = flat(yaml.safe_load(path.read_text()))
    assert wanted
    got = settings(config)
    assert {key: got[key] for key in wanted} == wanted
    # What the file leaves out is the default.
    default = settings(Config())
    assert all(got[key] == default[key] for key in default if key not in wanted)
    # The loss of step 2 can be made of it.
    assert set(config.distill.loss_options()) == LOSS_OPTIONS


# Where a setting comes from.


def test_the_command_line_goes_before_the_file_and_the_file_before_the_default(tmp_path: Path) -> None:
    file = write(tmp_path, "seed: 3\ndistill: {steps: 5, batch: 6}\n")
    config, out = parsed("--config", file, "--distill.steps", "7", "--out", "elsewhere")
    assert (config.seed, config.distill.steps, config.distill.batch) == (3, 7, 6)
    assert config.distill.lr == DistillConfig().lr
    assert out == Path("elsewhere")


def test_nothing_given_is_the_default() -> None:
    config, out = parsed()
    assert config == Config()
    assert out == Path("runs/default")


@pytest.mark.parametrize(
    "text",
    [
        # Nothing in it.
        "",
        # Nothing but words for a person.
        "# nothing yet\n",
    ],
)
def test_an_empty_file_is_the_default(tmp_path: Path, text: str) -> None:
    config, out = parsed("--config", write(tmp_path, text))
    assert config == Config()
    assert out == Path("runs/mine")


@pytest.mark.parametrize(
    ("word", "value", "wanted"),
    [
        # YAML 1.1 takes a number without a point for a word.
        ("distill.lr", "1e-3", 1e-3),
        # Switches.
        ("data.flip", "true", True),
        # null unsets.
        ("distill.budget", "null", None),
        ("distill.budget", "1000", 1000),
        # Lists.
        ("oracle.mean", "[0.5, 0.4, 0.3]", [0.5, 0.4, 0.3]),
        # YAML 1.1 takes these words for switches, and they are where a switch belongs.
        ("engine.compile", "off", "off"),
        ("teacher.name", "no", "no"),
        ("data.flip", "yes", True),
        ("engine.progress", "off", False),
    ],
)
def test_values_are_read_alike_from_the_file_and_from_the_command_line(
    tmp_path: Path, word: str, value: str, wanted: Any
) -> None:
    section, name = word.split(".")
    for words in ([f"--{word}", value], ["--config", write(tmp_path, f"{section}: {{{name}: {value}}}\n")]):
        got = settings(parsed(*words)[0])[word]
        assert got == wanted and type(got) is type(wanted)


def test_what_is_printed_can_be_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--distill.preset",
        "paper",
        "--data.size",
        "16",
        "--oracle.mean",
        "[0.5]",
        "--distill.budget",
        "9",
    ]
    config, _ = parsed(*words)
    assert parse([*words, "--print_config"]) is None
    text = capsys.readouterr().out
    assert text == dump_yaml(config)
    assert parsed("--config", write(tmp_path, text))[0] == config


# What is refused.


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        # A typo in a setting, in a section, at the top.
        ("distill: {stepz: 3}", ["'distill.stepz'", "nearest", "distill.steps"]),
        ("distil: {kl_tau: 3}", ["'distil.kl_tau'", "nearest", "distill.kl_tau"]),
        ("sed: 3", ["'sed'", "nearest", "seed"]),
        # A setting of another section.
        ("teacher: {preset: paper}", ["'teacher.preset'", "nearest", "distill.preset"]),
        # A setting without its section.
        ("local_fraction: 0.1", ["'local_fraction'", "nearest", "data.local_fraction"]),
        # A setting below a setting.
        ("seed: {steps: 3}", ["'seed.steps'", "nearest"]),
        # Nothing like it: all are listed.
        ("zzzzzz: 1", ["'zzzzzz'", "seed", "engine.progress"]),
        # A value where a section belongs, and a section without settings.
        ("data: digits", ["data", "section", "'digits'"]),
        ("data:", ["data", "section", "None"]),
        # No settings by name.
        ("- seed", ["settings by name", "list"]),
        ("seed", ["settings by name", "str"]),
        # No YAML.
        ("data: {name: digits", ["no YAML"]),
        # Keys that are no words.
        ("data: {1: 2}", ["data.1"]),
        ("1: 2", ["no setting 1"]),
        ("true: 2", ["no setting True"]),
        # One that would hide the other, and a whole section of settings.
        ("data: {size: 16, size: 32}", ["size stands here a second time"]),
        ("data: {size: 16}\nseed: 1\ndata: {path: photos}", ["data stands here a second time", "line 3"]),
    ],
)
def test_files_with_mistakes(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ValueError) as caught:
        parse(["--config", file])
    for part in (file, *parts):
        assert part in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--config is '.*nowhere.yaml'; no such file"):
        read_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(ValueError, match="no such file"):
        parse(["--config", str(tmp_path)])


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        # A typo.
        ("--distill.stepz", "distill.steps"),
        # A section left out.
        ("--local_fraction", "data.local_fraction"),
        # With its value in the same word.
        ("--distill.bta=1", "distill.beta"),
    ],
)
def test_mistyped_words_get_the_nearest_setting(word: str, nearest: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse([word] if "=" in word else [word, "3"])
    assert word in str(caught.value) and nearest in str(caught.value)


@pytest.mark.parametrize("value", ["#album", "&album"])
def test_a_word_that_yaml_would_pass_over_is_refused(value: str, tmp_path: Path) -> None:
    for words in (["--data.path", value], [f"--data.path={value}"]):
        with pytest.raises(ValueError, match=rf"data.path is '{value}', which reads as null.* may begin with \./"):
            parse(words)
    with pytest.raises(ValueError, match=rf"data.path is '{value}', which reads as null"):
        parse(["--config", write(tmp_path, f"data: {{path: '{value}'}}")])
    config, _ = parsed("--data.path", f"./{value}")
    assert config.data.path == f"./{value}"


def test_a_value_of_nothing_is_refused(tmp_path: Path) -> None:
    """As a variable of the shell that is not set gives it: another teacher or folder would be taken in silence."""
    for words in (["--teacher.onnx", ""], ["--teacher.onnx="], ["--config", write(tmp_path, "teacher: {onnx: ''}")]):
        with pytest.raises(ValueError, match=r"teacher.onnx is ''.* leave it out for its default"):
            parse(words)
    with pytest.raises(ValueError, match=r"--out is ''.* leave it out for runs/NAME"):
        parse(["--out", ""])
    with pytest.raises(ValueError, match=r"data.size: expected one argument"):
        parse(["--data.size"])


def test_one_file_says_what_is_run(tmp_path: Path) -> None:
    """Of two, the first one's settings would go into the folder of the second."""
    file = write(tmp_path, "seed: 1")
    with pytest.raises(ValueError, match="--config is given more than once"):
        parse(["--config", file, "--config=digits"])


@pytest.mark.parametrize("value", [".inf", ".nan"])
@pytest.mark.parametrize("name", ["distill.beta", "distill.image", "deprivatize.alpha", "teacher.lr", "deprivatize.dp"])
def test_what_is_no_finite_number_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {value[1:]}; it must be"):
        parse([f"--{name}", value])
    config, _ = parsed("--oracle.patience", ".inf")
    assert config.oracle.patience == math.inf  # may be waited for without an end


WRONG = [
    # Numbers out of range.
    ("data.local_fraction", "1.5", "between 0 and 1"),
    ("data.local_fraction", "-0.1", "between 0 and 1"),
    ("deprivatize.ema", "2", "between 0 and 1"),
    ("deprivatize.alpha", "-1", "at least 0"),
    ("distill.replay", "-1", "at least 0"),
    ("distill.budget", "-1", "at least 0"),
    ("distill.weight_decay", "-1", "at least 0"),
    ("teacher.weight_decay", "-1", "at least 0"),
    # More than a generator of random numbers takes.
    ("seed", str(2**64), "between -"),
    # Steps of nothing, steps of no size.
    ("teacher.batch", "0", "above 0"),
    ("teacher.lr", "0", "above 0"),
    ("teacher.resize", "0", "above 0"),
    ("evaluate.baseline_steps", "0", "above 0"),
    # What nothing can be divided by, and a scale of no channel.
    ("teacher.std", "[0.0]", "numbers above 0"),
    ("teacher.mean", "[]", "finite numbers"),
    ("deprivatize.steps", "0", "above 0"),
    ("deprivatize.width", "0", "above 0"),
    ("distill.steps", "-5", "above 0"),
    ("distill.holdout", "0", "above 0"),
    ("distill.eval_every", "0", "above 0"),
    ("engine.checkpoint_every", "0", "above 0"),
    ("engine.log_every", "0", "above 0"),
    # Choices.
    ("oracle.response", "soft", "'logits', 'probs', 'topk', 'label'"),
    ("oracle.transport", "int8", "'uint8', 'float'"),
    ("distill.preset", "mine", "'default', 'paper', 'authors'"),
    ("distill.scale", "tau3", "'tau2', 'tau', 'one'"),
    ("distill.code", "rank", "'auto', 'logits', 'log_probs', 'onehot', 'standardized'"),
    ("distill.rest", "keep", "'spread', 'drop', 'tail'"),
    ("distill.reduction", "avg", "'mean'"),
]
WRONG_WORDS = [
    # Words where numbers belong.
    ("seed", "many", "a whole number"),
    ("data.size", "big", "a whole number"),
    ("data.flip", "perhaps", "true or false"),
    ("oracle.mean", "half", "list"),
    ("distill.steps", "many", "a whole number"),
    ("distill.budget", "lots", "a whole number"),
    ("distill.kl_tau", "hot", "a number"),
]
WRONG_NUMBERS = [
    # Half a step.
    ("teacher.steps", "1.5", "a whole number"),
    # A number where a name belongs.
    ("distill.student", "8", "text"),
    # A number where a switch belongs.
    ("data.flip", "7", "true or false"),
]


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        *WRONG,
        *WRONG_WORDS,
        WRONG_NUMBERS[0],
        WRONG_NUMBERS[2],
        # What the loss does not know.
        *(
            wrong
            for wrong in (
                ("distill.reduction", "sum", "'mean', 'batchmean'"),
                ("distill.tau", "0", "above 0"),
                ("distill.kl_tau", "-1", "above 0"),
                ("distill.beta", "-1", "at least 0"),
                ("distill.image", "-1", "at least 0"),
            )
        ),
    ],
)
def test_wrong_values_on_the_command_line(key: str, value: str, allowed: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse([f"--{key}", value])
    for part in (key, value, allowed):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        *WRONG,
        *WRONG_NUMBERS,
        *(wrong for wrong in WRONG_WORDS),
    ],
)
def test_wrong_values_in_a_file(tmp_path: Path, key: str, value: str, allowed: str) -> None:
    section, _, name = key.rpartition(".")
    file = write(tmp_path, f"{section}: {{{name}: {value}}}\n" if section else f"{name}: {value}\n")
    with pytest.raises(ValueError) as caught:
        parse(["--config", file])
    for part in (key, value, allowed):
        assert part in str(caught.value)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]


# The loss of step 2.

LOSS_OPTIONS = {"tau", "kl_tau", "beta", "scale", "reduction", "image", "code", "rest"}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        # Ours.
        (DistillConfig(), {"tau": 5, "kl_tau": 1, "beta": 1, "scale": "tau2", "reduction": "mean"}),
        # The paper's, and the authors' code's.
        (
            DistillConfig(preset="paper"),
            {"tau": 5, "kl_tau": 1, "beta": 0.5, "scale": "one", "reduction": "batchmean"},
        ),
        (
            DistillConfig(preset="authors"),
            {"tau": 5, "kl_tau": 5, "beta": 1, "scale": "tau", "reduction": "mean"},
        ),
        # One setting of one's own, the preset's besides; 0 is a value, not a gap.
        (
            DistillConfig(preset="paper", kl_tau=2.0, beta=0.0),
            {"tau": 5, "kl_tau": 2, "beta": 0, "scale": "one", "reduction": "batchmean"},
        ),
        # All of one's own.
        (
            DistillConfig(preset="authors", tau=2, kl_tau=3, beta=4, scale="one", reduction="batchmean"),
            {"tau": 2, "kl_tau": 3, "beta": 4, "scale": "one", "reduction": "batchmean"},
        ),
        # What no preset sets.
        (
            DistillConfig(image=0.5, code="log_probs", rest="drop"),
            {"image": 0.5, "code": "log_probs", "rest": "drop", "tau": 5},
        ),
    ],
)
def test_loss_options(config: DistillConfig, wanted: dict[str, Any]) -> None:
    options = config.loss_options()
    assert set(options) == LOSS_OPTIONS
    assert {key: options[key] for key in wanted} == wanted
    loss = MEKDLoss(_generator(), **options)
    assert {key: getattr(loss, key) for key in options} == options


def _generator() -> Any:
    import torch

    return torch.nn.Linear(3, 3)


@pytest.mark.parametrize("saved", [False, True])
def test_a_setting_that_is_a_mapping(saved: bool, tmp_path: Path) -> None:
    headers = {"X-Api-Key": "{env:KEY}", "X.Y": "1"}
    config, _ = parsed("--oracle.headers", json.dumps(headers))
    if saved:  # as a run saves it
        config, _ = parsed("--config", write(tmp_path, dump_yaml(config)))
    assert config.oracle.headers == headers
