"""What the losses over rows of classes are called with, checked, as the name of an op and its arguments.

mekd.functional runs the op on logits, mekd.linear on those of a layer, part by part.
"""

import contextlib
import operator
from typing import Any

from torch import Tensor

from mekd import reference
from mekd.checks import (
    REDUCTIONS,
    SCALES,
    TOPK_RESTS,
    check_best,
    check_choice,
    check_device,
    check_floor,
    check_index,
    check_labels,
    check_named_classes,
    check_number,
    check_positive,
    check_probabilities,
    check_rows,
    check_student,
    check_teacher,
    check_tensor,
    check_weight,
    rows_that_weigh,
    rows_with_answer,
    slack_of,
    tau_tensor,
)
from mekd.reference import accumulation_dtype

#: An op's name, and what it takes up to reduction.
Arguments = tuple[str, tuple[Any, ...]]


def check_direction(
    direction: str, skew: float, labels: Tensor | None, topk: tuple[Tensor, Tensor] | None, rest: str
) -> None:
    """Raise unless skew is a number in [0, 1), and this way of looking says something of the target."""
    check_number("skew", skew)
    if not 0 <= skew < 1:
        raise ValueError(f"skew is {float(skew)}; it must be at least 0 and below 1")
    if (direction != "forward" or skew != 0) and (labels is not None or (topk is not None and rest == "drop")):
        what = "labels" if labels is not None else "topk with rest='drop'"
        raise ValueError(
            f"direction is {direction!r} and skew {float(skew):g} with {what}, whose probabilities of 0 make the "
            "divergence infinite or say nothing: use direction='forward' and skew=0, or another target, or another rest"
        )


