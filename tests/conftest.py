"""What several tests need: a card or a reason, a small teacher as an ONNX file, the smallest run with every stage."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from forked import processes as processes
from hub_server import hub as hub
from mekd.nets import build
from mekd.oracle.export import Classifier, export


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")


@pytest.fixture(autouse=True)
def values_are_looked_at(request: pytest.FixtureRequest) -> None:
    """On a GPU nobody looks at values unless told: the tests that run there expect the errors of the CPU."""
    if request.node.get_closest_marker("gpu"):
        request.getfixturevalue("monkeypatch").setenv("MEKD_CHECK", "1")


LOADERS = {
    "dali": ("nvidia.dali", "pip install 'mekd[dali]'"),
    "torchvision": ("torchvision", "pip install 'mekd[vision]'"),
}


@pytest.fixture(params=LOADERS)
def loader(request: pytest.FixtureRequest) -> ModuleType:
    """Each of the modules that read images of files."""
    package, how = LOADERS[request.param]
    pytest.importorskip(package, reason=f"{package} is not installed: {how}")
    return importlib.import_module(f"mekd.data.{request.param}_loader")


@pytest.fixture(scope="session")
def teacher_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained ResNet8 for 1 x 16 x 16 pixels and 10 classes, with its logits spread out."""
    torch.manual_seed(0)
    net = build("resnet8", 10, 1)
    torch.nn.init.normal_(net.fc.weight, std=1.0)  # type: ignore[union-attr, arg-type]
    path = tmp_path_factory.mktemp("teacher") / "teacher.onnx"
    export(Classifier(net), path, (1, 16, 16))
    return path


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose output is what it was sent."""
    from onnx_files import echo

    return echo(tmp_path_factory.mktemp("small") / "echo.onnx")


def tiny_settings(teacher: Path) -> list[str]:
    settings = {
        "data.name": "digits", "data.size": 16, "teacher.onnx": teacher, "teacher.arch": "resnet8",
        "deprivatize.steps": 9, "deprivatize.batch": 8, "deprivatize.width": 0.1, "deprivatize.alpha": 0.5,
        "oracle.batch": 64,
        "distill.steps": 9, "distill.batch": 8, "distill.holdout": 20, "distill.eval_every": 3, "distill.coverage": 0,
        "engine.checkpoint_every": 4, "engine.log_every": 2, "engine.device": "cpu",
    }  # fmt: skip
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


@pytest.fixture
def tiny(teacher_onnx: Path) -> list[str]:
    """Settings of a run of all stages that takes seconds, with checkpoints in odd places."""
    return tiny_settings(teacher_onnx)


#: A student of the user's own, with what behaves otherwise in training.
OWN_STUDENT = """
from torch import nn


def small(num_classes, channels):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, num_classes),
    )
"""


@pytest.fixture(scope="session")
def finished(teacher_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of all stages, whose student is small() of OWN_STUDENT."""
    from mekd import cli

    folder = tmp_path_factory.mktemp("finished")
    (folder / "own_net.py").write_text(OWN_STUDENT)
    words = [*tiny_settings(teacher_onnx), "--distill.student", f"{folder / 'own_net.py'}:small"]
    words += [
        "--distill.replay",
        "40",
        "--oracle.price",
        "0.01",
        "--oracle.response",
        "topk",
        "--oracle.k",
        "3",
        "--oracle.decimals",
        "3",
    ]
    assert cli.main(["run", *words, "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def pushed_run(teacher_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a store, whose student is one of mekd's."""
    from mekd import cli

    out = tmp_path_factory.mktemp("private-place") / "run"
    words = [*tiny_settings(teacher_onnx), "--distill.student", "resnet8", "--distill.replay", "40"]
    assert cli.main(["run", *words, "--out", str(out)]) == 0
    return out
