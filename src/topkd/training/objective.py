"""Weights of the terms of an objective, and their shares of the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from topkd.config.recipe import Term
from topkd.features import FeatureExtractor, Features
from topkd.losses.base import MIN_GRADIENT_SHARE, located

SMOOTHING = 0.9  # decay of the moving average of gradient norms
SAME = 0.99  # cosine of two gradients above which two terms count as redundant


@dataclass
class GradientBalancer:
    r"""Computes the weights of terms that have a share of the gradient.

    Let :math:`g_i` be the gradient norm of term i at the student's embedding, F the sum of
    :math:`w_i g_i` over the terms with a weight, and S the sum of the shares. A term with share s
    has the weight :math:`s F / ((1 - S) g)`. The norms are moving averages, so that weights change
    slowly.
    """

    norms: dict[str, float] = field(default_factory=dict)
    """Title of a term -> moving average of its unweighted gradient norm."""

    def update(self, norms: Mapping[str, float]) -> None:
        """Updates the moving averages with the norms of one step."""
        for title, norm in norms.items():
            old = self.norms.get(title, norm)
            self.norms[title] = SMOOTHING * old + (1 - SMOOTHING) * norm

    def weights(self, terms: Sequence[Term], epoch: int, epochs: int) -> dict[str, float]:
        """Computes the weight of every term in an epoch.

        Raises:
            ValueError: If a term with a share has no gradient at the student's embedding.
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
                    "so it cannot have a share; set a weight"
                )
            norm = max(self.norms[term.title], 1e-12)
            weights[term.title] = schedule[term.title] * (term.share or 0) * fixed / (rest * norm)
        return {term.title: weights.get(term.title, 0.0) for term in terms}


def gradients(
    values: Mapping[str, Tensor], features: Features, student: FeatureExtractor
) -> dict[str, Tensor]:
    """Computes the gradient of every term at the student's embedding.

    Args:
        values: Title of a term -> unweighted value.
        features: Features that the values were computed from.
        student: The student, whose classifier backpropagates gradients at the logits.

    Returns:
        Title -> gradient (n, d), without terms that only read feature maps.
    """
    found = {}
    for title, value in values.items():
        at_logits, at_embedding = torch.autograd.grad(
            value, (features.logits, features.embedding), retain_graph=True, allow_unused=True
        )
        if at_logits is None and at_embedding is None:
            continue
        gradient = torch.zeros_like(features.embedding) if at_embedding is None else at_embedding
        if at_logits is not None:
            embedding = features.embedding.detach().requires_grad_()
            (through,) = torch.autograd.grad(student.head(embedding), embedding, at_logits)
            gradient = gradient + through
        found[title] = gradient
    return found


def cosines(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Computes the cosine similarity of the gradients of every two terms, keyed ``a|b``."""
    return {
        f"{a}|{b}": torch.cosine_similarity(gradients[a].flatten(), gradients[b].flatten(), dim=0)
        for a, b in combinations(gradients, 2)
    }


def warnings(shares: Mapping[str, float], cosines: Mapping[str, float]) -> list[str]:
    """Lists ineffective or redundant terms of an epoch, one line each.

    Args:
        shares: Title of a term -> mean share of the gradient.
        cosines: Two titles ``a|b`` -> mean cosine of their gradients.
    """
    silent = [
        f"{title} carries {share:.2%} of the gradient at the embedding: it has no measurable "
        "effect on training; give it more weight, or a share"
        for title, share in shares.items()
        if share < MIN_GRADIENT_SHARE
    ]
    same = [
        f"{pair.replace('|', ' and ')} are redundant (cosine of their gradients {cosine:.3f}); "
        "remove one of them"
        for pair, cosine in cosines.items()
        if cosine > SAME
    ]
    return silent + same
