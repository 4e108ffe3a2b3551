"""A study as public repositories run it: one run after another, in one process.

Float32 and contiguous; images augmented one at a time by torchvision in two worker processes; the
teacher's forward pass in every step; the test set after every epoch. `benchmarks/study.py` runs it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import cdist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from topkd.data import DATA
from topkd.models import MODELS, checkpoint

BATCH, CLASSES, TEMPERATURE, BINS = 64, 100, 4.0, 20
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
NORMALIZED = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
AUGMENTED = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]

Output = tuple[Tensor, Tensor]  # logits, embedding
Objective = Callable[[Output, Output, Tensor, int], Tensor]


def cross_entropy(student: Output, teacher: Output, target: Tensor, epoch: int) -> Tensor:
    return F.cross_entropy(student[0], target)


def kd(student: Tensor, teacher: Tensor) -> Tensor:
    log_s, t = F.log_softmax(student / TEMPERATURE, 1), F.softmax(teacher / TEMPERATURE, 1)
    return F.kl_div(log_s, t, reduction="batchmean") * TEMPERATURE**2


def with_kd(student: Output, teacher: Output, target: Tensor, epoch: int) -> Tensor:
    return 0.1 * F.cross_entropy(student[0], target) + 0.9 * kd(student[0], teacher[0])


def dkd(student: Tensor, teacher: Tensor, target: Tensor, alpha: float, beta: float) -> Tensor:
    is_target = F.one_hot(target, CLASSES).bool()
    s, t = F.softmax(student / TEMPERATURE, 1), F.softmax(teacher / TEMPERATURE, 1)
    two = [torch.stack([p[is_target], p[~is_target].view(len(p), -1).sum(1)], 1) for p in (s, t)]
    of_target = F.kl_div(two[0].log(), two[1], reduction="batchmean")
    others = [x / TEMPERATURE - 1000.0 * is_target for x in (student, teacher)]
    rest = F.kl_div(F.log_softmax(others[0], 1), F.softmax(others[1], 1), reduction="batchmean")
    return (alpha * of_target + beta * rest) * TEMPERATURE**2


def with_dkd(student: Output, teacher: Output, target: Tensor, epoch: int) -> Tensor:
    warmup = min(epoch / 2, 1.0)
    return F.cross_entropy(student[0], target) + warmup * dkd(
        student[0], teacher[0], target, 1.0, 2.0
    )


def relative_distances(points: Tensor) -> Tensor:
    distances = torch.cdist(points, points)
    return distances / distances[distances > 0].mean()


def angles(points: Tensor) -> Tensor:
    directions = F.normalize(points[None] - points[:, None], dim=2)
    return torch.bmm(directions, directions.transpose(1, 2)).flatten()


def with_rkd(student: Output, teacher: Output, target: Tensor, epoch: int) -> Tensor:
    s, t = student[1], teacher[1]
    by_distance = F.smooth_l1_loss(relative_distances(s), relative_distances(t))
    by_angle = F.smooth_l1_loss(angles(s), angles(t))
    return F.cross_entropy(student[0], target) + 25 * by_distance + 50 * by_angle


def persistence(points: Tensor) -> Tensor:
    """Smooth histogram of the H0 bars of a cloud, relative to their mean."""
    detached = points.detach().double().numpy()
    tree = minimum_spanning_tree(cdist(detached, detached)).tocoo()
    bars = (points[tree.row] - points[tree.col]).norm(dim=1)
    bars = bars / bars.mean()
    centers = torch.linspace(0, 2, BINS)
    weights = torch.exp(-0.5 * ((bars[:, None] - centers) / 0.1) ** 2)
    return (bars[:, None] * weights).mean(0)


def with_topkd(student: Output, teacher: Output, target: Tensor, epoch: int) -> Tensor:
    topology = F.mse_loss(persistence(student[1]), persistence(teacher[1]))
    others = F.cross_entropy(student[0], target) + 2 * kd(student[0], teacher[0])
    return others + 5 * topology


OBJECTIVES: dict[str, Objective] = {
    "ce": cross_entropy,
    "kd": with_kd,
    "dkd": with_dkd,
    "rkd": with_rkd,
    "topkd": with_topkd,
}


class Pictures(Dataset):
    """Images in memory, transformed one at a time."""

    def __init__(self, pixels: np.ndarray, target: list[int], steps: list[Callable]) -> None:
        self.pixels, self.target, self.transform = pixels, target, transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.target[index]


def splits(folder: str, limit: int) -> tuple[Pictures, Pictures]:
    data = DATA["cifar100"](root=folder).with_limit(limit)
    parts = []
    for images, steps in ((data.train, AUGMENTED + NORMALIZED), (data.test, NORMALIZED)):
        pixels = images.read_bytes(torch.arange(len(images.target)), None).numpy()
        parts.append(Pictures(pixels, images.target.tolist(), steps))
    return parts[0], parts[1]


@contextmanager
def embeddings(network: nn.Module) -> Iterator[list[Tensor]]:
    """Lists the input of the classifier at every forward pass."""
    seen: list[Tensor] = []
    handle = network.fc.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    yield seen
    handle.remove()


def accuracy(network: nn.Module, loader: DataLoader) -> float:
    network.eval()
    right = 0
    with torch.no_grad():
        for images, target in loader:
            right += (network(images).argmax(1) == target).sum().item()
    return 100 * right / len(loader.dataset)


def train(name: str, seed: int, teacher: nn.Module, parts, epochs: int) -> float:
    """Trains one student and returns its accuracy after the last epoch."""
    torch.manual_seed(seed)
    student = MODELS["resnet8"].network(classes=CLASSES)
    training = DataLoader(parts[0], BATCH, shuffle=True, drop_last=True, num_workers=2)
    test = DataLoader(parts[1], BATCH, num_workers=2)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.2, epochs * len(training), pct_start=0.25, cycle_momentum=False
    )
    objective, top1 = OBJECTIVES[name], 0.0
    with embeddings(student) as seen, embeddings(teacher) as shown:
        for epoch in range(1, epochs + 1):
            student.train()
            for images, target in training:
                logits = student(images)
                with torch.no_grad():
                    taught = teacher(images)
                loss = objective((logits, seen.pop()), (taught, shown.pop()), target, epoch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            top1 = accuracy(student, test)
            seen.clear()
    return top1


def run(
    folder: str, file: str, variants: list[str], seeds: int, epochs: int, limit: int
) -> tuple[float, list[float]]:
    """Runs the study. Returns the seconds after the data were decoded, and all accuracies."""
    parts = splits(folder, limit)
    start = time.perf_counter()
    teacher = MODELS["resnet20"].network(classes=CLASSES)
    checkpoint.fill(teacher, checkpoint.load_weights(Path(file)), file)
    teacher.eval().requires_grad_(False)
    found = [
        train(name, seed, teacher, parts, epochs) for seed in range(seeds) for name in variants
    ]
    return time.perf_counter() - start, found
