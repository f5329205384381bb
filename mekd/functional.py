"""The losses as functions. Arguments are checked here, formulas are in mekd.reference, and mekd.ops runs them.

Of logits that never exist as a whole, the losses are in mekd.linear.

Common to all: losses come as float32 (float64 for float64 inputs) whatever the inputs' dtype; a teacher that requires
grad is refused, and so are second derivatives. Raises ValueError or TypeError naming the argument; values (labels,
probabilities, indices, tau) are checked while they are read: on the CPU always, on a GPU with MEKD_CHECK=1 in the
environment. Within torch.func and forward-mode differentiation the formula runs, which has derivatives of every order;
within torch.func values are not checked. Arguments that several have:

- `weights` (...) multiplies each row's loss, `mask` (...) is True for the rows that count; a row that does not, or has
  a weight of 0, may hold anything.
- `reduction`: "none" gives (...), "sum" adds up, "rowmean" divides that by the rows that count, whatever their weights,
  "batchmean" by the size of dimension 0 and "mean" by all elements, both as F.kl_div does.
- `dim`: where the classes are, 1 for dense predictions (B, C, H, W).
- `tau`: a float or a 0-d tensor; under torch.compile only the tensor changes without a recompile.
- `impl` names a backend, "reference", "cpp" or "triton", and is an error where that cannot run.
"""

import math

import torch
from torch import Tensor

from mekd import ops
from mekd.arguments import check_direction, classes_last, dkd_arguments, jsd_arguments, kd_arguments
from mekd.checks import (
    DIRECTIONS,
    SAMPLE_REDUCTIONS,
    SLACK,
    check_choice,
    check_device,
    check_floating,
    check_rows,
    check_student,
    check_teacher,
    check_weight,
    rows_that_weigh,
    slack_of,
)
from mekd.reference import accumulation_dtype, hide


def kd_loss(
    student: Tensor,
    logits: Tensor | None = None,
    *,
    probs: Tensor | None = None,
    labels: Tensor | None = None,
    topk: tuple[Tensor, Tensor] | None = None,
    tau: float | Tensor = 1.0,
    tau_teacher: float | Tensor | None = None,
    scale: str = "tau2",
    direction: str = "forward",
    skew: float = 0.0,
    rest: str = "spread",
    floor: float = 0.0,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    dim: int = -1,
    reduction: str = "rowmean",
    impl: str | None = None,
) -> Tensor:
    """scale * KL(p_t^tau || softmax(student / tau)), the loss of Hinton et al. (2015), for any kind of answer.

    Exactly one target is given: logits, probs, labels or topk. The rest is common to all losses: see the module.

    Args:
        student: logits (..., C).
        logits: the teacher's (..., C).
        probs: (..., C), re-tempered as p^(1/tau). A row sums to 1, give or take 1e-2 and floor a class.
        labels: (...) int64, one-hot and not softened.
        topk: values and indices, both (..., K). A row of values sums to 1 at most. An index of -1 is an absent entry,
            whose value may be anything; a row of such is uniform when spread, and else does not count.
        tau_teacher: a temperature of the teacher's own, with logits and probs; they are copied then, in float32.
        scale: "tau2", "tau" or "one", of tau.
        direction: "forward" is KL(p || q), "reverse" KL(q || p), q the student's, "symmetric" their mean. Others than
            forward take no labels, nor rest="drop".
        skew: in [0, 1), what the second is mixed with of the first, KL(p || (1 - skew) q + skew p), and so in reverse
            (Lee, 2001). It takes no labels, nor rest="drop".
        rest: what becomes of the mass that topk leaves out: "spread" over the other classes, "drop", or "tail": held
            against what the student gives to all of them together.
        floor: half the step of probabilities that were rounded, 0.005 for two decimals.
        ignore_index: the label of rows that do not count.
    """
    check_choice("direction", direction, DIRECTIONS)
    check_direction(direction, skew, labels, topk, rest)
    losses = []
    for way in ("forward", "reverse") if direction == "symmetric" else (direction,):
        name, arguments = kd_arguments(
            student, logits, probs, labels, topk, tau, tau_teacher, scale, way, skew, rest, floor, ignore_index,
            weights, mask, dim, reduction,
        )  # fmt: skip
        loss = ops.run(name, *arguments, reduction=reduction, impl=impl)
        compared, classes = arguments[0].shape[-1], student.shape[dim]
        if compared != classes and (reduction == "mean" or (reduction == "batchmean" and student.dim() == 1)):
            loss = loss * (compared / classes)  # of buckets the op has divided by their number
        losses.append(loss)
    return losses[0] if len(losses) == 1 else (losses[0] + losses[1]) / 2


