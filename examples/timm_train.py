"""Training with timm as its users do, and distillation of a frozen teacher in the lines marked `# mekd`.

Without those lines it is a plain training script. FOLDER has class folders in train/. Nothing is downloaded.

    python examples/timm_train.py FOLDER --model resnet18 --teacher resnet50 --teacher_checkpoint teacher.pth
"""

import argparse

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from mekd.functional import kd_loss  # mekd

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", metavar="FOLDER", help="class folders in FOLDER/train")
parser.add_argument("--model", default="resnet18")
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--batch", type=int, default=128)
parser.add_argument("--epochs", type=int, default=90)
parser.add_argument("--steps", type=int, help="stop after so many, to try it out")
parser.add_argument("--lr", type=float, default=0.1)
parser.add_argument("--workers", type=int, default=4)
parser.add_argument("--teacher", default="resnet50")  # mekd
parser.add_argument("--teacher_checkpoint", default="")  # mekd
parser.add_argument("--alpha", type=float, default=0.9, help="weight of the teacher, 1 - alpha of the labels")  # mekd
parser.add_argument("--tau", type=float, default=4.0)  # mekd
options = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)
dataset = create_dataset("", options.folder, split="train", is_training=True)
classes = len(dataset.reader.class_to_idx)
loader = create_loader(
    dataset, (3, options.size, options.size), options.batch, is_training=True, num_workers=options.workers,
    device=device, use_prefetcher=device.type == "cuda", persistent_workers=options.workers > 0,
)  # fmt: skip
model = timm.create_model(options.model, num_classes=classes).to(device)
teacher = timm.create_model(options.teacher, num_classes=classes, checkpoint_path=options.teacher_checkpoint)  # mekd
teacher = teacher.to(device).eval().requires_grad_(False)  # mekd
optimizer = create_optimizer_v2(model, opt="sgd", lr=options.lr, weight_decay=5e-4)
scheduler, epochs = create_scheduler_v2(optimizer, num_epochs=options.epochs, updates_per_epoch=len(loader))
criterion = torch.nn.CrossEntropyLoss()

step = 0
for epoch in range(epochs):
    model.train()
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        logits = model(images)
        loss = criterion(logits, labels)
        loss = (1 - options.alpha) * loss + options.alpha * kd_loss(logits, teacher(images), tau=options.tau)  # mekd
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        scheduler.step_update(num_updates=step)
        if step % 10 == 0 or step == options.steps:
            print(f"epoch {epoch} step {step} loss {loss.item():.4f}")
        if step == options.steps:
            raise SystemExit
    scheduler.step(epoch + 1)
