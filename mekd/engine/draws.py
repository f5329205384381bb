"""The images that step 2 asks about: G draws several for each, and the one that D takes most for real is sent."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mekd import files
from mekd.engine.run import Run
from mekd.nets import Discriminator

#: draws(purpose, step, count, rows): some rows of a step's count images (m, ch, S, S), and the nuisance they have.
Draws = Callable[..., tuple[Tensor, Tensor]]


def draws(run: Run, draw: nn.Module) -> Draws:
    """What draw makes of the run's latents: for each image the best of distill.candidates, by step 1's discriminator.

    An image depends on its own candidates alone, in however many processes a step is taken. Rejection by the
    discriminator is that of Azadi et al. (2019), as the best of a number.
    """
    candidates = run.config.distill.candidates
    judge = None if candidates == 1 else trained_discriminator(run)

    @torch.no_grad()
    def drawn(purpose: str, step: int, count: int, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        code, n = (part.unflatten(0, (-1, candidates)) for part in run.latents(purpose, step, count, rows, candidates))
        images, chosen = draw(code[:, 0], n[:, 0]), n[:, 0]
        if judge is not None:
            best = judge(images.float()).flatten()
            for i in range(1, candidates):
                others = draw(code[:, i], n[:, i])
                scores = judge(others.float()).flatten()
                better = scores > best
                best = torch.where(better, scores, best)
                images = torch.where(better[:, None, None, None], others, images)
                chosen = torch.where(better[:, None], n[:, i], chosen)
        return images, chosen

    return drawn


def trained_discriminator(run: Run) -> Discriminator:
    """Step 1's discriminator, frozen."""
    settings = run.config.deprivatize
    discriminator = Discriminator(run.config.data.size, run.image[0], settings.dropout, settings.d_width)
    discriminator.load_state_dict(files.load(run.checkpoint("deprivatize"))["state"]["discriminator"])
    return run.place(discriminator).eval().requires_grad_(False)
