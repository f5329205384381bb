"""What the simulation asked about real images: whose answers they are, of which images, and never paid for twice."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mekd.config import Config, DataConfig, EngineConfig, EvaluateConfig
from mekd.engine import asked, evaluate, parallel, preflight
from mekd.engine.run import Run, StageError
from mekd.nets import build
from mekd.oracle.export import Classifier, export
from mekd.oracle.ort import OnnxOracle
from mekd.pixels import to_float
from mekd.teacher_config import OracleConfig, TeacherConfig


class Images:
    """A source of these images, the test images and the private ones, dealt out to the processes."""

    image = (1, 16, 16)
    classes = tuple("0123456789")

    def __init__(self, images: Tensor) -> None:
        self.images, self.labels = images, torch.arange(len(images)) % 10

    def count(self, part: str) -> int:
        return len(self.images)

    def once(self, part: str, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        mine = parallel.part(len(self.images))
        yield from zip(self.images[mine].split(batch), self.labels[mine].split(batch), strict=True)


def images(seed: int, count: int = 30) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, 16, 16), dtype=torch.uint8, generator=generator)


@pytest.fixture
def config(teacher_onnx: Path) -> Config:
    return Config(
        data=DataConfig(name="digits", size=16), teacher=TeacherConfig(onnx=str(teacher_onnx)),
        oracle=OracleConfig(batch=64), engine=EngineConfig(device="cpu"),
        evaluate=EvaluateConfig(enabled=True, ask_teacher=True, baseline=True),
    )  # fmt: skip


def run_of(config: Config, out: Path, content: Tensor, **oracle: Any) -> Run:
    run = Run(replace(config, oracle=replace(config.oracle, **oracle)), out)
    run.__dict__["data"] = Images(content)
    return run


def answers(run: Run) -> Tensor:
    """What the teacher itself says of the images."""
    data: Any = run.data
    return OnnxOracle(run.teacher_onnx, "label").query(data.images).labels


def test_other_images_are_asked_about_anew_where_that_costs_nothing(config: Config, tmp_path: Path) -> None:
    first = run_of(config, tmp_path, images(0))
    assert torch.equal(evaluate.ask_test(first)[1], answers(first))
    found = asked.audited(first)
    assert found is not None and torch.equal(found[0], images(0)) and torch.equal(found[1].labels, answers(first))
    assert torch.equal(evaluate.ask_test(first)[1], answers(first)) and first.asked("evaluate")["queries"] == 30
    mixed = run_of(config, tmp_path, images(0).flip(0))
    assert torch.equal(evaluate.ask_test(mixed)[1], answers(mixed)) and first.asked("evaluate")["queries"] == 30
    for other in (images(1), images(2, 41)):  # as many, and more
        run = run_of(config, tmp_path, other)
        assert asked.audited(run) is None, "the answers are of other images"
        assert torch.equal(evaluate.ask_test(run)[1], answers(run))
        store, count = evaluate.ask_private(run)
        sent, answer, _ = store.read(slice(None))
        assert count == len(other) and torch.equal(sent, other) and torch.equal(answer.labels, answers(run))
    assert first.asked("evaluate")["queries"] == 30 + 2 * (30 + 41)


def test_another_baseline_learns_of_other_answers(config: Config, tmp_path: Path) -> None:
    evaluate.ask_private(run_of(config, tmp_path, images(0)))
    baseline = tmp_path / "checkpoints" / "baseline.pt"
    baseline.touch()
    evaluate.ask_private(run_of(config, tmp_path, images(0)))
    assert baseline.exists()
    evaluate.ask_private(run_of(config, tmp_path, images(1)))
    assert not baseline.exists()


@pytest.mark.parametrize("name", asked.PARTS)
@pytest.mark.parametrize("count", [30, 41])
def test_answers_that_were_paid_for_are_not_taken_for_those_to_other_images(
    config: Config, tmp_path: Path, name: str, count: int
) -> None:
    ask = {"evaluate-test": evaluate.ask_test, "evaluate-private": evaluate.ask_private}[name]
    ask(run_of(config, tmp_path, images(0), price=0.01))
    other = run_of(config, tmp_path, images(1, count), price=0.01)
    with pytest.raises(StageError, match=rf"{name}.pt is of 30 images; of the {count} .*, {count} were not.*delete"):
        ask(other)
    assert other.asked("evaluate")["queries"] == 30
    (tmp_path / "checkpoints" / f"{name}.pt").unlink()  # as it advises
    ask(other)
    assert other.asked("evaluate")["queries"] == 30 + count


def test_another_teacher_is_refused_before_anything_is_asked(config: Config, tmp_path: Path) -> None:
    torch.manual_seed(1)
    export(Classifier(build("resnet8", 10, 1)), tmp_path / "other.onnx", (1, 16, 16))
    out = tmp_path / "run"
    evaluate.ask_test(run_of(config, out, images(0)))
    other = replace(config, teacher=TeacherConfig(onnx=str(tmp_path / "other.onnx")))
    for run in (run_of(other, out, images(0)), run_of(config, out, images(0), response="label")):
        with pytest.raises(StageError, match=r"evaluate-test.pt is of another configuration: .*delete the file"):
            preflight._check_simulation(run)
        with pytest.raises(StageError, match=r"(teacher|oracle.response) was"):
            evaluate.ask_test(run)
    (out / "checkpoints" / "evaluate-test.pt").unlink()
    run = run_of(other, out, images(0))
    preflight._check_simulation(run)
    assert torch.equal(evaluate.ask_test(run)[1], answers(run))


def test_another_number_of_processes_pays_nothing_again(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads stand for the processes: two ask, then one and three find the answers."""
    own, meeting, told = threading.local(), threading.Barrier(1), dict[int, tuple[float, ...]]()

    def sum_of(*numbers: float) -> list[float]:
        told[own.rank] = numbers
        meeting.wait(60)
        total = [sum(column) for column in zip(*told.values(), strict=True)]
        meeting.wait(60)
        return total

    monkeypatch.setattr(parallel, "rank", lambda: own.rank)
    monkeypatch.setattr(parallel, "world", lambda: meeting.parties)
    monkeypatch.setattr(parallel, "barrier", lambda: meeting.wait(60))
    monkeypatch.setattr(parallel, "sum_of", sum_of)

    def ask(rank: int, run: Run) -> tuple[Tensor, Tensor, Tensor]:
        own.rank = rank
        labels = evaluate.ask_test(run)[1]
        store, count = evaluate.ask_private(run)
        assert count == 31
        sent, answer, _ = store.read(slice(None))
        return labels, sent, answer.labels

    own.rank = 0
    run, *others = (run_of(config, tmp_path, images(0, 31), price=0.01) for _ in range(3))
    expected = answers(run)
    for world in (2, 1, 3):
        meeting = threading.Barrier(world)
        told.clear()
        with ThreadPoolExecutor(world) as pool:
            found = list(pool.map(ask, range(world), [run, *others]))
        assert torch.equal(torch.cat([labels for labels, _, _ in found]), expected)
        assert all(torch.equal(sent, images(0, 31)) and torch.equal(named, expected) for _, sent, named in found)
        assert run.asked("evaluate")["queries"] == 62


def test_a_float_transport_gets_real_images_too(config: Config, tmp_path: Path) -> None:
    torch.manual_seed(0)
    export(Classifier(build("resnet8", 10, 1)), tmp_path / "float.onnx", (1, 16, 16), "float")
    config = replace(config, teacher=TeacherConfig(onnx=str(tmp_path / "float.onnx")))
    run = run_of(config, tmp_path / "run", images(0), transport="float")
    expected = OnnxOracle(run.teacher_onnx, "label", transport="float").query(to_float(images(0))).labels
    assert torch.equal(evaluate.ask_test(run)[1], expected)
    store, _ = evaluate.ask_private(run)
    sent, answer, _ = store.read(slice(None))
    assert torch.equal(sent, images(0)) and torch.equal(answer.labels, expected)
