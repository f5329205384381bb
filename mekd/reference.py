"""Every op in a few lines of plain PyTorch: the definition of its value, and the oracle of every test.

A function NAME takes rows (..., C) or a batch (m, ...), computes in float32 (float64 for float64 inputs) and returns
one loss per row or sample. NAME_loss is the whole op: it checks the values, and applies weights, mask, scale and
reduction. Gradients follow by autograd; tests compare the fused backends with them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mekd.checks import check_named_classes, check_probabilities, check_tau, rows_with_label


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
    them at 0. Either way the row is normalised, so that values rounded by an API still sum to one.
    """
    values = values.to(accumulation_dtype(values))
    missing = (1 - values.sum(-1, keepdim=True)).clamp_min(0)
    unnamed = num_classes - indices.shape[-1]
    share = missing / unnamed if rest == "spread" and unnamed else torch.zeros_like(missing)
    filled = share.expand(*indices.shape[:-1], num_classes).scatter(-1, indices, values)
    return filled / filled.sum(-1, keepdim=True)


def tempered_kl_topk(
    student: Tensor, values: Tensor, indices: Tensor, tau: Tensor | float, rest: str = "spread"
) -> Tensor:
    """KL of the filled and tempered top-k distribution against softmax(student / tau): (N,)."""
    return tempered_kl(student, fill_topk(values, indices, student.shape[-1], rest), tau, probs=True)


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

    student, teacher: logits (N, C), labels (N,). With one class both parts are 0, with two the second one is.
    """
    target = torch.arange(student.shape[-1], device=labels.device) == labels.unsqueeze(-1)
    log_q, log_p = log_softmax(student, tau), log_softmax(teacher, tau).to(accumulation_dtype(student))

    def split(log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the target and of all others together, without 1 - p, which would round to 0."""
        hit = log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return hit, log_probs.masked_fill(target, -math.inf).logsumexp(-1)

    (hit_q, miss_q), (hit_p, miss_p) = split(log_q), split(log_p)
    binary = _kl_term(hit_p, hit_q) + _kl_term(miss_p, miss_q)
    if student.shape[-1] < 3:
        return alpha * binary
    hidden_p, hidden_q = ((x.to(log_q.dtype) / tau).masked_fill(target, -math.inf) for x in (teacher, student))
    rest = tempered_kl(hidden_q, hidden_p, 1.0)
    return alpha * binary + beta * rest


def _kl_term(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).masked_fill(p == 0, 0.0)


def jsd(student: Tensor, teacher: Tensor, tau: Tensor | float, beta: float, log_probs: bool = False) -> Tensor:
    """Generalised Jensen-Shannon divergence beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    student, teacher: logits (N, C), or log-probabilities that are taken as they are (tau is then not used). beta = 0
    means KL(p || q) and beta = 1 means KL(q || p), the limits of the formula divided by beta and by 1 - beta.
    """
    log_q = student.to(accumulation_dtype(student)) if log_probs else log_softmax(student, tau)
    log_p = teacher.to(log_q.dtype) if log_probs else log_softmax(teacher, tau).to(log_q.dtype)
    if beta in (0, 1):
        losses = (_kl_term(log_p, log_q) if beta == 0 else _kl_term(log_q, log_p)).sum(-1)
        # Log-probabilities that do not add up to 1 may have a KL below 0.
        return losses if log_probs else _at_least_0(losses)
    masked = (log_p == -math.inf) & (log_q == -math.inf)  # 0 log 0 = 0, and a gradient of 0
    log_p, log_q = log_p.masked_fill(masked, -1e30), log_q.masked_fill(masked, -1e30)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    log_m = log_m + torch.where(log_p == log_q, log_p - log_m, 0.0).detach()  # equal sides have no distance, to the bit
    return _at_least_0((beta * _kl_term(log_p, log_m) + (1 - beta) * _kl_term(log_q, log_m)).sum(-1))


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
    probs: bool, scale: str, reduction: str,
) -> Tensor:  # fmt: skip
    """tempered_kl of (..., C), weighted, masked, scaled and reduced."""
    check_tau(tau)
    if probs:
        check_probabilities("probs", target, mask)
    student, target = _hide(student, mask, 0.0), _hide(target, mask, 1.0)
    return _rows(tempered_kl(student, target, tau, probs), student, tau, weights, mask, scale, reduction)


def tempered_kl_labels_loss(
    student: Tensor, labels: Tensor, tau: Tensor, weights: Tensor | None, mask: Tensor | None,
    ignore_index: int, scale: str, reduction: str,
) -> Tensor:  # fmt: skip
    """tempered_kl_labels of (..., C) and labels (...), weighted, masked, scaled and reduced."""
    check_tau(tau)
    mask = rows_with_label(labels, mask, ignore_index, student.shape[-1])
    student = _hide(student, mask, 0.0)
    losses = tempered_kl_labels(student, labels.where(mask, 0), tau, -1)
    return _rows(losses, student, tau, weights, mask, scale, reduction)


