"""Problems of every kind for the losses, their true results, and how far off a backend may be.

The truth is the formula of mekd.reference for the rows that count, weighted and reduced here and differentiated by
autograd, in float64 on the inputs as they were rounded. The same in float32 says what plain arithmetic loses. The tests
of the ops and `mekd selftest` share them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mekd import reference
from mekd.functional import discriminator_loss, dkd_loss, generator_loss, image_l1_loss, jsd_loss, kd_loss

ROW_KINDS = [
    # tempered_kl: a teacher that shows its logits.
    "logits",
    # tempered_kl: an API that answers probabilities, which are tempered again.
    "probs",
    # tempered_kl_labels: an API that answers a label.
    "labels",
    # tempered_kl_topk: the missing mass is shared among the other classes ...
    "spread",
    # ... or left out, which makes classes of probability exactly 0 ...
    "drop",
    # ... or a bucket, beside named classes of which every other row has one less.
    "tail",
    # dkd: two softmaxes a row, one without the target.
    "dkd",
    # jsd: the mixture ...
    "jsd",
    # ... its limit KL(p || q), a branch of its own ...
    "jsd-forward",
    # ... its limit KL(q || p) ...
    "jsd-reverse",
    # ... the skewed divergences, KL(p || m) and KL(q || m) alone ...
    "jsd-skew",
    "jsd-skew-reverse",
    # ... and log-probabilities that are taken as they are.
    "jsd-log",
]
IMAGE_KINDS = [
    # tanh_l1: two pre-activations.
    "tanh",
    # tanh_l1: a pre-activation and a finished image.
    "finished",
    # tanh_l1: two finished images.
    "images",
    # tanh_l1_: the gradient is written over the student.
    "in-place",
]
GAN_KINDS = [
    # gan_generator: y was computed before ...
    "confidence",
    # ... is taken from logits ...
    "gan-logits",
    # ... from probabilities ...
    "gan-probs",
    # ... or is 1, with a teacher that answers labels.
    "gan-label",
    # gan_generator: the other GAN loss.
    "minimax",
    # gan_discriminator: two gradients.
    "discriminator",
]
KINDS = ROW_KINDS + IMAGE_KINDS + GAN_KINDS
SHAPES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(ROW_KINDS, (6, 7)),
    **dict.fromkeys(IMAGE_KINDS, (4, 3, 5, 5)),
    **dict.fromkeys(GAN_KINDS, (6, 7)),
}
TOPK_KINDS = ("spread", "drop", "tail")
IGNORED = -100
BETAS = {"jsd": 0.3, "jsd-forward": 0.0, "jsd-reverse": 1.0, "jsd-log": 0.6}
#: kd_loss by its direction, skewed: the mixture's share of the teacher, and what is compared with it.
SKEWED = {"jsd-skew": "forward", "jsd-skew-reverse": "reverse"}
SKEW = 0.2


@dataclass
class Problem:
    """One call of a loss: what gets a gradient, what it is compared with, and the arguments beside."""

    kind: str
    students: list[Tensor]
    target: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def function(self) -> Callable[..., Tensor]:
        """What a user calls."""
        if self.kind in IMAGE_KINDS:
            return image_l1_loss
        if self.kind == "discriminator":
            return discriminator_loss
        if self.kind in GAN_KINDS:
            return generator_loss
        if self.kind == "dkd":
            return dkd_loss
        return jsd_loss if self.kind in BETAS else kd_loss

    def loss(self, *students: Tensor, **others: Any) -> Tensor:
        """The loss of these students, or of its own."""
        return self.function(*(students or self.students), **{**self.target, **self.options, **others})


def make(
    kind: str, shape: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32, values: str = "plain",
    device: str = "cpu", seed: int = 0, **options: Any,
) -> Problem:  # fmt: skip
    """A problem of this kind. Shape: (..., C) for rows, (m, ...) for images, (m, C) for the GAN, d being (m,).

    values: "plain"; "near", student and teacher nearly equal; "gap", numbers 600 and 1200 apart.
    """
    shape = SHAPES[kind] if shape is None else shape
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, dtype=torch.float64)

    def logits(*size: int) -> Tensor:
        jumps = 600.0 * torch.randint(-1, 2, size, generator=random)
        return normal(*size) + jumps if values == "gap" else 3 * normal(*size)

    def to(x: Tensor) -> Tensor:
        return x.to(device, dtype)

    if kind in IMAGE_KINDS:
        a = logits(*shape) / 2
        # Never closer than rounding: the sign of the difference is the gradient.
        away = (0.5 + torch.rand(shape, generator=random, dtype=torch.float64)) * normal(*shape).sign()
        b = (a / 3).tanh().atanh() + 1e-3 * away if values == "near" else logits(*shape) / 2
        a = a / 3 if values == "near" else a
        if kind == "finished":
            b = a.tanh() + 1e-3 * away if values == "near" else b.tanh()
        flags = {"tanh": kind != "images", "finished": kind == "finished", "inplace": kind == "in-place"}
        return Problem(kind, [to(a)], {"teacher": to(b)}, {**flags, **options})

    if kind in GAN_KINDS:
        m, answer = shape[0], logits(*shape)
        d = logits(m) if values == "gap" else (2e-3 if values == "near" else 2.0) * normal(m)
        if kind == "discriminator":
            other = logits(m + 3) if values == "gap" else d.new_ones(m + 3) + normal(m + 3)
            return Problem(kind, [to(d), to(other)], {}, options)
        answers: dict[str, dict[str, Any]] = {
            "confidence": {"confidence": to(answer.softmax(-1).amax(-1))},
            "gan-logits": {"logits": to(answer)},
            "gan-probs": {"probs": to(answer.softmax(-1))},
            "gan-label": {},
            "minimax": {"logits": to(answer), "minimax": True},
        }
        return Problem(kind, [to(d)], answers[kind], options)

    teacher, labels = logits(*shape), torch.randint(0, shape[-1], shape[:-1], generator=random).to(device)
    student = teacher + 1e-3 * normal(*shape) if values == "near" else logits(*shape)
    options = {"tau": 3.0, **options}
    if kind in TOPK_KINDS:
        # A tenth is missing: 1 - sum is then no difference of rounding errors.
        best, indices = (0.9 * teacher.softmax(-1)).topk(min(3, shape[-1]))
        if kind == "tail" and shape[-1] > 1:
            late = torch.arange(math.prod(shape[:-1])).reshape(shape[:-1]) % 2 == 1
            indices[..., -1].masked_fill_(late, -1)
        return Problem(kind, [to(student)], {"topk": (to(best), indices.to(device)), "rest": kind}, options)
    if kind == "dkd":
        return Problem(kind, [to(student)], {"teacher": to(teacher), "labels": labels}, {"beta": 2.0, **options})
    if kind in BETAS:
        as_log = kind == "jsd-log"
        if as_log:
            student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
        return Problem(
            kind, [to(student)], {"teacher": to(teacher)}, {"beta": BETAS[kind], "log_probs": as_log, **options}
        )
    if kind in SKEWED:
        return Problem(
            kind, [to(student)], {"logits": to(teacher)}, {"direction": SKEWED[kind], "skew": SKEW, **options}
        )
    target = {"logits": to(teacher), "probs": to(teacher.softmax(-1)), "labels": labels}[kind]
    return Problem(kind, [to(student)], {kind: target}, options)


def result(problem: Problem, impl: str, reduction: str = "none") -> list[Tensor]:
    """Loss and gradients as a training step gets them, with an upstream gradient of 1."""
    leaves = [x.detach().requires_grad_() for x in problem.students]
    # In place needs a tensor that somebody computed.
    students = [x.clone() for x in leaves] if problem.options.get("inplace") else leaves
    loss = problem.loss(*students, reduction=reduction, impl=impl)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def truth(problem: Problem, reduction: str = "none", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Loss and gradients by the formula, by autograd, in this dtype."""
    students = [x.detach().cpu().to(dtype).contiguous().requires_grad_() for x in problem.students]

    def wide(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(wide, x))
        if not isinstance(x, Tensor):
            return x
        # A float64 answer beside a float32 student stays what it is.
        return x.cpu().to(torch.promote_types(x.dtype, dtype) if x.is_floating_point() else x.dtype)

    target, options = ({name: wide(x) for name, x in d.items()} for d in (problem.target, problem.options))
    if problem.kind == "discriminator":
        real, fake = (_reduce(x, reduction, x, len(x)) for x in reference.gan_discriminator(*students))
        loss = real + fake
    else:
        losses, counted = _losses(problem.kind, students[0], target, options)
        loss = _reduce(losses, reduction, students[0], counted)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), students)]