def logit_standardized_kd_loss(
    student: Tensor,
    logits: Tensor,
    *,
    tau: float | Tensor = 1.0,
    scale: str = "tau2",
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    dim: int = -1,
    **others: object,
) -> Tensor:
    """kd_loss of logits that are standardised per row, (x - mean) / (1e-7 + std) (Sun et al., CVPR 2024).

    student, logits: (..., C) with C at least 2; a class of logit -inf is left out of its row's mean and deviation.
    Others as in kd_loss.
    """
    student, logits = classes_last("student", student, dim), classes_last("logits", logits, dim)
    check_student("student", student)
    check_teacher("logits", logits, student)
    if student.shape[-1] < 2:
        raise ValueError(f"student has shape {tuple(student.shape)}; one class has no deviation: at least 2 are needed")
    check_rows(weights, mask, student.shape[:-1], student)
    kept = rows_that_weigh(weights, mask)  # of the others, nothing may reach a gradient
    ours, theirs = (_standardize(hide(x.to(accumulation_dtype(x)), kept, 0.0)) for x in (student, logits))
    return kd_loss(ours, theirs, tau=tau, scale=scale, weights=weights, mask=mask, **others)  # type: ignore[arg-type]


def _standardize(x: Tensor) -> Tensor:
    masked = x == -math.inf
    count = (~masked).sum(-1, keepdim=True).clamp_min(1)
    x = x.masked_fill(masked, 0.0)
    centred = (x - x.sum(-1, keepdim=True) / count).masked_fill(masked, 0.0)
    squares = centred.square().sum(-1, keepdim=True)
    flat = squares == 0  # where a root has no slope
    deviation = (squares.masked_fill(flat, 1.0) / (count - 1).clamp_min(1)).sqrt().masked_fill(flat, 0.0)
    return (centred / (1e-7 + deviation)).masked_fill(masked, -math.inf)


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    tau: float | Tensor = 4.0,
    scale: str = "tau2",
    ignore_index: int = -100,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    dim: int = -1,
    reduction: str = "rowmean",
    impl: str | None = None,
) -> Tensor:
    """scale * (alpha * KL of target against rest + beta * KL within the rest): decoupled KD (Zhao et al., 2022).

    Args:
        student: logits (..., C).
        teacher: logits (..., C).
        labels: the target classes (...), int64.
        alpha: the weight of the target against the rest.
        beta: the weight of the part within the rest.
    """
    name, arguments = dkd_arguments(
        student, teacher, labels, alpha, beta, tau, scale, ignore_index, weights, mask, dim, reduction
    )
    return ops.run(name, *arguments, reduction=reduction, impl=impl)


def jsd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 0.5,
    log_probs: bool = False,
    tau: float | Tensor = 1.0,
    scale: str = "one",
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    dim: int = -1,
    reduction: str = "rowmean",
    impl: str | None = None,
) -> Tensor:
    """scale * (beta KL(p || m) + (1 - beta) KL(q || m)), m = beta p + (1 - beta) q: generalised Jensen-Shannon.

    Args:
        student: logits (..., C), of q.
        teacher: logits (..., C), of p.
        beta: in [0, 1]; 0 is KL(p || q) and 1 is KL(q || p) (Agarwal et al., 2024).
        log_probs: both sides are log-probabilities, taken as they are.
    """
    name, arguments = jsd_arguments(student, teacher, beta, log_probs, tau, scale, weights, mask, dim, reduction)
    return ops.run(name, *arguments, reduction=reduction, impl=impl)


def image_l1_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    tanh: bool = True,
    finished: bool = False,
    weights: Tensor | None = None,
    reduction: str = "mean",
    inplace: bool = False,
    impl: str | None = None,
) -> Tensor:
    """L1 distance of the images that the generator draws from the student's and from the teacher's code.

    Args:
        student: pre-activations (m, ch, H, W), to which tanh is applied here.
        teacher: likewise.
        tanh: False says that both are images already.
        finished: True says that teacher is.
        weights: (m,), each image's.
        reduction: "mean" over elements, "batchmean" (sum over pixels, mean over images: the paper's), "sum", or "none",
            which gives (m,).
        inplace: write the gradient over student, which spares an allocation of its size: nothing else may read student,
            and backward runs once. A float16 student keeps a gradient of its own, in float32; so does one that torch
            negates when it is read, or that has a tangent.
    """
    check_choice("reduction", reduction, SAMPLE_REDUCTIONS)
    check_floating("student", student)
    if student.dim() == 0:
        raise ValueError("student is 0-d; it must have shape (m, ...)")
    check_teacher("teacher", teacher, student)
    check_rows(weights, None, student.shape[:1], student)
    wanted = student.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if inplace and wanted and student.dtype != torch.float16 and not student.is_neg() and not ops.transformed():
        if student.is_leaf:
            raise ValueError("student is a leaf that requires grad, and inplace=True would overwrite it; use False")
        base = student._base
        if base is not None and base.is_leaf and base.requires_grad:
            raise ValueError(
                "student is a view of a leaf that requires grad, and inplace=True would overwrite that; use False"
            )
        return ops.run_in_place(student, teacher, weights, tanh, finished, reduction, impl=impl)
    return ops.run("tanh_l1", student, teacher, weights, tanh, finished, reduction=reduction, impl=impl)


