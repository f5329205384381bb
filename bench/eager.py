"""The losses as one writes them with PyTorch alone: what the fused ones are measured against."""

import torch
import torch.nn.functional as F
from torch import Tensor

TAU = 4.0


def tempered_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Hinton's loss."""
    log_q = F.log_softmax(student.float() / TAU, -1)
    return TAU**2 * F.kl_div(log_q, F.softmax(teacher.float() / TAU, -1), reduction="batchmean")


def tempered_kl_labels(student: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with a temperature."""
    return TAU**2 * F.cross_entropy(student.float() / TAU, labels)


def tempered_kl_topk(student: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """The best five classes; what is missing to 1 is spread over the others."""
    rest = (1 - values.float().sum(-1, keepdim=True)).clamp_min(0) / (student.shape[-1] - values.shape[-1])
    full = rest.expand(student.shape).scatter(-1, indices, values.float())
    p = (full.log() / TAU).softmax(-1)
    return TAU**2 * F.kl_div(F.log_softmax(student.float() / TAU, -1), p, reduction="batchmean")


def dkd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Decoupled KD with the target masked by a large negative logit."""
    s, t = student.float() / TAU, teacher.float() / TAU
    target = F.one_hot(labels, s.shape[-1]).bool()
    q, p = s.softmax(-1), t.softmax(-1)
    split_q = torch.stack([q[target], q.masked_fill(target, 0).sum(-1)], -1)
    split_p = torch.stack([p[target], p.masked_fill(target, 0).sum(-1)], -1)
    binary = F.kl_div(split_q.log(), split_p, reduction="batchmean")
    rest = F.kl_div(
        F.log_softmax(s - 1000 * target, -1), F.softmax(t - 1000 * target, -1), reduction="batchmean"
    )  # fmt: skip
    return TAU**2 * (binary + 8 * rest)


def jsd(student: Tensor, teacher: Tensor) -> Tensor:
    """The symmetric Jensen-Shannon divergence."""
    log_q, log_p = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    log_m = (0.5 * (log_q.exp() + log_p.exp())).log()
    forward = F.kl_div(log_m, log_p, log_target=True, reduction="batchmean")
    return 0.5 * (forward + F.kl_div(log_m, log_q, log_target=True, reduction="batchmean"))


def tanh_l1(a: Tensor, b: Tensor) -> Tensor:
    """The distance of two images before their tanh."""
    return F.l1_loss(a.float().tanh(), b.float().tanh())


def gan_generator(d: Tensor, logits: Tensor) -> Tensor:
    """The generator's loss with the information term, from the teacher's logits."""
    return gan_generator_probs(d, logits.float().softmax(-1))


def gan_generator_probs(d: Tensor, probs: Tensor) -> Tensor:
    """The same from its probabilities."""
    fooling = F.softplus(-d.float())
    return fooling.mean() + 0.5 * (probs.float().amax(-1) * fooling).mean()
