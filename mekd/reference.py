"""Every op in a few lines of plain PyTorch: the definition of its value, and the oracle of every test.

Each function takes rows (N, C) or a batch (m, ...), computes in float32 (float64 for float64 inputs) and
returns one loss per row or sample. Gradients follow by autograd; tests compare the fused backends with them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    return (a - b).abs().flatten(1).sum(1)


def gan_generator(d_fake: Tensor, confidence: Tensor, alpha: float, minimax: bool = False) -> Tensor:
    """(1 + alpha y) softplus(-d) per sample: the generator's GAN loss and the information term in one pass.

    minimax=True replaces the first softplus(-d) by log(1 - sigmoid(d)) = -softplus(d).
    """
    d = d_fake.to(accumulation_dtype(d_fake))
    fooling = -F.softplus(d) if minimax else F.softplus(-d)
    return fooling + alpha * confidence.to(d.dtype) * F.softplus(-d)


def gan_discriminator(d_real: Tensor, d_fake: Tensor) -> tuple[Tensor, Tensor]:
    """softplus(-d(x)) and softplus(d(G(z))) per sample."""
    real, fake = (d.to(accumulation_dtype(d)) for d in (d_real, d_fake))
    return F.softplus(-real), F.softplus(fake)
