"""The losses as functions: arguments are checked here, once, and the formulas are those of mekd.reference."""

import torch
from torch import Tensor

from mekd import reference

SCALES = ("tau2", "tau", "one")
REDUCTIONS = ("none", "mean", "batchmean", "sum")
TOPK_RESTS = ("spread", "drop")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of the allowed names."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


def check_positive(name: str, value: float | Tensor) -> None:
    """Raise ValueError unless value is above 0. A tensor on a GPU is believed: asking would stop the device."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be a float or a 0-d tensor")
        if value.is_cuda:
            return
    if not value > 0:
        raise ValueError(f"{name} is {float(value)}; it must be above 0")


def _check_teacher(name: str, target: Tensor, shape: torch.Size | None = None) -> None:
    if target.requires_grad:
        raise ValueError(f"{name} requires grad; a teacher gets no gradient: pass {name}.detach()")
    if shape is not None and target.shape != shape:
        raise ValueError(f"{name} has shape {tuple(target.shape)}; it must be {tuple(shape)}, as the student's")


def _check_floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; it must be a floating dtype")


def _check_labels(name: str, labels: Tensor, shape: torch.Size) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {labels.dtype}; it must be torch.int64")
    if labels.shape != shape:
        raise ValueError(f"{name} has shape {tuple(labels.shape)}; it must be {tuple(shape)}")


def _reduce(losses: Tensor, reduction: str, elements: int, rows: int | Tensor) -> Tensor:
    """none, sum, batchmean (sum / rows), mean (sum / all elements); the loss of an empty batch is 0."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "batchmean":
        return losses.sum() / (rows.clamp_min(1) if isinstance(rows, Tensor) else max(rows, 1))
    return losses.sum() / max(elements, 1)


