"""engine.track: what trackers are told, and that it is told once; none stops a run or sees what is private."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from conftest import tiny_settings
from mekd import cli, track
from mekd.plots import PUBLIC


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def wanted(out: Path) -> Counter:
    """Each number of metrics.jsonl, by its tag and step."""
    return Counter(
        (f"{row['stage']}/{name}", row["step"])
        for row in rows(out)
        for name, value in row.items()
        if name not in ("stage", "step") and value is not None
    )


class Recorder:
    """Stands in for a tracker and keeps what it was told."""

    told: Counter
    pictures: list[str]
    ids: list[str | None]

    def __init__(self, out: Path, id: str | None) -> None:
        self.ids.append(id)
        self.id = id or "made-up"

    def metrics(self, stage: str, step: int, values: Any) -> None:
        self.told.update((f"{stage}/{name}", step) for name in values)

    def picture(self, name: str, path: Path) -> None:
        self.pictures.append(name)

    def close(self) -> None:
        self.ids.append("closed")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    fresh = type("Fresh", (Recorder,), {"told": Counter(), "pictures": [], "ids": []})
    monkeypatch.setattr(track, "OPEN", {"wandb": fresh, "mlflow": fresh})
    monkeypatch.setattr(track, "check", lambda names: None)
    return fresh


def run(teacher: Path, out: Path, *more: str, stage: str = "run") -> int:
    words = [*tiny_settings(teacher), "--distill.student", "resnet8", "--distill.replay", "40"]
    return cli.main([stage, *words, "--out", str(out), *more])


def test_everything_is_told_once_though_a_run_stops_and_goes_on(
    teacher_onnx: Path, tmp_path: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mekd.engine import distill as module

    out, words = tmp_path / "run", ["--engine.track", "[wandb]"]
    real, taken = module.take_step, []

    def breaks(*arguments: Any, **more: Any) -> Any:
        taken.append(1)
        if len(taken) == 8:  # three steps behind the checkpoint of step 4
            raise RuntimeError("a crash")
        return real(*arguments, **more)

    monkeypatch.setattr(module, "take_step", breaks)
    with pytest.raises(RuntimeError, match="a crash"):
        run(teacher_onnx, out, *words)
    assert ("distill/loss", 6) in recorder.told
    monkeypatch.setattr(module, "take_step", real)
    assert run(teacher_onnx, out, *words) == 0
    assert recorder.told == wanted(out), "neither twice nor never"
    assert recorder.ids == [None, "closed", "made-up", "closed"]
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'mekd[plot]'")
    assert sorted(recorder.pictures) == sorted(name for name in PUBLIC if (out / name).exists()) != []
    assert (out / "samples" / "sent.png").exists(), "or this shows nothing"
    # Nothing is new: nothing is told. Another student: another series, and new pictures.
    recorder.told.clear()
    recorder.pictures.clear()
    assert run(teacher_onnx, out, *words) == 0
    assert not recorder.told and not recorder.pictures
    assert run(teacher_onnx, out, *words, "--distill.student", "resnet20") == 0
    assert {tag for tag, _ in recorder.told} == {
        "distill-2/loss",
        "distill-2/image",
        "distill-2/kl",
        "distill-2/agreement",
    }
    assert set(recorder.told.values()) == {1}


def test_a_tracker_that_fails_is_named_once_and_stops_nothing(
    teacher_onnx: Path, tmp_path: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    class Fails(Recorder):
        ids: list[str | None] = []  # noqa: RUF012

        def metrics(self, stage: str, step: int, values: Any) -> None:
            raise ConnectionError("the service\nis gone")

    class DoesNotOpen:
        def __init__(self, out: Path, id: str | None) -> None:
            raise OSError("no room")

    monkeypatch.setattr(track, "OPEN", {"wandb": Fails, "trackio": DoesNotOpen, "mlflow": recorder})
    assert run(teacher_onnx, tmp_path / "run", "--engine.track", "[wandb,trackio,mlflow]") == 0
    said = capsys.readouterr().out
    assert said.count("wandb (engine.track) failed") == 1 and "ConnectionError: the service is gone" in said
    assert said.count("trackio (engine.track) failed") == 1
    assert recorder.told == wanted(tmp_path / "run"), "the others are told everything"


def test_the_password_of_a_tracker_stays_out_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLFLOW_TRACKING_URI may hold one, and MLflow's errors name the address."""

    class Unreachable:
        def __init__(self, out: Path, id: str | None) -> None:
            raise ConnectionError("API request to https://me:s3@cret@mlflow.example.com/api failed, as to http://h/a@b")

    monkeypatch.setattr(track, "OPEN", {"mlflow": Unreachable})
    said: list[str] = []
    track.Tracks(["mlflow"], tmp_path, said.append).metrics("distill", {}, 1, {"loss": 1.0})
    assert len(said) == 1 and "cret" not in said[0]
    assert "https://…@mlflow.example.com/api failed, as to http://h/a@b" in said[0]


def test_nothing_is_tracked_unless_asked_and_it_is_no_part_of_the_fingerprint(
    teacher_onnx: Path, tmp_path: Path, recorder: type[Recorder]
) -> None:
    assert run(teacher_onnx, tmp_path / "run") == 0
    assert not recorder.told and not (tmp_path / "run" / track.TOLD).exists()
    assert run(teacher_onnx, tmp_path / "run", "--engine.track", "[wandb]") == 0, "it may be added later"
    assert run(teacher_onnx, tmp_path / "dry", "--engine.track", "[wandb]", "--dry-run") == 0
    assert not recorder.told


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("[comet]", ["engine.track is 'comet'", "'tensorboard'", "'mlflow'"]),
        ("[trackio]", ["not installed: pip install trackio"]),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused_before_the_run_begins(
    teacher_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    value: str, parts: list[str],
) -> None:  # fmt: skip
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "trackio" else real(name, *more)
    )
    assert run(teacher_onnx, tmp_path / "run", "--engine.track", value) == 2
    said = capsys.readouterr().err
    assert [part for part in parts if part not in said] == [], said
    assert not (tmp_path / "run").exists()


