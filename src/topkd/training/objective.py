"""The summands of a loss: what each sees, what it weighs, and what of the gradient is its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations

import torch
from torch import Tensor

from topkd._runtime.memory_format import formatted, memory_format
from topkd.config.recipe import Term, View
from topkd.features import Batch, Features, Tapped
from topkd.losses import Loss

SMOOTHING = 0.9  # share of the old in the running mean of a gradient's norm
SILENT = 0.001  # share of the gradient below which a term cannot be noticed
SAME = 0.99  # cosine of two gradients above which two terms ask for the same


def seen(features: Features, view: View) -> Features:
    """Chooses what a term sees of one network.

    Raises:
        ValueError: If a tap that stands for maps did not read one.
    """
    maps, before, embedding = features.maps, features.preactivations, features.embedding
    if view.maps is not None:
        maps = [_map(features, tap) for tap in view.maps]
    if view.preactivations is not None:
        before = [_map(features, tap) for tap in view.preactivations]
    if view.embedding is not None:
        embedding = features.others[view.embedding]
        embedding = embedding.mean((2, 3)) if embedding.ndim == 4 else embedding.flatten(1)
    return replace(features, maps=maps, preactivations=before, embedding=embedding)


def _map(features: Features, tap: str) -> Tensor:
    read = features.others[tap]
    if read.ndim != 4:
        raise ValueError(f"the tap {tap!r} reads {tuple(read.shape)}, which is no map")
    return read


def taps(view: View) -> tuple[str, ...]:
    """Lists the taps that a view needs beyond those that all terms read."""
    embedding = [view.embedding] if view.embedding else []
    return (*(view.maps or ()), *(view.preactivations or ()), *embedding)


def where(title: str) -> str:
    """Names a term as recipes do."""
    return f"losses.{title}"


@contextmanager
def blamed(term: Term) -> Iterator[None]:
    """Says in an error of a loss which term it comes from: losses do not know what they are called.

    Raises:
        ValueError: If one is raised inside.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where(term.title)}: {error}") from error


@dataclass(frozen=True)
class Weighted:
    """A summand of the loss."""

    term: Term
    loss: Loss

    def counts(self, epoch: int, epochs: int) -> bool:
        """Tells whether it is a summand in this epoch, of so many."""
        return self.term.schedule(epoch, epochs) > 0

    def begin(self, epoch: int) -> None:
        """Tells the loss of an epoch, counted from 1, before its first batch."""
        with blamed(self.term):
            self.loss.begin(epoch)

    def value(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Computes the loss, of what the term sees of both networks.

        Raises:
            ValueError: If the loss cannot be computed; the message names the term.
        """
        views, layout = self.term.taps, memory_format(self.loss)
        with blamed(self.term):
            features = [seen(student, views.student), seen(teacher, views.teacher)]
            if layout is not torch.channels_last:  # else its convolutions take maps as they come
                features = [each.apply(lambda t: formatted(t, layout)) for each in features]
            value: Tensor = self.loss(*features, batch)
        return value


@dataclass
class Balance:
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
                    f"{where(term.title)}: its gradient does not pass the student's embedding, so "
                    "that it cannot have a share of it; give it a weight"
                )
            own = max(self.norms[term.title], 1e-12)
            weights[term.title] = schedule[term.title] * (term.share or 0) * fixed / (rest * own)
        return {term.title: weights.get(term.title, 0.0) for term in terms}


def gradients(
    values: Mapping[str, Tensor], features: Features, student: Tapped
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
        if share < SILENT
    ]
    same = [
        f"{pair.replace('|', ' and ')} ask for the same (cosine of their gradients {cosine:.3f}); "
        "one of them would do"
        for pair, cosine in cosines.items()
        if cosine > SAME
    ]
    return silent + same
