"""Distillation in Lightning: the training step returns the loss of a `Distiller`.

Needs `pip install lightning`.
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from topkd import Distiller
from topkd.losses import CE, KD, TopKD

pixels, target = map(torch.from_numpy, load_digits(return_X_y=True))
images = (pixels.float() / 16).view(-1, 1, 8, 8)
train, test = (
    TensorDataset(images[part], target[part]) for part in (slice(1280), slice(1280, None))
)


def network(width: int) -> nn.Module:
    body = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(body, nn.Flatten(), nn.Linear(16 * width, 10))


class Distillation(lightning.LightningModule):
    """Trains a student; the teacher in the distiller is frozen and not saved."""

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller = distiller

    def on_train_epoch_start(self) -> None:
        self.distiller.on_epoch_start(self.current_epoch + 1)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        out = self.distiller(*batch)
        self.log_dict(out.values)
        return out.loss

    def test_step(self, batch: list[Tensor], index: int) -> None:
        logits = self.distiller.student(batch[0]).logits
        self.log("accuracy", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def fit(student: nn.Module, teacher: nn.Module | None, losses: list, epochs: int) -> float:
    loader = DataLoader(train, 64, shuffle=True, drop_last=True)
    module = Distillation(Distiller(student, teacher, losses).setup(loader))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return trainer.test(module, DataLoader(test, 517), verbose=False)[0]["accuracy"]


lightning.seed_everything(0)
teacher = network(16)
print(f"teacher  {fit(teacher, None, [CE()], epochs=8):.1%}")
terms = [CE(), 2 * KD(temperature=4.0), TopKD().term(share=0.1)]
print(f"student  {fit(network(2), teacher, terms, epochs=4):.1%}")
