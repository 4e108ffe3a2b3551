"""A cloud that is spread over processes, gathered with gradient, is the cloud of one process."""

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from topkd._runtime.processes import gather
from topkd.topology import rips

POINTS = torch.randn(24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Linear(3, 2, dtype=torch.float64)


def loss(cloud):
    return rips(cloud, max_dim=1).persistence.square().sum()


def half(rank, folder):
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    shared = DistributedDataParallel(network())
    embedding = shared(POINTS[12 * rank : 12 * rank + 12])
    loss(gather(embedding)).backward()
    torch.save(shared.module.weight.grad, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path):
    multiprocessing.spawn(half, (str(tmp_path),), nprocs=2)
    alone = network()
    assert rips(alone(POINTS), max_dim=1).count[1] > 0
    loss(alone(POINTS)).backward()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, alone.weight.grad, rtol=1e-10, atol=1e-12)
