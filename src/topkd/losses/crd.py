"""Contrastive representation distillation with a memory of all training images."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topkd.data.augment import integer_draws
from topkd.features import Batch, Features
from topkd.losses._validation import check_floats, count, one_of
from topkd.losses._validation import temperature as checked
from topkd.losses.base import Loss, LossContext, LossInfo
from topkd.losses.relations import directions

Positives = Literal["exact", "relaxed"]


def contrast(
    similarity: Tensor, log_z: Tensor | float, images: int, *, temperature: float = 0.07
) -> Tensor:
    r"""Noise-contrastive loss: classifies memory rows as positives or negatives of each anchor.

    .. math:: -\frac{1}{n} \sum_i \Big( \log \frac{P_{i0}}{P_{i0} + K/N}
        + \sum_{j=1}^{K} \log \frac{K/N}{P_{ij} + K/N} \Big), \qquad
        P_{ij} = \frac{1}{Z} e^{s_{ij} / \tau}

    It is computed in the logarithmic domain, so the constant that the authors' code adds to the
    denominators is not needed.

    Args:
        similarity: Cosine similarities s of anchors and rows, (n, 1 + K); the positive comes first.
        log_z: Logarithm of the normalization constant Z.
        images: N, the number of rows in the memory.
        temperature: Temperature :math:`\tau`, 1e-6 to 100.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If there is no negative, or an option is out of range.

    References:
        Contrastive Representation Distillation (Tian et al., ICLR 2020)
        https://arxiv.org/abs/1910.10699

    Examples:
        >>> contrast(torch.zeros(1, 2), log_z=0.0, images=1)  # 2 log 2: no information
        tensor(1.3863)
    """
    check_floats("similarity", similarity, "(n, 1 + negatives)")
    checked(temperature)
    count("images", images)
    negatives = similarity.shape[1] - 1
    if negatives < 1:
        raise ValueError(f"similarity must be (n, 1 + negatives), got {tuple(similarity.shape)}")
    odds = similarity / temperature - log_z - math.log(negatives / images)
    return -(F.logsigmoid(odds[:, 0]) + F.logsigmoid(-odds[:, 1:]).sum(1)).mean()


class NegativeSampler(nn.Module):
    """Samples the positive and the negatives of each image.

    The sample is a function of (seed, epoch, index) and does not depend on the batch. The negatives
    are every s-th of the images of other classes, modulo the next prime; the start and s are drawn
    for each image and epoch. All images of other classes are equally likely, and repetitions are
    rare.

    Args:
        target: Labels of all images.
        negatives: Maximum number of negatives, images of other classes; fewer if there are fewer.
        positives: Whether the positive of an image is the image itself ("exact") or an image drawn
            from its class ("relaxed").

    Raises:
        ValueError: If all images are of one class.

    Examples:
        >>> sample = NegativeSampler(torch.tensor([0, 1, 0, 1]), negatives=3)
        >>> indices = sample(0, 1, torch.tensor([2, 1]))
        >>> indices[:, 0].tolist(), (indices[:, 1:] % 2).tolist()
        ([2, 1], [[1, 1], [0, 0]])
    """

    order: Tensor
    count: Tensor
    first: Tensor
    prime: Tensor

    def __init__(self, target: Tensor, negatives: int, positives: Positives = "exact") -> None:
        super().__init__()
        _, classes, counts = target.cpu().unique(return_inverse=True, return_counts=True)
        if len(counts) < 2:
            raise ValueError("negatives are images of other classes, but there is only one class")
        others = len(target) - counts
        self.negatives, self.positives = min(negatives, int(others.min())), positives
        primes = torch.tensor([_prime_from(number) for number in others.tolist()])
        for name, tensor in {
            "order": classes.argsort(stable=True),  # images sorted by class
            "count": counts[classes],  # number of images in the class of each image
            "first": (counts.cumsum(0) - counts)[classes],  # start of its class in the order
            "prime": primes[classes],
        }.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, seed: int | Tensor, epoch: int, index: Tensor) -> Tensor:
        """Samples for images (n,).

        Args:
            seed: Seed of the run.
            epoch: Epoch, counted from 1.
            index: Indices of the images, (n,).

        Returns:
            Indices of the positive, then of the negatives, (n, 1 + negatives).

        Raises:
            ValueError: If an index is out of range.
        """
        images = len(self.order)
        if not torch.compiler.is_compiling():  # a compiled graph cannot read values
            invalid = index[(index < 0) | (index >= images)].tolist()
            if invalid:
                raise ValueError(f"there is no image {invalid[0]} among the {images} of the memory")
        start, step, turn, other = integer_draws(seed, epoch, index, 4).T[..., None]
        first, count, prime = (t[index, None] for t in (self.first, self.count, self.prime))
        steps = torch.arange(self.negatives, device=index.device) * (1 + step % (prime - 1))
        place = (start % prime + steps) % prime
        place = (place + turn % (images - count)) % (images - count)  # all are equally likely
        place += count * (place >= first)  # skips the class of the image
        positive = index[:, None]
        if self.positives == "relaxed":
            positive = self.order[first + other % count]
        return torch.cat([positive, self.order[place]], 1)


def _prime_from(number: int) -> int:
    """Returns the smallest prime that is not below a number."""
    while number < 2 or any(number % factor == 0 for factor in range(2, math.isqrt(number) + 1)):
        number += 1
    return number


class CRD(Loss):
    r""":func:`contrast` of linear, normalized embeddings of both networks, CRD.

    Each embedding is contrasted with embeddings of the other network. Two memories hold one row per
    training image. In training mode, each batch updates its rows, :math:`m \leftarrow
    \mathrm{normalize}(\mu m + (1 - \mu) e)`; an image that occurs several times in a batch updates
    its row once, with the mean. The losses of both directions are added. Z is fixed by the first
    batch in training mode, to N times the mean of :math:`e^{s / \tau}`; until then, its expectation
    under the initial memory is used. Memories and Z are part of the ``state_dict``. With several
    processes, use ``batch: gathered``, so that all have the same memories.

    Args:
        size: Width of the contrasted embeddings.
        negatives: Maximum number of negatives, images of other classes; fewer if there are fewer.
        temperature: Temperature :math:`\tau`, 1e-6 to 100.
        momentum: Momentum :math:`\mu` of the memories.
        positives: Whether the positive of an image is its own row ("exact") or the row of any image
            of its class ("relaxed").

    Raises:
        ValueError: If an option is out of range.

    References:
        Contrastive Representation Distillation (Tian et al., ICLR 2020)
        https://arxiv.org/abs/1910.10699

    Examples:
        >>> from types import SimpleNamespace
        >>> context = SimpleNamespace(target=torch.tensor([0, 0, 1, 1]), images=4)
        >>> student = Features(torch.zeros(2, 10), torch.rand(2, 8))
        >>> teacher = Features(torch.zeros(2, 10), torch.rand(2, 32))
        >>> batch = Batch(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), torch.tensor([0, 2]))
        >>> loss = CRD(size=16)
        >>> loss.setup(student, teacher, context)
        >>> loss(student, teacher, batch).shape, loss.metadata()["negatives"]
        (torch.Size([]), 2)
    """

    info = LossInfo(
        name="crd",
        group="relations",
        compares="each embedding with the other network's embeddings of thousands of images",
        paper="Tian et al., ICLR 2020",
        url="https://arxiv.org/abs/1910.10699",
        cost="128 n N for N training images, two projections, 1 kB per image (51 MB for 50,000)",
        zero=False,
    )

    log_z: Tensor
    fixed: Tensor
    seed: Tensor
    of_student: Tensor
    of_teacher: Tensor

    def __init__(
        self,
        *,
        size: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        positives: Positives = "exact",
    ) -> None:
        super().__init__()
        one_of("positives", positives, Positives)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self.size, self.negatives = count("size", size), count("negatives", negatives)
        self.temperature, self.momentum = checked(temperature), momentum
        self.positives, self.epoch = positives, 1

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Creates the linear embeddings, and memories with one row per training image.

        Raises:
            ValueError: If all training images are of one class.
        """
        size, images = self.size, context.images
        self.sample = NegativeSampler(context.target, self.negatives, self.positives)
        self.student = nn.Linear(student.embedding.shape[1], size)
        self.teacher = nn.Linear(teacher.embedding.shape[1], size)
        expected = math.log(images) + 1 / (2 * size * self.temperature**2)
        self.register_buffer("log_z", torch.full((2,), expected))
        self.register_buffer("fixed", torch.tensor(False))
        self.register_buffer("seed", torch.randint(2**31, ()))
        for name in ("of_student", "of_teacher"):  # rows have approximately unit norm
            self.register_buffer(name, (2 * torch.rand(images, size) - 1) * math.sqrt(3 / size))

    def on_epoch_start(self, epoch: int) -> None:
        """Stores the epoch, from which negatives are sampled."""
        self.epoch = epoch

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        s = directions(self.student(student.embedding).to(self.of_student.dtype))
        t = directions(self.teacher(teacher.embedding).to(self.of_teacher.dtype))
        indices = self.sample(self.seed, self.epoch, batch.index)
        if not self.training:
            return self._value(s, t, indices)
        # Memories are updated in place, before the caller's backward pass: compute gradients now.
        constants = s.detach(), t.detach()
        with torch.enable_grad():
            leaf_s, leaf_t = (embedding.clone().requires_grad_() for embedding in constants)
            value = self._value(leaf_s, leaf_t, indices)
            gradients = torch.autograd.grad(value, (leaf_s, leaf_t))
        for memory, embedding in zip((self.of_student, self.of_teacher), constants, strict=True):
            update_memory(memory, batch.index, embedding, self.momentum)
        zeros = [
            (gradient * (embedding - constant)).sum()
            for gradient, embedding, constant in zip(gradients, (s, t), constants, strict=True)
        ]
        return value.detach() + torch.stack(zeros).sum()  # attaches the gradients to the value

    def _value(self, student: Tensor, teacher: Tensor, indices: Tensor) -> Tensor:
        """Contrasts both embeddings with the sampled rows of the memories."""
        # A product with all rows needs far less memory than gathering the rows of each image.
        similarities = [
            (anchor @ memory.T).gather(1, indices)
            for anchor, memory in ((student, self.of_teacher), (teacher, self.of_student))
        ]
        if self.training and not self.fixed:
            self._fix_z(similarities)
        values = [
            contrast(cosines, log_z, len(self.of_student), temperature=self.temperature)
            for cosines, log_z in zip(similarities, self.log_z, strict=True)
        ]
        return torch.stack(values).sum()

    @torch.no_grad()
    def _fix_z(self, similarities: list[Tensor]) -> None:
        """Sets Z from the similarities of the first batch."""
        means = [
            (s / self.temperature).logsumexp((0, 1)) - math.log(s.numel()) for s in similarities
        ]
        self.log_z = (torch.stack(means) + math.log(len(self.of_student))).to(self.log_z.dtype)
        self.fixed = torch.ones_like(self.fixed)

    def metadata(self) -> dict[str, Any]:
        """Returns number of negatives, kind of positives and size of the memories in MB."""
        megabytes = (self.of_student.nbytes + self.of_teacher.nbytes) / 1e6
        return {
            "negatives": self.sample.negatives,
            "positives": self.sample.positives,
            "memory_megabytes": round(megabytes, 1),
        }


@torch.no_grad()
def update_memory(memory: Tensor, index: Tensor, embedding: Tensor, momentum: float) -> None:
    r"""Updates rows of a memory, :math:`\mathrm{normalize}(\mu m + (1 - \mu) e)`.

    Args:
        memory: Rows m, (N, d); updated in place.
        index: Indices of the rows, (n,). A repeated index is updated once, with the mean of its
            embeddings.
        embedding: Embeddings e, (n, d).
        momentum: Momentum :math:`\mu`.

    Examples:
        >>> memory = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> update_memory(memory, torch.tensor([1]), torch.tensor([[0.0, -3.0]]), momentum=0.5)
        >>> memory
        tensor([[ 1.,  0.],
                [ 0., -1.]])
    """
    images, which, counts = index.unique(return_inverse=True, return_counts=True)
    total = embedding.new_zeros(len(images), embedding.shape[1]).index_add(0, which, embedding)
    rows = momentum * memory[images] + (1 - momentum) * total / counts[:, None]
    memory.index_copy_(0, images, directions(rows).to(memory.dtype))
