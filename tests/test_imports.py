"""`pip install mekd` needs torch alone: what is heavier is imported where it is used."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Extras of pyproject.toml.
EXTRAS = [
    "triton",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "matplotlib",
    "yaml",
    "jsonargparse",
    "sklearn",
    "tqdm",
    "safetensors",
    "PIL",
    "timm",
    "torchvision",
    "nvidia.dali",
    "starlette",
    "uvicorn",
    "huggingface_hub",
    "mlflow",
    "pyarrow",
    "tensorboard",
    "trackio",
    "wandb",
]

#: Makes them look like packages that were never installed, to torch and to us.
WITHOUT = f"""
import sys
from importlib.machinery import PathFinder

found = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    if any(name == extra or name.startswith(extra + ".") for extra in {EXTRAS!r}):
        return None
    return found(name, path, target)

PathFinder.find_spec = staticmethod(find_spec)
for extra in {EXTRAS!r}:
    try:
        __import__(extra)
    except ImportError:
        continue
    raise SystemExit(f"{{extra}} can still be imported: this tests nothing")
"""

LOSSES = """
import torch
import mekd, mekd.functional, mekd.losses, mekd.nets
from mekd.functional import kd_loss
from mekd.losses import DeprivatizationLoss, MEKDLoss

def check(loss, leaf):
    loss.backward()
    assert leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0

student = torch.randn(4, 10, requires_grad=True)
check(kd_loss(student, torch.randn(4, 10), tau=4.0), student)
generator = torch.nn.Sequential(torch.nn.Linear(10, 12), torch.nn.Tanh())
student = torch.randn(4, 10, requires_grad=True)
check(MEKDLoss(generator)(student, probs=torch.randn(4, 10).softmax(-1)), student)
fake = torch.randn(4, requires_grad=True)
check(DeprivatizationLoss()(fake, torch.rand(4)), fake)
"""

HELP = """
import runpy
sys.argv = ["mekd", "--help"]
try:
    runpy.run_module("mekd", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    assert stop.code == 0, stop.code
"""


def run(*words: str, log: str = "") -> str:
    """What a fresh Python prints; nothing but log goes to stderr."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == log
    return done.stdout


def test_losses_and_help_need_nothing_but_torch() -> None:
    log = (
        "generator is a Sequential and not a mekd.nets.Generator: it is used as it is, without being folded, which is "
        "several times slower\n"
    )
    assert run("-c", WITHOUT + LOSSES + HELP, log=log).startswith("usage: mekd STAGE")


def test_the_import_costs_no_more_than_torch_where_the_extras_are_installed() -> None:
    # An import inside a try would pass the test above, and still cost its time and memory here.
    code = """
import sys, torch
before = set(sys.modules)
import mekd, mekd.functional, mekd.losses, mekd.nets, mekd.cli
print(*sorted(set(sys.modules) - before))
"""
    new = run("-c", code).split()
    assert "mekd.losses" in new
    assert [name for name in new if any(f"{name}.".startswith(f"{extra}.") for extra in EXTRAS)] == []


def test_help_of_the_module() -> None:
    said = run("-m", "mekd", "--help")
    assert said.startswith("usage: mekd STAGE") and "doctor" in said


def test_the_settings_know_neither_losses_nor_networks() -> None:
    # Without the package's __init__, which imports the losses for the user.
    code = f"""
import sys, types
package = types.ModuleType("mekd")
package.__path__ = [{str(ROOT / "mekd")!r}]
sys.modules["mekd"] = package
import mekd.config
print(*sorted(name for name in sys.modules if name.startswith("mekd.")))
"""
    light = {"checks", "codes", "config", "errors", "pixels", "reference", "teacher_config"}
    assert set(run("-c", code).split()) <= {f"mekd.{name}" for name in light}
