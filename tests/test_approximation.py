"""Approximators: their training, the measure of how well they do, and their files."""

import copy
import io
import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from topkd.topology import (
    Approximation,
    DistanceNet,
    Exact,
    Fidelity,
    PersistenceImage,
    PersistenceVector,
    RipsNet,
    Training,
    fidelity,
    rips,
    train,
)
from topkd.topology.approximation import cut_clouds
from topkd.topology.serialization import to_json


def clouds(count, n=8, d=3, seed=0):
    """Clouds of different shapes: stretched by different amounts along the first axis."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, n, d, generator=generator)
    points[..., 0] *= 4 * torch.rand(count, 1, generator=generator)
    return points


VECTOR = Exact(PersistenceVector.fit(rips(clouds(50)), resolution=6))
NETWORKS = ["ripsnet", "distancenet"]


# --- Cutting and training ------------------------------------------------------------------------


def test_clouds_hold_each_embedding_at_most_once():
    embeddings = torch.arange(23.0)[:, None]
    cut = cut_clouds(embeddings, 5, torch.Generator().manual_seed(0))
    assert cut.shape == (4, 5, 1)
    assert len(set(cut.flatten().tolist())) == 20
    assert cut.flatten().tolist() != sorted(cut.flatten().tolist())


def test_clouds_depend_on_the_generator_alone():
    embeddings = torch.randn(40, 2)
    first, same, other = (
        cut_clouds(embeddings, 5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def trained(
    training, network="ripsnet", seed=0, state=None, after_epoch=lambda epoch, error, state: None
):
    return train(
        lambda epoch: clouds(32, seed=epoch),
        clouds(24, seed=1000),
        VECTOR,
        training,
        network=network,
        seed=seed,
        state=state,
        after_epoch=after_epoch,
    )


def same_weights(first, second):
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("network", NETWORKS)
def test_training_is_deterministic_in_its_seed(network):
    training = Training(epochs=3, lr=1e-2, clouds_per_step=16)
    first = trained(training, network)
    torch.randn(7)  # whatever was drawn before
    assert same_weights(first, trained(training, network))
    assert not same_weights(first, trained(training, network, seed=1))


@pytest.mark.parametrize(
    ("network", "expected"), [("ripsnet", [0.4] * 4), ("distancenet", [0.4, 0.3, 0.2, 0.1])]
)
def test_the_rate_stays_for_ripsnet_and_falls_to_zero_for_distancenet(network, expected):
    rates = []
    trained(
        Training(epochs=4, lr=0.4),
        network,
        after_epoch=lambda epoch, error, state: rates.append(
            state["optimizer"]["param_groups"][0]["lr"]
        ),
    )
    assert rates == pytest.approx(expected)


def of_many_sizes(count, seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 24, 3, generator=generator)
    return points * (0.2 + torch.rand(count, 1, 1, generator=generator))


def test_training_learns():
    image = Exact(PersistenceImage.fit(rips(of_many_sizes(200, 0)), resolution=5))
    training = Training(epochs=30, lr=1e-2, clouds_per_step=16, pooling="sum")
    network = train(lambda epoch: of_many_sizes(96, epoch), of_many_sizes(64, 100), image, training)
    assert network.pooling == "sum"
    # Seeds 0, 1 and 2 reached 0.61 to 0.63.
    assert fidelity(network, image, of_many_sizes(200, 0), of_many_sizes(100, 101)).r2 > 0.4


@pytest.mark.parametrize("network", NETWORKS)
def test_training_goes_on_from_a_state_to_the_same_bits(network):
    training, files = Training(epochs=6, lr=1e-2, clouds_per_step=16), {}

    def keep(epoch, error, state):
        content = io.BytesIO()
        torch.save(state, content)
        files[epoch] = content.getvalue()

    whole = trained(training, network, after_epoch=keep)
    assert list(files) == [1, 2, 3, 4, 5, 6]
    for epoch in (1, 4, 6):
        torch.manual_seed(epoch)  # a new process
        state = torch.load(io.BytesIO(files[epoch]), weights_only=True)
        assert same_weights(trained(training, network, state=state), whole)


def test_training_stops_early_also_after_it_was_interrupted():
    training = Training(epochs=50, patience=3, lr=0.0)  # the first epoch remains the best
    seen = {}

    def keep(epoch, error, state):
        seen[epoch] = copy.deepcopy(state)

    trained(training, after_epoch=keep)
    assert list(seen) == [1, 2, 3, 4]
    state = seen.pop(2)
    seen.clear()
    trained(training, state=state, after_epoch=keep)
    assert list(seen) == [3, 4]


def test_training_keeps_the_best_on_held_out_clouds():
    held_out, errors = clouds(24, seed=1000), []
    network = train(
        lambda epoch: clouds(32, seed=epoch) if epoch <= 4 else torch.zeros(32, 8, 3),
        held_out,
        VECTOR,
        Training(epochs=8, lr=2e-2, clouds_per_step=8),  # epoch 5 on it learns to answer with 0
        after_epoch=lambda epoch, error, state: errors.append(error),
    )
    assert min(errors) < 0.8 * errors[-1]
    with torch.no_grad():
        error = nn.functional.mse_loss(network(held_out), VECTOR(held_out)).item()
    assert error == pytest.approx(min(errors), rel=1e-5)


def test_a_trained_network_is_frozen():
    network = trained(Training(epochs=1))
    assert not network.training
    assert not any(weight.requires_grad for weight in network.parameters())


# --- Fidelity ------------------------------------------------------------------------------------


class Perfect(nn.Module):
    """A perfect approximator."""

    def forward(self, points):
        return VECTOR(points)


class Always(nn.Module):
    """An approximator that answers the same whatever it is shown, but is differentiable."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, points):
        return self.answer + 0 * points.sum((-1, -2))[..., None]


