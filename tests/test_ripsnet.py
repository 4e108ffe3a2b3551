"""RipsNet is the published network."""

import numpy as np
import pytest
import torch

from topkd.models import checkpoint
from topkd.topology import RipsNet


def clouds(count, n=8, d=3, seed=0):
    return torch.randn(count, n, d, generator=torch.Generator().manual_seed(seed))


def in_numpy(weights, points, pooling):
    """The published network: matrices, ReLU, pooling over the points, sigmoid."""
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}
    x = points.double().numpy()
    for layer in (1, 2, 3):
        x = x @ w[f"layer{layer}.linear.weight"].T + w[f"layer{layer}.linear.bias"]
        x = np.maximum(x, 0)
    x = x.mean(-2) if pooling == "mean" else x.sum(-2)
    for layer in (4, 5, 6):
        x = np.maximum(x @ w[f"layer{layer}.linear.weight"].T, 0)
    return 1 / (1 + np.exp(-(x @ w["layer7.linear.weight"].T)))


# --- The network ---------------------------------------------------------------------------------

PARAMETERS = {  # with 400 outputs, as published
    16: 106_616,
    32: 107_656,
    64: 113_896,
    128: 137_128,
    256: 226_600,
    512: 577_576,
    1024: 839_720,
    2048: 2_872_104,
}


@pytest.mark.parametrize("width", PARAMETERS)
def test_number_of_parameters_is_as_published(width):
    assert sum(w.numel() for w in RipsNet(width).parameters()) == PARAMETERS[width]
    assert sum(w.numel() for w in RipsNet(width, 20).parameters()) == PARAMETERS[width] - 76_000


@pytest.mark.parametrize(("width", "like"), [(3, 16), (17, 32), (100, 128), (1280, 2048)])
def test_other_widths_have_the_layers_of_the_next_greater(width, like):
    for name, weight in RipsNet(width).named_parameters():
        if name != "layer1.linear.weight":
            assert weight.shape == RipsNet(like).get_parameter(name).shape


def test_greater_widths_have_the_layers_of_the_greatest():
    assert RipsNet(4096)(torch.zeros(2, 3, 4096)).shape == (2, 400)


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_is_the_published_formula(pooling):
    network = RipsNet(16, 30, pooling=pooling)
    points = torch.randn(5, 7, 16)
    expected = in_numpy(network.state_dict(), points, pooling)
    np.testing.assert_allclose(network(points).detach(), expected, rtol=1e-4, atol=1e-6)


def test_weights_of_the_authors_give_their_images(shared):
    weights = checkpoint.load_weights(shared("checkpoints/ripsnet_resnet56_mean.pth"))
    network = RipsNet(64)
    checkpoint.fill(network, weights, "the file")
    points = torch.randn(3, 64, 64).relu()
    with torch.no_grad():
        found = network(points)
    np.testing.assert_allclose(
        found, in_numpy(network.state_dict(), points, "mean"), rtol=1e-4, atol=1e-6
    )
    # They learned images whose 20 columns are equal.
    assert found.unflatten(-1, (20, 20)).std(2).max() < 0.1 * found.std()


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_order_of_the_points_does_not_matter(pooling):
    network, points = RipsNet(3, pooling=pooling).double(), clouds(4).double()
    torch.testing.assert_close(network(points.flip(1)), network(points))


def test_points_said_twice_change_a_sum_but_not_a_mean():
    points = clouds(4).double()
    twice = torch.cat([points, points], dim=1)
    mean, total = RipsNet(3).double(), RipsNet(3, pooling="sum").double()
    torch.testing.assert_close(mean(twice), mean(points))
    assert not torch.allclose(total(twice), total(points))


def test_one_cloud_has_no_batch_axis():
    network, points = RipsNet(3, 9).double(), clouds(4).double()
    assert network(points[0]).shape == (9,)
    torch.testing.assert_close(network(points)[0], network(points[0]))


def test_pixels_are_between_zero_and_one():
    pixels = RipsNet(3)(1e3 * clouds(4))
    assert ((pixels >= 0) & (pixels <= 1)).all()
