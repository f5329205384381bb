"""The losses as modules: a temperature is a number that nobody who owns the module can change, or the user's tensor."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mekd import checks, functional
from mekd.losses import DeprivatizationLoss, DKDLoss, JSDLoss, KDLoss, LogitStandardizedKDLoss, MEKDLoss
from mekd.nets import Generator
from mekd.nets.frozen import freeze

Made = Callable[[Any], nn.Module]
MODULES: list[tuple[Made, Callable[..., Tensor]]] = [
    (KDLoss, functional.kd_loss),
    (LogitStandardizedKDLoss, functional.logit_standardized_kd_loss),
    (lambda tau: DKDLoss(2.0, 3.0, tau), lambda *x, tau: functional.dkd_loss(*x, alpha=2.0, beta=3.0, tau=tau)),
    (lambda tau: JSDLoss(0.3, tau), lambda *x, tau: functional.jsd_loss(*x, beta=0.3, tau=tau)),
]


def inputs(made: Made) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(4, 6, generator=random, dtype=torch.float64) for _ in range(2)]
    return [*logits, torch.tensor([0, 5, 2, 2])] if isinstance(made(1.0), DKDLoss) else logits


@pytest.mark.parametrize(("made", "function"), MODULES)
def test_whoever_owns_the_module_leaves_its_temperature_alone(made: Made, function: Callable[..., Tensor]) -> None:
    given = inputs(made)
    # 0.07 is no float32, and much less a bfloat16.
    wanted = function(*given, tau=torch.tensor(0.07, dtype=torch.float64))
    parent = nn.ModuleDict({"loss": made(0.07), "net": nn.Linear(2, 2)})
    saved = parent.state_dict()
    for owns in (
        lambda: parent.bfloat16(),
        lambda: parent.to("meta"),
        # As frameworks do that build a model without memory and load it afterwards.
        lambda: parent.to_empty(device="cpu").load_state_dict(saved),
    ):
        owns()
        assert torch.equal(parent["loss"](*given), wanted)
    assert list(saved) == ["net.weight", "net.bias"] and "tau=0.07" in repr(parent["loss"])


@pytest.mark.parametrize(("made", "function"), MODULES)
def test_a_tensor_that_the_user_passes_stays_that_tensor(made: Made, function: Callable[..., Tensor]) -> None:
    given, tau = inputs(made), torch.tensor(2.0, dtype=torch.float64)
    loss = made(tau)
    loss.bfloat16().to_empty(device="cpu")
    assert loss.tau is tau and not loss.state_dict() and "tau=tensor(2." in repr(loss)
    for value in (2.0, 0.5):
        tau.fill_(value)  # a schedule
        torch.testing.assert_close(loss(*given), function(*given, tau=value))


def test_a_temperature_is_made_into_a_tensor_once() -> None:
    checks._constant.cache_clear()
    loss, given = KDLoss(3.25), inputs(KDLoss)
    for _ in range(3):
        loss(*given)
    assert checks._constant.cache_info().misses == 1


def test_under_compile_another_number_is_another_graph_and_the_right_one() -> None:
    torch._dynamo.reset()
    loss, given = KDLoss(3.0), inputs(KDLoss)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for tau in (3.0, 1.5):
        loss.tau = tau
        torch.testing.assert_close(compiled(*given), functional.kd_loss(*given, tau=tau))
    torch._dynamo.reset()


@pytest.mark.parametrize("tau", [0.0, -1.0, math.inf, torch.tensor(-2.0), torch.tensor(math.inf), torch.ones(3)])
def test_a_temperature_is_checked_when_the_module_is_made(tau: Any) -> None:
    for made, _ in MODULES:
        with pytest.raises(ValueError, match="tau"):
            made(tau)
    with pytest.raises(ValueError, match="tau"):
        MEKDLoss(Generator(6, 16), tau)
    if not isinstance(tau, Tensor):
        with pytest.raises(ValueError, match="tau"):
            freeze(Generator(6, 16), tau)


@pytest.mark.parametrize("name", ["beta", "image", "floor"])
@pytest.mark.parametrize("value", ["1", None])
def test_what_is_no_number_is_named(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} is .*it must be a number"):
        MEKDLoss(Generator(6, 16), **{name: value})
    with pytest.raises(TypeError, match=r"alpha is .*it must be a number"):
        DeprivatizationLoss(value)


def test_a_picture_is_of_one_answer() -> None:
    student, teacher = (torch.randn(2, 6) for _ in range(2))
    loss, labels = MEKDLoss(Generator(6, 16, width=0.1, nuisance=2)), torch.tensor([0, 5])
    for given, named in (({}, "none"), ({"logits": teacher, "labels": labels}, "logits, labels"), ({"x": labels}, "x")):
        with pytest.raises(ValueError, match=f"targets given: {named}; give exactly one of logits, probs"):
            loss.teacher_image(6, **given)
    # A mask would be of the KL alone.
    with pytest.raises(ValueError, match="targets given: logits, mask; give exactly one"):
        loss.terms(student, teacher, mask=labels > 0)
    with pytest.raises(TypeError, match="n is a list; it must be a tensor"):
        loss(student, teacher, n=[[0.0, 1.0]])
