"""The code that the generator draws from, made alike for the student and for every kind of teacher's answer.

If the two sides were made differently, the image distance would measure the difference of formats.
"""

import torch
from torch import Tensor

from mekd.checks import check_drawn
from mekd.reference import accumulation_dtype, fill_topk, log_probs

CODES = ("auto", "logits", "log_probs", "onehot", "standardized")
#: The kinds of answers, and the code that "auto" means for each.
TARGETS = {"logits": "logits", "probs": "log_probs", "labels": "onehot", "topk": "log_probs"}
#: Probabilities below this are alike to a float32 API: half the spacing of float32 numbers just below 1.
FLOAT32_FLOOR = 2.0**-25
CLIP = 4.0


def standardize(x: Tensor) -> Tensor:
    """Zero mean and unit (population) variance per row, clipped at +-4: what the prior of G looks like."""
    centred = x - x.mean(-1, keepdim=True)
    return (centred / (centred.square().mean(-1, keepdim=True).sqrt() + 1e-7)).clamp(-CLIP, CLIP)


def centred_log_probs(log_p: Tensor, floor: float) -> Tensor:
    """Log-probabilities, floored and centred per row: the logits up to the constant that softmax ignores."""
    log_p = log_p.clamp_min(torch.tensor(floor).log().item())
    return log_p - log_p.mean(-1, keepdim=True)


def resolve_code(code: str, target: str, num_classes: int) -> str:
    """The code that "auto" means for a kind of target, or ValueError where code and target do not fit."""
    chosen = TARGETS[target] if code == "auto" else code
    fits = {
        "logits": target == "logits",
        "log_probs": target in ("logits", "probs", "topk"),
        "onehot": target == "labels",
        "standardized": True,
    }
    if not fits[chosen]:
        raise ValueError(f"code is {code!r}, which cannot be made from {target}; use code='auto'")
    if chosen in ("onehot", "standardized") and num_classes < 3:
        raise ValueError(
            f"code {chosen!r} needs at least 3 classes, not {num_classes}: standardised, a row of two says only "
            "which is larger; use code='auto' with logits or probabilities, or kd_loss alone"
        )
    return chosen


def student_code(logits: Tensor, code: str, target: str, tau: float | Tensor, floor: float) -> Tensor:
    """The student's side for logits (m, C); code as resolve_code returned it."""
    if code == "logits":
        return logits.to(accumulation_dtype(logits)) / tau
    if code == "log_probs":
        return centred_log_probs(log_probs(logits, 1.0), floor) / tau
    if target == "labels":
        return standardize(log_probs(logits, 1.0).exp())
    if target == "logits":
        return standardize(logits.to(accumulation_dtype(logits)))
    return standardize(centred_log_probs(log_probs(logits, 1.0), floor))


def teacher_code(
    answer: Tensor | tuple[Tensor, Tensor],
    code: str,
    target: str,
    tau: float | Tensor,
    floor: float,
    num_classes: int,
) -> Tensor:
    """The teacher's side for logits or probs (m, C), labels (m,) or top-k (values, indices): (m, C).

    What a top-k answer leaves out is spread here, whatever the KL does with it: the generator knows no bucket, and a
    class of probability 0 is not what the teacher said.
    """
    if target == "topk":
        values, indices = answer
        answer, target = fill_topk(values, indices, num_classes), "probs"
    assert isinstance(answer, Tensor)
    if target == "labels":
        check_drawn(answer, num_classes)
        return standardize(torch.nn.functional.one_hot(answer, num_classes).to(torch.float32))
    if code == "logits":
        return answer.to(accumulation_dtype(answer)) / tau
    if code == "standardized" and target == "logits":
        return standardize(answer.to(accumulation_dtype(answer)))
    log_p = centred_log_probs(log_probs(answer, 1.0, probs=target == "probs"), floor)
    return log_p / tau if code == "log_probs" else standardize(log_p)
