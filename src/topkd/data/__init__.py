"""The data sets, by the name that recipes use."""

from collections.abc import Callable, Mapping

from topkd.data.base import Data, Images, InMemory, plain_batches, training_batches
from topkd.data.cifar import cifar10, cifar100
from topkd.data.digits import digits
from topkd.data.folder import folder

DATA: Mapping[str, Callable[..., Data]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "digits": digits,
    "folder": folder,
}
"""Name -> function that loads it; its arguments are the options of ``data`` in a recipe."""

__all__ = ["DATA", "Data", "Images", "InMemory", "plain_batches", "training_batches"]
