"""The contrastive loss: the paper in plain loops, known cases, and a memory that can be resumed."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import relation_losses as reference
from reference.features import CLASSES, CLOUD, IMAGES, WIDTH, batch, bound, features, source_in

from topkd.features import Batch
from topkd.losses.crd import CRD, NegativeSampler, update_memory
from topkd.losses.functional import contrast

TARGET = torch.arange(IMAGES) % CLASSES


def contrasting(target=TARGET, **options):
    """The loss between a student of 3 numbers and a teacher of more, for images of these labels."""
    context = replace(source_in(Path()), target=target)
    return bound(CRD, features(3, seed=1), features(WIDTH, seed=2), context, **options)


def contrastive(seed=0, **options):
    torch.manual_seed(seed)
    return contrasting(**{"size": 4, "temperature": 0.5, **options}).double()


def shown(index):
    index = torch.as_tensor(index)
    return Batch(torch.zeros(len(index), 3, 8, 8), TARGET[index], index)


def made(index, seed=1):
    """What both networks make of some images, whatever the batch they are in."""
    whole = features(3, seed, n=IMAGES), features(WIDTH, seed + 50, n=IMAGES)
    return tuple(f.apply(lambda t: t[torch.as_tensor(index)]) for f in whole)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 1.0])
def test_value_is_the_authors_code_in_plain_loops(temperature):
    similarity = torch.rand(5, 8, dtype=torch.float64) * 2 - 1
    found = contrast(similarity, math.log(30.0), 48, temperature=temperature)
    expected = reference.contrast(similarity.tolist(), 30.0, 48, temperature, epsilon=0.0)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    almost = reference.contrast(similarity.tolist(), 30.0, 48, temperature)
    assert found.item() == pytest.approx(almost, rel=1e-5)


def test_gradient_is_the_slope_of_the_authors_code():
    similarity = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(contrast(similarity, 1.0, 9, temperature=0.3), similarity)
    slopes = reference.slopes(
        lambda rows: reference.contrast(rows, math.e, 9, 0.3, epsilon=0.0), similarity.tolist()
    )
    torch.testing.assert_close(found, found.new_tensor(slopes), rtol=1e-5, atol=1e-7)


def test_even_odds_cost_the_logarithm_of_two_for_every_row():
    # P = K / N on every row: each of the 1 + K guesses is fifty-fifty.
    similarity = torch.zeros(4, 6, dtype=torch.float64)
    value = contrast(similarity, -math.log(5 / 20), images=20)
    assert value.item() == pytest.approx(6 * math.log(2))


def test_great_cosines_do_not_overflow():
    value = contrast(torch.tensor([[1.0, -1.0, 1.0]]), 0.0, 10, temperature=0.001)
    assert value.item() == pytest.approx(1000 - math.log(2 / 10), rel=1e-5)


@pytest.mark.parametrize("positives", ["exact", "relaxed"])
def test_the_whole_loss_is_the_paper_on_a_hand_made_memory(positives):
    loss = contrastive(negatives=7, positives=positives).eval()
    loss.of_student = torch.eye(4).double().repeat(IMAGES // 4, 1)
    loss.of_teacher = loss.of_student.flip(1)
    loss.log_z = torch.tensor([2.0, 3.0]).double()
    index = [3, 40, 11]
    student, teacher = made(index)
    chosen = loss.sample(int(loss.seed), 1, torch.tensor(index)).tolist()
    expected = 0.0
    for seen, adapter, memory, log_z in (
        (student, loss.student, loss.of_teacher.tolist(), 2.0),
        (teacher, loss.teacher, loss.of_student.tolist(), 3.0),
    ):
        anchors = [reference.unit(row) for row in adapter(seen.embedding).tolist()]
        cosines = [
            [reference.dot(anchor, memory[j]) for j in row]
            for anchor, row in zip(anchors, chosen, strict=True)
        ]
        expected += reference.contrast(cosines, math.exp(log_z), IMAGES, 0.5, epsilon=0.0)
    assert loss(student, teacher, shown(index)).item() == pytest.approx(expected, rel=1e-9)


def test_first_batch_fixes_z_and_no_other_does():
    loss, index = contrastive(negatives=7), [3, 40, 11]
    student, teacher = made(index)
    chosen = loss.sample(int(loss.seed), 1, torch.tensor(index))
    expected = []
    for seen, adapter, memory in (
        (student, loss.student, loss.of_teacher),
        (teacher, loss.teacher, loss.of_student),
    ):
        anchor = torch.nn.functional.normalize(adapter(seen.embedding))
        cosines = torch.einsum("nd,nkd->nk", anchor, memory[chosen])
        expected.append(IMAGES * (cosines / 0.5).exp().mean())
    loss(student, teacher, shown(index))
    first = loss.log_z.clone()
    torch.testing.assert_close(first.exp(), torch.stack(expected))
    loss(*made([5, 6], seed=9), shown([5, 6]))
    assert torch.equal(loss.log_z, first)


def test_z_begins_as_what_the_memory_gives_on_average():
    loss = contrasting(torch.arange(20_000) % 2, size=128)
    anchor = torch.nn.functional.normalize(torch.randn(8, 128))
    measured = 20_000 * (anchor @ loss.of_teacher.T / 0.07).exp().mean()
    assert loss.log_z.exp()[0].item() == pytest.approx(measured.item(), rel=0.05)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_memory_is_mixed_in_plain_loops(momentum):
    generator = torch.Generator().manual_seed(3)
    memory, embedding = (
        torch.randn(n, 4, dtype=torch.float64, generator=generator) for n in (10, 3)
    )
    expected, rows = memory.tolist(), embedding.tolist()
    update_memory(memory, torch.tensor([7, 2, 7]), embedding, momentum)
    both = [(a + b) / 2 for a, b in zip(rows[0], rows[2], strict=True)]
    for place, row in ((7, both), (2, rows[1])):
        old = expected[place]
        moved = [momentum * m + (1 - momentum) * e for m, e in zip(old, row, strict=True)]
        expected[place] = reference.unit(moved)
    torch.testing.assert_close(memory, memory.new_tensor(expected))


def plainly(rows, adapter):
    """Directions of what an adapter makes of embeddings, in plain loops."""
    return [reference.unit(row) for row in adapter(rows).tolist()]


def test_steps_are_the_paper_in_plain_loops_and_the_memory_stays_where_it_is():
    loss = contrastive(negatives=7)
    memories = [loss.of_student.tolist(), loss.of_teacher.tolist()]
    places = [memory.data_ptr() for memory in (loss.of_student, loss.of_teacher)]
    for step, index in enumerate(([3, 40, 11], [11, 5, 3], [40, 41, 3])):
        student, teacher = made(index, seed=step)
        chosen = loss.sample(loss.seed, 1, torch.tensor(index)).tolist()
        found = loss(student, teacher, shown(index)).item()
        anchors = [
            plainly(student.embedding, loss.student),
            plainly(teacher.embedding, loss.teacher),
        ]
        expected = 0.0
        for own, memory, log_z in zip(anchors, memories[::-1], loss.log_z.tolist(), strict=True):
            cosines = [
                [reference.dot(anchor, memory[j]) for j in row]
                for anchor, row in zip(own, chosen, strict=True)
            ]
            expected += reference.contrast(cosines, math.exp(log_z), IMAGES, 0.5, epsilon=0.0)
        assert found == pytest.approx(expected, rel=1e-9)
        for own, memory in zip(anchors, memories, strict=True):
            for anchor, i in zip(own, index, strict=True):
                memory[i] = reference.unit(
                    [(old + new) / 2 for old, new in zip(memory[i], anchor, strict=True)]
                )
    for memory, expected in zip((loss.of_student, loss.of_teacher), memories, strict=True):
        torch.testing.assert_close(memory, memory.new_tensor(expected))
    assert [memory.data_ptr() for memory in (loss.of_student, loss.of_teacher)] == places


def test_gradient_of_a_step_is_that_before_the_memory_changes():
    loss, index = contrastive(negatives=7), [3, 40, 11]
    student, teacher = made(index)
    student.embedding.requires_grad_()
    loss.eval()
    inputs = [student.embedding, *loss.parameters()]
    expected = torch.autograd.grad(loss(student, teacher, shown(index)), inputs)
    loss.train().fixed.fill_(True)  # so that Z is the same
    values = [loss(student, teacher, shown(index)) for _ in range(2)]  # before any backward pass
    torch.testing.assert_close(torch.autograd.grad(values[0], inputs), expected)


def test_evaluation_changes_nothing():
    loss = contrastive().eval()
    before = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
    loss(*made(range(CLOUD)), batch())
    assert all(torch.equal(before[name], tensor) for name, tensor in loss.state_dict().items())


def test_gradient_survives_the_change_of_the_memory():
    loss, index = contrastive(), torch.arange(CLOUD)
    student, teacher = made(index)
    student.embedding.requires_grad_()
    loss(student, teacher, shown(index)).backward()
    assert student.embedding.grad.norm() > 0
    assert all(w.grad.norm() > 0 for w in loss.parameters())


@pytest.mark.parametrize("positives", ["exact", "relaxed"])
def test_choice_keeps_the_classes_apart(positives):
    target = torch.tensor([2, 0, 1, 2, 2, 0, 1, 2, 2, 2])  # 2, 2 and 6 of a class
    choose = NegativeSampler(target, negatives=100, positives=positives)
    for epoch in range(20):
        chosen = choose(0, epoch, torch.arange(10))
        assert chosen.shape == (10, 1 + 4)  # as many as the greatest class has of others
        assert (target[chosen[:, 0]] == target).all()
        assert (target[chosen[:, 1:]] != target[:, None]).all()
        assert positives == "relaxed" or (chosen[:, 0] == torch.arange(10)).all()


@pytest.mark.parametrize("positives", ["exact", "relaxed"])
def test_choice_does_not_depend_on_the_batch(positives):
    choose, order = NegativeSampler(TARGET, 9, positives), torch.randperm(IMAGES)
    whole = choose(3, 4, torch.arange(IMAGES))
    assert torch.equal(choose(3, 4, order), whole[order])
    assert not torch.equal(choose(3, 5, order), whole[order])
    assert not torch.equal(choose(4, 4, order), whole[order])


def test_choice_is_fair():
    # Of 36 others, 9 in each of 1000 epochs: 250 of each, with a standard deviation below 15.
    choose = NegativeSampler(TARGET, 9, "relaxed")
    chosen = torch.cat([choose(0, epoch, torch.tensor([5])) for epoch in range(1000)])
    counts = chosen[:, 1:].flatten().bincount(minlength=IMAGES)
    assert (counts[TARGET[5] != TARGET] - 250).abs().max() < 4 * 15
    own = chosen[:, 0].bincount(minlength=IMAGES)[TARGET[5] == TARGET]
    assert (own - 1000 / 12).abs().max() < 4 * math.sqrt(1000 / 12)


def test_choice_hardly_repeats_itself():
    chosen = NegativeSampler(torch.arange(5000) % 10, 2000)(0, 1, torch.arange(50))[:, 1:]
    distinct = torch.tensor([len(row.unique()) for row in chosen])
    assert distinct.min() >= 2000 - (4507 - 4500)  # 4507 is the prime after 4500


def test_two_half_epochs_are_one_whole():
    batches = torch.randperm(IMAGES).split(CLOUD)

    def train(loss, batches):
        optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
        for index in batches:
            optimizer.zero_grad()
            value = loss(*made(index), shown(index))
            value.backward()
            optimizer.step()
        return value

    whole, first = contrastive(), contrastive()
    expected = train(whole, batches)
    train(first, batches[:4])
    second = contrastive(seed=1)  # another process: all that counts is in the state
    second.load_state_dict(first.state_dict())
    found = train(second, batches[4:])
    assert torch.equal(found, expected)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name


def test_an_image_seen_twice_is_safe():
    index = torch.tensor([4, 9, 4, 2])
    results = []
    for order in (torch.arange(4), torch.tensor([2, 3, 0, 1])):
        loss = contrastive()
        student, teacher = made(index[order])
        student.embedding.add_((order == 2)[:, None])  # the second view differs
        value = loss(student, teacher, shown(index[order]))
        results.append((value, loss.of_student, loss.of_teacher))
    torch.testing.assert_close(*results)


def test_new_epochs_bring_new_negatives():
    loss = contrastive(negatives=3).eval()
    values = []
    for epoch in (1, 2, 1):
        loss.on_epoch_start(epoch)
        values.append(loss(*made(range(CLOUD)), batch()).item())
    assert values[0] == values[2] != values[1]


def test_facts_tell_the_memory(tmp_path):
    student, teacher = features(3, seed=1), features(WIDTH, seed=2)
    loss = bound(CRD, student, teacher, source_in(tmp_path))
    assert loss.metadata() == {"negatives": 36, "positives": "exact", "memory_megabytes": 0.0}
    large = contrasting(torch.arange(50_000) % 100, size=128)
    assert large.metadata() == {"negatives": 16384, "positives": "exact", "memory_megabytes": 51.2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positives": "all"}, "positives must be exact or relaxed, got all"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"negatives": 0}, "negatives must be positive, got 0"),
        ({"size": 0}, "size must be positive, got 0"),
    ],
)
def test_refuses_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        CRD(**options)


def test_refuses_what_cannot_be_contrasted():
    with pytest.raises(ValueError, match="there is only one class"):
        contrasting(torch.zeros(10).long())
    with pytest.raises(ValueError, match="there is no image 50 among the 48 of the memory"):
        contrastive()(*made([3, 4]), Batch(torch.zeros(2), TARGET[:2], torch.tensor([3, 50])))
    with pytest.raises(ValueError, match=r"\(n, 1 \+ negatives\), got \(4, 1\)"):
        contrast(torch.zeros(4, 1), 0.0, 10)