def _reduce(losses: Tensor, reduction: str, student: Tensor, counted: int) -> Tensor:
    if reduction == "none":
        return losses
    divisors = {"sum": 1, "mean": student.numel(), "batchmean": student.shape[0], "rowmean": counted}
    return losses.sum() / max(divisors[reduction], 1)


def _losses(kind: str, x: Tensor, target: dict[str, Any], options: dict[str, Any]) -> tuple[Tensor, int]:
    """One loss for each row or sample, and how many count."""
    weights = options.get("weights")
    if kind in IMAGE_KINDS:
        # Samples of one pixel have no dimension to sum over.
        a, b = (y.unsqueeze(1) if y.dim() == 1 else y.flatten(1) for y in (x, target["teacher"]))
        losses = reference.tanh_l1(a, b, options["tanh"], options["finished"])
        return losses if weights is None else losses * weights, len(x)
    if kind in GAN_KINDS:
        y = torch.ones_like(x)
        if "confidence" in target:
            y = target["confidence"]
        elif target:
            answer = target["logits"].softmax(-1) if "logits" in target else target["probs"]
            y = answer.amax(-1).reshape(x.shape)
        return reference.gan_generator(x, y, options.get("alpha", 0.5), target.get("minimax", False)), x.numel()
    return _row_losses(kind, x, target, options)


