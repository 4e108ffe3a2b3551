"""Draws the figures of the page on persistence: python docs/persistence.py"""

from pathlib import Path

import torch

from topkd.reporting import plots
from topkd.topology import rips

here = Path(__file__).parent
generator = torch.Generator().manual_seed(3)
angle = torch.linspace(0, 2 * torch.pi, 19)[:18] + 0.12 * torch.randn(18, generator=generator)
radius = 1 + 0.07 * torch.randn(18, generator=generator)
points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
found = rips(points, max_dim=1)
components, loops = (found.of(dimension) for dimension in (0, 1))

plots.filtration(points, [0.2, 0.4, 0.7, 1.2, 1.8]).savefig(here / "filtration.png", dpi=110)
bars = {"H0, components": components.bars, "H1, loops": loops.bars}
plots.diagram(bars, title="Its persistence diagram").savefig(here / "diagram.png", dpi=110)
