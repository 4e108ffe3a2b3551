"""A teacher's answers that are kept: the same as asking again, and never asked for twice."""

import errno
import os

import pytest
import torch

from topkd.features import Batch, Features
from topkd.training.teacher_cache import TeacherCache

IMAGES, CLASSES, WIDTH = 12, 3, 5


def ask(images):
    pixels = images.flatten(1)
    return Features(pixels[:, :CLASSES] * 3, pixels[:, :WIDTH].sin())


def shown(*index):
    images = torch.stack([torch.linspace(i, i + 1, 3 * 4).view(3, 2, 2) for i in index])
    return Batch(images, torch.zeros(len(index)).long(), torch.tensor(index))


def kept(folder, about=None):
    return TeacherCache(
        folder, about or {"teacher": "a"}, images=IMAGES, classes=CLASSES, width=WIDTH
    )


def never(images):
    raise AssertionError("the teacher was asked again")


def test_answers_are_those_of_the_teacher_to_rounding(tmp_path):
    batch = shown(3, 0, 11)
    found, asked = kept(tmp_path)(batch, 1, ask), ask(batch.images)
    # bfloat16 has eight significant bits: half a unit in the last place is 2^-9 of the number.
    torch.testing.assert_close(found.logits.float(), asked.logits, rtol=2**-8, atol=0)
    torch.testing.assert_close(found.embedding.float(), asked.embedding, rtol=2**-8, atol=0)
    assert found.maps == []


def test_a_second_student_does_not_ask(tmp_path):
    first = kept(tmp_path)
    answers = [first(shown(*part), 2, ask) for part in ((0, 1, 2), (9, 4, 7))]
    assert first.computed == 6
    second = kept(tmp_path)
    again = [second(shown(*part), 2, never) for part in ((0, 1, 2), (9, 4, 7))]
    for one, other in zip(answers, again, strict=True):
        assert torch.equal(one.logits, other.logits)
        assert torch.equal(one.embedding, other.embedding)
    mixed = second(shown(7, 0), 2, never)  # in another order and another batch
    assert torch.equal(mixed.logits, torch.stack([answers[1].logits[2], answers[0].logits[0]]))


def test_a_batch_with_a_missing_answer_is_asked_about(tmp_path):
    answers = kept(tmp_path)
    answers(shown(0, 1), 1, ask)
    answers(shown(1, 2), 1, ask)
    assert answers.computed == 4
    answers(shown(0, 2), 1, ask)
    assert answers.computed == 4


def test_epochs_and_teachers_are_apart(tmp_path):
    kept(tmp_path)(shown(0), 1, ask)
    for answers, epoch in ((kept(tmp_path), 2), (kept(tmp_path, {"teacher": "b"}), 1)):
        answers(shown(0), epoch, ask)
        assert answers.computed == 1


def test_going_back_to_an_epoch_finds_it_again(tmp_path):
    answers = kept(tmp_path)
    first = answers(shown(5), 1, ask)
    answers(shown(5), 2, ask)
    assert torch.equal(answers(shown(5), 1, ask).logits, first.logits)
    assert answers.computed == 2


def test_a_full_disk_is_an_error_before_anything_is_lost(tmp_path, monkeypatch):
    def full(file, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        kept(tmp_path)(shown(0), 1, ask)


def test_a_damaged_cache_is_computed_again(tmp_path):
    every = shown(*range(IMAGES))
    right = kept(tmp_path)(every, 1, ask)
    (path,) = tmp_path.glob("*/epoch1.bin")
    content = path.read_bytes()
    assert len(content) == IMAGES * (4 + 2 * (CLASSES + WIDTH))
    flips = [(place, bit) for place in range(len(content)) for bit in range(8)]
    damaged = [
        content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]
        for place, bit in flips[::7]
    ]
    damaged += [content[:50], b"", content + b"more", bytes(len(content))]
    for other in damaged:
        path.write_bytes(other)
        found = kept(tmp_path)(every, 1, ask)
        assert torch.equal(found.logits, right.logits)
        assert torch.equal(found.embedding, right.embedding)
        assert path.read_bytes()[: len(content)] == content
