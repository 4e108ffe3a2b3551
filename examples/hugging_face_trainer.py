"""Distillation in a Hugging Face Trainer: a subclass with a teacher and any losses.

Needs `pip install transformers`. The networks here are small ones made by hand, so that nothing is
downloaded; with pretrained ones only `Tapped` changes: the names of the modules to read.
"""

from tempfile import mkdtemp

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from topkd.features import Batch, FeatureExtractor, Teacher
from topkd.losses import DKD, SP, Loss


class Distiller(Trainer):
    """A Trainer whose model learns from a teacher, too."""

    def __init__(self, *args, teacher: Teacher, losses: dict[Loss, float], **options) -> None:
        super().__init__(*args, **options)
        self.teacher, self.losses = teacher.to(self.args.device), losses

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        images, target = inputs["images"], inputs["labels"]
        student, teacher = model.tapped(images), self.teacher(images)
        batch = Batch(images, target, index=inputs["index"])
        loss = F.cross_entropy(student.logits, target)
        for method, weight in self.losses.items():
            loss = loss + weight * method(student, teacher, batch)
        return (loss, {"logits": student.logits}) if return_outputs else loss


class Classifier(nn.Module):
    """A network as the Trainer calls it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        body = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        network = nn.Sequential(body, nn.Flatten(), nn.Linear(16 * width, 10))
        self.tapped = FeatureExtractor(network, maps=["0.1"], head="2")

    def forward(self, images: Tensor, labels: Tensor, index: Tensor) -> dict[str, Tensor]:
        logits = self.tapped(images).logits
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def settings(epochs: int) -> TrainingArguments:
    return TrainingArguments(
        mkdtemp(),
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        seed=0,
    )


pixels, target = load_digits(return_X_y=True)
digits = [
    {"images": torch.tensor(p / 16).float().view(1, 8, 8), "labels": int(t), "index": i}
    for i, (p, t) in enumerate(zip(pixels, target, strict=True))
]
torch.manual_seed(0)
large = Classifier(32)
Trainer(large, settings(10), train_dataset=digits[:1280]).train()
small = Classifier(2)
Distiller(
    small,
    settings(10),
    train_dataset=digits[:1280],
    teacher=Teacher(large.tapped, mean=[0.0], std=[1.0]),
    losses={DKD(beta=2.0): 1.0, SP(): 10.0},
).train()
for name, network in {"teacher": large, "student": small}.items():
    images = torch.stack([digit["images"] for digit in digits[1280:]]).to(
        network.tapped.classifier.weight
    )
    right = network.tapped(images).logits.argmax(1).cpu() == torch.tensor(target[1280:])
    print(f"{name}: {right.float().mean():.1%} of the digits it has not seen")
