"""Step 1 with a number for its privacy: D learns by DP-SGD (Abadi et al., 2016).

Whatever is computed from D alone, G, every image that is sent, the student, is (epsilon, delta)-differentially private
with respect to one private image. Logs, reports and pictures of the private images are not: they stay at home.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mekd import files
from mekd.config import Config
from mekd.data import TREES, arrays
from mekd.engine import parallel
from mekd.engine.run import Run, StageError
from mekd.errors import UsageError
from mekd.pixels import to_float
from mekd.seeds import generator_at

#: Renyi's orders, of which the best bounds epsilon: few steps of much noise want large ones.
ORDERS = [*(1 + x / 10 for x in range(1, 100)), *range(12, 64), *range(64, 1025, 32)]


class Spent(NamedTuple):
    """Each step draws each private image with probability rate, and adds noise of sigma * clip to their gradients."""

    sigma: float
    rate: float
    delta: float

    def epsilon(self, steps: int) -> float:
        """After so many steps, by Renyi differential privacy (Mironov, 2017; Opacus)."""
        from opacus.accountants import RDPAccountant

        accountant = RDPAccountant()
        accountant.history = [(self.sigma, self.rate, steps)]
        return float(accountant.get_epsilon(self.delta, alphas=ORDERS)) if steps else 0.0


def check(config: Config) -> None:
    """UsageError for what uses private images besides, or cannot be combined with deprivatize.dp."""
    if config.deprivatize.dp is None:
        return
    others = {
        "deprivatize.augment": (bool(config.deprivatize.augment), "looks at D's answers to private images", "false"),
        "distill.pretrain": (config.distill.pretrain > 0, "trains the student on private images", "0"),
        "evaluate.baseline": (bool(config.evaluate.baseline), "sends the private images to the teacher", "false"),
        "data.name": (config.data.name in TREES, "streams images, of which none can be drawn by chance", "photos"),
        "deprivatize.generator": (
            config.deprivatize.generator is not None,
            "is another run's, with its own epsilon",
            None,
        ),
        "deprivatize.after": (config.deprivatize.after is not None, "goes on from what another run learnt", None),
    }
    for name, (there, does, instead) in others.items():
        if there:
            raise UsageError(
                f"deprivatize.dp is {config.deprivatize.dp:g}, and {name} {does}, which its epsilon does not count: "
                + (f"say --{name} {instead}" if instead else f"leave {name} out")
                + ", or leave deprivatize.dp out"
            )
    if parallel.world() > 1:
        raise UsageError("deprivatize.dp takes one process: its noise is added once; start without torchrun")
    try:
        import opacus  # noqa: F401
    except ImportError as error:
        raise UsageError("deprivatize.dp takes Opacus, which counts epsilon: pip install 'mekd[dp]'") from error


def told(run: Run) -> dict[str, Any] | None:
    """What dp.json says of the run's generator, which may be another run's; None where there is no such number.

    There is none for a student that private images went into besides: of pretraining, or of another round's answers.
    """
    step1, checkpoint = run.config.deprivatize, run.checkpoint("deprivatize")
    path = (run.out if step1.generator is None else checkpoint.parent.parent) / "dp.json"
    if run.config.distill.pretrain or step1.after is not None or not path.exists():
        return None
    found = files.read_json(path)
    if step1.generator is not None:  # any file may be given: is it the one that dp.json is of?
        saved = files.load(checkpoint)
        if saved["state"].get("dp") != {name: found[name] for name in Spent._fields} or saved["step"] != found["steps"]:
            return None
    return found


class Noisy:
    """The private images of a run whose D learns by DP-SGD, and the noise, which stays what the run began with."""

    def __init__(self, run: Run) -> None:
        from opacus.accountants.utils import get_noise_multiplier

        config = run.config.deprivatize
        self.images = torch.cat([images for images, _ in run.data.once("local", 256)])
        rate, delta = min(1.0, config.batch / len(self.images)), 1 / (10 * len(self.images))
        sigma = get_noise_multiplier(
            target_epsilon=config.dp, target_delta=delta, sample_rate=rate, steps=config.steps, accountant="rdp"
        )
        self.state: dict[str, Any] = Spent(float(sigma), rate, delta)._asdict()

    @property
    def spent(self) -> Spent:
        """What the checkpoint says, once it is read."""
        return Spent(**self.state)

    def check(self, run: Run) -> None:
        """StageError where the noise that the run began with does not last for deprivatize.steps."""
        config = run.config.deprivatize
        assert config.dp is not None
        total = self.spent.epsilon(config.steps)
        if total > 1.01 * config.dp:
            raise StageError(
                f"deprivatize.steps is {config.steps}, which spends epsilon {total:.2f} with the noise that this run "
                f"began with, and deprivatize.dp is {config.dp:g}: take fewer steps, or start anew with another --out"
            )

    def step_discriminator(
        self, run: Run, discriminator: nn.Module, adam_d: torch.optim.Optimizer, fake: Tensor, step: int
    ) -> Tensor:
        """One step of D; each private image takes part with probability rate. Returns the loss."""
        config, spent, data = run.config.deprivatize, self.spent, run.config.data
        random = generator_at(run.config.seed, "dp", step)
        chosen = self.images[(torch.rand(len(self.images), generator=random) < spent.rate).to(self.images.device)]
        moves = arrays.moves(len(chosen), chosen.shape[-1], data.flip, random, data.shift)
        real = to_float(arrays.moved(chosen, moves))
        loss = set_gradients(discriminator, real, fake, spent, config.clip, spent.rate * len(self.images), random)
        adam_d.step()
        return loss

    def about(self, steps: int) -> dict[str, Any]:
        """What dp.json says."""
        epsilon = round(self.spent.epsilon(steps), 4)
        return {"epsilon": epsilon, "steps": steps, "images": len(self.images), "accountant": "RDP", **self.state}


def set_gradients(
    discriminator: nn.Module, real: Tensor, fake: Tensor, spent: Spent, clip: float, expected: float,
    random: torch.Generator,
) -> Tensor:  # fmt: skip
    """Set D's gradients: of mean softplus(-d(x)) and mean softplus(d(G(z))), each image's clipped to clip; the private
    ones' sum with noise. Returns the loss, which is no part of what is private.

    real (k, ch, S, S), k of them by chance; expected: how many on the average, which their sum is divided by. What is
    drawn needs no clipping: but clipped on one side alone, D learns that everything is drawn.
    """
    weights = list(discriminator.parameters())
    sums, of_real = clipped(discriminator, real, clip, -1)
    others, of_fake = clipped(discriminator, fake, clip, 1)
    for x in weights:
        noise = spent.sigma * clip * torch.randn(x.shape, generator=random).to(x.device)
        x.grad = (sums[x] + noise) / expected + others[x] / len(fake)
    return of_real + of_fake


def clipped(
    discriminator: nn.Module, images: Tensor, clip: float, sign: int
) -> tuple[dict[nn.Parameter, Tensor], Tensor]:
    """The sum over images (k, ch, S, S) of the gradients of softplus(sign * d(x)), each clipped, and the mean loss."""
    weights = {x: torch.zeros_like(x) for x in discriminator.parameters()}
    if not len(images):
        return weights, torch.zeros((), device=images.device)
    layers, loss = per_layer(discriminator, images, sign)
    norms = torch.stack([squares(back, read) + back.sum(2).square().sum(1) for _, back, read in layers]).sum(0).sqrt()
    factors = (clip / norms.clamp_min(1e-12)).clamp_max(1)
    for layer, back, read in layers:
        back = back * factors[:, None, None]
        weights[layer.weight] = torch.einsum("iop,iqp->oq", back, read).view_as(layer.weight)
        weights[layer.bias] = back.sum((0, 2))
    return weights, loss


def per_layer(discriminator: nn.Module, images: Tensor, sign: int) -> tuple[list[tuple[Any, Tensor, Tensor]], Tensor]:
    """Each layer with what its weights' gradients of softplus(sign * d(x)) are made of, and the mean loss.

    An image's gradient of a layer is back @ read.T: of what the layer gave (k, outputs, places), and what it read (k,
    inputs, places).
    """
    kept: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        kept.append((layer, inputs[0].detach(), output))
        return output.clone()  # an activation in place would change what was kept

    layers = [x for x in discriminator.modules() if any(True for _ in x.parameters(recurse=False))]
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        losses = F.softplus(sign * discriminator(images))
    finally:
        for hook in hooks:
            hook.remove()
    gradients = torch.autograd.grad(losses.sum(), [output for *_, output in kept])
    found: list[tuple[Any, Tensor, Tensor]] = []
    for (layer, read, _), back in zip(kept, gradients, strict=True):
        if isinstance(layer, nn.Conv2d):
            read = F.unfold(read, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
        else:
            assert isinstance(layer, nn.Linear), layer
            read = read[:, :, None]
        found.append((layer, back.reshape(len(images), back.shape[1], -1), read))
    return found, losses.detach().mean()


def squares(back: Tensor, read: Tensor) -> Tensor:
    """The squared norms (k,) of back @ read.T (k, outputs, inputs), by the smaller product (Li et al., 2022)."""
    places = back.shape[2]
    if places * places < back.shape[1] * read.shape[1]:
        return ((back.mT @ back) * (read.mT @ read)).sum((1, 2))
    return (back @ read.mT).square().sum((1, 2))


def words(spent: Spent, steps: int) -> str:
    """Epsilon and delta, for the log, the report and the card."""
    return f"({spent.epsilon(steps):.2f}, {spent.delta:.1e})"
