"""Arguments of the losses, checked once: an error names the argument, what it was and what it may be."""

import functools
import math
import os

import torch
from torch import Tensor

SCALES = ("tau2", "tau", "one")
REDUCTIONS = ("rowmean", "none", "mean", "batchmean", "sum")
#: Of losses that have no rows of classes: every sample counts.
SAMPLE_REDUCTIONS = ("none", "mean", "batchmean", "sum")
DIRECTIONS = ("forward", "reverse", "symmetric")
TOPK_RESTS = ("spread", "drop", "tail")
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Looked up once: every call of a loss asks several times.
_modes, _transforms = torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ValueError unless value is one of the allowed names."""
    if isinstance(value, Tensor) or value not in allowed:  # a tensor is compared by its elements
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


def check_number(name: str, value: object) -> None:
    """Raise TypeError unless value is a number, of Python's or NumPy's, or a tensor of one that wants no gradient."""
    if not hasattr(value, "__float__") or (isinstance(value, Tensor) and value.numel() != 1):
        raise TypeError(f"{name} is {_shown(value)}; it must be a number")
    if isinstance(value, Tensor) and value.requires_grad:
        _refuse_gradient(name)


def _refuse_gradient(name: str) -> None:
    raise ValueError(f"{name} requires grad, which the losses do not give; pass {name}.detach()")


def check_index(ignore_index: object) -> None:
    """Raise unless ignore_index is a whole number that a label could be."""
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index is {_shown(ignore_index)}; it must be an int")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index is {ignore_index}; it must fit into 64 bits, as labels do")


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return "None" if value is None else f"a {type(value).__name__}"


def check_tensor(name: str, x: object) -> None:
    """Raise TypeError unless x is a tensor of rows and columns in memory."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {_shown(x)}; it must be a tensor")
    if x.is_nested:
        raise TypeError(
            f"{name} is a nested tensor; pass {name}.to_padded_tensor(0.0), and a mask of the rows that count"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{name} has the layout {x.layout}; it must be dense: pass {name}.to_dense()")


def check_positive(name: str, value: float | Tensor) -> None:
    """Raise ValueError unless value is above 0 and finite, where checks_values() lets a tensor be asked."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be a float or a 0-d tensor")
        if value.requires_grad and not torch._C._are_functorch_transforms_active():  # where the formula gives it
            _refuse_gradient(name)
        if not checks_values(value):
            return
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {float(value)}; it must be above 0 and finite")


def check_weight(name: str, value: float) -> None:
    """Raise ValueError unless value is a finite number from 0 on."""
    check_number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}; it must be at least 0 and finite")


def tau_tensor(tau: float | Tensor, device: torch.device) -> Tensor:
    """The temperature as the 0-d tensor that the ops take. Its value is checked by whoever reads it."""
    if isinstance(tau, Tensor):
        if tau.dim() != 0 or tau.requires_grad:
            check_positive("tau", tau)
        return tau if tau.device == device else tau.to(device)
    check_number("tau", tau)
    # Neither a fake tensor, nor one of torch.func, nor one in a CUDA graph that is being captured may be kept.
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if _nothing_to_see() or capturing:
        check_positive("tau", tau)
        return torch.full((), tau, dtype=torch.float64, device=device)
    return _constant(float(tau), device)


@functools.lru_cache(maxsize=64)
def _constant(tau: float, device: torch.device) -> Tensor:
    check_positive("tau", tau)
    with torch.inference_mode(False):  # it outlives the caller's mode
        return torch.tensor(tau, dtype=torch.float64, device=device)


def check_teacher(name: str, target: Tensor, student: Tensor) -> None:
    """Raise unless target is a floating tensor of the student's shape and device that wants no gradient."""
    check_tensor(name, target)
    if target.requires_grad:
        raise ValueError(f"{name} requires grad; a teacher gets no gradient: pass {name}.detach()")
    if target.shape != student.shape:
        raise ValueError(f"{name} has shape {tuple(target.shape)}; it must be {tuple(student.shape)}, as the student's")
    check_floating(name, target)
    check_device(name, target, student)


def check_floating(name: str, x: Tensor) -> None:
    """Raise TypeError unless x is a tensor of floating-point numbers that every backend reads."""
    check_tensor(name, x)
    if x.dtype not in FLOATING:
        allowed = ", ".join(map(str, FLOATING))
        raise TypeError(f"{name} has dtype {x.dtype}; it must be a floating dtype: one of {allowed}")


def check_device(name: str, x: Tensor, student: Tensor) -> None:
    """Raise ValueError unless x is where the student's logits are."""
    if x.device != student.device:
        raise ValueError(f"{name} is on {x.device} and the student on {student.device}; move {name} there")


def check_student(name: str, student: Tensor) -> None:
    """Raise unless student holds floating-point logits (..., C) with C at least 1."""
    check_floating(name, student)
    if student.dim() == 0:
        raise ValueError(f"{name} is 0-d; it must have shape (..., C)")
    if student.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(student.shape)}; it must have at least one class")


