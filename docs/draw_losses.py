"""A picture of each loss, of mekd.functional itself: python docs/draw_losses.py [--out docs/pictures]."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from mekd.functional import (
    discriminator_loss,
    dkd_loss,
    generator_loss,
    image_l1_loss,
    jsd_loss,
    kd_loss,
    logit_standardized_kd_loss,
)

#: What a teacher says of four classes: sure of the first, the second not impossible.
TEACHER = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64).log()
MOVED = torch.linspace(-6, 6, 241, dtype=torch.float64)
Loss = Callable[[Tensor], Tensor]
plt.rcParams.update({"svg.hashsalt": "mekd", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


def students() -> Tensor:
    """The teacher's logits with the first one moved: (n, 4)."""
    moved = TEACHER.repeat(len(MOVED), 1)
    moved[:, 0] += MOVED
    return moved


def curve(loss: Loss, student: Tensor, column: int = 0) -> tuple[Tensor, Tensor]:
    """The loss of each row and its gradient for one logit."""
    student = student.clone().requires_grad_()
    losses = loss(student)
    (grad,) = torch.autograd.grad(losses.sum(), student)
    return losses.detach(), grad[:, column]


def pair() -> tuple[plt.Figure, Axes, Axes]:
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.9), layout="constrained")
    return figure, left, right


def titled(figure: plt.Figure, title: str) -> plt.Figure:
    """The figure, with what the lines on its left are."""
    figure.axes[0].legend(frameon=False)
    figure.suptitle(title)
    return figure


def against_a_logit(losses: dict[str, Loss], title: str) -> plt.Figure:
    """Loss and gradient against how far the student's first logit is from the teacher's."""
    figure, left, right = pair()
    for name, loss in losses.items():
        values, grad = curve(loss, students())
        left.plot(MOVED, values, label=name)
        right.plot(MOVED, grad, label=name)
    both(left, right, "first logit of the student, less the teacher's", "its gradient")
    return titled(figure, title)


def both(left: Axes, right: Axes, x: str, gradient: str) -> None:
    for axes, title in ((left, "loss"), (right, gradient)):
        axes.set(title=title, xlabel=x)
        axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)


def rows(loss: Callable[..., Tensor], **settings: object) -> Loss:
    """The loss against TEACHER, a value for each row."""
    return lambda student: loss(student, TEACHER.expand_as(student), reduction="none", **settings)


def temperature() -> plt.Figure:
    chosen = {f"tau {tau:g}": rows(kd_loss, tau=tau) for tau in (1.0, 2.0, 4.0)}
    return against_a_logit(chosen, "kd_loss: tau² keeps the gradient's size as the temperature grows")


def direction() -> plt.Figure:
    chosen = {
        "forward": rows(kd_loss),
        "reverse": rows(kd_loss, direction="reverse"),
        "symmetric": rows(kd_loss, direction="symmetric"),
        "forward, skew 0.1": rows(kd_loss, skew=0.1),
    }
    return against_a_logit(chosen, "kd_loss: which way the divergence looks")


def jsd() -> plt.Figure:
    chosen = {f"beta {beta:g}": rows(jsd_loss, beta=beta) for beta in (0.1, 0.5, 0.9)}
    return against_a_logit(chosen, "jsd_loss: bounded, however wrong the student is")


def standardized() -> plt.Figure:
    """Against the student's scale: a shape is compared, not a size."""
    figure, left, right = pair()
    factor = torch.linspace(0.1, 4, 200, dtype=torch.float64)
    for name, loss in {"kd_loss": kd_loss, "logit_standardized_kd_loss": logit_standardized_kd_loss}.items():
        values, grad = curve(rows(loss, tau=2.0), factor[:, None] * TEACHER)
        left.plot(factor, values, label=name)
        right.plot(factor, grad, label=name)
    both(left, right, "the teacher's logits times", "gradient of the first logit")
    return titled(figure, "logit_standardized_kd_loss: how large the logits are does not matter")


def dkd() -> plt.Figure:
    """The two parts, and what beta weighs: the order among the classes that are not the target."""
    figure, left, right = pair()
    other = TEACHER.repeat(len(MOVED), 1)
    other[:, 1] += MOVED
    target = torch.zeros(len(MOVED), dtype=torch.long)
    for axes, student, what in (
        (left, students(), "the target's logit moves"),
        (right, other, "another class's moves"),
    ):
        for style, alpha, beta in (("-", 1.0, 0.0), ("-", 0.0, 1.0), ("--", 1.0, 4.0)):
            teacher = TEACHER.expand_as(student)
            loss = dkd_loss(student, teacher, target, alpha=alpha, beta=beta, tau=1.0, reduction="none")
            axes.plot(MOVED, loss, style, label=f"alpha {alpha:g}, beta {beta:g}")
        axes.set(title=f"loss, {what}", xlabel="student's logit less the teacher's")
    return titled(figure, "dkd_loss: target against rest, and within the rest")


