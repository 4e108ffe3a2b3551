"""An exact topological term in a training loop of your own, on a GPU or not.

The loop teaches a small network the handwritten digits, and asks of it that its embeddings of a
batch have the shape of the pixels' own: the lengths at which clusters merge, told without scale.
The four lines marked with * are all there is to it.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from topkd.topology import PersistenceVector, rips

images, target = map(torch.from_numpy, load_digits(return_X_y=True))
images = images.float() / 16
torch.manual_seed(0)
body, head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)), nn.Linear(16, 10)
optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-3)

describe = PersistenceVector.fit(rips(images[:1280].view(20, 64, 64)))  # * 20 clouds of 64 images
for epoch in range(10):
    for batch in torch.randperm(len(images)).split(64)[:-1]:
        embedding = body(images[batch])
        loss = F.cross_entropy(head(embedding), target[batch])
        wanted = describe(rips(images[batch]))  # *
        shape = F.mse_loss(describe(rips(embedding)), wanted)  # *
        optimizer.zero_grad()
        (loss + 5 * shape).backward()  # *
        optimizer.step()
    print(f"epoch {epoch + 1}: cross-entropy {loss:.3f}, shape {shape:.4f}")