def tempered_kl_topk_loss(
    student: Tensor, values: Tensor, indices: Tensor, tau: Tensor, weights: Tensor | None, mask: Tensor | None,
    rest: str, scale: str, reduction: str,
) -> Tensor:  # fmt: skip
    """tempered_kl_topk of (..., C), values and indices (..., K), weighted, masked, scaled and reduced."""
    check_tau(tau)
    check_probabilities("topk values", values, mask)
    check_named_classes(indices, student.shape[-1], mask)
    if mask is not None:
        values = _hide(values, mask, 1.0)
        indices = indices.where(mask.unsqueeze(-1), torch.arange(indices.shape[-1], device=indices.device))
    student = _hide(student, mask, 0.0)
    losses = tempered_kl_topk(student, values, indices, tau, rest)
    return _rows(losses, student, tau, weights, mask, scale, reduction)


def dkd_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, tau: Tensor, weights: Tensor | None, mask: Tensor | None,
    alpha: float, beta: float, ignore_index: int, scale: str, reduction: str,
) -> Tensor:  # fmt: skip
    """dkd of (..., C) and labels (...), weighted, masked, scaled and reduced."""
    check_tau(tau)
    mask = rows_with_label(labels, mask, ignore_index, student.shape[-1])
    student, teacher = _hide(student, mask, 0.0), _hide(teacher, mask, 0.0)
    ours, theirs = (x.reshape(-1, x.shape[-1]) for x in (student, teacher))
    losses = dkd(ours, theirs, labels.where(mask, 0).reshape(-1), tau, alpha, beta).reshape(labels.shape)
    return _rows(losses, student, tau, weights, mask, scale, reduction)


def jsd_loss(
    student: Tensor, teacher: Tensor, tau: Tensor, weights: Tensor | None, mask: Tensor | None,
    beta: float, log_probs: bool, scale: str, reduction: str,
) -> Tensor:  # fmt: skip
    """jsd of (..., C), weighted, masked, scaled and reduced."""
    check_tau(tau)
    student, teacher = _hide(student, mask, 0.0), _hide(teacher, mask, 0.0)
    losses = jsd(student, teacher, tau, beta, log_probs)
    return _rows(losses, student, tau, weights, mask, scale, reduction)


def tanh_l1_loss(a: Tensor, b: Tensor, weights: Tensor | None, tanh: bool, finished: bool, reduction: str) -> Tensor:
    """tanh_l1 of (m, ...), weighted and reduced."""
    losses = tanh_l1(a, b, tanh, finished)
    losses = losses if weights is None else losses * weights.to(losses.dtype)
    return _reduce(losses, reduction, a.numel(), a.shape[0])


def gan_generator_loss(
    d: Tensor, response: Tensor | None, kind: str, base: float, alpha: float, minimax: bool, reduction: str
) -> Tensor:
    """gan_generator with y from a response of this kind: confidence (m,), logits or probs (m, C); y = 1 without."""
    if response is None:
        y = torch.ones_like(d)
    elif kind == "confidence":
        y = response
    elif kind == "logits":
        y = (log_softmax(response).exp()).amax(-1).reshape(d.shape)
    else:
        y = response.amax(-1).reshape(d.shape)
    if response is not None and kind != "logits":
        check_probabilities(kind, response)
    return _reduce(gan_generator(d, y, alpha, minimax, base), reduction, d.numel(), d.numel())


def gan_discriminator_loss(d_real: Tensor, d_fake: Tensor, reduction: str) -> Tensor:
    """Both sides of gan_discriminator, each reduced, and added."""
    if reduction == "none":
        raise ValueError("reduction is 'none'; the two batches have no loss for each sample in common")
    real, fake = gan_discriminator(d_real, d_fake)
    return _reduce(real, reduction, real.numel(), 1) + _reduce(fake, reduction, fake.numel(), 1)


def _hide(x: Tensor, mask: Tensor | None, value: float) -> Tensor:
    """Rows that do not count may hold anything, NaN too: nothing of it may reach a loss or a gradient."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), value)


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
    return _reduce(losses, reduction, student.numel(), losses.numel() if mask is None else mask.sum())


def _reduce(losses: Tensor, reduction: str, elements: int, rows: int | Tensor) -> Tensor:
    """none, sum, batchmean (sum / rows that count), mean (sum / all elements); the loss of an empty batch is 0."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "batchmean":
        return losses.sum() / (rows.clamp_min(1) if isinstance(rows, Tensor) else max(rows, 1))
    return losses.sum() / max(elements, 1)
