"""What a student learns of private images at home: of itself, exactly resumed, and sent to nobody."""

import json
import math
from pathlib import Path

import pytest
import torch

from interrupted import stopped_at
from mekd import cli, files
from mekd.config import Config, DistillConfig
from mekd.engine.pretrain import contrastive_loss, view
from mekd.engine.run import Run
from mekd.fingerprint import differing, fingerprint
from mekd.nets import build
from mekd.nets.features import Features, last_linear
from test_run import Recorder, run_stages


def test_the_loss_by_hand() -> None:
    axes = torch.eye(4)
    # Each image's views are one axis: its partner is at 1 / tau, the six others at 0.
    assert float(contrastive_loss(axes, 3 * axes)) == pytest.approx(math.log(math.exp(5) + 6) - 5, rel=1e-5)
    same = torch.ones(4, 2)
    assert float(contrastive_loss(same, same)) == pytest.approx(math.log(7), rel=1e-5)


def test_views_differ_stay_near_and_repeat_with_their_seed() -> None:
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    one, again = (view(images, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, again) and one.shape == images.shape and one.isfinite().all()
    assert not torch.allclose(one, view(images, torch.Generator().manual_seed(2)), atol=0.1)


def test_features_are_what_the_last_linear_layer_reads() -> None:
    net = build("resnet8", 10, 1).eval()
    with Features(net) as seen:
        logits = net(torch.zeros(3, 1, 16, 16))
    assert torch.allclose(last_linear(net)(seen.value), logits)
    with pytest.raises(ValueError, match="no linear layer"):
        last_linear(torch.nn.Conv2d(1, 1, 1))


def test_a_student_begins_with_it_and_the_teacher_sees_nothing_of_it(tiny: list[str], tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []
    words = [*tiny, "--distill.pretrain", "7", "--deprivatize.alpha", "0", "--distill.replay", "40"]
    run = run_stages(words, tmp_path / "one", wrap_oracle=lambda oracle: Recorder(oracle, seen))
    private = {image.numpy().tobytes() for part, _ in run.data.once("local", 64) for image in part}
    assert not {image.numpy().tobytes() for part in seen for image in part} & private
    plain = run_stages(words[: len(tiny)] + words[len(tiny) + 2 :], tmp_path / "two")
    queries = [one.asked("distill")["queries"] for one in (run, plain)]
    assert queries[0] == queries[1]
    weights = [files.load(one.out / "student.pt")["fc.weight"] for one in (run, plain)]
    assert not torch.equal(*weights)
    logged = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if row["stage"] == "pretrain"][-1] == 7


def test_it_is_resumed_exactly(tiny: list[str], tmp_path: Path) -> None:
    words = [*tiny, "--deprivatize.alpha", "0", "--distill.replay", "40", "--distill.pretrain", "8"]
    from mekd.engine import checkpoint, pretrain

    weights = []
    for name in ("whole", "parts"):
        out = tmp_path / name
        assert cli.main(["deprivatize", *words, "--out", str(out)]) == 0
        if name == "parts":  # stopped in the middle, as by Ctrl-C
            parsed = cli.parse([*words, "--out", str(out)])
            assert parsed is not None
            with stopped_at(5), pytest.raises(checkpoint.Interrupted, match="pretrain stopped at step 5 of 8, saved"):
                pretrain.pretrain(Run(*parsed))
        assert cli.main(["distill", *words, "--out", str(out)]) == 0
        weights.append(files.load(out / "student.pt"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_another_length_begins_the_student_anew_and_pays_nothing(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*tiny, "--deprivatize.alpha", "0", "--distill.replay", "40", "--out", str(tmp_path)]
    for stage in ("deprivatize", "distill"):
        assert cli.main([stage, *words]) == 0
    parsed = cli.parse(words)
    assert parsed is not None
    before = Run(*parsed).asked("distill")["queries"]
    assert cli.main(["distill", *words, "--distill.pretrain", "4"]) == 0
    assert "the answers stay" in capsys.readouterr().out
    assert cli.main(["distill", *words, "--distill.pretrain", "6"]) == 0
    assert Run(*parsed).asked("distill")["queries"] == before


def test_what_cannot_be(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"distill.pretrain is -1; it must be at least 0 steps"):
        DistillConfig(pretrain=-1)
    with pytest.raises(ValueError, match=r"distill.pretrain is 5 and distill.checkpoint 'a.pt'"):
        DistillConfig(pretrain=5, checkpoint="a.pt")
    own = tmp_path / "net.py"
    own.write_text(
        "from torch import nn\n"
        "def net(num_classes, channels):\n"
        "    return nn.Sequential(nn.Conv2d(channels, num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    words = [*tiny, "--distill.student", f"{own}:net", "--distill.pretrain", "5", "--out", str(tmp_path / "out")]
    assert cli.main(["run", *words]) == 2
    assert "no linear layer" in (said := capsys.readouterr().err) and "--distill.pretrain 0" in said


def test_earlier_runs_are_not_touched_by_it() -> None:
    before = fingerprint(Config(), "distill")
    assert "distill.pretrain" not in before
    now = fingerprint(Config(distill=DistillConfig(pretrain=9)), "distill")
    assert differing(before, now)["distill.pretrain"] == (0, 9) and differing(now, before)["distill.pretrain"] == (9, 0)