def check_labels(name: str, labels: Tensor, shape: torch.Size, student: Tensor) -> None:
    """Raise unless labels are int64, of the given shape and where the student is."""
    check_tensor(name, labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {labels.dtype}; it must be torch.int64")
    if labels.shape != shape:
        raise ValueError(f"{name} has shape {tuple(labels.shape)}; it must be {tuple(shape)}")
    check_device(name, labels, student)


def check_rows(weights: Tensor | None, mask: Tensor | None, shape: torch.Size, student: Tensor) -> None:
    """Raise unless weights (floating) and mask (bool) have one element for each row."""
    if weights is not None:
        check_floating("weights", weights)
        if weights.shape != shape or weights.requires_grad:
            raise ValueError(
                f"weights have shape {tuple(weights.shape)}, requires_grad={weights.requires_grad}; they must have "
                f"shape {tuple(shape)} and want no gradient"
            )
        check_device("weights", weights, student)
    if mask is not None:
        check_tensor("mask", mask)
        if mask.dtype != torch.bool or mask.shape != shape:
            raise ValueError(
                f"mask has dtype {mask.dtype} and shape {tuple(mask.shape)}; it must be torch.bool {tuple(shape)}, "
                "True for the rows that count"
            )
        check_device("mask", mask, student)


# Values: looked at by whoever reads them. Where the formula or a kernel cannot say what it met, these look ahead.


def checks_values(x: Tensor) -> bool:
    """Whether values are looked at: always on the CPU, elsewhere with MEKD_CHECK=1, as it stops the device.

    Never while torch.compile or make_fx traces, or within torch.func.
    """
    if _nothing_to_see():
        return False
    return x.device.type == "cpu" or (x.device.type != "meta" and os.environ.get("MEKD_CHECK") == "1")


def traced() -> bool:
    """Whether tensors stand for others: of a graph that is being traced, or fake ones, which hold no number."""
    if torch.compiler.is_compiling():
        return True
    if not _modes():
        return False
    modes = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)
    return any(torch._C._get_dispatch_mode(one) is not None for one in modes)


def _nothing_to_see() -> bool:
    """Whether tensors stand for others: of a graph that is being traced, or of torch.func."""
    return torch.compiler.is_compiling() or _modes() > 0 or _transforms()


def check_tau(tau: Tensor) -> None:
    """Raise ValueError unless tau is above 0 and finite."""
    if checks_values(tau) and not 0 < tau < math.inf:
        raise ValueError(f"tau is {tau.item()}; it must be above 0 and finite")


#: How far the sum of a row of probabilities may be from 1, before what is known of their rounding.
SLACK = 1e-2


def check_floor(floor: float) -> None:
    """Raise ValueError unless floor is a number from 0 on and below 1."""
    check_number("floor", floor)
    if not 0 <= floor < 1:
        raise ValueError(f"floor is {floor}; it must be at least 0 and below 1: half the step of rounded probabilities")


def slack_of(probs: Tensor, floor: float) -> float:
    """How far the sum of a row of (..., C) may be from 1 where each value was rounded by at most floor."""
    if probs.dtype == torch.float16:
        floor = max(floor, 2.0**-25)  # half its least number
    return SLACK + floor * probs.shape[-1] if floor > 0 else SLACK


#: What to do about rounded probabilities.
SAY_FLOOR = "for rounded ones say floor, half their step"
SAY_CONFIDENCE = "of rounded ones give the largest as confidence"


def check_probabilities(
    probs: Tensor, weights: Tensor | None, mask: Tensor | None, slack: float, advice: str = SAY_FLOOR
) -> None:
    """Raise ValueError unless the rows of probs (..., C) that weigh hold no negative number and sum to 1."""
    if checks_values(probs):
        mask = rows_that_weigh(weights, mask)
        sums = _sums("probs", probs, mask)
        allowed = f"a row of probabilities sums to 1, give or take {slack:g}; {advice}"
        _refuse((sums - 1).abs() > slack, mask, sums, "probs", allowed, "sum to")


