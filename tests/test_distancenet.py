"""DistanceNet sees distances alone, and guesses well from them."""

import pytest
import torch

from topkd.topology import (
    DistanceNet,
    Exact,
    PersistenceImage,
    PersistenceVector,
    Training,
    fidelity,
    rips,
    train,
)


def clouds(count, n=24, d=3, seed=0):
    """Clouds of different sizes and shapes."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, n, d, generator=generator)
    points[..., 0] *= 4 * torch.rand(count, 1, generator=generator)
    return points * (0.2 + torch.rand(count, 1, 1, generator=generator))


def network(**options):
    torch.manual_seed(0)
    return DistanceNet(5, neighbors=6, hidden=8, **options).double()


def test_order_place_and_direction_do_not_matter():
    points = clouds(4).double()
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    moved = points[:, torch.randperm(24)] @ rotation + 5
    for scale_aware in (False, True):
        seen = network(scale_aware=scale_aware)
        torch.testing.assert_close(seen(moved), seen(points))


def test_scale_does_not_matter_unless_it_is_asked_for():
    points = clouds(4).double()
    blind, seeing = network(), network(scale_aware=True)
    torch.testing.assert_close(blind(7 * points), blind(points), rtol=1e-5, atol=1e-8)
    assert not torch.allclose(seeing(7 * points), seeing(points))


def test_width_and_number_of_points_may_differ():
    assert network()(torch.randn(2, 50, 9).double()).shape == (2, 5)
    assert network()(torch.randn(50, 9).double()).shape == (5,)


def test_gradient_matches_finite_differences():
    points = clouds(2, n=9).double().requires_grad_()
    assert torch.autograd.gradcheck(network(scale_aware=True), points)


def test_coinciding_points_have_a_finite_gradient():
    points = torch.ones(2, 9, 3, dtype=torch.float64, requires_grad=True)
    network()(points).sum().backward()
    assert points.grad.isfinite().all()


def test_outputs_are_standardized():
    points, vectors = clouds(50), 3 + 0.1 * torch.randn(50, 5)
    network = DistanceNet(5, neighbors=6, hidden=8)
    network.standardize(points, vectors)
    torch.testing.assert_close(network.output_mean, vectors.mean(0))
    torch.testing.assert_close(network.output_std, vectors.std(0))
    nearest = torch.cdist(points, points).sort(-1).values[..., 1:7]
    nearest = nearest / nearest[..., :1].mean(1, keepdim=True)
    torch.testing.assert_close(network.point_mean, nearest.flatten(0, 1).mean(0))


def test_needs_more_points_than_neighbors():
    with pytest.raises(ValueError, match="more than 6 points.* got 6"):
        network()(torch.randn(2, 6, 3).double())


@pytest.mark.parametrize(
    "exact",
    [
        Exact(PersistenceVector.fit(rips(clouds(200)))),
        Exact(PersistenceImage.fit_cells(rips(clouds(200), max_dim=1).of(1), resolution=8), 1),
    ],
    ids=["H0", "H1"],
)
def test_guesses_better_than_ripsnet(exact):
    training, judged = Training(epochs=15, clouds_per_step=16), {}
    for name in ("ripsnet", "distancenet"):
        learned = train(
            lambda epoch: clouds(200, seed=epoch),
            clouds(60, seed=99),
            exact,
            training,
            network=name,
        )
        judged[name] = fidelity(learned, exact, clouds(200), clouds(100, seed=98)).r2
    assert judged["distancenet"] > judged["ripsnet"] + 0.2


def test_has_no_choice_of_pooling():
    exact = Exact(PersistenceVector.fit(rips(clouds(20))))
    with pytest.raises(ValueError, match="pooling is an option of ripsnet"):
        Training(pooling="sum").build("distancenet", clouds(20), exact)
