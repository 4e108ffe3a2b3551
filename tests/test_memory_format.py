"""Networks and losses have the right gradients whatever the instruction set of the processor."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference.gradients import Narrow
from torch import nn

from topkd._runtime.memory_format import memory_format
from topkd.features import FeatureExtractor
from topkd.models import MODELS

WRONG = 0.2  # relative error; rounding at the kinks of ReLUs makes up to 0.1 in a deep network
LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv2d(15, 8, 1, stride=2), CONTIGUOUS),
        (nn.Conv2d(15, 8, 1, stride=(1, 2)), CONTIGUOUS),
        (nn.Conv2d(16, 8, 1, stride=2), LAST),
        (nn.Conv2d(4, 8, 1), LAST),
        (nn.Conv2d(4, 8, 3, stride=2), LAST),
        (nn.Conv2d(8, 8, 1, stride=2, groups=8), LAST),
        (nn.LazyConv2d(8, 1, stride=2), CONTIGUOUS),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 1, stride=2)), CONTIGUOUS),
        (Narrow(10), CONTIGUOUS),
        (nn.Linear(4, 4), LAST),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_rule(module, expected):
    assert memory_format(nn.Sequential(nn.Conv2d(3, 16, 3), module)) is expected


@pytest.mark.parametrize("model", ["resnet8", "resnet8x0.25"])
def test_images_have_the_format_of_the_network(model):
    tapped, seen = MODELS[model].build(10), []
    tapped.network.conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for images in (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8).to(memory_format=LAST)):
        tapped(images)
        assert seen[-1].is_contiguous(memory_format=memory_format(tapped.network))


@pytest.mark.parametrize("model", ["resnet8", "resnet8x0.25"])
def test_weights_that_were_channels_last_do_not_overrule_the_images(model):
    network = MODELS[model].network(classes=10).to(memory_format=LAST)
    tapped = FeatureExtractor(network, [], head="fc")
    assert all(weight.is_contiguous() for weight in tapped.parameters())


def errors(isa, threads, group, *part):
    environment = {name: value for name, value in os.environ.items() if "MAX_CPU_ISA" not in name}
    if isa is not None:
        environment["ONEDNN_MAX_CPU_ISA"] = isa
    done = subprocess.run(
        [sys.executable, "-m", "reference.gradients", str(threads), group, *part],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=280,  # a fault of oneDNN may end in a loop
        check=False,
    )
    assert done.returncode == 0, f"after {done.stdout}: {done.stderr}"
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    return {name: float(error) for name, error in lines}


@pytest.mark.parametrize("isa", ["AVX2", None])
def test_gradients_are_right(isa):
    assert max(errors(isa, 1, "quick").values()) < WRONG


PARTS = [
    *(("zoo", str(part), "6") for part in range(6)),
    *(("foreign", str(part), "4") for part in range(4)),
    ("losses",),
]


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", ["SSE41", "AVX2", "AVX512_CORE", None])
@pytest.mark.parametrize("group", PARTS, ids=" ".join)
def test_all_gradients_are_right(group, isa, threads):
    if group[0] == "foreign":
        pytest.importorskip("timm")
    found = errors(isa, threads, *group)
    assert {name: error for name, error in found.items() if not error < WRONG} == {}
