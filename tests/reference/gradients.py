"""Gradients of networks and losses beside float64 ones; run as a program, under an instruction set.

    python -m reference.gradients THREADS GROUP [PART OF]

A crash of oneDNN takes this process down and not the test.
"""

import copy
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import nn

from topkd._io.progress import Progress
from topkd.config.terms import Term
from topkd.features import Batch, FeatureExtractor, Features, Teacher
from topkd.losses import LOSSES, LossContext
from topkd.losses.base import LossTerm
from topkd.models import MODELS, factory

STEPS = 3
LAST = torch.channels_last
AN_ADAPTER = "an adapter of somebody else's"
FOREIGN = {
    "torchvision:resnet18": 64,
    "torchvision:mobilenet_v2": 64,
    "torchvision:mobilenet_v3_small": 64,
    "torchvision:shufflenet_v2_x0_5": 64,
    "torchvision:mnasnet0_5": 64,
    "torchvision:efficientnet_b0": 64,
    "torchvision:regnet_x_400mf": 64,
    "timm:resnet10t": 64,
    "timm:resnet26t": 64,
    "timm:regnetx_002": 64,
    "timm:mobilenetv3_small_050": 64,
    "timm:ghostnet_050": 64,
    "timm:convnext_atto": 64,
    "timm:vit_tiny_patch16_224": 224,
    "timm:test_resnet": 64,
    "timm:test_efficientnet": 64,
}


class Narrow(nn.Module):
    """Strided 1x1 convolutions of few channels, held by torch's module and by one of its own."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 16, 1, stride=2)
        self.kernel = nn.Parameter(torch.randn(20, 16, 1, 1) / 4)
        self.narrower = nn.Parameter(torch.randn(6, 20, 1, 1) / 4)
        self.last = nn.Parameter(torch.randn(24, 6, 1, 1) / 4)
        self.fc = nn.Linear(24, classes)

    def forward(self, x):
        x = F.conv2d(self.down(self.stem(x).relu()).relu(), self.kernel, stride=2).relu()
        x = F.conv2d(F.conv2d(x, self.narrower), self.last, stride=(1, 2))
        return self.fc(x.mean((2, 3)))


class Adapter(nn.Module):
    """A loss of somebody else whose adapter is a strided 1x1 convolution of few channels."""

    def __init__(self) -> None:
        super().__init__()
        self.adapt = nn.Conv2d(4, 16, 1, stride=2)

    def forward(self, student, teacher, batch):
        return (self.adapt(student.maps[0]) - teacher.maps[0]).square().mean()


def shown(size):
    images = torch.randn(8, 3, size, size).to(memory_format=torch.channels_last)
    return Batch(images, torch.arange(8) % 10, torch.arange(8))


def distance(found, expected):
    """Greatest relative error of a tensor's gradient; tiny ones count as a thousandth of all."""
    least = 1e-3 * torch.stack([b.norm() for b in expected]).norm()
    pairs = zip(found, expected, strict=True)
    return max(((a.double() - b).norm() / b.norm().clamp(min=least)).item() for a, b in pairs)


def network_error(tapped, size):
    """Trains some steps; returns the error of the gradients of the last one."""
    optimizer = torch.optim.SGD(tapped.train().parameters(), lr=1e-3)
    for step in range(STEPS):
        optimizer.step()  # the first has no gradients and does nothing
        before = copy.deepcopy(tapped.network)
        batch = shown(size)
        found = gradients_of(tapped, batch.images, batch.target, step)
    exact = before.double().to(memory_format=torch.contiguous_format)
    return distance(
        found, gradients_of(exact, batch.images.double().contiguous(), batch.target, step)
    )


def gradients_of(network, images, target, seed):
    network.zero_grad()
    torch.manual_seed(seed)  # for dropout
    made = network(images)
    F.cross_entropy(made.logits if isinstance(made, Features) else made, target).backward()
    return [w.grad for w in network.parameters() if w.grad is not None]


def loss_error(loss, student, teacher, batch):
    """Computes the error of a loss's gradients at its own weights and at the student's features."""
    exact = copy.deepcopy(loss).double().to(memory_format=torch.contiguous_format)
    worst = 0.0
    for _ in range(STEPS):
        gradients = []
        for each, to in ((loss, torch.float32), (exact, torch.float64)):
            given = student.apply(lambda t, to=to: t.detach().to(to).requires_grad_())
            asked = teacher.apply(lambda t, to=to: t.detach().to(to))
            if each is exact:
                given, asked = (f.apply(lambda t: t.contiguous()) for f in (given, asked))
                given = given.apply(lambda t: t.detach().requires_grad_())
            torch.manual_seed(0)
            value = LossTerm(Term(name="ce"), each).value(given, asked, batch)
            leaves = [*given.tensors(), *(w for w in each.parameters() if w.requires_grad)]
            found = torch.autograd.grad(value, leaves, allow_unused=True)
            gradients.append([g for g in found if g is not None])
        worst = max(worst, distance(*gradients))
    return worst


def networks(names):
    for name, size in names.items():
        torch.manual_seed(0)
        yield name, network_error(factory.build(name, 10, size), size)


def quick():
    yield "strided 1x1 kernels", network_error(FeatureExtractor(Narrow(10), [], head="fc"), 16)
    yield from networks({"resnet8x0.25": 32, "torchvision:mobilenet_v3_small": 64})
    yield AN_ADAPTER, adapter_error()


def losses():
    student, teacher = MODELS["resnet8x0.25"].build(10), MODELS["resnet8"].build(10)
    batch = shown(32)
    with torch.no_grad():
        made, answer = student(batch.images), teacher(batch.images)
    asked = Teacher(teacher, (0.5,) * 3, (0.25,) * 3)
    for name, loss_class in LOSSES.items():
        torch.manual_seed(0)
        with TemporaryDirectory() as folder:
            source = LossContext(
                lambda epoch: iter([(batch, answer)] * 4),
                batch.target.repeat(4),
                student,
                asked,
                "a teacher",
                Path(folder),
                Progress(quiet=True),
                batch.images,
            )
            try:
                loss = loss_class()
                loss.setup(made, answer, source)
            except ValueError:  # of other sizes or of another kind of student
                continue
        if any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in loss.modules()):
            yield name, loss_error(loss, made, answer, batch)
    yield AN_ADAPTER, adapter_error()


def adapter_error():
    maps = [torch.randn(shape).to(memory_format=LAST) for shape in ((64, 4, 8, 8), (64, 16, 4, 4))]
    made = [Features(torch.randn(64, 10), torch.randn(64, 8), [each]) for each in maps]
    return loss_error(Adapter(), *made, shown(8))


GROUPS = {
    "quick": quick,
    "zoo": lambda part: networks(dict.fromkeys(list(MODELS)[part], 32)),
    "foreign": lambda part: networks(dict(list(FOREIGN.items())[part])),
    "losses": losses,
}

if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    part = (
        [slice(int(sys.argv[3]), None, int(sys.argv[4]))] if sys.argv[3:] else []
    )  # every so many, from the n-th
    for name, error in GROUPS[sys.argv[2]](*part):
        print(f"{name}\t{error:.3g}", flush=True)
