"""Every op in a few lines of plain PyTorch: the definition of its value, and the oracle of every test.

A function NAME takes rows (..., C) or a batch (m, ...), computes in float32 (float64 for float64 inputs) and returns
one loss per row or sample. NAME_loss is the whole op: it checks the values, and applies weights, mask, scale and
reduction. Gradients follow by autograd; tests compare the fused backends with them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mekd.checks import (
    SAY_CONFIDENCE,
    check_best,
    check_choice,
    check_confidence,
    check_named_classes,
    check_probabilities,
    check_tau,
    rows_that_weigh,
    rows_with_answer,
    rows_with_label,
)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where x is; the meta device knows none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def log_softmax(logits: Tensor, tau: Tensor | float = 1.0) -> Tensor:
    """log softmax(logits / tau) over the last dimension, in the accumulation dtype. A logit of -inf is a mask."""
    return F.log_softmax(logits.to(accumulation_dtype(logits)) / tau, dim=-1)


def log_probs(target: Tensor, tau: Tensor | float, probs: bool = False) -> Tensor:
    """log p^tau over the last dimension for logits, or for probabilities with probs=True.

    p^(1/tau), normalised, is softmax(logits / tau): log p is the logits up to a constant that softmax ignores.
    """
    return log_softmax(target.to(accumulation_dtype(target)).clamp_min(0).log() if probs else target, tau)


def tempered_kl(student: Tensor, target: Tensor, tau: Tensor | float, probs: bool = False) -> Tensor:
    """KL(p_t^tau || softmax(student / tau)) for logits (N, C), or for probabilities with probs=True: (N,)."""
    log_p = log_probs(target, tau, probs).to(accumulation_dtype(student))
    p = log_p.exp()
    # 0 log 0 = 0: a class that the teacher rules out counts nothing, even where the student's log q is -inf.
    return (p * (log_p - log_softmax(student, tau)).masked_fill(p == 0, 0.0)).sum(-1)


def tempered_kl_labels(student: Tensor, labels: Tensor, tau: Tensor | float, ignore_index: int = -100) -> Tensor:
    """KL(onehot(label) || softmax(student / tau)) for labels (N,): the cross-entropy; 0 for ignored rows."""
    kept = labels != ignore_index
    log_q = log_softmax(student.masked_fill(~kept.unsqueeze(-1), 0.0), tau)
    picked = log_q.gather(-1, labels.where(kept, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(kept, -picked, torch.zeros_like(picked))


def fill_topk(values: Tensor, indices: Tensor, num_classes: int, rest: str = "spread") -> Tensor:
    """Top-k probabilities (N, K) with indices (N, K) as a full distribution (N, C).

    rest="spread" shares the missing mass equally over the classes that were not named; rest="drop" leaves
    them at 0. Either way the row is normalised, so that values rounded by an API still sum to one. An entry of index
    -1 is absent, whatever its value; a row of such is uniform when spread, and no distribution, all 0, when dropped.
    """
    named = indices >= 0
    values = values.to(accumulation_dtype(values)).masked_fill(~named, 0.0)
    missing = (1 - values.sum(-1, keepdim=True)).clamp_min(0)
    unnamed = num_classes - named.sum(-1, keepdim=True)
    share = (missing / unnamed.clamp_min(1)).masked_fill((unnamed == 0) | (rest != "spread"), 0.0)
    # Absent entries go to a column of their own, which is cut off.
    wide = share.expand(*indices.shape[:-1], num_classes + 1)
    filled = wide.scatter(-1, indices.where(named, num_classes), values)[..., :num_classes].contiguous()
    return filled / filled.sum(-1, keepdim=True).masked_fill(~named.any(-1, keepdim=True), 1.0)


def tempered_kl_topk(
    student: Tensor, values: Tensor, indices: Tensor, tau: Tensor | float, rest: str = "spread"
) -> Tensor:
    """KL of the tempered top-k distribution against softmax(student / tau): (N,).

    It is filled to all classes, or with rest="tail" compared as it is, with one bucket for what it does not name. Only
    when spread does a row without any entry say something: else its loss is 0.
    """
    if rest == "tail":
        log_p, log_q = buckets(student, values, indices, tau)
        return _at_least_0(kl_term(log_p, log_q).sum(-1))
    target = fill_topk(values, indices, student.shape[-1], rest)
    if rest == "spread":
        return tempered_kl(student, target, tau, probs=True)
    silent = (indices < 0).all(-1)
    return tempered_kl(student.masked_fill(silent.unsqueeze(-1), 0.0), target, tau, probs=True).masked_fill(silent, 0.0)


def buckets(student: Tensor, values: Tensor, indices: Tensor, tau: Tensor | float) -> tuple[Tensor, Tensor]:
    """Log-probabilities log p, log q (N, K + 1) of the named classes, and of one bucket for the n others.

    In the bucket the teacher has n equal parts; of an absent entry both are -inf.
    """
    named, dtype = indices >= 0, accumulation_dtype(student)
    values = values.to(accumulation_dtype(values)).masked_fill(~named, 0.0)
    unnamed = student.shape[-1] - named.sum(-1, keepdim=True).to(values.dtype)
    share = (1 - values.sum(-1, keepdim=True)).clamp_min(0) / unnamed.clamp_min(1)
    log_p = F.log_softmax(torch.cat([values.log() / tau, unnamed.log() + share.log() / tau], -1), -1).to(dtype)

    scaled = student.to(dtype) / tau
    scaled = scaled - scaled.amax(-1, keepdim=True).detach()
    among = torch.zeros_like(scaled[..., :1], dtype=torch.bool).expand(*scaled.shape[:-1], scaled.shape[-1] + 1)
    among = among.scatter(-1, indices.where(named, scaled.shape[-1]), True)[..., :-1]
    others = scaled.masked_fill(among, -math.inf)
    empty = (others == -math.inf).all(-1, keepdim=True)
    together = others.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True).masked_fill(empty, -math.inf)
    mine = scaled.gather(-1, indices.clamp_min(0)).masked_fill(~named, -math.inf)
    return log_p, torch.cat([mine, together], -1) - scaled.logsumexp(-1, keepdim=True)


def tanh_l1(a: Tensor, b: Tensor, tanh: bool = True, finished: bool = False) -> Tensor:
    """Per-sample sum over all pixels of |tanh(a) - tanh(b)| for pre-activations (m, ...): (m,).

    finished=True says that b already is an image; tanh=False compares a and b as they are. The sub-gradient
    at ties is 0.
    """
    a, b = a.to(accumulation_dtype(a)), b.to(accumulation_dtype(a))
    if tanh:
        a, b = a.tanh(), b if finished else b.tanh()
    return (a - b).abs().reshape(a.shape[0], math.prod(a.shape[1:])).sum(1)


def dkd(student: Tensor, teacher: Tensor, labels: Tensor, tau: Tensor | float, alpha: float, beta: float) -> Tensor:
    """Decoupled KD (Zhao et al., 2022): alpha * KL of target class against rest + beta * KL within the rest.

    student, teacher: logits (N, C), labels (N,). With one class both parts are 0, with two the second one is; so it is
    in a row where either side masks all of the rest, in which there is then nothing to compare. A part of weight 0
    counts nothing, even where it is infinite.
    """
    target = torch.arange(student.shape[-1], device=labels.device) == labels.unsqueeze(-1)
    dtype = accumulation_dtype(student)

    def split(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the target against all others together (N, 2), the others' logits, and where none is."""
        scaled = logits.to(accumulation_dtype(logits)) / tau
        rest = scaled.masked_fill(target, -math.inf)
        empty = (rest == -math.inf).all(-1)
        rest = rest.masked_fill(empty.unsqueeze(-1), 0.0)
        together = rest.logsumexp(-1).masked_fill(empty, -math.inf)
        both = torch.stack([scaled.gather(-1, labels.unsqueeze(-1)).squeeze(-1), together], -1)
        return F.log_softmax(both, -1).to(dtype), rest.to(dtype), empty

    (log_q, rest_q, none_q), (log_p, rest_p, none_p) = split(student), split(teacher)
    binary = kl_term(log_p, log_q).sum(-1)
    within = tempered_kl(rest_q, rest_p, 1.0).masked_fill(none_q | none_p, 0.0)
    return _times(alpha, binary) + _times(beta if student.shape[-1] > 2 else 0.0, within)


