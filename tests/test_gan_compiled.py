"""Step 1 under torch.compile: three graphs, no breaks, no recompiles, and the same weights."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from mekd.config import EngineConfig
from mekd.engine.deprivatize import passes, take_step
from mekd.engine.train import adam
from mekd.losses import DeprivatizationLoss
from mekd.nets import Discriminator, Generator


def train(mode: str, steps: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    torch.manual_seed(0)
    generator, discriminator = Generator(6, 16, width=0.25), Discriminator(16, dropout=0.0)
    compute = passes(generator, discriminator, DeprivatizationLoss(), mode)
    adams = adam(generator, 2e-4), adam(discriminator, 2e-4)
    real, losses = torch.rand(8, 3, 16, 16) * 2 - 1, []
    for _ in range(steps):
        fake = compute.draw(torch.randn(8, 6))
        confidence = torch.rand(8)
        losses += [x.item() for x in take_step(compute, discriminator, *adams, real, fake, confidence).values()]
    return copy.deepcopy({**generator.state_dict(), **discriminator.state_dict()}), losses


def test_three_graphs_without_breaks_or_recompiles() -> None:
    expected, plain = train("off", 5)
    torch._dynamo.reset()
    counters.clear()
    got, losses = train("default", 5)
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"] and not counters["recompiles"]
    torch.testing.assert_close(losses, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_mode_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"engine\.compile is 'fast'.*reduce-overhead"):
        EngineConfig(compile="fast")
