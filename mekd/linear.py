"""Losses of logits that never exist as a whole: the student's last linear layer and the loss on it, in one.

A few rows at a time become logits, a loss and its gradient, and the gradients of hidden, weight and bias, of those that
are not frozen, are taken at once, in the forward. What is needed beside them is the logits and the gradient of one part
of the rows. Each loss is the one of the same name in mekd.functional, on F.linear(hidden, weight, bias).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mekd import ops
from mekd.arguments import check_direction, dkd_arguments, jsd_arguments, kd_arguments
from mekd.checks import (
    check_choice,
    check_floating,
    check_positive,
    check_tensor,
    checks_values,
    rows_with_answer,
    rows_with_label,
)
from mekd.reference import accumulation_dtype, autocasts

#: Into how many parts the rows are cut, by the bytes of a number: logits and gradient of one take less than a quarter
#: of what all do in float32, and the weight's gradient is read and written, once a part, but a few times.
PARTS = {8: 10, 4: 5, 2: 3}
#: What a loss for each row would need the logits again for is left out.
REDUCTIONS = ("rowmean", "mean", "batchmean", "sum")
#: A teacher as its own last layer: hidden (..., H'), weight (C, H') and bias (C,) or None.
Head = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]


def linear_kd_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    teacher: Head | None = None,
    logits: Tensor | None = None,
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
    reduction: str = "rowmean",
    impl: str | None = None,
) -> Tensor:
    """kd_loss of F.linear(hidden, weight, bias), whose logits never exist as a whole.

    hidden: (..., H), weight (C, H), bias (C,): float32, float64 or bfloat16, all alike (under autocast they are cast to
    its dtype, as F.linear does). Exactly one target: teacher, whose logits are made of its own hidden, weight and bias,
    or one of kd_loss's. reduction "none" is refused, and direction "symmetric" is two calls. Raises ValueError
    or TypeError naming the argument.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    hidden, weight, bias = _in_one_dtype(hidden, weight, bias)
    student = _stand_in("hidden", hidden, weight, bias)
    check_choice("direction", direction, ("forward", "reverse"))
    check_direction(direction, skew, labels, topk, rest)
    if topk is not None and rest == "tail" and (direction != "forward" or skew):
        raise ValueError("rest='tail' with another direction than forward, or a skew, takes all logits: use kd_loss")
    if teacher is not None:
        if (logits, probs, labels, topk) != (None, None, None, None):
            raise ValueError("teacher and another target are given; give one of teacher, logits, probs, labels, topk")
        _check_head(teacher, "its logits are logits=")
        if tau_teacher is not None:
            check_positive("tau_teacher", tau_teacher)
            warmer, tau_teacher = tau / tau_teacher, None
            bias_of = teacher[2] if len(teacher) == 3 else None
            teacher = teacher[0] * warmer, teacher[1], None if bias_of is None else bias_of * warmer
        logits = _stand_in("teacher's hidden", *teacher)
    name, (_, *arguments) = kd_arguments(
        student, logits, probs, labels, topk, tau, tau_teacher, scale, direction, skew, rest, floor, ignore_index,
        weights, mask, -1, reduction,
    )  # fmt: skip
    return _run(name, hidden, weight, bias, teacher, arguments, reduction, impl)


def linear_dkd_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    teacher: Head | Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    tau: float | Tensor = 4.0,
    scale: str = "tau2",
    ignore_index: int = -100,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "rowmean",
    impl: str | None = None,
) -> Tensor:
    """dkd_loss of F.linear(hidden, weight, bias); teacher: logits (..., C), or hidden, weight and bias of its own.

    Arguments as in linear_kd_loss and dkd_loss.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    hidden, weight, bias = _in_one_dtype(hidden, weight, bias)
    head, target = _either(teacher)
    name, (_, *arguments) = dkd_arguments(
        _stand_in("hidden", hidden, weight, bias), target, labels, alpha, beta, tau, scale, ignore_index, weights, mask,
        -1, reduction,
    )  # fmt: skip
    return _run(name, hidden, weight, bias, head, arguments, reduction, impl)


def linear_jsd_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    teacher: Head | Tensor,
    beta: float = 0.5,
    tau: float | Tensor = 1.0,
    scale: str = "one",
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "rowmean",
    impl: str | None = None,
) -> Tensor:
    """jsd_loss of F.linear(hidden, weight, bias); teacher: logits (..., C), or hidden, weight and bias of its own.

    Arguments as in linear_kd_loss and jsd_loss.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    hidden, weight, bias = _in_one_dtype(hidden, weight, bias)
    head, target = _either(teacher)
    name, (_, *arguments) = jsd_arguments(
        _stand_in("hidden", hidden, weight, bias), target, beta, False, tau, scale, weights, mask, -1, reduction
    )
    return _run(name, hidden, weight, bias, head, arguments, reduction, impl)


