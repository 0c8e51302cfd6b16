# SPDX-License-Identifier: MIT
"""What a call costs where there is next to nothing to compute: a layer on an image of 4x4, on one thread."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastconv

LAYERS = {
    "Conv2d": lambda layers: layers.Conv2d(1, 1, 3),
    "MaxPool2d": lambda layers: layers.MaxPool2d(2),
    "Linear": lambda layers: layers.Linear(4, 4),
}
IMPLEMENTATIONS = {"torch contiguous": nn, "fastconv contiguous": fastconv}
MODES = ("no grad", "forward", "forward+backward")

pytestmark = pytest.mark.benchmark(max_time=0.05, min_rounds=3, warmup=True, warmup_iterations=3)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def contender(layers, name: str, mode: str, device) -> Callable[[], object]:
    torch.manual_seed(0)
    layer = LAYERS[name](layers).to(device)
    x = torch.randn(1, 1, 4, 4, device=device, requires_grad=mode != "no grad")
    if mode != "forward+backward":
        return lambda: layer(x)
    leaves, grad_output = [x, *layer.parameters()], torch.ones_like(layer(x))
    return lambda: torch.autograd.grad(layer(x), leaves, grad_output)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_overhead(measure, device, name, mode, implementation):
    contenders = {each: contender(layers, name, mode, device) for each, layers in IMPLEMENTATIONS.items()}
    with torch.set_grad_enabled(mode != "no grad"):
        torch.testing.assert_close(*(call() for call in contenders.values()))
        measure(f"overhead {name} {mode}", contenders, implementation, layer=name, mode=mode)
