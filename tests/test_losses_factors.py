"""Factor transfer, and the paraphraser that comes before it."""

from dataclasses import replace

import pytest
import torch
from reference import map_losses as reference
from reference.features import IMAGES, Recorder, answers, batch, bound, features, never, source_in
from torch import nn
from torch.autograd import gradcheck

from topkd.features import Features
from topkd.losses import FT
from topkd.losses.factor_transfer import Paraphraser, learn
from topkd.losses.functional import factor_transfer

SHORT = {"epochs": 3, "lr": 0.05}


@pytest.fixture
def source(tmp_path):
    return source_in(tmp_path)


def maps(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("sides", [(2, 2), (4, 2), (2, 4)])
@pytest.mark.parametrize("form", ["map", "whole"])
def test_factor_transfer_is_the_paper_in_plain_loops(form, sides):
    student, teacher = (maps(3, 4, side, side, seed=side + i) for i, side in enumerate(sides))

    def plain(moved):
        return reference.factor_transfer(moved.tolist(), teacher.tolist(), whole=form == "whole")

    inputs = student.clone().requires_grad_()
    value = factor_transfer(inputs, teacher, form=form)
    assert plain(student) > 0
    assert value.item() == pytest.approx(plain(student), rel=1e-9)
    (found,) = torch.autograd.grad(value, inputs)
    way, step = maps(*student.shape, seed=9), 1e-6
    along = (plain(student + step * way) - plain(student - step * way)) / (2 * step)
    assert (found * way).sum().item() == pytest.approx(along, rel=1e-6)
    assert gradcheck(lambda s: factor_transfer(s, teacher, form=form), (inputs,), fast_mode=True)


@pytest.mark.parametrize("form", ["map", "whole"])
def test_scale_of_a_factor_does_not_matter(form):
    student, teacher = maps(3, 4, 2, 2, seed=1), maps(3, 4, 2, 2, seed=2)
    scale = torch.tensor([0.2, 3.0, 50.0]).double()[:, None, None, None]
    torch.testing.assert_close(
        factor_transfer(scale * student, teacher, form=form),
        factor_transfer(student, teacher, form=form),
    )


def test_order_of_factors_matters_to_the_whole_form_alone():
    student, teacher = maps(3, 4, 2, 2, seed=1), maps(3, 4, 2, 2, seed=2)
    for form in ("map", "whole"):
        before = factor_transfer(student, teacher, form=form)
        after = factor_transfer(student.flip(1), teacher, form=form)
        assert torch.isclose(before, after) == (form == "map")


def test_factors_by_hand():
    # Of four numbers in all, both are 0.6 / 0.8 and 0.8 / 0.6 long.
    student = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    teacher = torch.tensor([8.0, 6.0]).view(1, 2, 1, 1)
    assert factor_transfer(student, teacher, form="whole").item() == pytest.approx(0.2)
    assert factor_transfer(student, teacher).item() == 0  # at the only position: 1 and 1


def test_factors_of_other_channels_are_refused():
    with pytest.raises(ValueError, match=r"factors differ: student \(1, 2, 2, 2\), teacher"):
        factor_transfer(torch.zeros(1, 2, 2, 2), torch.zeros(1, 3, 2, 2))


def plain_encoder(layers, x):
    """Convolutions and leaky ReLUs, with normalizations as they are at the start."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            x = reference.convolved(x, layer.weight.tolist(), layer.bias.tolist(), padding=1)
        elif isinstance(layer, nn.BatchNorm2d):
            x = reference.each(x, lambda v, c: v / (1 + 1e-5) ** 0.5)
        else:
            x = reference.each(x, lambda v, c: v if v > 0 else 0.1 * v)
    return x


@pytest.mark.parametrize("form", ["map", "whole"])
@pytest.mark.parametrize("width", [5, 3])
def test_the_loss_is_the_definition_in_plain_loops(source, form, width):
    student, teacher = features(width, seed=1, n=1), features(5, seed=2, n=1)
    loss = bound(FT, student, teacher, source, form=form, **SHORT).double().eval()
    own = plain_encoder(loss.translate, student.maps[-1].tolist())
    aim = plain_encoder(loss.paraphrase, teacher.maps[-1].tolist())
    assert len(own[0]) == len(aim[0]) == 2  # half of 5 channels
    expected = reference.factor_transfer(own, aim, whole=form == "whole")
    assert loss(student, teacher, batch(1)).item() == pytest.approx(expected, rel=1e-6)


def test_paraphrasers_come_back_to_the_shape_they_are_given():
    made = Paraphraser(6, 2)
    assert made(torch.zeros(2, 6, 5, 7)).shape == (2, 6, 5, 7)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in made.modules())


def test_paraphrasers_learn_what_needs_fewer_channels(source):
    # One pattern, brighter or darker: a single number for each image tells all.
    pattern = maps(6, 2, 2, seed=0).abs().float()

    def alike(epoch):
        for number, (shown, answer) in enumerate(answers(epoch)):
            brightness = maps(len(shown.index), 1, 1, 1, seed=100 * epoch + number).abs().float()
            yield shown, replace(answer, maps=[brightness * pattern])

    network, lost = learn(replace(source, teacher_batches=alike), 6, 3, epochs=12, lr=0.02)
    fresh = next(alike(999))[1].maps[-1]
    lost_on_fresh = (network(fresh) - fresh).square().sum() / fresh.square().sum()
    assert max(lost, lost_on_fresh.item()) < 0.1  # always answering with the mean loses 0.36


def test_the_error_is_that_of_its_last_epoch(source):
    # At a rate of nearly 0 the network stays what it was at the start.
    network, lost = learn(source, 5, 2, epochs=1, lr=1e-12)
    last = torch.cat([answer.maps[-1] for _, answer in answers(0)])
    expected = (network(last) - last).square().sum() / last.square().sum()
    assert lost == pytest.approx(expected.item(), rel=1e-5)


def test_only_the_translator_is_trained(source):
    loss = bound(FT, features(3, seed=1), features(5, seed=2), source, **SHORT)
    trained = [name for name, weight in loss.named_parameters() if weight.requires_grad]
    assert trained
    assert all(name.startswith("translate.") for name in trained)
    assert any(name.startswith("paraphrase.") for name in loss.state_dict())
    assert [type(layer) for layer in loss.translate] == 3 * [
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.LeakyReLU,
    ]
    assert loss.metadata().keys() == {"factors", "reconstruction_error"}
    assert loss.metadata()["factors"] == 2


def test_the_paraphraser_is_trained_once(source):
    def build(source):
        torch.manual_seed(5)
        return bound(FT, features(3, seed=1), features(5, seed=2), source, **SHORT)

    first, again = build(source), build(replace(source, teacher_batches=never))
    assert first.metadata() == again.metadata()
    ours, theirs = first.state_dict(), again.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)  # the translator as well


@pytest.mark.parametrize(
    "change", [{"rate": 1.0}, {"epochs": 2}, {"lr": 0.01}, {"teacher_hash": "another"}]
)
def test_other_options_make_another_paraphraser(source, change):
    def build(teacher_hash="a teacher", **options):
        own = replace(source, teacher_hash=teacher_hash)
        bound(FT, features(3, seed=1), features(5, seed=2), own, **SHORT | options)

    build()
    build(**change)
    build(form="whole")  # which is a matter of the student alone
    assert len(list(source.folder.glob("paraphraser-*.safetensors"))) == 2


def test_the_paraphraser_is_the_same_for_every_student(source, tmp_path):
    def weights(seed):
        torch.manual_seed(seed)
        made, _ = learn(replace(source, folder=tmp_path / str(seed)), 5, 2, **SHORT)
        return torch.cat([w.flatten() for w in made.parameters()])

    assert torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("stop_at", [1, 5, 12, 20])
def test_the_paraphraser_is_the_same_after_an_interruption(source, tmp_path, stop_at):
    whole, lost = learn(replace(source, folder=tmp_path / "whole"), 5, 2, **SHORT)
    stopped = replace(
        source, folder=tmp_path / "stopped", progress=Recorder(stop_at, "Paraphraser")
    )
    with pytest.raises(KeyboardInterrupt):
        learn(stopped, 5, 2, **SHORT)
    assert not list(tmp_path.glob("stopped/*.safetensors"))
    asked = []

    def counted(epoch):
        asked.append(epoch)
        return answers(epoch)

    again, lost_again = learn(
        replace(stopped, progress=Recorder(), teacher_batches=counted), 5, 2, **SHORT
    )
    done = (stop_at - 2) // (IMAGES // 6 + 1)  # epochs; the bar moves once before them
    assert asked == list(range(max(0, done), SHORT["epochs"]))
    assert lost_again == lost
    for ours, theirs in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not list(tmp_path.glob("*/*.state"))


def test_what_is_lost_is_said(source):
    learn(source, 5, 2, **SHORT)
    assert any(line.startswith("Paraphraser: ") and "%" in line for line in source.progress.said)


def test_a_paraphraser_that_diverges_is_refused(source):
    with pytest.raises(ValueError, match=r"^the paraphraser diverged at lr 1e\+30; use a smaller"):
        learn(source, 5, 2, epochs=3, lr=1e30)
    assert not list(source.folder.glob("paraphraser-*"))


@pytest.mark.parametrize(("option", "value"), [("rate", 0.0), ("epochs", 0), ("lr", -1.0)])
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(ValueError, match=f"^{option} must be positive, got {value}$"):
        FT(**{option: value})


def test_networks_without_maps_are_refused(source):
    made = features(5, seed=1)
    bare = Features(made.logits, made.embedding)
    with pytest.raises(ValueError, match="the student has 0 maps and the teacher 1"):
        bound(FT, bare, made, source)
