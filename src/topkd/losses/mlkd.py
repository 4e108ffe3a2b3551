"""Distillation of images, batches and classes, of one view of every image or of two."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from topkd.features import Batch, Features
from topkd.losses._validation import LOGITS, check_shapes, one_of
from topkd.losses.base import Loss, LossInfo
from topkd.losses.logits import standardized

Views = Literal[1, 2]

TEMPERATURES = (2.0, 3.0, 4.0, 5.0, 6.0)
OUTER = (2.0, 6.0)  # at which the authors' code takes weak logits for strong ones


def instance_level(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    r"""Computes :math:`T^2\, \mathrm{KL}(p^t_i \| p^s_i)` of every image i.

    Args:
        student: Logits, (n, classes).
        teacher: Logits, (n, classes).
        temperature: T.

    Returns:
        (n,).
    """
    log_s, log_t = ((z / temperature).log_softmax(1) for z in (student, teacher))
    return temperature**2 * F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1)


def batch_level(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    r"""Computes :math:`\lVert P^t p^t_i - P^s p^s_i \rVert^2` of every image i.

    P holds the predictions p at temperature T as its rows: what is compared is which images are
    predicted alike.

    Args:
        student: Logits, (n, classes).
        teacher: Logits, (n, classes).
        temperature: T.

    Returns:
        (n,); their mean is :math:`\lVert P^t P^{t\top} - P^s P^{s\top} \rVert_F^2 / n`.
    """
    s, t = ((z / temperature).softmax(1) for z in (student, teacher))
    return (t @ t.T - s @ s.T).square().sum(1)


def class_level(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    r"""Computes :func:`batch_level` with classes in place of images.

    Args:
        student: Logits, (n, classes).
        teacher: Logits, (n, classes).
        temperature: T.

    Returns:
        (classes,); their mean is
        :math:`\lVert P^{t\top} P^t - P^{s\top} P^s \rVert_F^2 / \mathrm{classes}`.
    """
    s, t = ((z / temperature).softmax(1) for z in (student, teacher))
    return (t.T @ t - s.T @ s).square().sum(1)


def unsure(teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the half of the images and the half of the classes that a teacher is less sure of.

    Args:
        teacher: Logits, (n, classes).

    Returns:
        Whether the greatest probability of an image is at most the median, (n,), and whether the
        sum of the probabilities of a class is, (classes,).
    """
    prediction = teacher.softmax(1)
    confidence, mass = prediction.amax(1), prediction.sum(0)
    return confidence <= confidence.median(), mass <= mass.median()


def multi_level_distillation(
    student: Tensor,
    teacher: Tensor,
    *,
    views: Views = 1,
    faithful: bool = True,
    standardize: bool = False,
) -> Tensor:
    r"""Compares predictions, which images are predicted alike, and which classes go together.

    .. math:: \sum_T \Big[ \frac{1}{n} \sum_i m_i \big(I_i(T) + B_i(T)\big)
        + \frac{1}{c} \sum_j m'_j\, C_j(T) \Big], \qquad T \in \{2, 3, 4, 5, 6\}

    with :func:`instance_level` I, :func:`batch_level` B and :func:`class_level` C; the masks m and
    m' are :func:`unsure`. Two views are added.

    The code of the authors does otherwise, and their numbers come from it. That is what
    ``faithful`` gives: masks multiply means, so that they choose nothing and all counts about
    half; and the strong view adds instance terms alone, without a mask, of which those at T = 2
    and 6 are of the weak view once more.

    Args:
        student: Logits, (views n, classes), those of the strong view after all of the weak.
        teacher: Logits, (views n, classes), in the same order.
        views: How many views of every image there are.
        faithful: Whether to follow the authors' code, or the formula above.
        standardize: Whether I compares :func:`~topkd.losses.logits.standardized` logits.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the logits differ in shape or are no floats, or two views have an odd number
            of rows.

    References:
        Multi-Level Logit Distillation (Jin et al., CVPR 2023)
        https://doi.org/10.1109/CVPR52729.2023.02325

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 4.0, 1.0]])
        >>> multi_level_distillation(logits + 5, logits).item() < 1e-6
        True
    """
    check_shapes("logits", student, teacher, form=LOGITS)
    one_of("views", views, Views)
    if len(student) % views:
        raise ValueError(f"two views need an even number of rows, got {len(student)}")
    pairs = list(zip(student.chunk(views), teacher.chunk(views), strict=True))
    total = _of_one_view(*pairs[0], faithful, standardize)
    if views == 1:
        return total
    if not faithful:
        return total + _of_one_view(*pairs[1], faithful, standardize)
    for temperature in TEMPERATURES:
        pair = pairs[0 if temperature in OUTER else 1]
        s, t = map(standardized, pair) if standardize else pair
        total = total + instance_level(s, t, temperature).mean()
    return total


def _of_one_view(student: Tensor, teacher: Tensor, faithful: bool, standardize: bool) -> Tensor:
    images, classes = (chosen.to(student.dtype) for chosen in unsure(teacher))
    if faithful:
        images, classes = images.mean(), classes.mean()
    s, t = map(standardized, (student, teacher)) if standardize else (student, teacher)
    total = student.new_zeros(())
    for temperature in TEMPERATURES:
        rows = instance_level(s, t, temperature) + batch_level(student, teacher, temperature)
        columns = class_level(student, teacher, temperature)
        total = total + (images * rows).mean() + (classes * columns).mean()
    return total


class MLKD(Loss):
    """:func:`multi_level_distillation` of the logits, MLKD.

    Published with two views, weight 0.9 and, with the cross-entropies of both views added, 0.1 of
    these: 0.2 of a mean over both. Two views cost twice the forward passes; compare with runs
    that see two views as well.

    Args:
        views: How many views of every image a batch holds: with 2, its first half are weakly
            augmented images, and its second half the same images, strongly augmented.
        faithful: Whether to follow the authors' code, or what it was meant to compute.
        standardize: Whether predictions are of :func:`~topkd.losses.logits.standardized` logits.

    References:
        Multi-Level Logit Distillation (Jin et al., CVPR 2023)
        https://doi.org/10.1109/CVPR52729.2023.02325
    """

    info = LossInfo(
        name="mlkd",
        group="logits",
        compares="predictions, and which images and classes go together",
        paper="Jin et al., CVPR 2023",
        url="https://doi.org/10.1109/CVPR52729.2023.02325",
        cost="n² c + n c²; with two views, twice the images",
    )

    def __init__(
        self, *, views: Views = 1, faithful: bool = True, standardize: bool = False
    ) -> None:
        super().__init__()
        self.views: Views = one_of("views", views, Views)
        self.faithful, self.standardize = faithful, standardize

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        half = len(batch.index) // 2
        if self.views == 2 and not batch.index[:half].equal(batch.index[half:]):
            raise ValueError(
                "two views need batches whose second half are the images of the first half, "
                "augmented again; let the data set show two views, or set views to 1"
            )
        return multi_level_distillation(
            student.logits,
            teacher.logits,
            views=self.views,
            faithful=self.faithful,
            standardize=self.standardize,
        )
