"""Distillation in a Hugging Face Trainer: the model is a `Distiller`, which returns its loss.

Needs `pip install transformers`. The networks here are small ones made by hand, so that nothing is
downloaded.
"""

from tempfile import mkdtemp

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from topkd import Distiller
from topkd.losses import CE, DKD, RKD

pixels, target = map(torch.from_numpy, load_digits(return_X_y=True))
images = (pixels.float() / 16).view(-1, 1, 8, 8)
rows = [
    {"images": image, "labels": label, "index": number}
    for number, (image, label) in enumerate(zip(images, target, strict=True))
]
train, test = rows[:1280], rows[1280:]


class Distillation(nn.Module):
    """A distiller as the Trainer calls it."""

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller = distiller

    def forward(self, images: Tensor, labels: Tensor, index: Tensor) -> dict[str, Tensor]:
        out = self.distiller(images, labels, index)
        return {"loss": out.loss, "logits": out.logits}


class Epochs(TrainerCallback):
    """Gives the distiller the number of each epoch, for terms that have a schedule."""

    def on_epoch_begin(self, args, state, control, model=None, **_) -> None:
        model.distiller.on_epoch_start(int(state.epoch) + 1)


def network(width: int) -> nn.Module:
    body = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(body, nn.Flatten(), nn.Linear(16 * width, 10))


def fit(student: nn.Module, teacher: nn.Module | None, losses: list, epochs: int) -> float:
    torch.manual_seed(0)
    model = Distillation(Distiller(student, teacher, losses).setup(images[:64]))
    settings = TrainingArguments(
        output_dir=mkdtemp(),
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=517,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=train,
        eval_dataset=test,
        callbacks=[Epochs()],
        compute_metrics=lambda made: {
            "top1": (made.predictions.argmax(1) == made.label_ids).mean().item()
        },
    )
    trainer.train()
    return trainer.evaluate()["eval_top1"]


teacher = network(16)
print(f"teacher: {fit(teacher, None, [CE()], epochs=5):.1%}")
terms = [CE(), DKD(beta=2.0), RKD().term(share=0.1)]
print(f"student: {fit(network(2), teacher, terms, epochs=5):.1%}")