def _row_losses(kind: str, x: Tensor, target: dict[str, Any], options: dict[str, Any]) -> tuple[Tensor, int]:
    dim, tau = options.get("dim", -1), torch.as_tensor(options["tau"], dtype=torch.float64).cpu()
    x = x.movedim(dim, -1)
    lead = x.shape[:-1]
    kept = torch.ones(lead, dtype=torch.bool)
    if options.get("mask") is not None:
        kept &= options["mask"]
    if "labels" in target:
        kept &= target["labels"] != options.get("ignore_index", IGNORED)
    if kind in ("drop", "tail"):
        kept &= (target["topk"][1].movedim(dim, -1) != -1).any(-1)
    rows, kept = x.reshape(-1, x.shape[-1])[kept.reshape(-1)], kept.reshape(-1)

    def of(y: Tensor) -> Tensor:
        """The rows of a target that count."""
        return y.movedim(dim, -1).reshape(-1, y.shape[dim])[kept]

    labels = target["labels"].reshape(-1)[kept] if "labels" in target else None
    if kind in ("logits", "probs"):
        losses = reference.tempered_kl(rows, of(target[kind]), tau, kind == "probs")
    elif kind == "labels":
        assert labels is not None
        losses = reference.tempered_kl_labels(rows, labels, tau, ignore_index=-1)
    elif kind in TOPK_KINDS:
        losses = reference.tempered_kl_topk(rows, of(target["topk"][0]), of(target["topk"][1]), tau, kind)
    elif kind == "dkd":
        assert labels is not None
        losses = reference.dkd(rows, of(target["teacher"]), labels, tau, options.get("alpha", 1.0), options["beta"])
    else:
        weighing = weights_of(kind, options)
        teacher = of(target["logits" if kind in SKEWED else "teacher"])
        losses = reference.jsd(rows, teacher, tau, *weighing, options.get("log_probs", False))
    scale = options.get("scale", "one" if kind in BETAS else "tau2")
    losses = losses * (tau * tau if scale == "tau2" else tau if scale == "tau" else 1.0)
    if options.get("weights") is not None:
        losses = losses * options["weights"].reshape(-1)[kept]
    everywhere = torch.zeros(len(kept), dtype=losses.dtype).index_put((kept.nonzero().squeeze(1),), losses)
    return everywhere.reshape(lead), int(kept.sum())


