"""mekd.compat against the packages themselves, where they are installed; none of them is needed otherwise."""

import os
from collections.abc import Callable
from inspect import signature
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mekd.compat import liger, modelopt, timm, torchdistill, torchtune, trl
from test_compat import DENSE, GAPS, hooked, pair, torchdistill_loss
from test_compat import SHAPES as LOGITS
from test_compat_liger import BETAS, log_pair
from test_compat_liger import SHAPES as LOG_PROBS

Loss = Callable[..., Tensor]


def installed(module: str, package: str) -> ModuleType:
    """The module, or a skipped test."""
    return pytest.importorskip(
        module, reason=f"compares with {package}, which cannot be imported here", exc_type=ImportError
    )


def same(ours: Loss, theirs: Loss, student: Tensor, *others: Tensor) -> None:
    """Both give the same value and the same gradient for the student, in float32."""
    a, b = (student.clone().requires_grad_() for _ in range(2))
    got, wanted = ours(a, *others), theirs(b, *others)
    upstream = torch.linspace(0.5, 2.0, wanted.numel(), device=wanted.device).reshape(wanted.shape)
    (got * upstream).sum().backward()
    (wanted * upstream).sum().backward()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def arguments_of(callee: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(p.name, p.default) for p in signature(callee).parameters.values()]


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize(
    ("arguments", "with_targets"),
    [
        # The plain KL. Without a beta the original cannot be made without an alpha.
        ({"beta": 0.5}, True),
        ({"beta": 0.5, "reduction": "none"}, True),
        ({"alpha": 0.0}, True),
        ({"alpha": 0.5}, False),
        # Both parts.
        ({"alpha": 0.3}, True),
        ({"alpha": 0.3, "beta": 2.0, "reduction": "mean"}, True),
        ({"alpha": 0.3, "beta": 2.0, "reduction": "sum"}, True),
        ({"alpha": 0.3, "label_smoothing": 0.1}, True),
    ],
)
@pytest.mark.parametrize("shape", LOGITS + DENSE)
def test_torchdistill(shape: tuple[int, ...], arguments: dict[str, Any], with_targets: bool, gap: float) -> None:
    theirs = installed("torchdistill.losses.mid_level", "torchdistill").KDLoss
    student, teacher = pair(shape, gap)
    targets = student.argmin(1) if with_targets else None
    original = theirs("head", "output", "fc", "input", 4.0, **arguments)
    same(hooked(torchdistill_loss(4.0, **arguments), targets), hooked(original, targets), student, teacher)


def test_torchdistill_signatures() -> None:
    theirs = installed("torchdistill.losses.mid_level", "torchdistill").KDLoss
    assert arguments_of(torchdistill.KDLoss) == arguments_of(theirs)
    assert arguments_of(torchdistill.KDLoss.forward) == arguments_of(theirs.forward)