def generator_loss(
    d_fake: Tensor,
    confidence: Tensor | None = None,
    *,
    logits: Tensor | None = None,
    probs: Tensor | None = None,
    alpha: float = 0.5,
    minimax: bool = False,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """L_G of deprivatisation: the mean of (1 + alpha y_i) softplus(-d_i) (Ma et al., 2024, with the sign set right).

    Args:
        d_fake: the discriminator's logits (m,) for generated images.
        confidence: y (m,), the teacher's top probability; 1 where neither it nor an answer is given (a teacher that
            answers labels).
        logits: the teacher's answer (m, C), of which y is taken.
        probs: the same as probabilities.
        alpha: the weight of the information term.
        minimax: G minimises log(1 - sigmoid(d)) instead of softplus(-d).

    Raises:
        ValueError: a confidence above 1, or a row of probs that does not sum to 1, give or take 1e-2.
    """
    return _generator(d_fake, confidence, logits, probs, 1.0, alpha, minimax, reduction, impl)


def information_maximization_loss(
    d_fake: Tensor,
    confidence: Tensor | None = None,
    *,
    logits: Tensor | None = None,
    probs: Tensor | None = None,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """L_IM of deprivatisation alone: the mean of y_i softplus(-d_i) (Ma et al., 2024), arguments as generator_loss."""
    return _generator(d_fake, confidence, logits, probs, 0.0, 1.0, False, reduction, impl)


def _generator(
    d_fake: Tensor,
    confidence: Tensor | None,
    logits: Tensor | None,
    probs: Tensor | None,
    base: float,
    alpha: float,
    minimax: bool,
    reduction: str,
    impl: str | None,
) -> Tensor:
    check_choice("reduction", reduction, SAMPLE_REDUCTIONS)
    check_floating("d_fake", d_fake)
    if d_fake.dim() == 0:
        raise ValueError("d_fake is 0-d; it must have shape (m,)")
    given = {"confidence": confidence, "logits": logits, "probs": probs}
    answers = [(name, value) for name, value in given.items() if value is not None]
    if len(answers) > 1:
        raise ValueError(f"confidence, logits and probs: {len(answers)} of them are given; give one at most")
    check_weight("alpha", alpha)
    kind, response = answers[0] if answers else ("confidence", None)
    if response is not None:
        check_teacher(kind, response, response)
        check_device(kind, response, d_fake)
        if kind == "confidence":
            if response.shape != d_fake.shape:
                raise ValueError(
                    f"{kind} has shape {tuple(response.shape)}; it must be {tuple(d_fake.shape)}, as d_fake's"
                )
        elif response.dim() != 2 or response.shape[0] != d_fake.numel() or response.shape[1] == 0:
            raise ValueError(f"{kind} has shape {tuple(response.shape)}; it must be ({d_fake.numel()}, C)")
    slack = SLACK if response is None else slack_of(response, 0.0)
    return ops.run(
        "gan_generator", d_fake, response, kind, slack, base, float(alpha), minimax, reduction=reduction, impl=impl
    )


def discriminator_loss(d_real: Tensor, d_fake: Tensor, *, reduction: str = "mean", impl: str | None = None) -> Tensor:
    """L_D: mean softplus(-d(x)) + mean softplus(d(G(z))) for logits (m,) and (n,); "sum" adds both sums."""
    check_choice("reduction", reduction, ("mean", "sum"))
    for name, d in (("d_real", d_real), ("d_fake", d_fake)):
        check_floating(name, d)
        if d.dim() == 0:
            raise ValueError(f"{name} is 0-d; it must have shape (m,)")
    check_device("d_fake", d_fake, d_real)
    return ops.run("gan_discriminator", d_real, d_fake, reduction=reduction, impl=impl)
