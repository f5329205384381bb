"""The table of students: what is measured once stays, what is stopped goes on, and what its figures mean."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench import curves, students, tables
from mekd.config import Config
from mekd.engine.run import Run

ROOT = Path(__file__).parents[1]


def row(name: str, queries: str, seed: int, accuracy: float, private: str = "0.1") -> dict[str, str]:
    values = ["fashion_mnist", private, name, "probs", queries, seed, accuracy, accuracy + 5, 2500, 100, "abc"]
    return dict(zip(students.COLUMNS, map(str, values), strict=True))


ROWS = [
    row("plain", "private", 0, 80.0), row("plain", "private", 1, 82.0), row("ceiling", "all", 0, 89.0),
    row("mekd", "20000", 0, 84.0), row("mekd", "20000", 1, 86.0), row("mekd", "unlimited", 0, 87.4),
    row("plain", "private", 0, 88.5, "0.5"), row("ceiling", "all", 0, 89.0, "0.5"),
    row("mekd", "20000", 0, 88.0, "0.5"),
]  # fmt: skip


def test_shares_of_the_gap_and_spreads() -> None:
    lines = curves.table(ROWS, "fashion_mnist")
    assert lines[2:] == [
        "| fashion_mnist | 0.1 | plain | probs | private | 2500 | 2 | 81.00 ± 1.00 | 86.00 ± 1.00 | 0.00 | 100 |",
        "| fashion_mnist | 0.1 | ceiling | probs | all | 2500 | 1 | 89.00 | 94.00 | 1.00 | 100 |",
        "| fashion_mnist | 0.1 | mekd | probs | 20000 | 2500 | 2 | 85.00 ± 1.00 | 90.00 ± 1.00 | 0.50 | 100 |",
        "| fashion_mnist | 0.1 | mekd | probs | unlimited | 2500 | 1 | 87.40 | 92.40 | 0.80 | 100 |",
        "| fashion_mnist | 0.5 | plain | probs | private | 2500 | 1 | 88.50 | 93.50 | no room | 100 |",
        "| fashion_mnist | 0.5 | ceiling | probs | all | 2500 | 1 | 89.00 | 94.00 | no room | 100 |",
        "| fashion_mnist | 0.5 | mekd | probs | 20000 | 2500 | 1 | 88.00 | 93.00 | no room | 100 |",
    ]
    assert len(curves.table(ROWS, "digits")) == 2


def test_a_picture_for_each_experiment(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    drawn = curves.draw(ROWS, "fashion_mnist", tmp_path)
    assert [path.name for path in drawn] == [
        "students-fashion_mnist-0.1-probs.png", "students-fashion_mnist-0.5-probs.png"
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_a_row_far_below_is_named_in_both_halves(tmp_path: Path) -> None:
    """By its agreement it was near enough to be drawn in the right half, and stood in no legend."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    worth = {"plain": (74, 76), "ceiling": (80, 90), "mekd": (72, 75), "mekd-before": (50, 60)}
    queries = {"plain": "private", "ceiling": "all"}
    rows = [
        {"row": name, "queries": queries.get(name, "20000"), "accuracy": str(accuracy), "agreement": str(agreement)}
        for name, (accuracy, agreement) in worth.items()
    ]
    figure = curves.picture(rows, "all")
    for axis, best in zip(figure.axes, ("50.0", "60.0"), strict=True):
        assert axis.get_xlabel().endswith(f"far below, at best: mekd-before {best}")
        assert {"plain", "ceiling", "mekd"} == set(axis.get_legend_handles_labels()[1])


def test_rows_are_added_and_found_again(tmp_path: Path) -> None:
    table = tmp_path / "new" / "students.csv"
    assert tables.read(table) == []
    for one in ROWS:
        tables.append(table, one, students.COLUMNS)
    assert tables.read(table) == ROWS
    assert table.read_text().splitlines()[0] == ",".join(students.COLUMNS)