def _either(teacher: Head | Tensor) -> tuple[Head | None, Tensor]:
    """The teacher's layer where it is one, and its logits or what stands for them."""
    if isinstance(teacher, Tensor):
        return None, teacher
    _check_head(teacher, "or its logits")
    return teacher, _stand_in("teacher's hidden", *teacher)


def _check_head(teacher: object, otherwise: str) -> None:
    if not isinstance(teacher, tuple | list) or len(teacher) not in (2, 3):
        what = f"a {type(teacher).__name__}" + (f" of {len(teacher)}" if isinstance(teacher, tuple | list) else "")
        raise TypeError(
            f"teacher is {what}; it must be its last layer, (hidden, weight) or (hidden, weight, bias), {otherwise}"
        )
    _check_tensors("teacher's ", *teacher)


def _check_tensors(whose: str, *layer: object) -> None:
    for name, x in zip(("hidden", "weight", "bias"), layer, strict=False):
        if x is not None or name != "bias":
            check_tensor(f"{whose}{name}", x)


def _in_one_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The layer in one dtype: autocast's where that is on and not for float64, as F.linear has it, else its own."""
    _check_tensors("", hidden, weight, bias)
    if not autocasts(hidden):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)
    hidden, weight = (x if x.dtype == torch.float64 else x.to(dtype) for x in (hidden, weight))
    return hidden, weight, bias if bias is None or bias.dtype == torch.float64 else bias.to(dtype)


def _stand_in(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A tensor of the logits' shape, dtype and device without their memory: what checks of arguments look at."""
    check_floating(name, hidden)
    if hidden.dtype == torch.float16 and name == "hidden":
        raise TypeError(
            f"{name} has dtype {hidden.dtype}; it must be float32, float64 or bfloat16 (in float16 gradients would be "
            "lost before a GradScaler scales them)"
        )
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name} has shape {tuple(hidden.shape)}, its weight {tuple(weight.shape)}; they must be (..., H), (C, H)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"the bias of {name} has shape {tuple(bias.shape)}; it must be {tuple(weight.shape[:1])}")
    for what, x in (("weight", weight), ("bias", bias)):
        if x is not None and (x.dtype, x.device) != (hidden.dtype, hidden.device):
            raise ValueError(
                f"the {what} of {name} is {x.dtype} on {x.device}; it must be {hidden.dtype} on {hidden.device}, as it"
            )
    return hidden.new_zeros(()).expand(*hidden.shape[:-1], weight.shape[0])