class Given(nn.Module):
    """A network whose logits are known beforehand."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        # What timm asks of a network.
        self.num_classes, self.in_chans = logits.shape[1], 1
        self.pretrained_cfg = {"mean": (0.5,), "std": (0.5,)}
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("shape", LOGITS)
def test_timm(shape: tuple[int, ...], tau: float, gap: float) -> None:
    task = installed("timm.task", "timm").LogitDistillationTask
    student, teacher = pair(shape, gap)
    images, targets = torch.zeros(shape[0], 1, 2, 2), student.argmin(1)

    def theirs(entry: str, **weights: float) -> Loss:
        def loss(s: Tensor, t: Tensor) -> Tensor:
            others = {"temperature": tau, "device": torch.device("cpu"), "verbose": False}
            made = task(Given(s), Given(t), nn.CrossEntropyLoss(), **others, **weights)
            return made(images, targets)[entry]

        return loss

    def both(s: Tensor, t: Tensor) -> Tensor:
        return 0.3 * nn.functional.cross_entropy(s, targets) + 2.0 * timm.kd_loss(s, t, tau)

    same(lambda s, t: timm.kd_loss(s, t, tau), theirs("kd_loss"), student, teacher)
    same(both, theirs("loss", task_loss_weight=0.3, distill_loss_weight=2.0), student, teacher)


class Eps(float):
    """A float that Liger's kernel can cast where it runs in Triton's interpreter, which hands it over as it is."""

    def to(self, dtype: object) -> "Eps":
        return self


@pytest.fixture
def device() -> str:
    """Where Liger's kernels run."""
    installed("liger_kernel", "liger-kernel")
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Liger's kernels need a GPU, or TRITON_INTERPRET=1 in the environment")
    return "cpu"


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("shape", LOG_PROBS)
def test_liger_kl(shape: tuple[int, int], log_target: bool, reduction: str, gap: float, device: str) -> None:
    theirs = installed("liger_kernel.transformers.kl_div", "liger-kernel").LigerKLDIVLoss
    log_q, log_p = (x.to(device) for x in log_pair(shape, gap))
    eps = Eps(1e-3) if device == "cpu" else 1e-3
    same(
        liger.LigerKLDIVLoss(1e-3, reduction=reduction, log_target=log_target),
        theirs(eps, reduction=reduction, log_target=log_target),
        log_q,
        log_p if log_target else log_p.exp(),
    )


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("ignoring", [False, True])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shape", LOG_PROBS)
def test_liger_jsd(shape: tuple[int, int], beta: float, ignoring: bool, gap: float, device: str) -> None:
    theirs = installed("liger_kernel.transformers.jsd", "liger-kernel").LigerJSD
    log_q, log_p = (x.to(device) for x in log_pair(shape, gap))
    labels = None
    if ignoring:
        labels = torch.arange(shape[0], device=device)
        labels[1::2] = -100
    same(lambda q, p: liger.LigerJSD(beta)(q, p, labels), lambda q, p: theirs(beta)(q, p, labels), log_q, log_p)


def test_liger_signatures(device: str) -> None:
    kl = installed("liger_kernel.transformers.kl_div", "liger-kernel").LigerKLDIVLoss
    jsd = installed("liger_kernel.transformers.jsd", "liger-kernel").LigerJSD
    assert arguments_of(liger.LigerKLDIVLoss)[:1] == arguments_of(kl)[:1]
    assert arguments_of(liger.LigerKLDIVLoss)[1:] == arguments_of(nn.KLDivLoss)
    assert arguments_of(liger.LigerKLDIVLoss.forward) == arguments_of(kl.forward)
    assert arguments_of(liger.LigerJSD) == arguments_of(jsd)
    assert arguments_of(liger.LigerJSD.forward) == arguments_of(jsd.forward)


LANGUAGE = [(6, 7), (3, 4, 11)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", LANGUAGE)
@pytest.mark.parametrize("name", ["ForwardKLLoss", "ReverseKLLoss", "SymmetricKLLoss"])
def test_torchtune(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    theirs = getattr(installed("torchtune.modules.loss", "torchtune"), name)()
    ours, labels = getattr(torchtune, name)(), torch.zeros(shape[:-1], dtype=torch.int64)
    labels.view(-1)[1] = -100
    student, teacher = (x.to(dtype) for x in pair(shape))
    for normalize in (True, False):
        got, wanted = (loss(student, teacher, labels, normalize) for loss in (ours, theirs))
        torch.testing.assert_close(got, wanted, rtol=1e-5 if dtype == torch.float32 else 0.05, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
@pytest.mark.parametrize("shape", LANGUAGE)
def test_modelopt_and_trl(shape: tuple[int, ...], reduction: str, dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in pair(shape))
    close = {"rtol": 1e-5 if dtype == torch.float32 else 0.05, "atol": 1e-6 if dtype == torch.float32 else 0.05}
    distill = installed("modelopt.torch.distill.losses", "nvidia-modelopt")
    found = [x.LogitsDistillationLoss(3.0, reduction)(student, teacher) for x in (modelopt, distill)]
    torch.testing.assert_close(*found, **close)
    trainer = installed("trl.experimental.gkd.gkd_trainer", "trl").GKDTrainer
    for beta in (0, 0.3, 1):
        arguments = student, teacher, None, beta, 2.0, reduction
        torch.testing.assert_close(
            trl.generalized_jsd_loss(*arguments), trainer.generalized_jsd_loss(*arguments), **close
        )