def tracks(names: list[str], out: Path) -> track.Tracks:
    def warn(line: str) -> None:
        raise AssertionError(line)

    return track.Tracks(names, out, warn)


def tell(told: track.Tracks, steps: Iterator[int] | range, picture: bool = False) -> None:
    for step in steps:
        told.metrics("distill", {"seed": 0}, step, {"loss": 1.0 / (step + 1), "none": None})
    if picture:
        told.picture("curves.png")
    told.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from PIL import Image

    out = tmp_path / "my-run"
    (out / "samples").mkdir(parents=True)
    for name in ("curves.png", "samples/sent.png"):
        Image.new("RGB", (8, 6), "red").save(out / name)
    return out


def test_tensorboard_holds_what_the_run_measured(folder: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell(tracks(["tensorboard"], folder), range(3))
    tell(tracks(["tensorboard"], folder), range(5), picture=True)  # goes on
    tell(tracks(["tensorboard"], folder), range(5), picture=True)
    events = EventAccumulator(str(folder / "tracks" / "tensorboard"), {"scalars": 0, "images": 0})
    events.Reload()
    assert events.Tags()["scalars"] == ["distill/loss"] and events.Tags()["images"] == ["curves.png"]
    points = [(point.step, round(point.value, 5)) for point in events.Scalars("distill/loss")]
    assert points == [(step, round(1.0 / (step + 1), 5)) for step in range(5)]
    assert [(image.width, image.height) for image in events.Images("curves.png")] == [(8, 6)]


def test_a_whole_run_in_tensorboard(teacher_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    assert run(teacher_onnx, out, "--engine.track", "[tensorboard]") == 0
    events = EventAccumulator(str(out / "tracks" / "tensorboard"), {"scalars": 0, "images": 0})
    events.Reload()
    found = Counter((tag, point.step) for tag in events.Tags()["scalars"] for point in events.Scalars(tag))
    assert found == wanted(out) and found
    assert set(events.Tags()["images"]) == {name for name in PUBLIC if (out / name).exists()}


def test_mlflow_goes_on_in_the_same_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    tell(tracks(["mlflow"], folder), range(3))
    tell(tracks(["mlflow"], folder), range(5), picture=True)
    client = MlflowClient(f"file:{tmp_path / 'mlruns'}")
    experiment = client.get_experiment_by_name("mekd")
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "distill/loss")
    assert sorted(point.step for point in history) == list(range(5))
    assert (found.info.run_name, found.info.status) == ("my-run", "FINISHED")
    assert [file.path for file in client.list_artifacts(found.info.run_id)] == ["curves.png"]


WANDB = """
import sys
from pathlib import Path
from mekd import track
told = track.Tracks(["wandb"], Path(sys.argv[1]), lambda line: sys.exit(line))
for step in range(int(sys.argv[2])):
    told.metrics("distill", {"seed": 0}, step, {"loss": 1.5})
told.picture("curves.png")
told.close()
"""


@pytest.mark.slow
def test_wandb_stays_offline_where_nobody_is_logged_in_and_knows_nothing_of_the_machine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for steps in (3, 5):
        command = [sys.executable, "-c", WANDB, str(folder), str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
    written = sorted((folder / "tracks" / "wandb").glob("offline-run-*/*.wandb"))
    told = json.loads((folder / track.TOLD).read_text())["wandb"]
    assert len(written) == 2 and all(told["id"] in path.name for path in written)
    content = b"".join(path.read_bytes() for path in written)
    assert b"distill/loss" in content
    import platform

    for private in (str(Path.cwd()), sys.executable, platform.node(), "sent.png"):
        assert private.encode() not in content, private


def test_trackio_is_told_as_its_functions_take_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in, whose functions have the names and arguments of trackio 0.43 that are used here."""
    calls: list[tuple[str, Any, Any]] = []
    stand_in = ModuleType("trackio")

    def init(project: str, name: str | None = None, *, resume: str = "never", embed: bool = True,
             auto_log_gpu: bool | None = None, auto_log_cpu: bool | None = None) -> None:  # fmt: skip
        calls.append(("init", project, (name, resume, embed)))

    def log(metrics: dict[str, Any], step: int | None = None) -> None:
        calls.append(("log", metrics, step))

    stand_in.__dict__.update(init=init, log=log, finish=lambda: calls.append(("finish", None, None)), Image=Path)
    monkeypatch.setitem(sys.modules, "trackio", stand_in)
    tell(tracks(["trackio"], folder), range(2))
    tell(tracks(["trackio"], folder), range(3), picture=True)
    (_, _, first), (_, _, second) = (call for call in calls if call[0] == "init")
    assert first == second and first[0].startswith("my-run-") and first[1:] == ("allow", False)
    logged = [call[1:] for call in calls if call[0] == "log"]
    assert logged[:3] == [({"distill/loss": 1.0 / (step + 1)}, step) for step in range(3)]
    assert list(logged[3][0]) == ["curves.png"] and len(logged) == 4


def test_the_doctors_trials_are_told_to_nobody(
    recorder: type[Recorder], tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.forecast([*tiny, "--engine.track", "[wandb, mlflow]", "--out", str(tmp_path / "out")]) == 0
    assert "it fits" in capsys.readouterr().out and not recorder.ids and not recorder.told
