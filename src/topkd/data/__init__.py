"""Data sets, registered by the name that recipes use."""

from collections.abc import Callable, Mapping

from topkd.data.augmented import Augmentation, Augmented, with_augmentation
from topkd.data.base import Data, DataIssues, Images, InMemory, Subset, same_order
from topkd.data.batches import plain_batches, refuse_few, training_batches
from topkd.data.pictures import with_crop
from topkd.data.sources.cifar import cifar10, cifar100
from topkd.data.sources.dataset import dataset, from_dataset
from topkd.data.sources.digits import digits
from topkd.data.sources.folder import folder
from topkd.data.sources.parquet import parquet
from topkd.data.sources.webdataset import webdataset

DATA: Mapping[str, Callable[..., Data]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "dataset": dataset,
    "digits": digits,
    "folder": folder,
    "parquet": parquet,
    "webdataset": webdataset,
}
"""Name -> function that loads it; its arguments are the options of ``data`` in a recipe."""

TRAINING_IMAGES: Mapping[str, int] = {"cifar10": 50_000, "cifar100": 50_000, "digits": 1257}
"""Name -> number of training images, where it is always the same."""

__all__ = [
    "DATA",
    "TRAINING_IMAGES",
    "Augmentation",
    "Augmented",
    "Data",
    "DataIssues",
    "Images",
    "InMemory",
    "Subset",
    "from_dataset",
    "plain_batches",
    "refuse_few",
    "same_order",
    "training_batches",
    "with_augmentation",
    "with_crop",
]
