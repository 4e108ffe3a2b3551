"""Point clouds that several tests look at."""

import math

import torch


def gaussian(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, dtype=torch.float64, generator=generator)


def polygon(n):
    angle = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def octahedron():
    return torch.cat([torch.eye(3), -torch.eye(3)]).double()
