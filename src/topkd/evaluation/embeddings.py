"""Quality of embeddings: nearest neighbors, a linear probe, and neighbors shared with a teacher."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1000  # embeddings compared at a time; does not affect the results


def nearest_neighbor_accuracy(
    train: Tensor,
    train_target: Tensor,
    test: Tensor,
    test_target: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    r"""Computes the accuracy of a k-nearest-neighbor classifier on embeddings, in percent.

    Each of the ``k`` nearest training embeddings votes for its class with weight
    :math:`\exp(s / \tau)`, where :math:`s` is the cosine similarity.

    Args:
        train: Embeddings of training images, (n, d).
        train_target: Their labels, (n,).
        test: Embeddings to classify, (m, d).
        test_target: Their labels, (m,).
        k: Number of neighbors; at most n are used.
        temperature: :math:`\tau`.

    References:
        Unsupervised Feature Learning via Non-Parametric Instance Discrimination (Wu et al., CVPR
        2018), for the vote https://arxiv.org/abs/1805.01978
        Emerging Properties in Self-Supervised Vision Transformers (Caron et al., ICCV 2021), for
        20 neighbors https://arxiv.org/abs/2104.14294

    Examples:
        >>> train, test = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 1.0]])
        >>> nearest_neighbor_accuracy(train, torch.tensor([4, 7]), test, torch.tensor([4]))
        100.0
    """
    classes = int(max(train_target.max(), test_target.max())) + 1
    predicted = []
    for similarity in _similarities(test, train):
        near = similarity.topk(min(k, len(train)))
        weight = ((near.values - 1) / temperature).exp()  # -1 prevents overflow
        votes = weight.new_zeros(len(weight), classes)
        votes.scatter_add_(1, train_target[near.indices], weight)
        predicted.append(votes.argmax(1))
    return _percentage(torch.cat(predicted) == test_target)


def linear_probe_accuracy(
    train: Tensor,
    train_target: Tensor,
    test: Tensor,
    test_target: Tensor,
    *,
    iterations: int = 100,
) -> float | None:
    """Computes the accuracy of a logistic regression on embeddings, in percent.

    Embeddings are standardized. The regression is scikit-learn's, with its default L2 penalty
    (C = 1).

    Args:
        train: Embeddings of training images, (n, d).
        train_target: Their labels, (n,).
        test: Embeddings to classify, (m, d).
        test_target: Their labels, (m,).
        iterations: Maximum number of iterations of L-BFGS.

    Returns:
        The accuracy, or None if all training labels are equal.

    References:
        Understanding Intermediate Layers Using Linear Classifier Probes (Alain & Bengio, ICLR
        2017 workshop) https://arxiv.org/abs/1610.01644

    Examples:
        >>> train, test = torch.tensor([[-1.0], [1.0]]), torch.tensor([[-3.0], [2.0]])
        >>> linear_probe_accuracy(train, torch.tensor([4, 7]), test, torch.tensor([4, 7]))
        100.0
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(train_target.unique()) < 2:
        return None
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=iterations))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the bound is intended
        probe.fit(train.double().numpy(), train_target.numpy())
    predicted = torch.from_numpy(probe.predict(test.double().numpy()))
    return _percentage(predicted == test_target)


def neighbor_overlap(student: Tensor, teacher: Tensor, *, k: int = 10) -> float | None:
    """Computes the percentage of the teacher's nearest neighbors that are the student's as well.

    It is the recall at ``k``, averaged over images. Neighbors are other images of the same set, by
    cosine similarity. Independent embeddings of n images share 100 k / (n - 1) % on average.

    Args:
        student: The student's embeddings, (n, d).
        teacher: The teacher's embeddings of the same images, (n, e).
        k: Number of neighbors.

    Returns:
        The percentage, or None if an image has fewer than ``k`` neighbors.

    Examples:
        >>> points = torch.randn(30, 4)
        >>> neighbor_overlap(points, 2 * points)
        100.0
    """
    if len(student) <= k:
        return None
    shared, pairs = 0, zip(_similarities(student), _similarities(teacher), strict=True)
    for similarities in pairs:
        s, t = (similarity.topk(k).indices for similarity in similarities)
        shared += int((t[:, :, None] == s[:, None, :]).sum())
    return 100 * shared / (k * len(student))


def _similarities(points: Tensor, others: Tensor | None = None) -> Iterator[Tensor]:
    """Yields rows of the cosine similarities to others, or to the other points themselves."""
    points = F.normalize(points)
    against = points if others is None else F.normalize(others)
    for start in range(0, len(points), CHUNK):
        rows = points[start : start + CHUNK] @ against.T
        if others is None:
            rows.diagonal(start).fill_(-torch.inf)
        yield rows


def _percentage(correct: Tensor) -> float:
    return 100 * correct.double().mean().item()
