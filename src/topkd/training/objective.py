"""The summands of a loss: what each sees, what it weighs, and what of the gradient is its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from topkd.config.recipe import Term
from topkd.features import FeatureExtractor, Features
from topkd.losses.base import MIN_GRADIENT_SHARE, located

SMOOTHING = 0.9  # share of the old in the running mean of a gradient's norm
SAME = 0.99  # cosine of two gradients above which two terms ask for the same


@dataclass
class GradientBalancer:
    r"""What the terms weigh, where some are to carry a share of the gradient.

    With :math:`g_i` the norm of the gradient of term i at the student's embedding, F the sum of
    :math:`w_i g_i` over the terms that have a weight and S the sum of the shares, a term with the
    share s weighs :math:`s F / ((1 - S) g)`. The norms are running means, so that weights change
    slowly.
    """

    norms: dict[str, float] = field(default_factory=dict)
    """Title of a term -> running mean of the norm of its gradient, at weight 1."""

    def update(self, norms: Mapping[str, float]) -> None:
        """Takes in what was measured at one step."""
        for title, norm in norms.items():
            old = self.norms.get(title, norm)
            self.norms[title] = SMOOTHING * old + (1 - SMOOTHING) * norm

    def weights(self, terms: Sequence[Term], epoch: int, epochs: int) -> dict[str, float]:
        """Computes what every term weighs in an epoch.

        Raises:
            ValueError: If a term should carry a share of a gradient that it has no part in.
        """
        schedule = {term.title: term.schedule(epoch, epochs) for term in terms}
        weights = {t.title: t.weight * schedule[t.title] for t in terms if t.share is None}
        sharing = [t for t in terms if t.share is not None and schedule[t.title]]
        fixed = sum(weight * self.norms.get(title, 0.0) for title, weight in weights.items())
        rest = 1 - sum(term.share or 0 for term in sharing)
        for term in sharing:
            if term.title not in self.norms:
                raise ValueError(
                    f"{located(term.title)}: its gradient does not pass the student's embedding, "
                    "so that it cannot have a share of it; give it a weight"
                )
            own = max(self.norms[term.title], 1e-12)
            weights[term.title] = schedule[term.title] * (term.share or 0) * fixed / (rest * own)
        return {term.title: weights.get(term.title, 0.0) for term in terms}


def gradients(
    values: Mapping[str, Tensor], features: Features, student: FeatureExtractor
) -> dict[str, Tensor]:
    """Computes the gradient of every term at the student's embedding.

    Args:
        values: Title of a term -> its value, at weight 1.
        features: What the values were computed from.
        student: The network, through whose classifier gradients at the logits are carried back.

    Returns:
        Title -> (n, d), without the terms that only look at feature maps.
    """
    found = {}
    for title, value in values.items():
        at_logits, at_embedding = torch.autograd.grad(
            value, (features.logits, features.embedding), retain_graph=True, allow_unused=True
        )
        if at_logits is None and at_embedding is None:
            continue
        whole = torch.zeros_like(features.embedding) if at_embedding is None else at_embedding
        if at_logits is not None:
            embedding = features.embedding.detach().requires_grad_()
            (through,) = torch.autograd.grad(student.head(embedding), embedding, at_logits)
            whole = whole + through
        found[title] = whole
    return found


def cosines(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Computes how alike the gradients of every two terms are, by their titles with ``|``."""
    return {
        f"{a}|{b}": torch.cosine_similarity(gradients[a].flatten(), gradients[b].flatten(), dim=0)
        for a, b in combinations(gradients, 2)
    }


def warnings(shares: Mapping[str, float], cosines: Mapping[str, float]) -> list[str]:
    """Tells which terms of an epoch were not worth their time, a line each.

    Args:
        shares: Title of a term -> its mean share of the gradient.
        cosines: Two titles with ``|`` -> mean cosine of their gradients.
    """
    silent = [
        f"{title} carries {share:.2%} of the gradient at the embedding: nobody would notice if it "
        "were not there; give it more weight, or a share"
        for title, share in shares.items()
        if share < MIN_GRADIENT_SHARE
    ]
    same = [
        f"{pair.replace('|', ' and ')} ask for the same (cosine of their gradients {cosine:.3f}); "
        "one of them would do"
        for pair, cosine in cosines.items()
        if cosine > SAME
    ]
    return silent + same
