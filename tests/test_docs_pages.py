"""The pages for users, and the notebooks, do what they say: their code is run as it stands there."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from follow_page import ROOT, commands, follow, free_port, script
from mekd.functional import jsd_loss, kd_loss

START = sorted((ROOT / "docs" / "start").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("page", START, ids=[page.stem for page in START])
def test_page(page: Path, tmp_path: Path) -> None:
    for package in ("sklearn", "torchvision", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'mekd[demo,vision]'")
    said = follow(page, tmp_path)
    print(said)
    if page.stem == "address":
        assert (tmp_path / "work" / "predictions.csv").read_text().startswith("file,class,probability")
        assert "one-long-secret" not in (tmp_path / "work" / "runs" / "mine" / "config.yaml").read_text()


def test_there_are_pages_and_notebooks() -> None:
    assert [page.stem for page in START] == ["address", "imagenet", "kernels", "loss"] and len(NOTEBOOKS) == 2
    assert all("mekd" in script(page.read_text("utf-8")) for page in START)


def test_a_page_that_does_not_hold_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for number, (text, why) in enumerate((
        ("```sh\necho it took 3.5 s\n```\n```text\nit took 9 s\n```\n", ""),
        ("```sh\necho it took 3.5 s\n```\n```text\nit cost 9\n```\n", "not printed: it cost 9"),
        ('```yaml title="a.yaml"\nkey: 1\n```\n```sh\ngrep other a.yaml\n```\n', ""),
        ("```python\nraise SystemExit('stopped')\n```\n```sh\necho after\n```\n", "stopped"),
    )):  # fmt: skip
        page.write_text(text)
        folder = tmp_path / str(number)
        folder.mkdir()
        if number == 0:
            assert "3.5" in follow(page, folder)
        else:
            with pytest.raises(AssertionError, match=why or None):
                follow(page, folder)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[notebook.stem for notebook in NOTEBOOKS])
def test_notebook(notebook: Path, tmp_path: Path) -> None:
    for package in ("nbconvert", "ipykernel"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'mekd[docs]'")
    (tmp_path / "work").mkdir()
    copy = tmp_path / "work" / notebook.name
    copy.write_text(notebook.read_text("utf-8").replace("8000", free_port()))
    done = subprocess.run(
        [sys.executable, "-m", "nbconvert", "--execute", "--to", "notebook", "--inplace", copy],
        env=commands(tmp_path), text=True, timeout=1800, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    if notebook.stem == "distil_an_address":
        assert "named rightly" in copy.read_text() and (tmp_path / "work/runs/mine/student.onnx").exists()


def test_plain_pytorch_is_what_the_table_says() -> None:
    torch.manual_seed(0)
    s, t, labels, T = torch.randn(8, 10), torch.randn(8, 10), torch.randint(10, (8,)), 3.0
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    torch.testing.assert_close(
        kd_loss(s, t, tau=T, reduction="batchmean"),
        F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="batchmean") * T**2,
    )
    torch.testing.assert_close(
        jsd_loss(log_q, log_p, beta=0.0, log_probs=True), F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    )
    torch.testing.assert_close(kd_loss(s, labels=labels, tau=T, scale="one"), F.cross_entropy(s / T, labels))


def test_the_pictures_of_the_losses_are_those_that_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'mekd[plot]'")
    draw = [sys.executable, ROOT / "docs" / "draw_losses.py", "--out", tmp_path]
    subprocess.run(draw, check=True, env=commands(tmp_path) | {"HOME": str(Path.home())})
    shutil.rmtree(tmp_path / "bin")
    drawn = {path.name for path in tmp_path.iterdir()}
    page = (ROOT / "docs" / "losses.md").read_text("utf-8")
    assert drawn == {path.name for path in (ROOT / "docs" / "pictures").iterdir()}
    assert all(f"](pictures/{name})" in page for name in drawn)
