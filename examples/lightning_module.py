"""A LightningModule that learns from labels and from what a black box answered, on scikit-learn's digits.

python examples/lightning_module.py --steps 200
"""

import argparse
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mekd.functional import kd_loss


class Distilled(lightning.LightningModule):
    """A student of images (m, 1, 8, 8): alpha of the teacher's probabilities, 1 - alpha of the labels."""

    def __init__(self, student: nn.Module, alpha: float = 0.7, tau: float = 2.0, lr: float = 0.01) -> None:
        super().__init__()
        self.student, self.alpha, self.tau, self.lr = student, alpha, tau, lr

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], index: int) -> Tensor:
        images, labels, probs = batch
        logits = self.student(images)
        hard = F.cross_entropy(logits, labels)
        soft = kd_loss(logits, probs=probs, tau=self.tau)  # or topk=(values, indices), where that is all it tells
        loss = (1 - self.alpha) * hard + self.alpha * soft
        self.log_dict({"loss": loss, "hard": hard, "soft": soft})
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def answers(images: Tensor, labels: Tensor) -> Tensor:
    """What a service said of the images, once: here of a network that is trained in a moment."""
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(teacher(images), labels).backward()
        optimizer.step()
    with torch.no_grad():
        return teacher(images).softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    lightning.seed_everything(0)
    digits: Any = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    data = TensorDataset(images, labels, answers(images, labels))
    student = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    trainer = lightning.Trainer(
        max_steps=options.steps, accelerator="auto", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Distilled(student), DataLoader(data, batch_size=64, shuffle=True))
    named = student.cpu()(images).argmax(-1)
    metrics = trainer.callback_metrics
    print(f"step {trainer.global_step} loss {metrics['loss']:.4f} accuracy {(named == labels).float().mean():.3f}")


if __name__ == "__main__":
    main()
