"""CIFAR images to augmented batches of 128: torchvision, one image at a time, and ours.

python benchmarks/input.py
"""

import torch
from PIL import Image
from torchvision import transforms
from turns import in_turn

from topkd.data import InMemory, training_batches

COUNT, SIZE = 128 * 40, 128
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)

generator = torch.Generator().manual_seed(0)
pixels = torch.randint(0, 256, (COUNT, 32, 32, 3), dtype=torch.uint8, generator=generator)
target = torch.zeros(COUNT, dtype=torch.long)
arrays = pixels.numpy()
transform = transforms.Compose(
    [
        transforms.RandomCrop(32, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
)


class OneByOne(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int):
        return transform(Image.fromarray(arrays[index])), target[index]


plain = torch.utils.data.DataLoader(OneByOne(), batch_size=SIZE, shuffle=True, drop_last=True)
ours = InMemory(pixels, target, MEAN, STD, padding=4, flip=True)
in_turn(
    {
        "torchvision, PIL, one process": lambda: sum(1 for _ in plain),
        "ours": lambda: sum(1 for _ in training_batches(ours, SIZE, 0, 1)),
    },
    rounds=5,
    unit=f"{COUNT} images",
)