def kd_arguments(
    student: Tensor, logits: Tensor | None, probs: Tensor | None, labels: Tensor | None,
    topk: tuple[Tensor, Tensor] | None, tau: float | Tensor, tau_teacher: float | Tensor | None, scale: str,
    direction: str, skew: float, rest: str, floor: float, ignore_index: int, weights: Tensor | None,
    mask: Tensor | None, dim: int, reduction: str,
) -> Arguments:  # fmt: skip
    """What kd_loss runs, checked; direction and skew by check_direction."""
    if (logits is not None) + (probs is not None) + (labels is not None) + (topk is not None) != 1:
        given = {"logits": logits, "probs": probs, "labels": labels, "topk": topk}
        names = [name for name, value in given.items() if value is not None]
        raise ValueError(f"targets given: {', '.join(names) or 'none'}; give exactly one of {', '.join(given)}")
    check_choice("scale", scale, SCALES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_floor(floor)
    check_index(ignore_index)
    mixed = direction != "forward" or skew != 0
    if tau_teacher is not None:
        if logits is None and probs is None:
            raise ValueError("tau_teacher is given without logits or probs, which alone it softens: leave it out")
        check_positive("tau_teacher", tau_teacher)
    student = classes_last("student", student, dim)
    tau = tau_tensor(tau, student.device)
    check_student("student", student)
    rows = student.shape[:-1]
    if weights is not None or mask is not None:
        check_rows(weights, mask, rows, student)

    if labels is not None:
        check_labels("labels", labels, rows, student)
        return "tempered_kl_labels", (student, labels, tau, weights, mask, ignore_index, scale)
    if topk is not None:
        if not isinstance(topk, tuple | list) or len(topk) != 2:
            raise TypeError(f"topk is a {type(topk).__name__}; it must be a pair (values, indices)")
        values, indices = (
            classes_last(f"topk {name}", x, dim) for name, x in zip(("values", "indices"), topk, strict=True)
        )
        check_choice("rest", rest, TOPK_RESTS)
        check_labels("topk indices", indices, values.shape, student)
        if values.shape[:-1] != rows or not 1 <= values.shape[-1] <= student.shape[-1]:
            raise ValueError(
                f"topk values have shape {tuple(values.shape)}; they must be {(*rows, 'K')}, "
                f"K from 1 to {student.shape[-1]}"
            )
        check_teacher("topk values", values, values)
        check_device("topk values", values, student)
        slack = slack_of(values, floor)
        if mixed:
            check_best(values, indices, weights, mask, slack, rest, student.shape[-1])
            check_named_classes(indices, student.shape[-1], weights, mask)
            mask = rows_with_answer(indices, mask, rest)
            kept = rows_that_weigh(weights, mask)  # of the others, nothing may reach a gradient
            indices = reference.hide(indices, kept, -1)
            if rest == "tail":
                log_p, log_q = reference.buckets(reference.hide(student, kept, 0.0), values, indices, tau)
                return _through_mixture(log_q, log_p, direction, skew, tau, weights, mask, True, scale)
            filled = reference.fill_topk(values, indices, student.shape[-1])
            return _through_mixture(student, filled.log(), direction, skew, tau, weights, mask, False, scale)
        return "tempered_kl_topk", (student, values, indices, tau, weights, mask, rest, slack, scale)
    target = logits if logits is not None else probs
    assert target is not None
    target = classes_last("probs" if logits is None else "logits", target, dim)
    check_teacher("probs" if logits is None else "logits", target, student)
    slack = slack_of(target, floor)
    if logits is None and (mixed or tau_teacher is not None):
        check_probabilities(target, weights, mask, slack)
        target = target.to(accumulation_dtype(target)).clamp_min(0).log()
    if tau_teacher is not None:
        target = target.to(accumulation_dtype(target)) * (tau / tau_tensor(tau_teacher, target.device))
        logits = target
    if mixed:
        return _through_mixture(student, target, direction, skew, tau, weights, mask, False, scale)
    return "tempered_kl", (student, target, tau, weights, mask, logits is None, slack, scale)


def _through_mixture(
    student: Tensor, teacher: Tensor, direction: str, skew: float, tau: Tensor, weights: Tensor | None,
    mask: Tensor | None, log_probs: bool, scale: str,
) -> Arguments:  # fmt: skip
    """KL of one side against a mixture of both, as the op jsd has it."""
    skew = float(skew)  # of a tensor too
    beta, left, right = (skew, 1.0, 0.0) if direction == "forward" else (1.0 - skew, 0.0, 1.0)
    return "jsd", (student, teacher, tau, weights, mask, beta, left, right, log_probs, scale)


def dkd_arguments(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, beta: float, tau: float | Tensor, scale: str,
    ignore_index: int, weights: Tensor | None, mask: Tensor | None, dim: int, reduction: str,
) -> Arguments:  # fmt: skip
    """What dkd_loss runs, checked."""
    check_choice("scale", scale, SCALES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_weight("alpha", alpha)
    check_weight("beta", beta)
    check_index(ignore_index)
    student, teacher = classes_last("student", student, dim), classes_last("teacher", teacher, dim)
    check_student("student", student)
    check_teacher("teacher", teacher, student)
    check_labels("labels", labels, student.shape[:-1], student)
    check_rows(weights, mask, student.shape[:-1], student)
    tau = tau_tensor(tau, student.device)
    return "dkd", (student, teacher, labels, tau, weights, mask, float(alpha), float(beta), ignore_index, scale)


def jsd_arguments(
    student: Tensor, teacher: Tensor, beta: float, log_probs: bool, tau: float | Tensor, scale: str,
    weights: Tensor | None, mask: Tensor | None, dim: int, reduction: str,
) -> Arguments:  # fmt: skip
    """What jsd_loss runs, checked."""
    check_choice("scale", scale, SCALES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_number("beta", beta)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; it must lie between 0 and 1")
    student, teacher = classes_last("student", student, dim), classes_last("teacher", teacher, dim)
    check_student("student", student)
    check_teacher("teacher", teacher, student)
    check_rows(weights, mask, student.shape[:-1], student)
    tau = tau_tensor(tau, student.device)
    left, right = float(beta or 1), float(1 - beta or 1)  # of the limits, what is not 0
    return "jsd", (student, teacher, tau, weights, mask, float(beta), left, right, log_probs, scale)


def classes_last(name: str, x: Tensor, dim: int) -> Tensor:
    check_tensor(name, x)
    if not isinstance(dim, int):
        with contextlib.suppress(TypeError):  # NumPy's is a number too
            dim = operator.index(dim)
    if not isinstance(dim, int) or (dim != -1 and not -x.dim() <= dim < x.dim()):
        raise ValueError(
            f"dim is {dim!r}; it must be one of the {x.dim()} dimensions of {name}, the one of the classes"
        )
    return x if dim in (-1, x.dim() - 1) else x.movedim(dim, -1)