def test_a_perfect_approximator():
    found = fidelity(Perfect(), VECTOR, clouds(20), clouds(30, seed=1))
    assert found.r2 == pytest.approx(1)
    assert found.gradient_cosine == pytest.approx(1)
    assert found.gradient_cosine_low == pytest.approx(1)
    assert (found.clouds, found.silent) == (30, 0)


def test_the_mean_of_the_training_clouds_explains_nothing():
    mean = VECTOR(clouds(20)).mean(0)
    found = fidelity(Always(mean), VECTOR, clouds(20), clouds(30, seed=1))
    assert found.r2 == pytest.approx(0, abs=1e-6)
    assert found.silent == 30  # its gradient is zero everywhere
    assert (found.gradient_cosine, found.gradient_cosine_low) == (0, 0)


def test_worse_than_the_mean_is_below_zero():
    assert fidelity(Always(torch.ones(6)), VECTOR, clouds(20), clouds(30, seed=1)).r2 < 0


def test_fidelity_is_the_definition():
    network, seen, held_out = RipsNet(3, 6), clouds(20), clouds(11, seed=1)
    found = fidelity(network, VECTOR, seen, held_out)

    def mean_square(first, second):
        return ((first - second) ** 2).sum() / len(first)

    exact = [VECTOR(cloud) for cloud in held_out]
    guess = [network(cloud).detach() for cloud in held_out]
    mean = sum(VECTOR(cloud) for cloud in seen) / len(seen)
    unexplained = sum(mean_square(g, e).item() for g, e in zip(guess, exact, strict=True))
    all_there_is = sum(mean_square(mean, e).item() for e in exact)
    assert found.r2 == pytest.approx(1 - unexplained / all_there_is, rel=1e-4)

    cosines = []
    for i in range(len(held_out)):
        other = held_out[i - 1].clone().requires_grad_()
        by_guess = torch.autograd.grad(mean_square(network(other), guess[i]), other)[0].flatten()
        by_exact = torch.autograd.grad(mean_square(VECTOR(other), exact[i]), other)[0]
        cosines.append(torch.cosine_similarity(by_guess, by_exact.flatten(), dim=0, eps=0).item())
    assert found.gradient_cosine == pytest.approx(np.median(cosines), abs=1e-4)
    assert found.gradient_cosine_low == pytest.approx(np.quantile(cosines, 0.1), abs=1e-4)
    assert (found.clouds, found.silent) == (11, 0)


def test_fidelity_tells_both_measures():
    text = str(Fidelity(0.756, 0.512, 0.1, 40, 2))
    assert "0.76 on 40 held-out clouds" in text
    assert "0.51 (10 % below 0.10)" in text


# --- The file ------------------------------------------------------------------------------------

IMAGE = Exact(PersistenceImage((0.0, 0.0), (0.1, 2.0), sigma=0.3, normalizer=4.0, resolution=3))
LOOPS = Exact(PersistenceVector((0.0, 2.0), sigma=0.3, resolution=7), dimension=1)


@pytest.mark.parametrize("exact", [VECTOR, IMAGE, LOOPS])
@pytest.mark.parametrize(
    "build",
    [
        lambda outputs: RipsNet(3, outputs, pooling="mean"),
        lambda outputs: RipsNet(3, outputs, pooling="sum"),
        lambda outputs: DistanceNet(outputs, neighbors=5, hidden=8, scale_aware=True),
    ],
)
def test_a_file_holds_all_that_is_needed(exact, build):
    network = build(exact.vectorization.size)
    judged = Fidelity(0.5, 0.4, 0.1, 256, 1)
    before = Approximation(network, exact, 8, 3, "the hash of a teacher", judged)
    after = Approximation.from_bytes(before.to_bytes())
    assert torch.equal(after.network(clouds(4)), network(clouds(4)))
    assert not after.network.training
    assert not any(weight.requires_grad for weight in after.network.parameters())
    for name in ("exact", "cloud_size", "width", "teacher", "fidelity"):
        assert getattr(after, name) == getattr(before, name)
    assert after.to_bytes() == before.to_bytes()


def good_file():
    network = RipsNet(3, VECTOR.vectorization.size)
    return Approximation(network, VECTOR, 8, 3, "", Fidelity(0.5, 0.4, 0.1, 256, 1)).to_bytes()


def with_header(content):
    return struct.pack("<Q", len(content)) + content


def described(about):
    return save({"a": torch.zeros(2)}, {"approximation": json.dumps(about)})


OTHERS = {
    "nothing": b"",
    "text": b"not a RipsNet, but a longer text",
    "a number": with_header(b"1"),
    "a list": with_header(b"[]"),
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07garbage\x94.",
    "a greater size than it has": struct.pack("<Q", 2**63) + b"{}",
    "other weights": save({"a": torch.zeros(2)}),
    "a student": save({"a": torch.zeros(2)}, {"topkd": "{}"}),
    "an empty description": described({}),
    "no description": described(3),
    "other weights than described": described(
        {
            "network": "ripsnet",
            "settings": {"width": 3, "outputs": 6, "pooling": "mean"},
            "vectorization": to_json(VECTOR.vectorization),
            "dimension": 0,
            "width": 3,
            "cloud_size": 8,
            "teacher": "",
            "fidelity": vars(Fidelity(0.5, 0.4, 0.1, 256, 1)),
        }
    ),
    "half of one": good_file()[: len(good_file()) // 2],
    "all of one but a byte": good_file()[:-1],
    "the header of one": good_file()[:300],
}


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
def test_other_files_are_refused(content):
    with pytest.raises(ValueError, match="not an approximator file of this version"):
        Approximation.from_bytes(content)
