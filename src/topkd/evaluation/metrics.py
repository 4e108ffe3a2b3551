"""How good a network is, and how much like its teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from topkd._runtime import processes
from topkd.data import Images, plain_batches
from topkd.features import Features
from topkd.topology import Diagrams, rips, wasserstein

BATCH = 250  # images at a time; no number depends on it


@dataclass(frozen=True)
class Predictions:
    """What a network makes of a set of images, in order."""

    logits: Tensor  # (images, classes)
    embedding: Tensor  # (images, d)
    target: Tensor  # (images,)


@torch.no_grad()
def predict(
    network: Callable[[Tensor], Features],
    images: Images,
    device: torch.device,
    advance: Callable[[int, str], None] = lambda amount, news: None,
) -> Predictions:
    """Shows a network all images once, as they are; each of several processes shows some of them.

    Args:
        network: In eval mode.
        images: To be shown.
        device: Where the network is.
        advance: Told how many images were shown.

    Raises:
        ValueError: If the network answers with NaN or infinity.
    """
    logits, embeddings, total = [], [], len(images.target)
    for batch in plain_batches(images, BATCH, processes.share(total)):
        features = network(batch.images.to(device))
        logits.append(features.logits.float())
        embeddings.append(features.embedding.float())
        advance(len(batch.index) * processes.count(), "")
    predictions = Predictions(
        processes.joined(torch.cat(logits), total).cpu(),
        processes.joined(torch.cat(embeddings), total).cpu(),
        images.target,
    )
    broken = ~predictions.logits.isfinite().all(1)
    if broken.any():
        where = int(broken.nonzero()[0])
        raise ValueError(f"the network answers image {where} with NaN or infinity")
    return predictions


def top_k(predictions: Predictions, k: int) -> float:
    """Computes the share of images, in percent, whose label is among the k likeliest classes."""
    best = predictions.logits.topk(min(k, predictions.logits.shape[1])).indices
    return 100 * (best == predictions.target[:, None]).any(1).double().mean().item()


def calibration_error(predictions: Predictions, *, bins: int = 15) -> float:
    r"""Computes the expected calibration error, in percent.

    .. math:: \sum_b \frac{n_b}{n} \lvert \mathrm{accuracy}_b - \mathrm{confidence}_b \rvert

    over bins of equal width of the confidence, the probability of the likeliest class.

    Args:
        predictions: Of a network.
        bins: How many there are.

    References:
        On Calibration of Modern Neural Networks (Guo et al., ICML 2017)
        https://arxiv.org/abs/1706.04599
    """
    confidence, guess = predictions.logits.double().softmax(1).max(1)
    right = (guess == predictions.target).double()
    number = (confidence * bins).ceil().long().clamp(1, bins) - 1
    surplus = torch.zeros(bins, dtype=torch.float64).index_add(0, number, right - confidence)
    return 100 * surplus.abs().sum().item() / len(right)


def quality(predictions: Predictions) -> dict[str, float]:
    """Computes accuracy (%), negative log-likelihood (nats) and calibration error (%)."""
    return {
        "top1": top_k(predictions, 1),
        "top5": top_k(predictions, 5),
        "nll": F.cross_entropy(predictions.logits.double(), predictions.target).item(),
        "ece": calibration_error(predictions),
    }


def likeness(student: Predictions, teacher: Predictions, *, cloud_size: int) -> dict[str, float]:
    """Compares a student with its teacher on the same images.

    Args:
        student: Its predictions.
        teacher: Its teacher's.
        cloud_size: Images in each cloud whose shape is compared.

    Returns:
        ``agreement``: share of images, in percent, that both give the same class. ``kl``: mean
        divergence of the student's prediction from the teacher's, in nats.
        ``topological_distance``: mean over clouds of the 1-Wasserstein distance between the H0
        diagrams, divided by the number of bars, each diagram in units of its own mean death;
        absent where there are fewer images than make a cloud.
    """
    same = student.logits.argmax(1) == teacher.logits.argmax(1)
    log_s, log_t = (p.logits.double().log_softmax(1) for p in (student, teacher))
    kl = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True).item()
    numbers = {"agreement": 100 * same.double().mean().item(), "kl": kl}
    diagrams = [relative_diagrams(p.embedding, cloud_size) for p in (student, teacher)]
    if len(diagrams[0].bars):
        distance = wasserstein(*diagrams) / (cloud_size - 1)
        numbers["topological_distance"] = distance.mean().item()
    return numbers


def relative_diagrams(embedding: Tensor, cloud_size: int) -> Diagrams:
    """Computes the H0 diagrams of images taken in order, each in units of its mean death."""
    whole = len(embedding) - len(embedding) % cloud_size
    diagrams = rips(embedding[:whole].double().view(-1, cloud_size, embedding.shape[1]))
    mean = diagrams.deaths.mean(-1)
    return diagrams.scaled(1 / torch.where(mean > 0, mean, 1.0))