def _times(weight: float, losses: Tensor) -> Tensor:
    return weight * (losses if weight else losses.masked_fill(torch.ones_like(losses, dtype=torch.bool), 0.0))


def kl_term(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q) of each class by itself, 0 where p is."""
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).masked_fill(p == 0, 0.0)


def jsd(
    student: Tensor, teacher: Tensor, tau: Tensor | float, beta: float, left: float, right: float,
    log_probs: bool = False,
) -> Tensor:  # fmt: skip
    """Divergences through a mixture m = beta p + (1 - beta) q: left KL(p || m) + right KL(q || m).

    student, teacher: logits (N, C), or log-probabilities that are taken as they are (tau is then not used). left = beta
    and right = 1 - beta are the generalised Jensen-Shannon divergence; with left = 1 and right = 0 it is the skewed KL
    of Lee (2001), and at beta = 0 KL(p || q); with left = 0 and right = 1 the same of q, and at beta = 1 KL(q || p).
    """
    log_q = student.to(accumulation_dtype(student)) if log_probs else log_softmax(student, tau)
    log_p = teacher.to(log_q.dtype) if log_probs else log_softmax(teacher, tau).to(log_q.dtype)
    if beta in (0, 1):
        losses = (left * kl_term(log_p, log_q) if beta == 0 else right * kl_term(log_q, log_p)).sum(-1)
        # Log-probabilities that do not add up to 1 may have a KL below 0.
        return losses if log_probs else _at_least_0(losses)
    masked = (log_p == -math.inf) & (log_q == -math.inf)  # 0 log 0 = 0, and a gradient of 0
    log_p, log_q = log_p.masked_fill(masked, -1e30), log_q.masked_fill(masked, -1e30)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    log_m = log_m + torch.where(log_p == log_q, log_p - log_m, 0.0).detach()  # equal sides have no distance, to the bit
    return _at_least_0((_times(left, kl_term(log_p, log_m)) + _times(right, kl_term(log_q, log_m))).sum(-1))


def _at_least_0(losses: Tensor) -> Tensor:
    """What rounding takes below 0, with the derivatives of the formula all the same."""
    return losses - losses.detach().clamp_max(0)


def gan_generator(d_fake: Tensor, confidence: Tensor, alpha: float, minimax: bool = False, base: float = 1.0) -> Tensor:
    """(base + alpha y) softplus(-d) per sample: the generator's GAN loss and the information term in one pass.

    minimax=True replaces base * softplus(-d) by base * log(1 - sigmoid(d)) = -base * softplus(d).
    """
    d = d_fake.to(accumulation_dtype(d_fake))
    fooling = -F.softplus(d) if minimax else F.softplus(-d)
    return base * fooling + alpha * confidence.to(d.dtype) * F.softplus(-d)


def gan_discriminator(d_real: Tensor, d_fake: Tensor) -> tuple[Tensor, Tensor]:
    """softplus(-d(x)) and softplus(d(G(z))) per sample."""
    real, fake = (d.to(accumulation_dtype(d)) for d in (d_real, d_fake))
    return F.softplus(-real), F.softplus(fake)


# The whole ops, with the arguments of their schemas in mekd.ops.


def tempered_kl_loss(
    student: Tensor, target: Tensor, tau: Tensor, weights: Tensor | None, mask: Tensor | None,
    probs: bool, slack: float, scale: str, reduction: str,
) -> Tensor:  # fmt: skip
    """tempered_kl of (..., C), weighted, masked, scaled and reduced; slack: how far a row of probs may be from 1."""
    check_tau(tau)
    if probs:
        check_probabilities(target, weights, mask, slack)
    kept = rows_that_weigh(weights, mask)
    student, target = hide(student, kept, 0.0), hide(target, kept, 1.0)
    return _rows(tempered_kl(student, target, tau, probs), student, tau, weights, mask, scale, reduction)


def tempered_kl_labels_loss(
    student: Tensor, labels: Tensor, tau: Tensor, weights: Tensor | None, mask: Tensor | None,
    ignore_index: int, scale: str, reduction: str,
) -> Tensor:  # fmt: skip
    """tempered_kl_labels of (..., C) and labels (...), weighted, masked, scaled and reduced."""
    check_tau(tau)
    mask = rows_with_label(labels, weights, mask, ignore_index, student.shape[-1])
    kept = rows_that_weigh(weights, mask)
    assert kept is not None
    losses = tempered_kl_labels(hide(student, kept, 0.0), labels.where(kept, 0), tau, -1)
    return _rows(losses, student, tau, weights, mask, scale, reduction)


def tempered_kl_topk_loss(
    student: Tensor, values: Tensor, indices: Tensor, tau: Tensor, weights: Tensor | None, mask: Tensor | None,
    rest: str, slack: float, scale: str, reduction: str,
) -> Tensor:  # fmt: skip
    """tempered_kl_topk of (..., C), values and indices (..., K), weighted, masked, scaled and reduced.

    slack: how far above 1 the sum of a row of values may be. A row without any entry counts only when it is spread.
    """
    check_tau(tau)
    check_best(values, indices, weights, mask, slack, rest, student.shape[-1])
    check_named_classes(indices, student.shape[-1], weights, mask)
    mask = rows_with_answer(indices, mask, rest)
    kept = rows_that_weigh(weights, mask)
    if kept is not None:
        values = hide(values, kept, 1.0)
        indices = indices.where(kept.unsqueeze(-1), torch.arange(indices.shape[-1], device=indices.device))
    student = hide(student, kept, 0.0)
    losses = tempered_kl_topk(student, values, indices, tau, rest)
    return _rows(losses, student, tau, weights, mask, scale, reduction)


def dkd_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, tau: Tensor, weights: Tensor | None, mask: Tensor | None,
    alpha: float, beta: float, ignore_index: int, scale: str, reduction: str,
) -> Tensor:  # fmt: skip
    """dkd of (..., C) and labels (...), weighted, masked, scaled and reduced."""
    check_tau(tau)
    mask = rows_with_label(labels, weights, mask, ignore_index, student.shape[-1])
    kept = rows_that_weigh(weights, mask)
    assert kept is not None
    student, teacher = hide(student, kept, 0.0), hide(teacher, kept, 0.0)
    ours, theirs = (x.reshape(-1, x.shape[-1]) for x in (student, teacher))
    losses = dkd(ours, theirs, labels.where(kept, 0).reshape(-1), tau, alpha, beta).reshape(labels.shape)
    return _rows(losses, student, tau, weights, mask, scale, reduction)


def jsd_loss(
    student: Tensor, teacher: Tensor, tau: Tensor, weights: Tensor | None, mask: Tensor | None,
    beta: float, left: float, right: float, log_probs: bool, scale: str, reduction: str,
) -> Tensor:  # fmt: skip
    """jsd of (..., C), weighted, masked, scaled and reduced."""
    check_tau(tau)
    kept = rows_that_weigh(weights, mask)
    student, teacher = hide(student, kept, 0.0), hide(teacher, kept, 0.0)
    losses = jsd(student, teacher, tau, beta, left, right, log_probs)
    return _rows(losses, student, tau, weights, mask, scale, reduction)


def tanh_l1_loss(a: Tensor, b: Tensor, weights: Tensor | None, tanh: bool, finished: bool, reduction: str) -> Tensor:
    """tanh_l1 of (m, ...), weighted and reduced."""
    if weights is not None:  # of weight 0 an image may hold anything, and 0 times NaN is NaN
        off = (weights == 0).reshape(-1, *[1] * (a.dim() - 1))
        a, b = a.masked_fill(off, 0.0), b.masked_fill(off, 0.0)
    losses = tanh_l1(a, b, tanh, finished)
    if weights is not None:
        losses = losses * weights.to(losses.dtype)
    return _reduce(losses, reduction, a, a.shape[0])


def gan_generator_loss(
    d: Tensor, response: Tensor | None, kind: str, slack: float, base: float, alpha: float, minimax: bool,
    reduction: str,
) -> Tensor:  # fmt: skip
    """gan_generator with y from a response of this kind: confidence (m,), logits or probs (m, C); y = 1 without.

    slack: how far from 1 the sum of a row of probs, and how far above it a confidence, may be.
    """
    if response is None:
        y = torch.ones_like(d)
    elif kind == "confidence":
        y = response
    elif kind == "logits":
        y = (log_softmax(response).exp()).amax(-1).reshape(d.shape)
    else:
        y = response.amax(-1).reshape(d.shape)
    if response is not None and kind == "confidence":
        check_confidence(response, slack)
    if response is not None and kind == "probs":
        check_probabilities(response, None, None, slack, SAY_CONFIDENCE)
    return _reduce(gan_generator(d, y, alpha, minimax, base), reduction, d, d.numel())


def gan_discriminator_loss(d_real: Tensor, d_fake: Tensor, reduction: str) -> Tensor:
    """Both sides of gan_discriminator, each reduced, and added."""
    check_choice("reduction", reduction, ("mean", "sum"))  # both batches have no loss for each sample in common
    real, fake = gan_discriminator(d_real, d_fake)
    return _reduce(real, reduction, real, 1) + _reduce(fake, reduction, fake, 1)


def hide(x: Tensor, kept: Tensor | None, value: float) -> Tensor:
    """x with this value in rows that do not count, which may hold anything: nothing of it may reach a gradient."""
    return x if kept is None else x.masked_fill(~kept.unsqueeze(-1), value)


def _rows(
    losses: Tensor, student: Tensor, tau: Tensor, weights: Tensor | None, mask: Tensor | None, scale: str,
    reduction: str,
) -> Tensor:  # fmt: skip
    if mask is not None:
        losses = losses.masked_fill(~mask, 0.0)
    if weights is not None:
        losses = losses * (weights if mask is None else weights.masked_fill(~mask, 0.0)).to(losses.dtype)
    tau = tau.to(losses)  # of one row, the losses are 0-d as tau is, and the wider dtype would win
    losses = losses * (tau * tau if scale == "tau2" else tau if scale == "tau" else 1.0)
    return _reduce(losses, reduction, student, losses.numel() if mask is None else mask.sum())


def _reduce(losses: Tensor, reduction: str, student: Tensor, rows: int | Tensor) -> Tensor:
    """none, or the sum by nothing, all elements, dimension 0, or the rows that count; that of an empty batch is 0."""
    if reduction == "none":
        return losses
    divisors = {"sum": 1, "mean": student.numel(), "batchmean": student.shape[0], "rowmean": rows}
    by = divisors[reduction]
    return losses.sum() / (by.clamp_min(1) if isinstance(by, Tensor) else max(by, 1))
