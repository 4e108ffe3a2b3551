"""Multi-level logit distillation: instance, batch and class level, for one or two views."""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from topkd.features import Batch, Features
from topkd.losses._validation import LOGITS, check_shapes, one_of
from topkd.losses._validation import temperatures as checked
from topkd.losses.base import Loss, LossInfo
from topkd.losses.logits import standardized

Views = Literal[1, 2]

TEMPERATURES = (2.0, 3.0, 4.0, 5.0, 6.0)


def instance_level(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    r"""Computes :math:`T^2\, \mathrm{KL}(p^t_i \| p^s_i)` for each image i.

    Args:
        student: Logits, (n, classes).
        teacher: Logits, (n, classes).
        temperature: Softmax temperature T.

    Returns:
        Divergences, (n,).
    """
    log_s, log_t = ((z / temperature).log_softmax(1) for z in (student, teacher))
    return temperature**2 * F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1)


def batch_level(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    r"""Computes :math:`\lVert P^t p^t_i - P^s p^s_i \rVert^2` for each image i.

    The rows of P are the predictions p at temperature T. The loss compares the similarities of the
    predictions of all pairs of images.

    Args:
        student: Logits, (n, classes).
        teacher: Logits, (n, classes).
        temperature: Softmax temperature T.

    Returns:
        (n,); the mean is :math:`\lVert P^t P^{t\top} - P^s P^{s\top} \rVert_F^2 / n`.
    """
    s, t = ((z / temperature).softmax(1) for z in (student, teacher))
    return (t @ t.T - s @ s.T).square().sum(1)


def class_level(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    r"""Computes :func:`batch_level` with the roles of images and classes exchanged.

    Args:
        student: Logits, (n, classes).
        teacher: Logits, (n, classes).
        temperature: Softmax temperature T.

    Returns:
        (classes,); the mean is
        :math:`\lVert P^{t\top} P^t - P^{s\top} P^s \rVert_F^2 / \mathrm{classes}`.
    """
    s, t = ((z / temperature).softmax(1) for z in (student, teacher))
    return (t.T @ t - s.T @ s).square().sum(1)


def low_confidence(teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Selects the half of the images and of the classes on which the teacher is less confident.

    Args:
        teacher: Logits, (n, classes).

    Returns:
        Two boolean masks: whether the largest probability of an image is at most the median, (n,),
        and whether the sum of the probabilities of a class is at most the median, (classes,).
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
    temperatures: Sequence[float] = TEMPERATURES,
) -> Tensor:
    r"""Compares predictions, and their similarities across images and across classes.

    .. math:: \sum_T \Big[ \frac{1}{n} \sum_i m_i \big(I_i(T) + B_i(T)\big)
        + \frac{1}{c} \sum_j m'_j\, C_j(T) \Big]

    with :func:`instance_level` I, :func:`batch_level` B and :func:`class_level` C; the masks m and
    m' are :func:`low_confidence`. The sum is over the temperatures T.

    ``faithful=False`` computes this formula, and adds it for both views if there are two.
    ``faithful=True`` follows the authors' code, which differs: the means of I, B and C are
    multiplied by the means of the masks, so no image or class is selected and each term counts
    about half. The strong view adds no B and no C, only the unmasked mean of I at each temperature;
    at the first and at the last temperature, this is computed from the weak view again.

    Args:
        student: Logits, (views n, classes); all rows of the weak view come first.
        teacher: Logits, (views n, classes), in the same order.
        views: Number of views per image.
        faithful: Whether to follow the authors' code instead of the formula above.
        standardize: Whether I compares :func:`~topkd.losses.logits.standardized` logits.
        temperatures: Temperatures T, 1e-6 to 100; a repeated one counts as often as it is given.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the logits differ in shape or are not floating-point, the number of rows is
            odd for two views, or an option is out of range.

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
    checked(temperatures)
    if len(student) % views:
        raise ValueError(f"two views need an even number of rows, got {len(student)}")
    pairs = list(zip(student.chunk(views), teacher.chunk(views), strict=True))
    total = _single_view(*pairs[0], faithful, standardize, temperatures)
    if views == 1:
        return total
    if not faithful:
        return total + _single_view(*pairs[1], faithful, standardize, temperatures)
    ends = 0, len(temperatures) - 1
    for place, temperature in enumerate(temperatures):
        pair = pairs[0 if place in ends else 1]
        s, t = map(standardized, pair) if standardize else pair
        total = total + instance_level(s, t, temperature).mean()
    return total


def _single_view(
    student: Tensor,
    teacher: Tensor,
    faithful: bool,
    standardize: bool,
    temperatures: Sequence[float],
) -> Tensor:
    images, classes = (mask.to(student.dtype) for mask in low_confidence(teacher))
    if faithful:
        images, classes = images.mean(), classes.mean()
    s, t = map(standardized, (student, teacher)) if standardize else (student, teacher)
    total = student.new_zeros(())
    for temperature in temperatures:
        rows = instance_level(s, t, temperature) + batch_level(student, teacher, temperature)
        columns = class_level(student, teacher, temperature)
        total = total + (images * rows).mean() + (classes * columns).mean()
    return total


class MLKD(Loss):
    """:func:`multi_level_distillation` of the logits, MLKD.

    The authors use two views, weight 0.9, and weight 0.1 for the sum of the cross-entropies of both
    views (0.2 for their mean). With standardized logits, Sun et al. use the temperatures 2, 2, 3, 5
    and 6 and weight 9. Two views double the forward passes; compare with runs that use two views
    as well.

    Args:
        views: Number of views per image in a batch. With 2, the first half of the batch holds
            weakly augmented images, and the second half the same images, strongly augmented.
        faithful: Whether to follow the authors' code instead of the formula.
        standardize: Whether instance terms use :func:`~topkd.losses.logits.standardized` logits.
        temperatures: Temperatures T of the sum, 1e-6 to 100; a repeated one counts as often as it
            is given. The authors' code uses 4, 2, 3, 5 and 6.

    Raises:
        ValueError: If ``views`` is not 1 or 2, or there is no temperature or one is out of range.

    References:
        Multi-Level Logit Distillation (Jin et al., CVPR 2023)
        https://doi.org/10.1109/CVPR52729.2023.02325
        Logit Standardization in Knowledge Distillation (Sun et al., CVPR 2024)
        https://arxiv.org/abs/2403.01427

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 4.0, 1.0]])
        >>> features = Features(logits, logits)
        >>> batch = Batch(torch.zeros(2, 3, 8, 8), torch.tensor([2, 1]), torch.arange(2))
        >>> MLKD()(features, features, batch).item()
        0.0
    """

    info = LossInfo(
        name="mlkd",
        group="logits",
        compares="predictions, and their similarities across images and classes",
        paper="Jin et al., CVPR 2023",
        url="https://doi.org/10.1109/CVPR52729.2023.02325",
        cost="n² c + n c²; with two views, twice the images",
    )

    def __init__(
        self,
        *,
        views: Views = 1,
        faithful: bool = True,
        standardize: bool = False,
        temperatures: tuple[float, ...] = TEMPERATURES,
    ) -> None:
        super().__init__()
        self.views: Views = one_of("views", views, Views)
        self.faithful, self.standardize = faithful, standardize
        self.temperatures = checked(temperatures)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        half = len(batch.index) // 2
        if self.views == 2 and not batch.index[:half].equal(batch.index[half:]):
            raise ValueError(
                "two views need batches whose second half are the images of the first half, "
                "augmented again; configure the data set with two views, or set views to 1"
            )
        return multi_level_distillation(
            student.logits,
            teacher.logits,
            views=self.views,
            faithful=self.faithful,
            standardize=self.standardize,
            temperatures=self.temperatures,
        )
