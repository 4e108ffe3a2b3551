"""The handwritten digits of scikit-learn, 8 x 8, included in its package."""

import numpy as np
import torch

from topkd.data.base import Data, InMemory

TRAINING_IMAGES = {"digits": 1257}  # always the same


def digits() -> Data:
    """Loads scikit-learn's 1,797 handwritten digits: 1,257 to train, 540 to test.

    References:
        Optical Recognition of Handwritten Digits (Alpaydin & Kaynak, UCI, 1998)
        https://archive.ics.uci.edu/dataset/80

    Examples:
        >>> data = digits()
        >>> len(data.train.target), len(data.test.target), len(data.classes)
        (1257, 540, 10)
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    gray = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(gray[..., None], 3, axis=-1)
    train, test = train_test_split(
        np.arange(len(pixels)), test_size=0.3, stratify=bunch.target, random_state=0
    )
    mean = (float(gray[train].mean() / 255),) * 3
    std = (float(gray[train].std() / 255),) * 3

    def part(index: np.ndarray) -> InMemory:
        images, target = torch.from_numpy(pixels[index]), torch.from_numpy(bunch.target[index])
        return InMemory(images, target.long(), mean, std, padding=1, flip=False)

    return Data("digits", part(train), part(test), [str(d) for d in range(10)], mean, std)
