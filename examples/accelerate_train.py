"""Distillation in a loop of Hugging Face Accelerate, on scikit-learn's digits: labels and teacher in one loss.

The loss is torchdistill's, by its name and with its arguments: alpha * CE + (1 - alpha) * T^2 * KL.

    accelerate launch examples/accelerate_train.py --steps 200
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mekd.compat.torchdistill import KDLoss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--precision", default="no", choices=("no", "bf16", "fp16"))
    options = parser.parse_args()
    set_seed(0)
    accelerator = Accelerator(mixed_precision=options.precision)
    digits: Any = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)

    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))  # yours, trained
    adam = torch.optim.Adam(teacher.parameters(), lr=0.01)
    for _ in range(100):
        adam.zero_grad()
        F.cross_entropy(teacher(images), labels).backward()
        adam.step()
    teacher = teacher.to(accelerator.device).eval().requires_grad_(False)

    student = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    loader = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True, drop_last=True)
    student, optimizer, loader = accelerator.prepare(student, torch.optim.Adam(student.parameters(), lr=0.01), loader)
    criterion = KDLoss("student", "output", "teacher", "output", temperature=2.0, alpha=0.3)
    step = 0
    while step < options.steps:
        for pixels, named in loader:
            with accelerator.autocast():
                logits = student(pixels)
                answer = teacher(pixels)
            loss = criterion({"student": {"output": logits}}, {"teacher": {"output": answer}}, named)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            step += 1
            if step % 10 == 0 and accelerator.is_main_process:
                print(f"step {step} loss {loss.item():.4f}")
            if step == options.steps:
                break


if __name__ == "__main__":
    main()
