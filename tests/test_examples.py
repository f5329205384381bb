"""The scripts of examples/, for ten steps each; and timm's without the lines that are ours, which is plain training."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.slow


def run(script: Path, *words: object) -> str:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, str(script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loss_of(said: str, step: int) -> float:
    found = re.search(rf"step {step} loss ([\d.]+)", said)
    assert found is not None, said
    return float(found[1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for name in "abc":
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for i in range(8):
            pixels = random.integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / "train" / name / f"{i}.png")
    return tmp_path / "data"


WORDS = ("--model", "resnet10t", "--size", 32, "--batch", 8, "--workers", 0, "--steps", 10)


def test_timm_distils_by_its_marked_lines(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="timm is not installed: pip install 'mekd[examples]'")
    lines = (EXAMPLES / "timm_train.py").read_text().splitlines(True)
    ours = [line for line in lines if line.endswith("# mekd\n")]
    assert len(ours) == 8, "a patch of ten lines at most, and what README says"
    plain = tmp_path / "plain.py"
    plain.write_text("".join(line for line in lines if line not in ours))
    assert "mekd" not in plain.read_text().partition('"""\n')[2].partition('"""\n')[2]
    distilled = loss_of(run(EXAMPLES / "timm_train.py", folder, *WORDS, "--teacher", "resnet10t"), 10)
    labels_alone = loss_of(run(EXAMPLES / "timm_train.py", folder, *WORDS, "--teacher", "resnet10t", "--alpha", 0), 10)
    assert loss_of(run(plain, folder, *WORDS), 10) > 0 and distilled != labels_alone


def test_lightning(tmp_path: Path) -> None:
    for package in ("lightning", "sklearn"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'mekd[examples]'")
    said = run(EXAMPLES / "lightning_module.py", "--steps", 10)
    assert loss_of(said, 10) > 0
    assert float(said.split()[-1]) > 0.2, "more than chance, by ten steps"


def test_accelerate() -> None:
    for package in ("accelerate", "sklearn"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'mekd[examples]'")
    assert loss_of(run(EXAMPLES / "accelerate_train.py", "--steps", 20), 20) < loss_of(
        run(EXAMPLES / "accelerate_train.py", "--steps", 10), 10
    )
    assert loss_of(run(EXAMPLES / "accelerate_train.py", "--steps", 10, "--precision", "bf16"), 10) > 0