def _run(
    name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Head | None, arguments: list[Any],
    reduction: str, impl: str | None,
) -> Tensor:  # fmt: skip
    """The op over rows; arguments: what it takes behind its student, up to reduction."""
    at = ops.OPS[name].targets
    targets, (tau, weights, mask, *options) = arguments[:at], arguments[at:]
    if teacher is not None and any(x is not None and x.requires_grad for x in teacher):
        raise ValueError("teacher requires grad; a teacher gets no gradient: detach its hidden, weight and bias")
    if ops.transformed():  # the formula, on all logits
        made = [F.linear(*teacher), *targets[1:]] if teacher is not None else targets
        logits = F.linear(hidden, weight, bias)
        return ops.run(name, logits, *made, tau, weights, mask, *options, reduction=reduction, impl=impl)
    kept = _rows_that_count(name, targets, weights, mask, options, weight.shape[0])
    weights = _shares(hidden, weight.shape[0], weights, kept, reduction)
    rows = [x.reshape(-1, *x.shape[hidden.dim() - 1 :]) for x in targets]
    head: list[Tensor] = []
    if teacher is not None:
        head, rows = (
            [teacher[0].reshape(-1, teacher[0].shape[-1]), *(x for x in teacher[1:] if x is not None)],
            rows[1:],
        )
    grads = torch.is_grad_enabled()
    wanted = [grads and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    written = [f"{x}" for x in options]  # torch.compile has no str() of a number that it holds for a variable
    loss: Tensor = torch.ops.mekd.linear_loss(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, rows, head, tau, weights,
        None if kept is None else kept.reshape(-1), name, written, impl, wanted,
    )[0]  # fmt: skip
    return loss


def _rows_that_count(
    name: str, targets: list[Tensor], weights: Tensor | None, mask: Tensor | None, options: list[Any], classes: int
) -> Tensor | None:
    if name == "tempered_kl_labels":
        return rows_with_label(targets[0], weights, mask, options[0], classes)
    if name == "dkd":
        return rows_with_label(targets[1], weights, mask, options[2], classes)
    if name == "tempered_kl_topk":
        return rows_with_answer(targets[1], mask, options[0])
    return mask


def _shares(hidden: Tensor, classes: int, weights: Tensor | None, kept: Tensor | None, reduction: str) -> Tensor | None:
    """The rows' weights (N,) over what the reduction divides by, so that the parts' sums need only be added."""
    if reduction == "sum":
        return None if weights is None else weights.reshape(-1)
    rows = math.prod(hidden.shape[:-1])
    if reduction == "rowmean":
        count = torch.full((), rows, device=hidden.device) if kept is None else kept.sum()
    else:
        first = hidden.shape[0] if hidden.dim() > 1 else classes
        count = torch.full((), rows * classes if reduction == "mean" else first, device=hidden.device)
    share = 1 / count.clamp_min(1).to(torch.float64)
    return share.expand(rows) if weights is None else weights.reshape(-1).to(torch.float64) * share


def _linear_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: list[Tensor], teacher: list[Tensor], tau: Tensor,
    weights: Tensor | None, mask: Tensor | None, name: str, options: list[str], impl: str | None, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum of the op's losses over rows (N, H), and the gradients of hidden, weight and bias, each where wanted."""
    call, rows = ops.kernel_of(name, impl, hidden), hidden.shape[0]
    part, others = max(1, -(-rows // PARTS[hidden.element_size()])), _read(name, options)
    loss = hidden.new_zeros((), dtype=accumulation_dtype(hidden))
    layer = zip((hidden, weight, bias), wanted, strict=True)
    of_hidden, of_weight, of_bias = (
        torch.zeros_like(x) if x is not None and w else hidden.new_empty(0) for x, w in layer
    )
    for begin in range(0, rows, part):
        mine = slice(begin, begin + part)
        logits = F.linear(hidden[mine], weight, bias)
        made = [F.linear(teacher[0][mine], *teacher[1:])] if teacher else []
        some = [None if x is None else x[mine] for x in (weights, mask)]
        found, grad = call(logits, *made, *(x[mine] for x in targets), tau, *some, *others, "sum", any(wanted))
        del logits, made
        loss += found
        if wanted[0]:
            torch.mm(grad, weight, out=of_hidden[mine])
        if wanted[1]:
            of_weight.addmm_(grad.t(), _without_strays(hidden[mine], *some))
        if wanted[2]:
            of_bias += grad.sum(0)
        del grad  # before the next part's
    return loss, of_hidden, of_weight, of_bias


def _read(name: str, options: list[str]) -> list[Any]:
    """The op's last arguments but reduction and grad, from how they are written, by the types of its schema."""
    kinds = [str(x.type) for x in ops.OPS[name].dispatch._schema.arguments[-2 - len(options) : -2]]
    read: dict[str, Callable[[str], Any]] = {"bool": lambda x: x == "True", "int": int, "float": float, "str": str}
    return [read[kind](x) for kind, x in zip(kinds, options, strict=True)]


def _without_strays(hidden: Tensor, weights: Tensor | None, mask: Tensor | None) -> Tensor:
    """hidden with 0 in rows that count for nothing, which may hold anything: a gradient of 0 times NaN is NaN."""
    for off in (None if weights is None else weights == 0, None if mask is None else ~mask):
        hidden = hidden if off is None else hidden.masked_fill(off.unsqueeze(-1), 0.0)
    return hidden


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    # Laid out as zeros_like does it, so that the gradient of a turned weight is a plain one of what was turned.
    layer = zip((hidden, weight, bias), others[-1], strict=True)
    grads = [torch.empty_like(x) if x is not None and w else hidden.new_empty(0) for x, w in layer]
    return hidden.new_empty((), dtype=accumulation_dtype(hidden)), *grads


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wanted = inputs[-1]
    ctx.save_for_backward(*(x for x, w in zip(output[1:], ctx.wanted, strict=True) if w))
    ctx.dtypes = [x.dtype for x, w in zip(inputs[:3], ctx.wanted, strict=True) if w]
    ctx.set_materialize_grads(False)  # zeros as large as the gradients
    ctx.targets, ctx.teacher = len(inputs[3]), len(inputs[4])


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    scaled = iter([] if upstream is None else ops.scaled(ctx, upstream, looks=checks_values(upstream)))
    return (
        *(next(scaled, None) if w else None for w in ctx.wanted),
        [None] * ctx.targets,
        [None] * ctx.teacher,
        *[None] * 7,
    )


ops.define_alone(
    "linear_loss",
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor[] targets, Tensor[] teacher, Tensor tau, Tensor? weights, "
    "Tensor? mask, str name, str[] options, str? impl, bool[] wanted",
    4, _linear_loss, _fake, _keep, _backward,
)  # fmt: skip
