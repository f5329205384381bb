"""python -m mekd.kernels.hub: the kernels as a package of their own, as Hugging Face's kernel hub wants it."""

import ast
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from mekd.kernels.hub import main

ALONE = """
import importlib.util, sys
sys.modules["mekd"] = None  # importing it fails
spec = importlib.util.spec_from_file_location("any_name", sys.argv[1], submodule_search_locations=[sys.argv[2]])
package = importlib.util.module_from_spec(spec)
sys.modules["any_name"] = package
spec.loader.exec_module(package)
import torch
torch.manual_seed(0)
student, teacher = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
loss, grad = package.tempered_kl(
    student, teacher, torch.tensor(1.0), None, None, False, 0.01, "one", "rowmean", True
)
student.requires_grad_()
wanted = torch.nn.functional.kl_div(
    student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True
)
torch.testing.assert_close(loss, wanted.detach())
torch.testing.assert_close(grad, *torch.autograd.grad(wanted, student))
print(sorted(package.__all__))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    assert main(["--out", str(tmp_path / "hub")]) == 0
    return tmp_path / "hub"


def test_the_package_works_under_another_name_and_without_mekd(project: Path) -> None:
    package = project / "torch-ext" / "mekd"
    done = subprocess.run(
        [sys.executable, "-c", ALONE, package / "__init__.py", package],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tanh_l1_" in done.stdout and "tempered_kl_topk" in done.stdout


def test_it_imports_itself_relatively_and_else_what_the_hub_allows(project: Path) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton", "numpy"}
    for path in (project / "torch-ext" / "mekd").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            foreign = [name for name in names if name.split(".")[0] not in allowed]
            assert not foreign, f"{path.name} imports {foreign}"


def test_the_build_names_the_package_and_its_data(project: Path) -> None:
    build = (project / "build.toml").read_text()
    assert 'name = "mekd"' in build and "[torch-noarch]" in build and '"json"' in build
    assert (project / "torch-ext" / "mekd" / "tuning.json").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file")]) == 2
    assert "could not be written" in capsys.readouterr().err


#: What the hub's own package makes of the project: it reads build.toml, and loads what kernel-builder would lay out.
BY_THE_HUB = """
import json, shutil, sys
from pathlib import Path
from kernels import get_local_kernel
from kernels._rust import Build

project, repository = Path(sys.argv[1]), Path(sys.argv[2])
print(Build.open(project).general)
variant = repository / "build" / "torch-cuda"
shutil.copytree(project / "torch-ext" / "mekd", variant)
told = {"name": "mekd", "id": "mekd_0", "version": 0, "license": "Apache-2.0", "python-depends": [],
        "backend": {"type": "cuda"}}
(variant / "metadata.json").write_text(json.dumps(told))
print(get_local_kernel(repository).tempered_kl.__name__)
"""


def test_the_hubs_own_package_takes_it(tmp_path: Path) -> None:
    try:
        importlib.metadata.version("kernels")  # a folder of this project has the name of the package
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the hub's package is not installed: pip install kernels")
    if not torch.version.cuda:
        pytest.skip("the hub's package loads kernels for CUDA with a torch for CUDA alone")
    assert main(["--out", str(tmp_path / "project")]) == 0
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", BY_THE_HUB, str(tmp_path / "project"), str(tmp_path / "repository")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["General(backends=[Cuda])", "tempered_kl"]
    build = tmp_path / "project" / "build.toml"
    build.write_text(build.read_text().replace("backends", "backend"))
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=200)
    assert "Unknown field backend" in done.stderr, "it reads what it is given"
