"""Two networks of your own, a plain PyTorch loop, and three ways to teach.

Nothing of topkd runs the loop: `FeatureExtractor` reads the networks by the names of their modules,
`Teacher` keeps the large one from learning, and every method is a function of tensors.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from topkd.features import FeatureExtractor, Teacher
from topkd.losses.functional import decoupled_distillation, similarity_preserving
from topkd.topology import PersistenceVector, rips

pixels, target = map(torch.from_numpy, load_digits(return_X_y=True))
images = (pixels.float() / 16).view(-1, 1, 8, 8)
train, test = slice(0, 1280), slice(1280, None)
torch.manual_seed(0)


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * width, 10),
    )


def fit(learner: nn.Module, loss, epochs: int) -> float:
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    for _ in range(epochs):
        for index in torch.randperm(1280).split(64):
            optimizer.zero_grad()
            loss(images[index], target[index]).backward()
            optimizer.step()
    return (learner(images[test]).argmax(1) == target[test]).float().mean().item()


large = network(16)
top1 = fit(large, lambda x, y: F.cross_entropy(large(x), y), epochs=10)
print(f"teacher{top1:31.1%}")

teacher = Teacher(FeatureExtractor(large, maps=["4"], head="6"), mean=[0.0], std=[1.0])
describe = PersistenceVector.fit(rips(teacher(images[train]).embedding.view(20, 64, -1)))
methods = {
    "alone": lambda s, t, y: F.cross_entropy(s.logits, y),
    "decoupled distillation": lambda s, t, y: (
        F.cross_entropy(s.logits, y)
        + decoupled_distillation(s.logits, t.logits, y, beta=2.0, temperature=4.0)
    ),
    "similarity preserving": lambda s, t, y: (
        F.cross_entropy(s.logits, y) + 3000 * similarity_preserving(s.maps[0], t.maps[0])
    ),
    "persistence": lambda s, t, y: (
        F.cross_entropy(s.logits, y)
        + 5 * F.mse_loss(describe(rips(s.embedding)), describe(rips(t.embedding)))
    ),
}
for name, method in methods.items():
    torch.manual_seed(1)  # the same student for every method
    small = network(1)
    student = FeatureExtractor(small, maps=["4"], head="6")
    top1 = fit(small, lambda x, y, m=method, s=student: m(s(x), teacher(x), y), epochs=10)
    print(f"student, {name:24}{top1:.1%}")