def weights_of(kind: str, options: dict[str, Any]) -> tuple[float, float, float]:
    """The jsd op's beta, left and right in a problem of this kind."""
    if kind in SKEWED:
        return (SKEW, 1.0, 0.0) if SKEWED[kind] == "forward" else (1 - SKEW, 0.0, 1.0)
    beta = options["beta"]
    return beta, beta or 1 - beta, 1 - beta or beta


#: One rounding to the dtype that a gradient is stored in: half a unit in the last place, and half the least number.
ROUNDING = {torch.bfloat16: (2.0**-8, 0.0), torch.float16: (2.0**-11, 2.0**-25)}


def check(problem: Problem, impl: str, reduction: str = "none") -> list[Tensor]:
    """Hold loss and gradients against the truth; returns them."""
    got = result(problem, impl, reduction)
    compare(problem, got, reduction)
    return got


def compare(problem: Problem, got: list[Tensor], reduction: str) -> float:
    """Hold a loss and gradients against the truth; returns the worst error as a share of what is allowed."""
    dtype, exact = problem.students[0].dtype, truth(problem, reduction)
    plain = exact if dtype == torch.float64 else truth(problem, reduction, torch.float32)
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32), f"{dtype} gave {got[0].dtype}"
    assert all(x.dtype == student.dtype for x, student in zip(got[1:], problem.students, strict=True))
    return max(
        within(x, exactly, plainly, f"{'gradient' if i else 'loss'} of {problem.kind}, {dtype}, {reduction}")
        for i, (x, exactly, plainly) in enumerate(zip(got, exact, plain, strict=True))
    )


def within(got: Tensor, exact: Tensor, plain: Tensor, name: str) -> float:
    """Raise unless got is as near to exact as 2 max|plain - exact| + 2^-22 max(1, max|exact|), and one rounding.

    Returns the worst error as a share of that.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)} instead of {tuple(exact.shape)}"
    x, finite = got.cpu().double(), exact.isfinite()
    if not finite.all():
        torch.testing.assert_close(x[~finite], exact[~finite], equal_nan=True, msg=lambda m: f"{name}: {m}")
    x, exact, plain = x[finite], exact[finite], plain.double()[finite]
    if not len(x):
        return 0.0
    size = max(1.0, exact.abs().max().item())
    if got.dtype == torch.float64:
        allowed = torch.full_like(exact, 2.0**-42 * size)
    else:
        lost = (plain - exact).abs().max().item()
        allowed = torch.full_like(exact, (2 * lost if lost < float("inf") else 0.0) + 2.0**-22 * size)
        relative, least = ROUNDING.get(got.dtype, (0.0, 0.0))
        allowed += relative * (exact.abs() + allowed) + least
    bad = ~((x - exact).abs() <= allowed)
    if bad.any():
        i = int(((x - exact).abs() / allowed).nan_to_num(float("inf")).argmax())
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {len(x)} off; worst {x[i]:.9g} instead of {exact[i]:.9g}, "
            f"{(x[i] - exact[i]).abs():.3g} apart where {allowed[i]:.3g} is allowed"
        )
    return ((x - exact).abs() / allowed).max().item()