def command(tmp_path: Path, *words: str) -> list[str]:
    return [
        sys.executable, "-m", "bench", "students", "digits", "--quick", "--out", str(tmp_path / "runs"),
        "--results", str(tmp_path / "results"), *words,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--queries", "256"], "--queries 256: a number above 256"),
        (["--queries", "many"], "--queries many: a number above 256"),
        (["--rows", "best"], "invalid choice: 'best'"),
        (["--distill.stepz", "3"], "no setting --distill.stepz; the nearest is distill.steps"),
        (["--private", "2"], "data.local_fraction is 2"),
        (["--rows", "pool", "--queries", "600"], "--pool mnist=FOLDER"),
    ],
)
def test_mistakes_are_named(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(students, "teacher_of", lambda config, place: Run(config, place))
    arguments = ["digits", "--quick", "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), *words]
    try:
        assert students.main(arguments) == 2
    except SystemExit as end:
        assert end.code == 2 or said in str(end.code)
        print(end.code)
    printed = capsys.readouterr()
    assert said in printed.out + printed.err
    assert not (tmp_path / "results").exists()


def test_rows_of_other_settings_have_a_table_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row does not say with which settings it was made, and would be taken for the same."""
    monkeypatch.chdir(ROOT)

    def measure(job: students.Job, *_: object) -> dict[str, str]:
        return ROWS[0] | dict(zip(students.COLUMNS[:6], job.key, strict=True))

    monkeypatch.setattr(students, "measure", measure)
    arguments = ["digits", "--rows", "plain", "--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    assert students.main([*arguments, "--distill.steps", "7"]) == 0
    assert students.main([*arguments, "--distill.steps", "7", "--seeds", "1"]) == 0
    before = (tmp_path / "students.csv").read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        students.main([*arguments, "--seeds", "2"])
    said = capsys.readouterr().err
    assert "were made with the settings --distill.steps 7, and these are (none)" in said and "--results" in said
    assert (tmp_path / "students.csv").read_text() == before
    assert students.main([*arguments, "--private", "0.5"]) == 0, "another experiment"
    assert tables.settings(tmp_path) == {"digits 0.1": "--distill.steps 7", "digits 0.5": ""}


def test_a_teacher_that_is_kept_is_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found by what its training depends on, a row's own settings and this machine's precision are none of it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(students, "TEACHERS", tmp_path)
    trained = []

    def train(run: Run) -> None:
        trained.append(run.config.teacher.steps)
        run.teacher_onnx.write_bytes(b"trained")

    monkeypatch.setattr(students, "train_teacher", train)
    monkeypatch.setattr(students, "export_teacher", lambda run: None)
    words = ["--config", students.CONFIGS["digits"]]
    monkeypatch.setattr("mekd.engine.run.faster_in_bfloat16", lambda device: True)
    run = students.teacher_of(students.settings(*words), tmp_path / "first")
    kept = tmp_path / f"digits-{students.digest(run, 'teacher')}.onnx"
    kept.write_bytes(b"kept")
    monkeypatch.setattr("mekd.engine.run.faster_in_bfloat16", lambda device: False)
    other = [*words, "--oracle.response", "label", "--data.local_fraction", "0.5", "--deprivatize.steps", "3"]
    assert students.teacher_of(students.settings(*other), tmp_path / "second").teacher_onnx.read_bytes() == b"kept"
    students.teacher_of(students.settings(*words, "--teacher.steps", "7"), tmp_path / "third")
    students.teacher_of(students.settings(*words, "--teacher.precision", "float32"), tmp_path / "fourth")
    assert trained == [run.config.teacher.steps, 7, run.config.teacher.steps]


@pytest.mark.parametrize("row", ["mekd", "mekd-before"])
def test_every_row_has_the_experiment_s_teacher(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    asked = []

    def teacher_of(config: Config, place: Path) -> Run:
        asked.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(students, "teacher_of", teacher_of)
    with pytest.raises(KeyboardInterrupt):
        students.measure(students.Job("cifar10", "0.1", row, "label", "20000", 2), tmp_path, [], None)
    assert asked[0].seed == 0 and asked[0].data.shift


@pytest.mark.slow
def test_quick_is_stopped_goes_on_and_measures_nothing_twice(tmp_path: Path) -> None:
    running = subprocess.Popen(command(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("deprivatize 50/"):
            os.kill(running.pid, signal.SIGTERM)
            break
    rest = running.stdout.read()
    assert running.wait() == 3 and "the same command goes on" in rest
    done = subprocess.run(command(tmp_path), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "teacher 50/" not in done.stdout and "deprivatize 50/" not in done.stdout, "these steps were taken"
    with open(tmp_path / "results" / "students.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(one["row"], one["queries"]) for one in rows] == [
        ("mekd", "1000"), ("mekd", "unlimited"), ("kl", "1000"), ("kl", "unlimited"),
        ("plain", "private"), ("ceiling", "all"),
    ]  # fmt: skip
    # One generator for both, one store; a student each.
    kinds = [path.name.partition("-")[0] for path in (tmp_path / "runs" / "digits").iterdir()]
    assert {kind: kinds.count(kind) for kind in ("generator", "answers", "student", "plain")} == {
        "generator": 1, "answers": 1, "student": 4, "plain": 2
    }  # fmt: skip
    again = subprocess.run(command(tmp_path), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "0 rows to measure" in again.stdout and "distill" not in again.stdout
    more = subprocess.run(
        command(tmp_path, "--rows", "kl", "--queries", "600", "1500"), cwd=ROOT, capture_output=True, text=True
    )
    assert more.returncode == 0 and "2 rows to measure" in more.stdout, more.stderr
    assert len(list((tmp_path / "runs" / "digits").glob("answers-*"))) == 1, "the store grows"