def rest() -> plt.Figure:
    """Eight classes of which two are answered: the target, and the gradient of a student that knows nothing."""
    values, indices = torch.tensor([[0.55, 0.25]], dtype=torch.float64), torch.tensor([[0, 1]])
    figure, left, right = pair()
    ranks = torch.arange(8)
    student = torch.linspace(0, -1.4, 8, dtype=torch.float64)[None].requires_grad_()
    start = student.softmax(-1).detach()[0]  # what the student says now
    left.plot(ranks, start, "k_", markersize=14, label="student")
    spread = torch.cat([values[0], ((1 - values.sum()) / 6).repeat(6)])
    targets = {"spread": spread, "drop": torch.cat([values[0] / values.sum(), torch.zeros(6)]), "tail": spread.clone()}
    targets["tail"][2:] = (1 - values.sum()) * start[2:] / start[2:].sum()
    for place, (name, target) in enumerate(targets.items()):
        loss = kd_loss(student, topk=(values, indices), rest=name)
        (grad,) = torch.autograd.grad(loss, student)
        left.bar(ranks + 0.26 * (place - 1), target, 0.26, label=name)
        right.bar(ranks + 0.26 * (place - 1), -grad[0], 0.26, label=f"{name}, loss {loss.item():.3f}")
        assert torch.allclose(-grad[0], target - start), name  # the target is what the gradient pulls to
    left.set(title="where each pulls to", xlabel="class, 0 and 1 were answered", ylabel="probability")
    right.set(title="pull on each logit (minus the gradient)", xlabel="class")
    right.axhline(0, color="0.8", linewidth=0.8)
    right.legend(frameon=False)
    return titled(figure, 'kd_loss(topk=..., rest=...): "tail" keeps the student\'s own order of the others')


def image_l1() -> plt.Figure:
    """One pixel before its tanh, against a finished pixel of 0.5, and one that is finished itself."""
    figure, left, right = pair()
    pixel = torch.linspace(-3, 3, 401, dtype=torch.float64)[:, None]
    for name, settings in {"finished=True": {"finished": True}, "tanh=False": {"tanh": False}}.items():
        loss = partial(image_l1_loss, teacher=torch.full_like(pixel, 0.5), reduction="none", **settings)
        values, grad = curve(loss, pixel)
        left.plot(pixel[:, 0], values, label=name)
        right.plot(pixel[:, 0], grad, label=name)
    both(left, right, "the student's pixel; the teacher's is 0.5", "its gradient")
    return titled(figure, "image_l1_loss: behind the tanh, where a pixel cannot leave its range")


def gan() -> plt.Figure:
    """Step 1: what the discriminator's logit of a drawn image costs either side."""
    figure, left, right = pair()
    logit = MOVED[:, None]
    for sure in (0.0, 1.0):
        confidence = torch.full_like(MOVED, sure)
        values, grad = curve(lambda d: generator_loss(d[:, 0], confidence, reduction="none"), logit)  # noqa: B023
        left.plot(MOVED, values, label=f"generator, y = {sure:g}")
        right.plot(MOVED, grad)
    fake = MOVED.clone().requires_grad_()
    each = torch.stack([discriminator_loss(d.new_full((1,), 1e3), d[None]) for d in fake])
    (grad,) = torch.autograd.grad(each.sum(), fake)
    left.plot(MOVED, each.detach(), "--", label="discriminator")
    right.plot(MOVED, grad, "--")
    both(left, right, "the discriminator's logit of a drawn image", "its gradient")
    return titled(figure, "generator_loss, discriminator_loss: (1 + alpha y) softplus(-d), and softplus(d)")


PICTURES = {
    "temperature": temperature, "direction": direction, "rest": rest, "standardized": standardized, "dkd": dkd,
    "jsd": jsd, "image-l1": image_l1, "gan": gan,
}  # fmt: skip


def main() -> None:
    """Write each picture as SVG."""
    parser = argparse.ArgumentParser(prog="docs/draw_losses.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        figure = draw()
        figure.patch.set_facecolor("white")
        figure.savefig(out / f"loss-{name}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