def check_best(
    values: Tensor, indices: Tensor, weights: Tensor | None, mask: Tensor | None, slack: float, rest: str, classes: int
) -> None:
    """Raise ValueError unless top-k values (..., K) are parts of a distribution in the rows (...) that weigh.

    A value whose index is -1 is absent, and may be anything; a row of such is no fault.
    """
    if checks_values(values):
        mask = rows_that_weigh(weights, mask)
        named = indices != -1
        sums = _sums("topk values", values.masked_fill(~named, 0.0), mask)
        _refuse(
            sums > 1 + slack, mask, sums, "topk values",
            f"a row of probabilities sums to 1 at most, give or take {slack:g}; {SAY_FLOOR}", "sum to",
        )  # fmt: skip
        nothing = (sums <= 0) & named.any(-1)
        if rest != "drop":  # what is missing goes to the other classes, where there are any
            nothing = nothing & (named.sum(-1) == classes)
        _refuse(nothing, mask, sums, "topk values", "where nothing is spread one of them must be above 0", "sum to")


def check_confidence(confidence: Tensor, slack: float) -> None:
    """Raise ValueError unless confidences are probabilities: between 0 and 1."""
    if checks_values(confidence):
        bad = (confidence < 0) | (confidence > 1 + slack)
        _refuse(bad, None, confidence, "confidence", "a probability lies between 0 and 1")


def _sums(name: str, probs: Tensor, mask: Tensor | None) -> Tensor:
    """The sum of each row, and ValueError for a number below 0."""
    rows = None if mask is None else mask.unsqueeze(-1)
    _refuse(probs < 0, rows, probs, name, "probabilities are at least 0")
    return probs.sum(-1, dtype=torch.float64 if probs.dtype == torch.float64 else torch.float32)


def check_named_classes(
    indices: Tensor, classes: int, weights: Tensor | None = None, mask: Tensor | None = None
) -> None:
    """Raise ValueError unless indices (..., K) name classes, and none twice, in the rows (...) that weigh.

    -1 names none: the entry is absent, as often as it is said.
    """
    if checks_values(indices):
        mask = rows_that_weigh(weights, mask)
        rows = None if mask is None else mask.unsqueeze(-1)
        allowed = f"classes are 0 to {classes - 1}, and -1 is an absent entry"
        _refuse((indices < -1) | (indices >= classes), rows, indices, "topk indices", allowed)
        ordered = indices.sort(-1).values
        again = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != -1)
        _refuse(again, rows, ordered[..., 1:], "topk indices", "a row names a class once")


def rows_that_weigh(weights: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The rows that add to the loss: those that count, and of them those whose weight is not 0; None for all."""
    if weights is None:
        return mask
    return weights != 0 if mask is None else mask & (weights != 0)


def rows_with_answer(indices: Tensor, mask: Tensor | None, rest: str) -> Tensor | None:
    """Which rows of a top-k answer count: without any entry a row says nothing, unless its mass is spread."""
    if rest == "spread":
        return mask
    answered = (indices >= 0).any(-1)
    return answered if mask is None else mask & answered


def rows_with_label(
    labels: Tensor, weights: Tensor | None, mask: Tensor | None, ignore_index: int, classes: int
) -> Tensor:
    """Which rows count; ValueError for a label that is out of range and not ignored, in a row that weighs."""
    kept = labels != ignore_index
    if mask is not None:
        kept = kept & mask
    if checks_values(labels):
        bad = (labels < 0) | (labels >= classes)
        _refuse(bad, rows_that_weigh(weights, kept), labels, "labels", f"classes are 0 to {classes - 1}")
    return kept


def check_drawn(labels: Tensor, classes: int) -> None:
    """Raise ValueError for a label of no class, ignored by kd_loss or not: no image is drawn from it."""
    if checks_values(labels):
        bad = (labels < 0) | (labels >= classes)
        allowed = f"an image is drawn from each, and classes are 0 to {classes - 1}: leave out the rows without a label"
        _refuse(bad, None, labels, "labels", f"{allowed}, as in student[labels >= 0] and labels[labels >= 0]")


def _refuse(bad: Tensor, mask: Tensor | None, x: Tensor, name: str, allowed: str, what: str = "hold") -> None:
    if mask is not None:
        bad = bad & mask
    if bad.any():
        raise ValueError(f"{name} {what} {x[bad].flatten()[0].item():g}; {allowed}")
