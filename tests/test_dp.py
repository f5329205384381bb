"""DP-SGD of the discriminator: clipping, noise and sampling by hand, the count of epsilon, and what it refuses."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flat_settings import replaced
from interrupted import stopped_at
from mekd import cli, files
from mekd.config import Config, DeprivatizeConfig
from mekd.engine import dp
from mekd.engine.run import Run
from mekd.errors import UsageError
from mekd.fingerprint import fingerprint, resolve
from mekd.nets import Discriminator

pytest.importorskip("opacus", reason="Opacus counts epsilon, and cannot be imported: pip install 'mekd[dp]'")


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def discriminator() -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(16, 1, dropout=0.0, width=0.5)


def images(count: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, 1, 16, 16, generator=random(seed)) * 2 - 1


def gradients(net: Discriminator) -> torch.Tensor:
    return torch.cat([x.grad.flatten() for x in net.parameters() if x.grad is not None])


def test_without_noise_and_clipping_it_is_the_plain_gradient() -> None:
    net, real, fake = discriminator(), images(20), images(12, 2)
    spent = dp.Spent(0.0, 0.5, 1e-5)
    loss = dp.set_gradients(net, real, fake, spent, clip=1e9, expected=len(real), random=random())
    private = gradients(net)
    net.zero_grad()
    plain = F.softplus(-net(real)).mean() + F.softplus(net(fake)).mean()
    plain.backward()
    assert torch.allclose(private, gradients(net), atol=1e-6)
    assert float(loss) == pytest.approx(plain.item(), rel=1e-5)


def test_no_image_moves_it_by_more_than_the_clip() -> None:
    net, fake = discriminator(), images(12, 2)
    spent, clip = dp.Spent(0.0, 0.5, 1e-5), 0.01

    def of(real: torch.Tensor) -> torch.Tensor:
        dp.set_gradients(net, real, fake, spent, clip, expected=8.0, random=random())
        return gradients(net)

    many = images(9)
    without, with_it = of(many[:8]), of(many)
    assert (with_it - without).norm() == pytest.approx(clip / 8, rel=1e-3), "clipped, and to no less"
    assert torch.equal(of(many[:0]), of(images(0, 3))), "a step may draw none"


def test_each_image_is_clipped_as_one_by_one() -> None:
    net, real, fake, clip = discriminator(), images(7), images(5, 2), 0.3
    expected = torch.zeros_like(gradients_of(net, real[:1], -1))
    for x, sign, count in ((real, -1, 8.0), (fake, 1, 5)):
        for image in x.split(1):
            one = gradients_of(net, image, sign)
            assert one.norm() > clip, "nothing is clipped here"
            expected += one * clip / one.norm() / count
    net.zero_grad()
    dp.set_gradients(net, real, fake, dp.Spent(0.0, 0.5, 1e-5), clip, 8.0, random())
    assert torch.allclose(gradients(net), expected, atol=1e-6)


def gradients_of(net: Discriminator, image: torch.Tensor, sign: int) -> torch.Tensor:
    net.zero_grad()
    F.softplus(sign * net(image)).sum().backward()
    return gradients(net)


def test_the_noise_has_its_size_and_is_the_step_s_own() -> None:
    net, fake = discriminator(), images(12, 2)
    quiet, loud = (
        (dp.set_gradients(net, images(0), fake, dp.Spent(sigma, 0.5, 1e-5), 2.0, 8.0, random(5)), gradients(net))[1]
        for sigma in (0.0, 3.0)
    )
    noise = loud - quiet
    assert noise.std() == pytest.approx(3.0 * 2.0 / 8.0, rel=0.03) and abs(noise.mean()) < 0.05


def test_epsilon_is_what_opacus_says_and_grows_with_the_steps() -> None:
    from opacus.accountants import RDPAccountant

    spent, accountant = dp.Spent(1.5, 0.1, 1e-4), RDPAccountant()
    for _ in range(200):
        accountant.step(noise_multiplier=1.5, sample_rate=0.1)
    assert spent.epsilon(200) == pytest.approx(accountant.get_epsilon(1e-4))
    assert 0.0 == spent.epsilon(0) < spent.epsilon(100) < spent.epsilon(200)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("deprivatize.augment", True, "--deprivatize.augment false"),
        ("distill.pretrain", 10, "--distill.pretrain 0"),
        ("evaluate.baseline", True, "--evaluate.baseline false"),
        ("data.name", "folder", "--data.name photos"),
        ("deprivatize.generator", "other", "leave deprivatize.generator out"),
    ],
)
def test_what_else_looks_at_private_images_is_refused(key: str, value: Any, said: str) -> None:
    config = Config(deprivatize=DeprivatizeConfig(dp=3.0, augment=False))
    config = replaced("evaluate.baseline", False, config)
    dp.check(config)
    with pytest.raises(UsageError, match=r"deprivatize.dp is 3, and " + key) as found:
        dp.check(replaced(key, value, config))
    assert said in str(found.value)
    with pytest.raises(ValueError, match=r"deprivatize.dp is 0"):
        DeprivatizeConfig(dp=0.0)


def test_its_defaults_use_private_images_once() -> None:
    config = replaced("evaluate.enabled", True, Config(deprivatize=DeprivatizeConfig(dp=3.0)))
    resolved = resolve(dataclasses.replace(config, data=replaced("data.name", "digits").data), {}, lambda device: False)
    dp.check(resolved)
    assert resolved.deprivatize.augment is False and resolved.evaluate.baseline is False
    assert not {"deprivatize.dp", "deprivatize.clip"} & set(fingerprint(Config(), "deprivatize"))


def test_a_run_says_its_epsilon_and_is_resumed_exactly(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*tiny, "--deprivatize.dp", "5", "--deprivatize.alpha", "0", "--deprivatize.dropout", "0"]
    assert cli.main(["run", *words, "--out", str(tmp_path / "whole")]) == 0
    found = json.loads((tmp_path / "whole" / "dp.json").read_text())
    assert found["images"] == 144 and found["delta"] == pytest.approx(1 / 1440) and found["steps"] == 9
    assert 4.5 < found["epsilon"] <= 5.05
    assert "(epsilon, delta) = (" in capsys.readouterr().out
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "learned by DP-SGD" in card and "## Audit" not in card, "the audit's figures are not counted"
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["epsilon"] == found["epsilon"]
    assert not (tmp_path / "whole" / "samples" / "sent.png").exists(), "nobody stops step 1 by how near it comes"

    # In two parts: the noise of the first lasts for no more steps than it was made for.
    parts = [*words, "--out", str(tmp_path / "parts")]
    with stopped_at(4):
        assert cli.main(["deprivatize", *parts]) == 130, "as by Ctrl-C"
    assert cli.main(["deprivatize", *parts]) == 0
    one, other = (files.load(tmp_path / name / "checkpoints" / "deprivatize.pt") for name in ("whole", "parts"))
    for net in ("generator", "discriminator"):
        assert all(torch.equal(one["state"][net][key], other["state"][net][key]) for key in one["state"][net])
    assert cli.main(["deprivatize", *parts, "--deprivatize.steps", "90"]) == 2
    assert "spends epsilon" in (said := capsys.readouterr().err) and "take fewer steps" in said


def test_its_generator_and_its_answers_are_used_again(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where step 1 is not trained nothing of it is checked, and the card says the epsilon that the generator has."""
    first = str(tmp_path / "first")
    noised = [*tiny, "--deprivatize.alpha", "0", "--deprivatize.dp", "5", "--distill.replay", "24"]
    for stage in ("deprivatize", "distill"):
        assert cli.main([stage, *noised, "--out", first]) == 0
    found = json.loads((tmp_path / "first" / "dp.json").read_text())
    learning = [
        word for word in zip(tiny[::2], tiny[1::2], strict=True) if word[0].startswith(("--distill", "--engine"))
    ]
    words = [*(w for pair in learning for w in pair), "--distill.store", first]
    assert cli.main(["run", *words, "--out", str(tmp_path / "second")]) == 0, capsys.readouterr().err
    said = f"are ({found['epsilon']:.2f}, {found['delta']:.1e})-differentially private"
    assert said in (tmp_path / "second" / "README.md").read_text()
    assert said in (tmp_path / "second" / "report.html").read_text()

    def run(*more: str) -> Run:
        parsed = cli.parse([*tiny, "--deprivatize.generator", first, "--out", str(tmp_path / "third"), *more])
        assert parsed is not None
        return Run(*parsed)

    dp.check(run().config)
    assert dp.told(run()) == found == dp.told(run("--deprivatize.generator", f"{first}/checkpoints/deprivatize.pt"))
    (tmp_path / "first" / "dp.json").write_text(json.dumps({**found, "steps": 8}))
    assert dp.told(run()) is None, "of another generator"
    (tmp_path / "first" / "dp.json").write_text(json.dumps(found))
    assert dp.told(run("--distill.pretrain", "3")) is None, "its student learned from private images besides"
    with pytest.raises(UsageError, match=r"leave deprivatize.generator out, or leave deprivatize.dp out"):
        dp.check(run("--deprivatize.dp", "3").config)
