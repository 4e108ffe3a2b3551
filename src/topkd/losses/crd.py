"""A loss on embeddings that tells each image from thousands of others, by a memory of all."""

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
    r"""Tells for each anchor which row of a memory belongs to it, and which ones do not.

    .. math:: -\frac{1}{n} \sum_i \Big( \log \frac{P_{i0}}{P_{i0} + K/N}
        + \sum_{j=1}^{K} \log \frac{K/N}{P_{ij} + K/N} \Big), \qquad
        P_{ij} = \frac{1}{Z} e^{s_{ij} / \tau}

    It is computed from logarithms, so that the small number that the authors' code adds to the
    denominators is not needed.

    Args:
        similarity: Cosines s of anchors and rows, (n, 1 + K); the first row of each belongs to it.
        log_z: Logarithm of Z.
        images: N, the number of rows in the memory.
        temperature: :math:`\tau`.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If there is no negative.

    References:
        Contrastive Representation Distillation (Tian et al., ICLR 2020)
        https://arxiv.org/abs/1910.10699

    Examples:
        >>> contrast(torch.zeros(1, 2), log_z=0.0, images=1)  # two guesses at even odds
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


class Choice(nn.Module):
    r"""Chooses with which images of a data set an image is contrasted.

    What is chosen for an image depends on (seed, epoch, index) alone, not on the batch it is in.
    The negatives are every s-th of the images of other classes, modulo the next prime, from some
    image on; start and s are drawn for each image and epoch. So all images of other classes are
    equally likely, and hardly any comes twice.

    Args:
        target: Labels of all images.
        negatives: How many images of other classes each is contrasted with, at most; fewer if
            there are fewer of other classes.
        positives: Whether the image that belongs to an image is itself (exact) or one drawn from
            its class (relaxed).

    Raises:
        ValueError: If all images are of one class.

    Examples:
        >>> choose = Choice(torch.tensor([0, 1, 0, 1]), negatives=3)
        >>> chosen = choose(0, 1, torch.tensor([2, 1]))
        >>> chosen[:, 0].tolist(), (chosen[:, 1:] % 2).tolist()
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
            "order": classes.argsort(stable=True),  # class by class
            "count": counts[classes],  # of images in the class of an image
            "first": (counts.cumsum(0) - counts)[classes],  # where its class begins
            "prime": primes[classes],
        }.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, seed: int | Tensor, epoch: int, index: Tensor) -> Tensor:
        """Chooses for images (n,): first the one that belongs to each, then the negatives.

        Returns:
            Indices, (n, 1 + negatives).

        Raises:
            ValueError: If there is no such image.
        """
        images = len(self.order)
        if not torch.compiler.is_compiling():  # a graph must not ask for numbers
            wrong = index[(index < 0) | (index >= images)].tolist()
            if wrong:
                raise ValueError(f"there is no image {wrong[0]} among the {images} of the memory")
        start, step, turn, other = integer_draws(seed, epoch, index, 4).T[..., None]
        first, count, prime = (t[index, None] for t in (self.first, self.count, self.prime))
        steps = torch.arange(self.negatives, device=index.device) * (1 + step % (prime - 1))
        place = (start % prime + steps) % prime
        place = (place + turn % (images - count)) % (images - count)  # all are equally likely
        place += count * (place >= first)  # the own class is left out
        belongs = index[:, None]
        if self.positives == "relaxed":
            belongs = self.order[first + other % count]
        return torch.cat([belongs, self.order[place]], 1)


def _prime_from(number: int) -> int:
    """Finds the first prime that is not below a number."""
    while number < 2 or any(number % factor == 0 for factor in range(2, math.isqrt(number) + 1)):
        number += 1
    return number


