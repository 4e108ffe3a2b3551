"""Distillation with timm's networks, optimizers and schedules, in the loop of its train script.

Needs `pip install timm`. With real data, take `timm.data.create_loader` and a pretrained teacher;
here both networks are small and new, so that nothing is downloaded.
"""

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn

from topkd import Distiller
from topkd.losses import CE, DKD, EdgeMatching

pixels, target = map(torch.from_numpy, load_digits(return_X_y=True))
images = (pixels.float() / 16).view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
images = nn.functional.interpolate(images, 32)
train, test = slice(0, 1280), slice(1280, None)


def fit(student: nn.Module, teacher: nn.Module | None, losses: list, epochs: int) -> float:
    """Trains as timm's train script does; only the call of the network and its loss differ."""
    distiller = Distiller(student, teacher, losses, epochs=epochs).setup(images[:64])
    optimizer = create_optimizer_v2(distiller, opt="adamw", lr=3e-3, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs)
    for epoch in range(epochs):
        distiller.train()
        distiller.on_epoch_start(epoch + 1)
        meter = AverageMeter()
        for index in torch.randperm(1280).split(64):
            out = distiller(images[index], target[index], index)
            meter.update(out.loss.item(), len(index))
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        scheduler.step(epoch + 1, meter.avg)
    distiller.eval()
    return top1(student(images[test]), target[test])


def top1(logits: Tensor, labels: Tensor) -> float:
    return accuracy(logits, labels)[0].item()


torch.manual_seed(0)
teacher = timm.create_model("test_resnet", num_classes=10)
print(f"teacher  {fit(teacher, None, [CE()], epochs=4):.1f} %")
student = timm.create_model("test_efficientnet", num_classes=10)
terms = [CE(), DKD(beta=2.0), EdgeMatching().term(share=0.1)]
print(f"student  {fit(student, teacher, terms, epochs=2):.1f} %")
