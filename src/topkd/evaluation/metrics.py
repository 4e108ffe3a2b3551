"""Metrics of predictions and networks, and the table that names and formats them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from topkd._runtime import processes
from topkd.data import Data, Images, Subset, plain_batches, stratified_order
from topkd.data.corrupted import CORRUPTIONS, Corrupted
from topkd.evaluation.embeddings import (
    linear_probe_accuracy,
    nearest_neighbor_accuracy,
    neighbor_overlap,
)
from topkd.features import Features
from topkd.topology import Diagrams, rips, wasserstein

BATCH = 250  # images per forward pass; does not affect the results
FITTED = 10_000  # maximum number of training images that kNN and the linear probe are fitted to


@dataclass(frozen=True)
class Predictions:
    """The outputs of a network for a set of images, in order."""

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
    """Computes predictions for all images, without augmentation.

    With several processes, each computes a share, and all receive the complete result.

    Args:
        network: In eval mode.
        images: The images to classify.
        device: Where the network is.
        advance: Called with the number of images processed, for a progress bar.

    Raises:
        ValueError: If a logit is NaN or infinite.
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
    invalid = ~predictions.logits.isfinite().all(1)
    if invalid.any():
        first = int(invalid.nonzero()[0])
        raise ValueError(f"the network returns NaN or infinity for image {first}")
    return predictions


def top_k(predictions: Predictions, k: int) -> float:
    """Computes the percentage of images whose label is among the ``k`` most probable classes."""
    best = predictions.logits.topk(min(k, predictions.logits.shape[1])).indices
    return 100 * (best == predictions.target[:, None]).any(1).double().mean().item()


def negative_log_likelihood(predictions: Predictions) -> float:
    """Computes the mean negative log-likelihood of the labels, in nats."""
    return F.cross_entropy(predictions.logits.double(), predictions.target).item()


def calibration_error(predictions: Predictions, *, bins: int = 15) -> float:
    r"""Computes the expected calibration error, in percent.

    .. math:: \sum_b \frac{n_b}{n} \lvert \mathrm{accuracy}_b - \mathrm{confidence}_b \rvert

    over equal-width bins of the confidence, the probability of the predicted class.

    Args:
        predictions: The outputs of a network.
        bins: Number of bins.

    References:
        On Calibration of Modern Neural Networks (Guo et al., ICML 2017)
        https://arxiv.org/abs/1706.04599
    """
    confidence, predicted = predictions.logits.double().softmax(1).max(1)
    correct = (predicted == predictions.target).double()
    number = (confidence * bins).ceil().long().clamp(1, bins) - 1
    surplus = torch.zeros(bins, dtype=torch.float64).index_add(0, number, correct - confidence)
    return 100 * surplus.abs().sum().item() / len(correct)


def agreement(student: Tensor, teacher: Tensor) -> float:
    """Computes the percentage of images for which two sets of logits predict the same class."""
    return 100 * (student.argmax(1) == teacher.argmax(1)).double().mean().item()


def kl_divergence(student: Predictions, teacher: Predictions) -> float:
    """Computes the mean KL divergence of the student's predictions from the teacher's, in nats."""
    log_s, log_t = (p.logits.double().log_softmax(1) for p in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True).item()


def topological_distance(
    student: Predictions, teacher: Predictions, cloud_size: int
) -> float | None:
    """Computes the mean distance between the H0 diagrams of student and teacher.

    It is the 1-Wasserstein distance divided by the number of bars, averaged over point clouds of
    ``cloud_size`` consecutive images. Each diagram is scaled to a mean death of 1.

    Returns:
        The distance, or None if there are fewer images than ``cloud_size``.
    """
    diagrams = [relative_diagrams(p.embedding, cloud_size) for p in (student, teacher)]
    if not len(diagrams[0].bars):
        return None
    return (wasserstein(*diagrams) / (cloud_size - 1)).mean().item()


