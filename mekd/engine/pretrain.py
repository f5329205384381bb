"""What a student learns of the private images at home, before the first answer: they are sent to nobody."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mekd import files
from mekd.engine import parallel
from mekd.engine.checkpoint import Checkpoint, steps
from mekd.engine.feeds import Images
from mekd.engine.run import Run
from mekd.engine.runlog import RunLog
from mekd.engine.train import computed_in, set_cosine_lr, sgd
from mekd.nets import build
from mekd.nets.features import Features, last_linear
from mekd.pixels import to_float
from mekd.seeds import generator_at

#: SimCLR's temperature, and the width of what it compares.
TAU, COMPARED = 0.2, 64


class _Contrast(nn.Module):
    """The student up to its last linear layer, and a head of two layers that is thrown away."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        width = last_linear(student).in_features
        self.head = nn.Sequential(nn.Linear(width, 2 * COMPARED), nn.ReLU(), nn.Linear(2 * COMPARED, COMPARED))

    def forward(self, images: Tensor) -> Tensor:
        with Features(self.student) as seen:
            unused = self.student(images)
        # The last layer's weights take part, with a gradient of 0: several processes wait for every one.
        return self.head(seen.value) + 0 * unused.sum()


def pretrain(run: Run) -> None:
    """Train distill.student on the private images without labels or answers (SimCLR; Chen et al., 2020).

    Two views of an image shall be nearer to each other than to the other images of the batch. What it learned lies in
    the checkpoint pretrain, which new students begin with.
    """
    config = run.config.distill
    if not config.pretrain:
        return
    path = run.checkpoint("pretrain")
    torch.manual_seed(run.config.seed + 5)
    student = build(config.student, run.num_classes, run.image[0])
    both = run.place(_Contrast(student))
    optimizer = sgd(both, config.lr, config.weight_decay)
    learner = parallel.data_parallel(both)
    images = Images(run.data.local(config.batch))
    log = RunLog(run, "pretrain", config.pretrain, config.batch, {"data": images}, lr="distill.lr")
    state = {"student": student, "head": both.head, "optimizer": optimizer}
    checkpoint = Checkpoint(run, "pretrain", state, {"data": images}, run.depends("pretrain"))
    done = checkpoint.restore(log)
    parallel.dropout_apart(run.config.seed)
    for step in steps(checkpoint, log):
        set_cosine_lr(optimizer, config.lr, step, config.pretrain)
        batch, _ = images.take(step)
        random = generator_at(run.config.seed, "pretrain", step, parallel.rank())
        both_views = torch.cat([view(to_float(batch), random) for _ in range(2)])
        with computed_in(config.precision, run.device):
            compared = learner(both_views.contiguous(memory_format=torch.channels_last)).float()
        loss = contrastive_loss(*compared.chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.add(loss=loss)
    if done < config.pretrain:
        run.log(
            f"pretrain: {config.pretrain} steps on {run.data.count('local')} private images, which stay here; {path}"
        )


def load_pretrained(run: Run, student: nn.Module) -> None:
    """Let a new student begin with what pretrain() taught."""
    student.load_state_dict(files.load(run.checkpoint("pretrain"))["state"]["student"])


def contrastive_loss(one: Tensor, other: Tensor) -> Tensor:
    """The normalised temperature-scaled cross-entropy of two views (m, D) of m images (Chen et al., 2020)."""
    both = F.normalize(torch.cat([one, other]), dim=1)
    alike = both @ both.T / TAU
    alike.fill_diagonal_(float("-inf"))
    partner = torch.arange(len(both), device=both.device).roll(len(one))
    return F.cross_entropy(alike, partner)


def view(images: Tensor, random: torch.Generator) -> Tensor:
    """Images (m, ch, S, S) in [-1, 1], cropped to half the side at least, of another brightness and contrast.

    They come mirrored and shifted already, where data.flip and data.shift say so.
    """
    m = len(images)
    side = 0.5 + 0.5 * torch.rand(m, generator=random)
    corner = (2 * torch.rand(2, m, generator=random) - 1) * (1 - side)
    where = torch.zeros(m, 2, 3)
    where[:, 0, 0] = where[:, 1, 1] = side
    where[:, :, 2] = corner.T
    grid = F.affine_grid(where.to(images.device), list(images.shape), align_corners=False)
    cropped = F.grid_sample(images, grid, align_corners=False, padding_mode="reflection")
    contrast, light = torch.rand(2, m, 1, 1, 1, generator=random).to(images.device)
    return cropped * (0.6 + 0.8 * contrast) + 0.4 * (2 * light - 1)
