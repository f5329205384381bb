"""What is looked at at home: how near what will be sent comes to a private image, and what a student says of these."""

import json
from pathlib import Path

import pytest
import torch

from mekd import cli
from mekd.config import Config, DataConfig
from mekd.distances import nearest
from mekd.engine import deprivatize
from mekd.engine.private import private_images
from mekd.engine.run import Run


def test_the_nearest_private_image_and_how_far_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    private = torch.randint(0, 256, (3000, 3, 8, 8), dtype=torch.uint8, generator=generator)
    same, darker = private[2500], (private[7] * 0.4 + 20).to(torch.uint8)
    other = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=generator)
    apart, which = nearest(torch.stack([same, darker, other, torch.full_like(other, 90)]), private)
    assert which[:2].tolist() == [2500, 7]
    assert apart[0] < 1e-3 and apart[1] < 0.05, "a picture is the same however dark it is"
    assert 1.0 < apart[2] < 1.42 and apart[3] == pytest.approx(1, abs=0.01), "one colour is like nothing"
    among, neighbours = nearest(private[[5, 6]], private, torch.tensor([5, 6]))
    assert not {5, 6} & set(neighbours.tolist()) and among.min() > 0.9


def test_of_many_private_images_some_are_looked_at_and_none_twice(tmp_path: Path) -> None:
    run = Run(Config(data=DataConfig(name="digits", size=16, local_fraction=1.0)), tmp_path)
    whole = private_images(run, most=5000)
    some = private_images(run, most=300)
    assert len(whole) == run.data.count("local") and 200 < len(some) <= 300
    every = -(-len(whole) // 300)
    assert torch.equal(some, whole[::every])


@pytest.mark.parametrize(("sent", "said"), [(0.26, True), (0.29, False)])
def test_a_generator_that_knows_its_images_by_heart_is_spoken_of(
    sent: float, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"sent_to_private": sent, "private_to_private": 0.33}
    monkeypatch.setattr(deprivatize.private, "show_what_is_sent", lambda run: found)
    monkeypatch.setattr(Run, "generator_digest", "digest")
    deprivatize._show_what_is_sent(Run(Config(), tmp_path))
    printed = capsys.readouterr().out
    assert ("by heart" in printed) == said and f"{sent:.2f} from the nearest private image" in printed


def test_a_run_shows_what_it_will_send_before_it_does(tiny: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert cli.main(["deprivatize", *tiny, "--deprivatize.alpha", "0", "--out", str(out)]) == 0
    assert not (out / "holdout").exists(), "nothing was asked"
    found = json.loads((out / "sent.json").read_text())
    assert found["private_images"] == 144 and 0 < found["private_to_private"] < found["sent_to_private"] < 1.5
    assert (out / "samples" / "sent.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["distill", *tiny, "--deprivatize.alpha", "0", "--out", str(out)]) == 0
    assert cli.main(["report", "--out", str(out)]) == 0, "report reads the run's own config"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["private_images"] == 144 and 1 <= summary["private_classes"] <= 10
    assert summary["sent_to_private"] == found["sent_to_private"] and 0.1 <= summary["private_confidence"] <= 1
    report = (out / "report.md").read_text()
    assert "not measured" not in report and "test accuracy" not in report and "always the most frequent class" in report
    assert "at home, on 144 private images" in report and "samples/sent.png" in report
    page = (out / "report.html").read_text()
    assert "144 private" not in page and "test accuracy</dt>" not in page and "agreement, held-out images" in page
