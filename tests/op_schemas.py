"""The ops of torch.ops.mekd as they are called by hand: the arguments of a problem in the order of its schema."""

from typing import Any

import torch

from mekd.checks import SLACK
from op_grid import BETAS, IMAGE_KINDS, SKEWED, TOPK_KINDS, Problem, weights_of


def direct(problem: Problem, reduction: str, grad: bool) -> tuple[Any, list[Any]]:
    """The op and its arguments, its students wanting gradients where grad is True."""
    kind, target, options = problem.kind, problem.target, problem.options
    students = [x.detach().clone().requires_grad_(grad) for x in problem.students]
    rest = [reduction, grad]
    ops = torch.ops.mekd
    if kind in IMAGE_KINDS:
        return ops.tanh_l1.default, [
            *students, target["teacher"], options.get("weights"), options["tanh"], options["finished"], *rest,
        ]  # fmt: skip
    if kind == "discriminator":
        return ops.gan_discriminator.default, [*students, *rest]
    if "tau" not in options:
        answer = next(((name, x) for name, x in target.items() if name != "minimax"), ("confidence", None))
        name, response = answer
        return ops.gan_generator.default, [*students, response, name, SLACK, 1.0, 0.5, "minimax" in target, *rest]
    rows = [
        torch.as_tensor(options["tau"], dtype=torch.float64, device=students[0].device),
        options.get("weights"),
        options.get("mask"),
    ]
    ignored = options.get("ignore_index", -100)
    if kind == "labels":
        return ops.tempered_kl_labels.default, [*students, target["labels"], *rows, ignored, "tau2", *rest]
    if kind in TOPK_KINDS:
        return ops.tempered_kl_topk.default, [*students, *target["topk"], *rows, kind, SLACK, "tau2", *rest]
    if kind == "dkd":
        return ops.dkd.default, [
            *students, target["teacher"], target["labels"], *rows, 1.0, options["beta"], ignored, "tau2", *rest,
        ]  # fmt: skip
    if kind in BETAS:
        return ops.jsd.default, [
            *students, target["teacher"], *rows, *weights_of(kind, options), options["log_probs"], "one", *rest,
        ]  # fmt: skip
    if kind in SKEWED:
        return ops.jsd.default, [*students, target["logits"], *rows, *weights_of(kind, options), False, "tau2", *rest]
    return ops.tempered_kl.default, [*students, target[kind], *rows, kind == "probs", SLACK, "tau2", *rest]
