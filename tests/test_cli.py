"""Bad input at the command line: one line that names what, its value, what is allowed; nothing lost, nothing asked."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from mekd import cli, files
from mekd.engine.stages import STAGES
from mekd.settings import known_keys, must_be

ROOT = Path(__file__).parent.parent


def fails(words: list[str], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    assert cli.main([str(word) for word in words]) == status
    captured = capsys.readouterr().err
    assert "Traceback" not in captured
    return captured


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        # A typing mistake is answered with the nearest setting.
        (["--oracle.respnse", "label"], ["--oracle.respnse", "oracle.response"]),
        (["--deprivatise.alpha", "1"], ["deprivatize.alpha"]),
        # A folder where none is expected.
        (["runs/digits"], ["runs/digits", "--out FOLDER"]),
        # A value that no setting can have: the name, the value, what is allowed.
        (["--oracle.response", "everything"], ["oracle.response", "everything", "logits", "label"]),
        (["--distill.preset", "ours"], ["distill.preset", "ours", "default", "paper"]),
        (["--distill.steps", "0"], ["distill.steps", "0", "above 0"]),
        (["--distill.steps", "many"], ["distill.steps is many; it must be a whole number\n"]),
        (["--data.flip", "3"], ["data.flip is 3; it must be true or false, or null\n"]),
        (["--oracle.mean", "[a]"], ["oracle.mean is a; it must be a list of numbers"]),
        (["--data.local_fraction", "3"], ["data.local_fraction", "3", "between 0 and 1"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["--data.name", "digits", "--teacher.onnx", "nowhere.onnx"], ["nowhere.onnx", "--teacher.onnx"]),
        (["--data.name", "digits", "--teacher.arch", "resnet33", "--data.size", "16"], ["resnet33", "resnet32"]),
        (
            ["--data.name", "digits", "--teacher.checkpoint", "nowhere.pt", "--data.size", "16"],
            ["teacher.checkpoint", "nowhere.pt"],
        ),
        (["--data.name", "cifar11"], ["data.name", "cifar11", "cifar10"]),
        (["--data.name", "mnist"], ["data.path"]),
        (["--data.name", "mnist", "--data.path", "nowhere"], ["data.path", "nowhere"]),
        (["--engine.device", "gpu"], ["engine.device", "gpu", "cuda"]),
    ],
)
def test_mistakes(words: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(["run", *words, "--out", str(tmp_path / "run")], capsys)
    assert [part for part in parts if part not in said] == []
    assert not (tmp_path / "run" / "ledger").exists()


def test_unknown_key_in_a_yaml_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("distill:\n  stepps: 100\n")
    said = fails(["run", "--config", config], capsys)
    assert "mine.yaml" in said and "distill.stepps" in said and "distill.steps" in said
    config.write_text("distill: 3\n")
    assert "distill must be a section" in fails(["run", "--config", config], capsys)
    config.write_text("distill: {steps: [\n")
    assert "no YAML" in fails(["run", "--config", config], capsys)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: {path: 2024}", "data.path is 2024; it must be text (a number in quotes is text), or null"),
        ("distill: {student: [1, 2]}", "distill.student is [1, 2]; it must be text"),
        ("engine: {progress: maybe}", "engine.progress is maybe; it must be true or false"),
        ("oracle: {headers: {X-Api-Key: [hidden]}}", "oracle.headers cannot be read; it must be text by name, such as"),
    ],
)
def test_a_value_of_another_type_in_a_file(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert cli.main(["run", "--config", str(tmp_path / "a.yaml"), "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert f"a.yaml: {said}" in err and "hidden" not in err
    assert not (tmp_path / "run").exists()


def test_every_setting_has_words_for_what_it_may_be() -> None:
    assert all(must_be(key) for key in known_keys())


def test_unknown_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert "deprivatize" in fails(["privatize"], capsys)


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("seed: 3\ndistill: {steps: 100, lr: 1.0e-3}\n")
    parsed = cli.parse(["--config", str(config), "--distill.steps", "7"])
    assert parsed is not None
    settings, out = parsed
    assert (settings.seed, settings.distill.steps, settings.distill.lr) == (3, 7, 1e-3)
    assert out == Path("runs/mine")


def test_print_config_is_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--distill.steps", "7", "--print_config"]) == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    before, after = cli.parse(["--distill.steps", "7"]), cli.parse(["--config", str(file)])
    assert before is not None and after is not None and before[0] == after[0]


@pytest.mark.parametrize("stage", ["audit", "report"])
def test_a_look_at_a_run_takes_its_settings(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    small = ["--deprivatize.steps", "2", "--deprivatize.batch", "8", "--deprivatize.width", "0.1"]
    assert cli.main(["deprivatize", "--data.name", "digits", "--data.size", "16", *small, "--out", str(out)]) == 0
    before = (out / "config.yaml").read_bytes()
    seen = []
    monkeypatch.setitem(STAGES, stage, lambda run: seen.append(run.config.deprivatize.steps))
    assert cli.main([stage, "--out", str(out)]) == 0, capsys.readouterr().err
    assert cli.main([stage, f"--out={out}", "--audit.budget", "50"]) == 0
    assert seen == [2, 2]
    now = (out / "config.yaml").read_bytes()
    assert now == before if stage == "report" else now == before.replace(b"  budget: 0\n", b"  budget: 50\n")
    # Settings that are given are taken as they are, and nothing of another folder.
    assert cli.with_saved(["--config", "digits", "--out", str(out)]) == ["--config", "digits", "--out", str(out)]
    assert cli.with_saved(["--out", str(tmp_path / "none")]) == ["--out", str(tmp_path / "none")]
    both = ["--out", str(tmp_path / "none"), "--out", str(out)]  # of two folders the last one is written to
    assert cli.with_saved(both) == ["--config", str(out / "config.yaml"), *both]
    assert cli.with_saved([]) == []


@pytest.mark.parametrize(("command", "goes_on"), [("audit", True), ("run", True), ("quote", False), ("doctor", False)])
def test_what_is_said_of_an_interruption(
    command: str, goes_on: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupt)
    assert cli.main([command]) == 130
    assert ("the same command goes on" in capsys.readouterr().err) == goes_on


def without_readers(words: list[str]) -> int:
    """The exit status of a command whose screen is a pipe that nobody reads any more, as where tee ended first."""
    read, write = os.pipe()
    os.close(read)
    try:
        return subprocess.run([sys.executable, "-m", "mekd", *words], stdout=write, stderr=write).returncode
    finally:
        os.close(write)


def test_a_run_goes_on_where_nobody_reads_it(tiny: list[str], tmp_path: Path) -> None:
    words = [*tiny, "--out", str(tmp_path)]
    assert without_readers(["run", *words]) == 0
    assert "student.onnx differs" in (tmp_path / "log.txt").read_text("utf-8")
    assert without_readers(["run", *words, "--distill.lr", "0.3"]) == 2, "a mistake stays one"
    assert without_readers(["doctor"]) == 1, "what only prints ends"


@pytest.mark.parametrize("words", ["--help", "--version", "run --help", "run --print_config", "quote --help"])
def test_what_only_prints_ends_quietly(words: str) -> None:
    read, write = os.pipe()
    os.close(read)
    places = {"nobody reads": write}
    if os.path.exists("/dev/full"):
        places["full"] = os.open("/dev/full", os.O_WRONLY)
    for name, place in places.items():
        command = [sys.executable, "-m", "mekd", *words.split()]
        done = subprocess.run(command, stdout=place, stderr=subprocess.PIPE, text=True)
        os.close(place)
        assert done.stderr == "" and done.returncode == 0, (name, done)


def test_stages_say_what_they_need(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*tiny, "--out", str(tmp_path)]
    assert "run `mekd deprivatize` first" in fails(["distill", *words], capsys)
    assert "run `mekd distill` first" in fails(["evaluate", *words, "--evaluate.enabled", "true"], capsys)
    assert "run `mekd run` first" in fails(["report", *words], capsys)
    assert "there is no run" in fails(["report", *tiny, "--out", str(tmp_path / "nothing")], capsys)


def test_checkpoint_of_another_config(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*tiny, "--out", str(tmp_path)]
    assert cli.main(["deprivatize", *words]) == 0
    capsys.readouterr()
    kept = (tmp_path / "config.yaml").read_bytes()
    said = fails(["deprivatize", *words, "--deprivatize.lr", "0.5"], capsys)
    assert "deprivatize.lr was 0.0002 and is 0.5" in said and "--out" in said
    assert (tmp_path / "config.yaml").read_bytes() == kept


def test_another_teacher_under_the_same_name(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*tiny, "--out", str(tmp_path / "run")]
    assert cli.main(["deprivatize", *words]) == 0
    other = tmp_path / "other.onnx"
    other.write_bytes(Path(words[words.index("--teacher.onnx") + 1]).read_bytes() + b"\x32\x00")
    words[words.index("--teacher.onnx") + 1] = str(other)
    assert "teacher" in fails(["deprivatize", *words], capsys)


def test_damaged_checkpoint(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*tiny, "--out", str(tmp_path)]
    assert cli.main(["deprivatize", *words]) == 0
    path = tmp_path / "checkpoints" / "deprivatize.pt"
    path.write_bytes(path.read_bytes()[:1000])
    said = fails(["deprivatize", *words], capsys)
    assert str(path) in said and "damaged" in said


def nan_teacher(path: Path) -> None:
    """Square roots of negative brightness: NaN for every image that is not black."""
    node, value = onnx.helper.make_node, onnx.TensorProto
    weight = onnx.numpy_helper.from_array(-np.ones((1, 10), np.float32), "weight")
    nodes = [
        node("Cast", ["pixels"], ["float"], to=value.FLOAT),
        node("GlobalAveragePool", ["float"], ["mean"]),
        node("Flatten", ["mean"], ["flat"]),
        node("MatMul", ["flat", "weight"], ["negative"]),
        node("Sqrt", ["negative"], ["scores"]),
    ]
    pixels = onnx.helper.make_tensor_value_info("pixels", value.UINT8, ["batch", 1, 16, 16])
    scores = onnx.helper.make_tensor_value_info("scores", value.FLOAT, ["batch", 10])
    graph = onnx.helper.make_graph(nodes, "nan", [pixels], [scores], [weight])
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), path)


def test_nan_in_the_answer(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*tiny, "--out", str(tmp_path / "run")]
    words[words.index("--teacher.onnx") + 1] = str(tmp_path / "nan.onnx")
    nan_teacher(tmp_path / "nan.onnx")
    said = fails(["deprivatize", *words], capsys)
    assert "NaN or infinity for 7 of 8 images that were tried" in said
    assert not (tmp_path / "run" / "ledger").exists()  # known when the file is opened


def test_disk_full_while_saving(tiny: list[str], tmp_path: Path) -> None:
    """Files may grow to 200 kB only: a real error of the operating system in the middle of a checkpoint."""
    words = ["deprivatize", *tiny, "--out", str(tmp_path)]
    assert cli.main([*words, "--deprivatize.steps", "4"]) == 0
    path = tmp_path / "checkpoints" / "deprivatize.pt"
    before = path.read_bytes()
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "from mekd.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "could not be written" in done.stderr and "the earlier one stays" in done.stderr
    assert "Traceback" not in done.stderr
    assert path.read_bytes() == before and files.load(path)["step"] == 4
    assert not list(tmp_path.rglob("*.part"))
    assert cli.main(words) == 0
    assert files.load(path)["step"] == 9


def test_a_configuration_that_is_shipped_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parsed, whole = cli.parse(["--config", "digits"]), cli.parse(["--config", str(ROOT / "configs" / "digits.yaml")])
    assert parsed is not None and whole is not None and parsed == whole and str(parsed[1]) == "runs/digits"
    (tmp_path / "digits").write_text("seed: 7\n")  # a file of the user's comes first
    own = cli.parse(["--config", "digits"])
    assert own is not None and own[0].seed == 7