def kd_loss(
    student: Tensor,
    logits: Tensor | None = None,
    *,
    probs: Tensor | None = None,
    labels: Tensor | None = None,
    topk: tuple[Tensor, Tensor] | None = None,
    tau: float | Tensor = 1.0,
    scale: str = "tau2",
    rest: str = "spread",
    ignore_index: int = -100,
    reduction: str = "batchmean",
) -> Tensor:
    """scale * KL(p_t^tau || softmax(student / tau)), the loss of Hinton et al. (2015), for any kind of answer.

    student: logits (..., C). Exactly one target: logits (..., C); probs (..., C), re-tempered as p^(1/tau);
    labels (...) int64, one-hot and not softened; topk=(values, indices), both (..., K), whose missing mass is
    spread over the other classes (rest="spread") or dropped (rest="drop"). scale: "tau2", "tau" or "one".
    reduction: "batchmean" divides by the rows that are not ignored, "mean" by all elements, as F.kl_div does.
    Returns float32 (float64 for a float64 student). Raises ValueError or TypeError naming the argument.
    """
    given = {"logits": logits, "probs": probs, "labels": labels, "topk": topk}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(f"targets given: {', '.join(names) or 'none'}; give exactly one of {', '.join(given)}")
    check_choice("scale", scale, SCALES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("rest", rest, TOPK_RESTS)
    check_positive("tau", tau)
    _check_floating("student", student)
    if student.dim() == 0:
        raise ValueError("student is 0-d; it must have shape (..., C)")
    lead, num_classes = student.shape[:-1], student.shape[-1]
    rows: int | Tensor = lead.numel()
    flat = student.reshape(-1, num_classes)

    if labels is not None:
        _check_labels("labels", labels, lead)
        losses = reference.tempered_kl_labels(flat, labels.reshape(-1), tau, ignore_index)
        rows = (labels != ignore_index).sum()
    elif topk is not None:
        values, indices = topk
        _check_teacher("topk values", values)
        _check_floating("topk values", values)
        _check_labels("topk indices", indices, values.shape)
        if values.shape[:-1] != lead or not 1 <= values.shape[-1] <= num_classes:
            raise ValueError(
                f"topk values have shape {tuple(values.shape)}; they must be {(*lead, 'K')}, K from 1 to {num_classes}"
            )
        k = values.shape[-1]
        losses = reference.tempered_kl_topk(flat, values.reshape(-1, k), indices.reshape(-1, k), tau, rest)
    else:
        name, target = ("logits", logits) if logits is not None else ("probs", probs)
        assert target is not None
        _check_teacher(name, target, student.shape)
        _check_floating(name, target)
        losses = reference.tempered_kl(flat, target.reshape(-1, num_classes), tau, probs=name == "probs")

    factor = {"tau2": tau * tau, "tau": tau, "one": 1.0}[scale]
    return _reduce(losses.reshape(lead) * factor, reduction, student.numel(), rows)


def image_l1_loss(
    student: Tensor, teacher: Tensor, *, tanh: bool = True, finished: bool = False, reduction: str = "mean"
) -> Tensor:
    """L1 distance of the images that the generator draws from the student's and from the teacher's code.

    student, teacher: pre-activations (m, ch, H, W), to which tanh is applied here; finished=True says that
    teacher already is an image, tanh=False that both are. reduction: "mean" over elements, "batchmean" (sum
    over pixels, mean over images: the paper's), "sum", "none" (m,).
    """
    check_choice("reduction", reduction, REDUCTIONS)
    _check_floating("student", student)
    _check_teacher("teacher", teacher, student.shape)
    losses = reference.tanh_l1(student, teacher, tanh, finished)
    return _reduce(losses, reduction, student.numel(), student.shape[0])


def generator_loss(
    d_fake: Tensor,
    confidence: Tensor | None = None,
    *,
    logits: Tensor | None = None,
    probs: Tensor | None = None,
    alpha: float = 0.5,
    minimax: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """L_G of deprivatisation: the mean of (1 + alpha y_i) softplus(-d_i) (Ma et al., 2024, with the sign set right).

    d_fake: the discriminator's logits (m,) for generated images. y is the teacher's top probability: given as
    confidence (m,), or taken from its answer, logits or probs (m, C); 1 when nothing is given (a teacher that
    answers labels). minimax=True: G minimises log(1 - sigmoid(d)) instead of softplus(-d).
    """
    check_choice("reduction", reduction, REDUCTIONS)
    _check_floating("d_fake", d_fake)
    if sum(x is not None for x in (confidence, logits, probs)) > 1:
        raise ValueError("confidence, logits and probs: give one at most")
    if alpha < 0:
        raise ValueError(f"alpha is {alpha}; it must be at least 0")
    answer = logits if logits is not None else probs
    if answer is not None:
        _check_teacher("logits" if logits is not None else "probs", answer)
        if answer.dim() != 2 or answer.shape[0] != d_fake.shape[0]:
            raise ValueError(f"the answer has shape {tuple(answer.shape)}; it must be ({d_fake.shape[0]}, C)")
        confidence = (reference.log_softmax(answer).exp() if logits is not None else answer).amax(-1)
    if confidence is None:
        confidence = torch.ones_like(d_fake)
    _check_teacher("confidence", confidence, d_fake.shape)
    losses = reference.gan_generator(d_fake, confidence.detach(), alpha, minimax)
    return _reduce(losses, reduction, d_fake.numel(), d_fake.numel())


def discriminator_loss(d_real: Tensor, d_fake: Tensor, *, reduction: str = "mean") -> Tensor:
    """L_D: mean softplus(-d(x)) + mean softplus(d(G(z))) for logits (m,) and (n,); "sum" adds both sums."""
    check_choice("reduction", reduction, ("mean", "sum"))
    _check_floating("d_real", d_real)
    _check_floating("d_fake", d_fake)
    real, fake = reference.gan_discriminator(d_real, d_fake)
    return _reduce(real, reduction, real.numel(), 1) + _reduce(fake, reduction, fake.numel(), 1)
