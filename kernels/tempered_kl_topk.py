"""tempered_kl against the k best probabilities of a row: what is missing to 1 is spread over the others, or dropped."""

import torch
from torch import Tensor

from mekd.checks import check_best, check_named_classes, check_tau, checks_values
from mekd.kernels.rows import as_rows, check_shape, run
from mekd.kernels.tempered_kl import online, tempered_kl, tile

#: Each class is compared with each that is named: from here on that costs more than a target in memory.
MOST_NAMED = 32
SAY_OTHERWISE = "use rest='spread' or 'drop' with all entries present, or impl='reference'"


def tempered_kl_topk(
    student: Tensor, values: Tensor, indices: Tensor, tau: Tensor, weights: Tensor | None, mask: Tensor | None,
    rest: str, slack: float, scale: str, reduction: str, grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and gradient of logits (..., C) against probabilities and int64 classes (..., K), K from 1 to C.

    ValueError or TypeError where shapes do not fit; values are checked as mekd.functional says. RuntimeError for
    rest="tail" and, as far as values are looked at, for absent entries: they have no kernel yet.
    """
    if rest == "tail":
        raise RuntimeError(f"rest='tail' has no Triton kernel yet; {SAY_OTHERWISE}")
    classes, k = student.shape[-1], values.shape[-1]
    check_shape("topk values", values, (*student.shape[:-1], min(k, classes)))
    check_shape("topk indices", indices, values.shape, torch.int64)
    check_tau(tau)
    others = classes - k if rest == "spread" else 0
    check_best(values, indices, mask, slack, rest, classes)
    check_named_classes(indices, classes, mask)
    if checks_values(indices) and (indices == -1 if mask is None else (indices == -1) & mask.unsqueeze(-1)).any():
        raise RuntimeError(f"topk indices hold -1, an absent entry, which no Triton kernel takes yet; {SAY_OTHERWISE}")
    if k > MOST_NAMED:
        target = _dense(values, indices, mask, classes, others, torch.float64 in (student.dtype, values.dtype))
        return tempered_kl(student, target, tau, weights, mask, False, 0.0, scale, reduction, grad)
    v = as_rows(values)
    return run(
        "tempered_kl_topk", (tile, online), student, (v,), tau, weights, mask, scale, reduction, grad,
        indices.reshape(v.shape).contiguous(),
        TARGET_STEP=v.stride(0), K=k, OTHERS=others, PROBS=True,
    )  # fmt: skip


def _dense(values: Tensor, indices: Tensor, mask: Tensor | None, classes: int, others: int, wide: bool) -> Tensor:
    """The target in memory, as the kernel has it."""
    values = values.to(torch.float64 if wide else torch.float32)
    if mask is not None:  # rows that do not count may name what is no class
        indices = indices.where(mask.unsqueeze(-1), torch.arange(values.shape[-1], device=indices.device))
    missing = (1 - values.sum(-1, keepdim=True)).clamp_min(0)
    share = missing / others if others > 0 else torch.zeros_like(missing)
    filled = share.expand(*values.shape[:-1], classes).scatter(-1, indices, values)
    return (filled / filled.amax(-1, keepdim=True)).log()
