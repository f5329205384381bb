"""The audit: its figures, what it asks, and whom it catches."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flat_settings import settings
from mekd import audit, cli, distances
from mekd.config import AuditConfig, Config, DataConfig
from mekd.data import DataError, open_source
from mekd.data.arrays import kept_apart
from mekd.engine.run import Run, StageError
from mekd.fingerprint import differing, fingerprint, store_size
from mekd.oracle.ledger import totals
from mekd.oracle.response import Response
from test_run import Recorder, run_stages

pytest.importorskip("ot", reason="POT measures distances, and cannot be imported: pip install 'mekd[audit]'")
FIELDS = (
    "w_answers", "w_answers_noise", "w_images", "w_images_noise", "nearest_share", "membership_auc", "membership_low",
    "membership_high",
)  # fmt: skip


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "audit.json").read_text())
    return found


def test_a_run_ends_with_an_audit_that_asked_nothing(tiny: list[str], tmp_path: Path) -> None:
    run = run_stages([*tiny, "--distill.replay", "40"], tmp_path)
    found = read(tmp_path)
    assert all(field in found for field in FIELDS)
    assert 0 <= found["w_answers"] <= 1 and found["w_images"] > 0 and 0 <= found["nearest_share"] <= 1
    assert found["membership_auc"] is None, "nothing was held out"
    assert found["nearness"]["sent"] == 60 and found["function"]["answers"] == 20
    assert run.asked("audit")["queries"] == 0
    for page in ("report.md", "README.md"):
        text = (tmp_path / page).read_text()
        assert "## Audit" in text and "Not known: it takes 300 private images or more" in text
    # Pictures of private images stay in the folder: the card is what is handed on.
    report, card = ((tmp_path / page).read_text() for page in ("report.md", "README.md"))
    for picture in ("samples/sent.png", "samples/nearest.png"):
        assert picture in report and picture not in card.replace(f"{picture} shows", "")
    assert "samples/classes.png" in card
    # A second time nothing is measured, and what another student says is.
    before = (tmp_path / "audit.json").stat().st_mtime_ns
    assert cli.main(["audit", *tiny, "--distill.replay", "40", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "audit.json").stat().st_mtime_ns == before


def test_what_an_audit_found_is_said_of_its_own_student_alone(tiny: list[str], tmp_path: Path) -> None:
    words = [*tiny, "--distill.replay", "40", "--out", str(tmp_path)]
    assert cli.main(["run", *words]) == 0
    for command in (["distill", *words, "--distill.lr", "0.05"], ["report", "--out", str(tmp_path)]):
        assert cli.main(command) == 0
    for page in ("report.md", "README.md", "report.html"):
        text = (tmp_path / page).read_text()
        assert "W(P_S, P_T)" not in text and "nearest.png)" not in text, page
    assert "Not measured: <code>mekd audit</code>" in text
    for command in ("audit", "report"):
        assert cli.main([command, "--out", str(tmp_path)]) == 0
    assert all("W(P_S, P_T)" in (tmp_path / page).read_text() for page in ("report.md", "README.md", "report.html"))


@pytest.mark.parametrize("response", ["label", "logits", "topk"])
def test_every_kind_of_answer_is_audited(response: str, tiny: list[str], tmp_path: Path) -> None:
    run_stages([*tiny, "--oracle.response", response, "--evaluate.enabled", "true"], tmp_path)
    found = read(tmp_path)
    assert 0 <= found["w_answers"] <= 1 and found["codes"]["nats"] >= 0
    assert found["test"]["answers"] == 360, "in an experiment also on the test images"
    assert found["nearness"]["sent"] == 20, "fresh queries are not kept"


def test_what_it_asks_is_booked_once_and_nothing_private(tiny: list[str], tmp_path: Path) -> None:
    words, seen = [*tiny, "--audit.budget", "60"], list[torch.Tensor]()
    run = run_stages(words, tmp_path, wrap_oracle=lambda oracle: Recorder(oracle, seen))
    assert run.asked("audit")["queries"] == 60 == totals(tmp_path / "ledger", "audit")["queries"]
    found = read(tmp_path)
    assert found["function"]["answers"] == 60 and found["function"]["images"] == "drawn for the audit"
    private = {image.numpy().tobytes() for image in audit.images_of(run.data, run.config, "local", 5000)}
    sent = {image.numpy().tobytes() for part in seen for image in part}
    assert len(sent) >= 60 and not sent & private
    count = len(seen)
    (tmp_path / "audit.json").unlink()
    run_stages(words, tmp_path, wrap_oracle=lambda oracle: Recorder(oracle, seen))
    assert len(seen) == count, "nothing was paid twice"


def test_what_step_1_saw_is_not_held_out_afterwards(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images that G and D have seen, declared unseen, would make an attack look like chance."""
    for stage in ("deprivatize", "distill"):
        assert cli.main([stage, *tiny, "--data.local_fraction", "0.3", "--out", str(tmp_path)]) == 0
    config, alone = (tmp_path / "config.yaml").read_bytes(), ["audit", "--out", str(tmp_path)]
    for name, was, now in (("audit.holdout", 0, 300), ("seed", 0, 1), ("data.local_fraction", 0.3, 0.4)):
        assert cli.main([*alone, f"--{name}", str(now)]) == 2
        said = capsys.readouterr().err
        assert f"{name} was {was} and is {now}. Set that back" in said and "another --out" in said
    assert not (tmp_path / "audit.json").exists() and (tmp_path / "config.yaml").read_bytes() == config
    assert cli.main(alone) == 0 and read(tmp_path)["membership_auc"] is None


