"""The stages at ImageNet's shapes, 1000 classes and 224 px, for a few steps; and what doctor says of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.tree import write
from ledger_teacher import accounts
from mekd import cli, data
from mekd.oracle.export import Classifier, export

CONFIG = Path(__file__).parent.parent / "configs" / "imagenet.yaml"


class Cheap(nn.Module):
    """1000 logits of a 224-px image for next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 32, 32), nn.Linear(8, 1000)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv(images).mean((2, 3)))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The shipped configuration with a small tree, a cheap teacher and a small student."""
    folder = tmp_path_factory.mktemp("imagenet")
    write(data.load("digits", None, 32), folder / "tree", 40, 20)
    torch.manual_seed(0)
    export(Classifier(Cheap()), folder / "teacher.onnx", (3, 224, 224))
    settings = {
        "config": CONFIG, "data.path": folder / "tree", "data.workers": 1, "teacher.onnx": folder / "teacher.onnx",
        "oracle.batch": 4, "deprivatize.steps": 2, "deprivatize.batch": 2, "deprivatize.alpha": 0.5,
        "distill.steps": 2, "distill.batch": 2, "distill.coverage": 0,
        "distill.replay": 0, "distill.holdout": 4, "distill.student": "torchvision:mobilenet_v3_small",
        "engine.device": "cpu", "evaluate.enabled": "false",
    }  # fmt: skip
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


@pytest.mark.slow
def test_a_few_steps_of_both_stages(words: list[str], tmp_path: Path) -> None:
    for stage in ("deprivatize", "distill"):
        assert cli.main([stage, *words, "--out", str(tmp_path)]) == 0
    counts = list(accounts(tmp_path).values())
    assert {name: count["queries"] for name, count in accounts(tmp_path).items()} == {
        "deprivatize": 4, "distill": 4, "holdout": 4,
    }  # fmt: skip
    assert sum(count["bytes_up"] for count in counts) == 12 * 3 * 224 * 224
    assert sum(count["bytes_down"] for count in counts) == 12 * 1000 * 4
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(torch.tensor(row[key]).isfinite() for row in rows for key in row if key.startswith("loss"))


def test_doctor_says_what_it_will_need(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = next(Path(words[words.index("--data.path") + 1]).glob("train/*/*.jpg"))
    whole = broken.read_bytes()
    broken.write_bytes(b"no picture")
    try:
        given = ["--config" if word == "--config" else word for word in words]
        small = ["--data.size", "32", "--data.resize", "32", "--deprivatize.width", "0.1"]
        own = given.index("--teacher.onnx")
        status = cli.main(["doctor", *given[:own], *given[own + 2 :], *small])
    finally:
        broken.write_bytes(whole)
    said = capsys.readouterr().out
    assert status == 0, said
    assert "train: 40 images in 10 classes; 1 CANNOT be read" in said and str(broken) in said
    # 2 steps of 2 in step 1, 4 held out, 2 steps of 2 in step 2; 3 x 32 x 32 bytes up, 10 probabilities down.
    assert "deprivatize: 4 queries, 0.00 GB up" in said and "distill: 8 queries" in said
    table = [line[:38].strip() for line in said.splitlines() if line[38:49].endswith(" M")]
    assert table == ["deprivatize, G and D", "distill, mobilenet_v3_small and G", "of both, the teacher's answers"]
    assert "it fits" in said


def test_doctor_does_not_say_that_it_fits_of_data_it_did_not_see(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data.name", "folder", "--data.path", str(tmp_path / "nowhere"), "--data.size", "16"]
    words += [
        "--teacher.arch",
        "resnet8",
        "--deprivatize.width",
        "0.1",
        "--deprivatize.alpha",
        "0.5",
        "--engine.device",
        "cpu",
    ]
    assert cli.main(["doctor", *words]) == 1
    said = capsys.readouterr().out
    assert "nowhere' was NOT looked at" in said and "1000 classes are assumed" in said


def test_memory_of_steps_is_told_from_what_is_done_once() -> None:
    from mekd.engine.profile import peaks_mb

    def work(mark: Callable[[], None]) -> None:
        torch.zeros(8_000_000)  # 32 MB, before the first step has ended
        mark()
        kept = torch.zeros(1_000_000)
        mark()
        mark()
        del kept
        torch.zeros(4_000_000)

    whole, inside = peaks_mb(work)
    assert 32 <= whole < 33 and 4 <= inside < 5
    assert peaks_mb(lambda mark: torch.zeros(1_000_000))[1] == 0


def test_doctor_sees_the_memory_of_an_image_beside_what_is_done_once(tmp_path: Path) -> None:
    """Folding a generator of many classes holds more than the steps of a few images: their difference was 0."""
    from mekd import forecast
    from mekd.config import Config, DataConfig, DeprivatizeConfig, EngineConfig, TeacherConfig
    from mekd.engine.run import Run

    config = Config(
        data=DataConfig(name="folder", path="nowhere", size=16), teacher=TeacherConfig(onnx="nowhere"),
        deprivatize=DeprivatizeConfig(width=0.1), engine=EngineConfig(device="cpu"),
    )  # fmt: skip
    needs = list(forecast.stages(Run(config, tmp_path), 1000, (3, 16, 16)))
    for need in needs[:2]:
        assert need.image_mb > 0.02, need
        assert need.most_mb >= need.held_mb + need.batch * need.image_mb and need.once_mb > need.held_mb, need


def test_memory_that_does_not_suffice_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mekd import forecast
    from mekd.config import Config, DataConfig, DeprivatizeConfig, DistillConfig, EngineConfig, TeacherConfig

    monkeypatch.setattr(forecast, "memory_mb", lambda device: 1.0)
    config = Config(
        data=DataConfig(name="digits", size=16), teacher=TeacherConfig(arch="resnet8"),
        deprivatize=DeprivatizeConfig(alpha=0.5, width=0.1, budget=10), distill=DistillConfig(replay=100),
        engine=EngineConfig(device="cpu"),
    )  # fmt: skip
    assert forecast.forecast(config, tmp_path) == 1
    said = capsys.readouterr().out
    assert "does NOT fit" in said and "teacher, resnet8" in said
    assert "budget 10: it will NOT reach to the end" in said
    # The queries of both stages and the bytes, to the last one: 20,000 steps of 64, and 512 + 100.
    assert forecast.queries_of(config) == [("deprivatize", 1280000), ("distill", 612)]
    assert f"{1280000 * 256 / 1e9:.2f} GB up, {1280000 * 40 / 1e9:.2f} GB down" in said


def test_the_configuration_is_the_papers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--config", str(CONFIG), "--print_config"]) == 0
    said = capsys.readouterr().out
    assert "torchvision:resnet50" in said and "torchvision:resnet34" in said
