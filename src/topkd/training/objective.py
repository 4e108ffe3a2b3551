"""Weights of the terms of an objective, and their shares of the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor, nn

from topkd.config.terms import Term
from topkd.evaluation.results import GradientPlace
from topkd.features import FeatureExtractor, Features
from topkd.losses.base import MIN_GRADIENT_SHARE, LossTerm, located

SMOOTHING = 0.9  # decay of the moving average of gradient norms
SAME = 0.99  # cosine of two gradients above which two terms count as redundant
MEASURED = 8  # steps per epoch at which the gradient of each term is measured
BALANCED = 32  # the same at the embedding, if terms have a share of the gradient
MEASURED_EVERY: Mapping[GradientPlace, int] = {"embedding": 16, "backbone weights": 96}
"""Steps between measurements in custom training loops, if terms have a share."""


def measured_at(terms: Sequence[LossTerm], epoch: int, epochs: int) -> GradientPlace:
    """Returns the last place that the gradients of all active terms pass.

    It is the student's embedding if all terms read only embedding and logits. Otherwise, it is the
    backbone weights: the trainable weights of the student before its embedding.
    """
    active = (term for term in terms if term.is_active(epoch, epochs))
    return "backbone weights" if any(t.bypasses_embedding for t in active) else "embedding"


def measurements(place: GradientPlace, steps: int, *, is_shared: bool) -> int:
    """Returns the number of measured steps in an epoch.

    At the backbone weights, a measurement costs a backward pass per term, so there are fewer.

    Args:
        place: Where gradients are measured.
        steps: Number of steps of the epoch.
        is_shared: Whether a term has a share of the gradient.
    """
    if place == "embedding":
        return BALANCED if is_shared else MEASURED
    return max(1, min(MEASURED, steps // MEASURED_EVERY[place]))


@dataclass
class GradientBalancer:
    r"""Computes the weights of terms that have a share of the gradient.

    Let :math:`g_i` be the gradient norm of term i where gradients are measured, F the sum of
    :math:`w_i g_i` over the terms with a weight, and S the sum of the shares. A term with share s
    has the weight :math:`s F / ((1 - S) g)`. The norms are moving averages, so that weights change
    slowly.
    """

    norms: dict[str, float] = field(default_factory=dict)
    """Title of a term -> moving average of its unweighted gradient norm."""
    at: GradientPlace = "embedding"
    """Where the norms were measured."""

    def update(
        self, norms: Mapping[str, float], at: GradientPlace = "embedding", *, times: float = 1
    ) -> None:
        """Updates the moving averages with the norms of one step.

        Args:
            norms: Title of a term -> norm of its unweighted gradient.
            at: Where the norms were measured. Averages of another place are discarded.
            times: Number of equal measurements that this one counts as.
        """
        if at != self.at:
            self.norms, self.at = {}, at
        keep = SMOOTHING**times
        for title, norm in norms.items():
            old = self.norms.get(title, norm)
            self.norms[title] = keep * old + (1 - keep) * norm

    def weights(self, terms: Sequence[Term], epoch: int, epochs: int) -> dict[str, float]:
        """Computes the weight of every term in an epoch.

        Raises:
            ValueError: If a term with a share has no gradient where gradients are measured.
        """
        schedule = {term.title: term.schedule(epoch, epochs) for term in terms}
        weights = {t.title: t.weight * schedule[t.title] for t in terms if t.share is None}
        sharing = [t for t in terms if t.share is not None and schedule[t.title]]
        fixed = sum(weight * self.norms.get(title, 0.0) for title, weight in weights.items())
        rest = 1 - sum(term.share or 0 for term in sharing)
        for term in sharing:
            if term.title not in self.norms:
                raise ValueError(
                    f"{located(term.title)}: its gradient does not pass the student's {self.at}, "
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
            dtype = next(student.classifier.parameters(), embedding).dtype
            logits = student.head(embedding.to(dtype))
            (through,) = torch.autograd.grad(logits, embedding, at_logits.to(dtype))
            gradient = gradient + through
        found[title] = gradient
    return found


def weight_gradients(
    values: Mapping[str, Tensor],
    features: Features,
    output: Features,
    student: FeatureExtractor,
) -> dict[str, Tensor]:
    """Computes the gradient of every term at the backbone weights of the student.

    Args:
        values: Title of a term -> unweighted value.
        features: Detached copies of the student's output, from which the values were computed.
        output: The output, with the graph of an uncompiled forward pass, which is retained.
        student: The student.

    Returns:
        Title -> gradient, flat, without terms whose gradient reaches no weight.
    """
    weights, found = backbone(student, output.embedding), {}
    for title, value in values.items():
        at_features = torch.autograd.grad(
            value, features.tensors(), retain_graph=True, allow_unused=True
        )
        reached = [
            (tensor, gradient.to(tensor.dtype))
            for tensor, gradient in zip(output.tensors(), at_features, strict=True)
            if gradient is not None and tensor.requires_grad
        ]
        if not weights or not reached:
            continue
        tensors, given = zip(*reached, strict=True)
        at_weights = torch.autograd.grad(
            tensors, weights, given, retain_graph=True, allow_unused=True
        )
        if any(gradient is not None for gradient in at_weights):
            pairs = zip(at_weights, weights, strict=True)
            found[title] = torch.cat(
                [(torch.zeros_like(w) if g is None else g).flatten() for g, w in pairs]
            )
    return found


def backbone(student: nn.Module, embedding: Tensor) -> list[nn.Parameter]:
    """Lists the trainable weights of the student that its embedding depends on.

    Args:
        student: The student.
        embedding: Its embedding of a batch, with the graph of an uncompiled forward pass.
    """
    pending, seen, leaves = [embedding.grad_fn], set(), set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaves.add(id(getattr(node, "variable", None)))  # leaves of the graph have one
        pending += [earlier for earlier, _ in node.next_functions]
    return [weight for weight in student.parameters() if id(weight) in leaves]


def cosines(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Computes the cosine similarity of the gradients of every two terms, keyed ``a|b``."""
    return {
        f"{a}|{b}": torch.cosine_similarity(gradients[a].flatten(), gradients[b].flatten(), dim=0)
        for a, b in combinations(gradients, 2)
    }


def warnings(
    shares: Mapping[str, float], cosines: Mapping[str, float], at: GradientPlace = "embedding"
) -> list[str]:
    """Lists ineffective or redundant terms of an epoch, one line each.

    Args:
        shares: Title of a term -> mean share of the gradient.
        cosines: Two titles ``a|b`` -> mean cosine of their gradients.
        at: Where the gradients were measured.
    """
    silent = [
        f"{title} carries {share:.2%} of the gradient at the {at}: it has no measurable "
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