def test_what_is_held_out_is_seen_by_nothing_else() -> None:
    kept, held = kept_apart(100, 30, 0)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(100)) and len(held) == 30
    assert not torch.equal(held, kept_apart(100, 30, 1)[1])
    config = Config(data=DataConfig(name="digits", size=16, local_fraction=0.5))
    before = open_source(config, torch.device("cpu"))
    data = open_source(dataclasses.replace(config, audit=AuditConfig(holdout=300)), torch.device("cpu"))
    assert data.count("local") == before.count("local") - 300 and data.count("held") == 300
    (seen, unseen) = (torch.cat([x for x, _ in data.once(part, 64)]) for part in ("local", "held"))
    everything = torch.cat([x for x, _ in before.once("local", 64)])
    assert torch.equal(torch.cat([seen, unseen]).flatten(1).unique(dim=0), everything.flatten(1).unique(dim=0))
    rows = {image.numpy().tobytes() for image in unseen}
    drawn = {image.numpy().tobytes() for step in range(40) for image in data.local(64).take(step)[0]}
    assert not drawn & rows - {image.numpy().tobytes() for image in seen}
    with pytest.raises(DataError, match=r"audit.holdout is 999, and there are 718 private images.*smaller than 718"):
        open_source(dataclasses.replace(config, audit=AuditConfig(holdout=999)), torch.device("cpu"))