class CRD(Loss):
    r""":func:`contrast` of linear embeddings of both networks, normalized (CRD).

    Each network's embedding of an image is told from embeddings that the other network made of
    other images: two memories hold a row for every image, to which each batch in training mode is
    mixed in, :math:`m \leftarrow \mathrm{normalize}(\mu m + (1 - \mu) e)`; an image that is
    twice in a batch is mixed in once, with its mean. Both directions are added. Z is set by the
    first batch in training mode, to N times the mean of :math:`e^{s / \tau}`; before, it is what
    the memory gives on average as it begins. Memories and Z are saved with the loss. With several
    processes, take ``batch: gathered``, so that all have the same memories.

    Args:
        size: Width of the embeddings that are compared.
        negatives: Images of other classes that each is told from, at most; fewer if there are
            fewer of other classes.
        temperature: :math:`\tau`.
        momentum: :math:`\mu`.
        positives: Whether an image belongs to its own row (exact), or to that of any image of its
            class (relaxed).

    References:
        Contrastive Representation Distillation (Tian et al., ICLR 2020)
        https://arxiv.org/abs/1910.10699
    """

    info = LossInfo(
        name="crd",
        group="relations",
        compares="each embedding with the other network's of thousands of images",
        paper="Tian et al., ICLR 2020",
        url="https://arxiv.org/abs/1910.10699",
        cost="128 n N for N training images, two projections, 1 kB an image (51 MB for 50,000)",
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
        """Creates both embeddings, and a memory with a row for each training image.

        Raises:
            ValueError: If all training images are of one class.
        """
        size, images = self.size, context.images
        self.choose = Choice(context.target, self.negatives, self.positives)
        self.student = nn.Linear(student.embedding.shape[1], size)
        self.teacher = nn.Linear(teacher.embedding.shape[1], size)
        begins = math.log(images) + 1 / (2 * size * self.temperature**2)
        self.register_buffer("log_z", torch.full((2,), begins))
        self.register_buffer("fixed", torch.tensor(False))
        self.register_buffer("seed", torch.randint(2**31, ()))
        for name in ("of_student", "of_teacher"):  # every row is about as long as an embedding
            self.register_buffer(name, (2 * torch.rand(images, size) - 1) * math.sqrt(3 / size))

    def on_epoch_start(self, epoch: int) -> None:
        """Draws other negatives in every epoch."""
        self.epoch = epoch

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        s = directions(self.student(student.embedding).to(self.of_student.dtype))
        t = directions(self.teacher(teacher.embedding).to(self.of_teacher.dtype))
        chosen = self.choose(self.seed, self.epoch, batch.index)
        if not self.training:
            return self._value(s, t, chosen)
        # Memories are changed in place, so that a later backward pass would read other rows.
        fixed = s.detach(), t.detach()
        with torch.enable_grad():
            own, other = (embedding.clone().requires_grad_() for embedding in fixed)
            value = self._value(own, other, chosen)
            slopes = torch.autograd.grad(value, (own, other))
        for memory, embedding in zip((self.of_student, self.of_teacher), fixed, strict=True):
            mix_in(memory, batch.index, embedding, self.momentum)
        zeros = [
            (slope * (moving - still)).sum()
            for slope, moving, still in zip(slopes, (s, t), fixed, strict=True)
        ]
        return value.detach() + torch.stack(zeros).sum()  # the value, with its gradient

    def _value(self, student: Tensor, teacher: Tensor, chosen: Tensor) -> Tensor:
        """Contrasts both embeddings with the rows of the memories that are chosen for them."""
        # All rows at once: for a batch, far less memory than to gather those of each image.
        similar = [
            (anchor @ memory.T).gather(1, chosen)
            for anchor, memory in ((student, self.of_teacher), (teacher, self.of_student))
        ]
        if self.training and not self.fixed:
            self._fix(similar)
        values = [
            contrast(cosines, log_z, len(self.of_student), temperature=self.temperature)
            for cosines, log_z in zip(similar, self.log_z, strict=True)
        ]
        return torch.stack(values).sum()

    @torch.no_grad()
    def _fix(self, similar: list[Tensor]) -> None:
        """Sets Z, once and for all."""
        means = [(c / self.temperature).logsumexp((0, 1)) - math.log(c.numel()) for c in similar]
        self.log_z = (torch.stack(means) + math.log(len(self.of_student))).to(self.log_z.dtype)
        self.fixed = torch.ones_like(self.fixed)

    def metadata(self) -> dict[str, Any]:
        """Returns the number of negatives, and the megabytes of the memories."""
        megabytes = (self.of_student.nbytes + self.of_teacher.nbytes) / 1e6
        return {
            "negatives": self.choose.negatives,
            "positives": self.choose.positives,
            "memory_megabytes": round(megabytes, 1),
        }


@torch.no_grad()
def mix_in(memory: Tensor, index: Tensor, embedding: Tensor, momentum: float) -> None:
    r"""Mixes embeddings into rows of a memory, :math:`\mathrm{normalize}(\mu m + (1 - \mu) e)`.

    Args:
        memory: Rows m, (N, d); those of the index are changed in place.
        index: Which rows, (n,). Of an index that comes several times the mean is mixed in, once.
        embedding: e, (n, d).
        momentum: :math:`\mu`.

    Examples:
        >>> memory = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> mix_in(memory, torch.tensor([1]), torch.tensor([[0.0, -3.0]]), momentum=0.5)
        >>> memory
        tensor([[ 1.,  0.],
                [ 0., -1.]])
    """
    images, which, counts = index.unique(return_inverse=True, return_counts=True)
    total = embedding.new_zeros(len(images), embedding.shape[1]).index_add(0, which, embedding)
    rows = momentum * memory[images] + (1 - momentum) * total / counts[:, None]
    memory.index_copy_(0, images, directions(rows).to(memory.dtype))