def relative_diagrams(embedding: Tensor, cloud_size: int) -> Diagrams:
    """Computes the H0 diagrams of consecutive clouds, each scaled to a mean death of 1."""
    used = len(embedding) - len(embedding) % cloud_size
    diagrams = rips(embedding[:used].double().view(-1, cloud_size, embedding.shape[1]))
    mean = diagrams.deaths.mean(-1)
    return diagrams.scaled(1 / torch.where(mean > 0, mean, 1.0))


@dataclass(frozen=True)
class Evaluation:
    """A trained network, its predictions and its data: the input of the metrics on request."""

    network: Callable[[Tensor], Features]  # in eval mode
    data: Data
    device: torch.device  # of the network
    predictions: Predictions  # for the evaluation images
    teacher: Predictions | None = None  # the teacher's, for the same images

    @cached_property
    def training(self) -> Predictions:
        """Predictions for training images without augmentation: a stratified 10,000, or all."""
        images = self.data.train
        index = stratified_order(images.target)[:FITTED].sort().values
        return predict(self.network, Subset(images, index), self.device)


def _knn(evaluation: Evaluation) -> float:
    train, test = evaluation.training, evaluation.predictions
    return nearest_neighbor_accuracy(train.embedding, train.target, test.embedding, test.target)


def _probe(evaluation: Evaluation) -> float | None:
    train, test = evaluation.training, evaluation.predictions
    return linear_probe_accuracy(train.embedding, train.target, test.embedding, test.target)


def _retrieval(evaluation: Evaluation) -> float | None:
    if evaluation.teacher is None:
        return None
    return neighbor_overlap(evaluation.predictions.embedding, evaluation.teacher.embedding)


def _corrupted(evaluation: Evaluation) -> float:
    network, data, device = evaluation.network, evaluation.data, evaluation.device
    accuracies = []
    for name in CORRUPTIONS:
        images = Corrupted(data.test, name, data.mean, data.std)
        accuracies.append(top_k(predict(network, images, device), 1))
    return sum(accuracies) / len(accuracies)


@dataclass(frozen=True)
class Metric:
    """One column of results, in files, terminal, report, export and model card.

    Args:
        name: Key in ``result.json``.
        title: Heading, lower case where it is no abbreviation.
        unit: Unit of the value; empty if it has none.
        digits: Number of decimals shown.
        higher_is_better: Direction of improvement.
        about: Definition, one sentence without a period.
        compute: Called with the predictions; with ``needs_teacher``, with the student's, the
            teacher's and the cloud size; with ``on_request``, with an :class:`Evaluation`. Returns
            None where the metric is undefined.
        needs_teacher: Whether the metric compares a student with its teacher.
        on_request: Whether the metric is computed only for recipes that list it in ``evaluation``,
            once, at the end of a run.
    """

    name: str
    title: str
    unit: str
    digits: int
    higher_is_better: bool
    about: str
    compute: Callable[..., float | None]
    needs_teacher: bool = False
    on_request: bool = False

    @property
    def heading(self) -> str:
        """The title with an arrow for the direction of improvement, and the unit."""
        arrow = "↑" if self.higher_is_better else "↓"
        return f"{self.title} {arrow}" + (f", {self.unit}" if self.unit else "")

    def format(self, value: float | None) -> str:
        """Formats a value without its unit; an absent value is empty."""
        return "" if value is None else f"{value:.{self.digits}f}"