def test_a_tree_and_photos_hold_out_too(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("train/a", "train/b"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (20, 20), (12 * i, 5 * len(name), 90)).save(tmp_path / name / f"{i}.jpg")
    for name, path in (("folder", tmp_path), ("photos", tmp_path / "train")):
        settings = DataConfig(name=name, path=str(path), size=16, local_fraction=1.0, loader="torchvision", workers=0)
        config = Config(data=settings, audit=AuditConfig(holdout=6))
        data = open_source(config, torch.device("cpu"), cache=tmp_path / "cache")
        assert (data.count("local"), data.count("held")) == (14, 6)
        held = torch.cat([x for x, _ in data.once("held", 4)])
        assert held.shape == (6, 3, 16, 16)


def test_photos_that_come_or_go_leave_membership_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They change which images are held out: those that step 1 saw would pass for unseen."""
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for i in range(20):
        Image.new("RGB", (20, 20), (12 * i, 50, 90)).save(tmp_path / "photos" / f"{i}.png")
    words = ["--data.path", str(tmp_path / "photos"), "--data.size", "16", "--audit.holdout", "6", "--seed", "1"]
    words += ["--deprivatize.batch", "8", "--deprivatize.width", "0.1", "--deprivatize.precision", "float32"]
    words += ["--oracle.num_classes", "10", "--engine.device", "cpu", "--out", str(tmp_path / "run")]

    def held() -> int:
        parsed = cli.parse(words)
        assert parsed is not None
        return len(audit._at_home(Run(*parsed))[1])

    assert cli.main(["deprivatize", *words, "--deprivatize.steps", "1"]) == 0 and held() == 6
    moved = (tmp_path / "photos" / "3.png").rename(tmp_path / "3.png")
    assert held() == 0 and "so that audit.holdout takes other images" in (said := capsys.readouterr().out)
    assert "put them back" in said
    moved.rename(tmp_path / "photos" / "3.png")
    assert held() == 6
    (tmp_path / "photos" / "4.png").unlink()
    assert cli.main(["deprivatize", *words, "--deprivatize.steps", "2"]) == 0
    assert "the audit will say nothing of membership" in capsys.readouterr().out and held() == 0
    assert "put them back" not in capsys.readouterr().out


def test_a_holdout_is_part_of_step_1_and_of_no_earlier_run() -> None:
    saved = fingerprint(Config(), "deprivatize")
    changed = fingerprint(Config(audit=AuditConfig(holdout=300)), "deprivatize")
    assert differing(saved, changed) == {"audit.holdout": (0, 300)}
    assert "audit.holdout" not in saved, "so that a run from before goes on"
    # An audit that asks changes no student.
    asking = Config(audit=AuditConfig(budget=100))
    assert settings(asking)["audit.budget"] == 100
    for stage in ("deprivatize", "holdout", "replay", "distill"):
        assert fingerprint(asking, stage) == fingerprint(Config(), stage)


def test_a_budget_leaves_room_for_what_the_audit_asks() -> None:
    def size(audit_budget: int) -> int:
        config = Config(audit=AuditConfig(budget=audit_budget))
        return store_size(dataclasses.replace(config, oracle=dataclasses.replace(config.oracle, budget=5000)))

    assert size(0) - size(400) == 400
    for name, value in (("holdout", -1), ("budget", -5), ("budget", 10)):
        with pytest.raises(ValueError, match=rf"audit.{name} is {value}; it must be"):
            AuditConfig(**{name: value})


def test_without_pot_a_run_goes_on_and_a_wish_is_refused(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    audit.audit(Run(Config(), tmp_path))
    assert "audit: off" in (said := capsys.readouterr().out) and "pip install 'mekd[audit]'" in said
    with pytest.raises(StageError, match=r"POT is missing.*pip install 'mekd\[audit\]'"):
        audit.audit(Run(Config(audit=AuditConfig(enabled=True)), tmp_path))


def test_answers_as_distributions() -> None:
    label = audit.probabilities(Response("label", None, torch.tensor([2, 0])), 3)
    assert label.tolist() == [[0, 0, 1], [1, 0, 0]]
    best = Response("topk", torch.tensor([[0.7, 0.1]]), torch.tensor([[1, -1]]))
    assert audit.probabilities(best, 4)[0].tolist() == pytest.approx([0.1, 0.7, 0.1, 0.1])
    logits = torch.tensor([[1.0, 2.0]])
    assert torch.allclose(audit.probabilities(Response("logits", logits), 2), logits.double().softmax(1))
    rounded = Response("probs", torch.tensor([[0.33, 0.33, 0.33]]))
    assert audit.probabilities(rounded, 3).sum() == pytest.approx(1)


GAN = [
    "--deprivatize.batch",
    "32",
    "--deprivatize.width",
    "0.5",
    "--deprivatize.alpha",
    "0",
    "--deprivatize.lr",
    "5e-4",
]


def audited(words: list[str], out: Path) -> dict[str, Any]:
    for stage in ("deprivatize", "distill", "audit"):
        assert cli.main([stage, *words, "--out", str(out)]) == 0
    return read(out)


@pytest.mark.slow
def test_a_generator_that_memorises_is_caught(tiny: list[str], tmp_path: Path) -> None:
    # 20 images, no dropout, long.
    words = [*tiny, *GAN, "--data.local_fraction", "0.2227", "--audit.holdout", "300"]
    words += ["--deprivatize.dropout", "0", "--deprivatize.augment", "false", "--deprivatize.steps", "1500"]
    found = audited([*words, "--distill.replay", "200"], tmp_path)
    assert found["membership"]["members"] == 20
    assert found["membership_low"] > 0.6 and found["membership_auc"] > 0.75
    assert found["nearness"]["of_one"] > 0.1, "0.01 by chance"
    report = cli.main(["report", "--out", str(tmp_path)])
    assert report == 0 and "Which private images step 1 saw can be told" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_a_generator_that_never_saw_the_images_is_not(tiny: list[str], tmp_path: Path) -> None:
    words = [*tiny, *GAN, "--data.local_fraction", "0.7", "--audit.holdout", "600", "--deprivatize.steps", "200"]
    audited([*words, "--distill.replay", "200"], tmp_path)
    parsed = cli.parse([*words, "--out", str(tmp_path)])
    assert parsed is not None
    run = Run(*parsed)
    # Two halves of what step 1 never saw: one of them stands for the private images.
    held = audit.images_of(run.data, run.config, "held", 5000)
    draw = audit.freeze(run.load_generator())
    found = audit._membership(run, draw, audit._drawn(run, draw, 4000), held[:300], held[300:])
    assert found["membership_low"] < 0.5 < found["membership_high"]
    drawn = audit._pixels(audit._drawn(run, draw, 1000))
    assert distances.share_of_one(drawn, audit._pixels(held[:300])) < 0.05, "no more than chance"