METRICS: MutableMapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            *("top1", "top-1", "%", 2, True),
            "percentage of images whose label is the most probable class",
            lambda predictions: top_k(predictions, 1),
        ),
        Metric(
            *("top5", "top-5", "%", 2, True),
            "percentage of images whose label is among the five most probable classes",
            lambda predictions: top_k(predictions, 5),
        ),
        Metric(
            *("nll", "NLL", "nats", 4, False),
            "mean negative log-likelihood of the labels",
            negative_log_likelihood,
        ),
        Metric(
            *("ece", "ECE", "%", 2, False),
            "expected calibration error over 15 bins of the confidence",
            calibration_error,
        ),
        Metric(
            *("agreement", "agreement", "%", 2, True),
            "percentage of images for which student and teacher predict the same class",
            lambda student, teacher, cloud_size: agreement(student.logits, teacher.logits),
            needs_teacher=True,
        ),
        Metric(
            *("kl", "KL", "nats", 4, False),
            "mean KL divergence of the student's predictions from the teacher's",
            lambda student, teacher, cloud_size: kl_divergence(student, teacher),
            needs_teacher=True,
        ),
        Metric(
            *("topological_distance", "topological distance", "", 4, False),
            "mean 1-Wasserstein distance per bar between the H0 diagrams of student and teacher, "
            "each scaled to a mean death of 1",
            topological_distance,
            needs_teacher=True,
        ),
        Metric(
            *("knn", "nearest neighbors", "%", 2, True),
            "accuracy of a weighted vote of the 20 training images with the most similar embedding",
            _knn,
            on_request=True,
        ),
        Metric(
            *("probe", "linear probe", "%", 2, True),
            "accuracy of a logistic regression on the embeddings, fitted to training images",
            _probe,
            on_request=True,
        ),
        Metric(
            *("retrieval", "retrieval", "%", 2, True),
            "percentage of an image's 10 nearest images by the teacher's embedding that are also "
            "among the 10 nearest by the student's",
            _retrieval,
            needs_teacher=True,
            on_request=True,
        ),
        Metric(
            *("corrupted", "corrupted", "%", 2, True),
            "mean top-1 accuracy with Gaussian noise, blur, low contrast and JPEG artifacts",
            _corrupted,
            on_request=True,
        ),
    )
}
"""Name -> metric, in display order. A metric added here is computed, stored and shown."""


def prediction_metrics(predictions: Predictions) -> dict[str, float]:
    """Computes every metric of :data:`METRICS` that needs only predictions."""
    return _computed(False, predictions)


def teacher_similarity(
    student: Predictions, teacher: Predictions, *, cloud_size: int
) -> dict[str, float]:
    """Computes every metric of :data:`METRICS` that compares a student with its teacher.

    Metrics on request are left out.

    Args:
        student: The student's predictions.
        teacher: The teacher's predictions for the same images.
        cloud_size: Number of images in each point cloud.

    Returns:
        Metric name -> value, without the metrics that are undefined.
    """
    return _computed(True, student, teacher, cloud_size)


def _computed(needs_teacher: bool, *arguments: object) -> dict[str, float]:
    values = {
        name: metric.compute(*arguments)
        for name, metric in METRICS.items()
        if metric.needs_teacher is needs_teacher and not metric.on_request
    }
    return {name: value for name, value in values.items() if value is not None}


def requested_metrics(
    names: Collection[str], evaluation: Evaluation, *, needs_teacher: bool
) -> dict[str, float]:
    """Computes those metrics on request that are named.

    Args:
        names: Names; all but those of metrics on request are ignored.
        evaluation: The trained network and its data.
        needs_teacher: Whether to compute the metrics that compare with the teacher, or the others.

    Returns:
        Metric name -> value, without the metrics that are undefined.
    """
    values = {
        name: metric.compute(evaluation)
        for name, metric in METRICS.items()
        if name in names and metric.on_request and metric.needs_teacher is needs_teacher
    }
    return {name: value for name, value in values.items() if value is not None}


def displayed(is_known: Callable[[str], bool]) -> dict[str, Metric]:
    """Selects the metrics to show: without those on request whose values are not known.

    Args:
        is_known: Whether there is a value of the metric with this name.
    """
    return {
        name: metric for name, metric in METRICS.items() if not metric.on_request or is_known(name)
    }


def metric_lines(values: Mapping[str, float]) -> list[str]:
    """Formats metrics as aligned lines: title, value and unit."""
    shown = [metric for name, metric in METRICS.items() if name in values]
    width = max([18, *(len(metric.title) for metric in shown)])
    return [
        f"{metric.title:<{width}} {metric.format(values[metric.name])} {metric.unit}".rstrip()
        for metric in shown
    ]
