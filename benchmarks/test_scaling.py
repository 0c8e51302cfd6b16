# SPDX-License-Identifier: MIT
"""How time and memory grow with batch, channels, image and threads; where time jumps. With --full alone."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import fastconv
from benchmarks.memory import peak_bytes
from fastconv import models

SIDES = ("torch contiguous", "fastconv contiguous")
# What grows, and through which values. A convolution has 64 x 32 x 56 x 56 inputs and a 3x3 filter else.
SIZES = {
    "lenet inference, batch": [4**i for i in range(9)],
    "lenet training step, batch": [4**i for i in range(8)],
    "fashion_cnn training step, batch": [4**i for i in range(6)],
    "conv 3x3 forward, channels": [4, 8, 16, 32, 64, 128, 256],
    "conv 3x3 forward, image": [7, 14, 28, 56, 112, 224],
    "lenet training step, threads": [1, 2, 4, 8, 16, 32],
}
INPUTS = {"lenet": (1, 32, 32), "fashion_cnn": (1, 28, 28)}
# What is swept: [N, C, H, W], K and the filter or window of a call, of a size.
SWEEPS = {
    "conv 3x3, batch": lambda n: ("conv2d", (n, 16, 14, 14), 16, 3),
    "conv 3x3, input channels": lambda n: ("conv2d", (16, n, 14, 14), 16, 3),
    "conv 3x3, output channels": lambda n: ("conv2d", (16, 16, 14, 14), n, 3),
    "conv 5x5, image": lambda n: ("conv2d", (16, 6, n + 4, n + 4), 16, 5),
    "conv 1x1, channels": lambda n: ("conv2d", (16, n, 14, 14), n, 1),
    "max-pool 2x2, image": lambda n: ("max_pool2d", (16, 16, n + 1, n + 1), 16, 2),
    "linear, batch": lambda n: ("linear", (n, 256), 128, 1),
    "linear, features": lambda n: ("linear", (64, 4 * n), 128, 1),
}
SWEPT = range(1, 65)
NEIGHBOURS = 4  # on each side
CLIFF = 2.0

pytestmark = pytest.mark.benchmark(max_time=0.3, min_rounds=3, warmup=True, warmup_iterations=1)


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("--full")
    if "sweep" in metafunc.fixturenames:
        metafunc.parametrize("sweep", list(SWEEPS) if full else [])
    else:
        cases = [
            (what, size, side)
            for what, sizes in SIZES.items()
            for size in (sizes if full else [])
            if not what.endswith("threads") or size <= torch.get_num_threads()
            for side in SIDES
        ]
        metafunc.parametrize("what, size, side", cases)


def test_scaling(measure, device, what, size, side):
    threads = torch.get_num_threads()
    if what.endswith("threads"):
        if device.type != "cpu":
            pytest.skip("a GPU's time does not depend on the threads")
        torch.set_num_threads(size)
    try:
        contenders = _contenders(what, size, device)
        steps = what.endswith("step, batch")
        extra = {"peak_bytes": peak_bytes(contenders[side], device)} if steps else {}
        measure(f"{what} {size}", contenders, side, what=what, size=size, **extra)
    finally:
        torch.set_num_threads(threads)


@functools.lru_cache(maxsize=1)
def _contenders(what: str, size: int, device: torch.device) -> dict[str, Callable]:
    return {side: _contender(what, size, device, side) for side in SIDES}


def _contender(what: str, size: int, device: torch.device, side: str) -> Callable:
    torch.manual_seed(0)
    if what.startswith("conv"):
        channels, image = (size, 28) if what.endswith("channels") else (32, size)
        x = torch.rand(16, channels, image, image, device=device)
        w, b = torch.rand(channels, channels, 3, 3, device=device), torch.rand(channels, device=device)
        conv2d = F.conv2d if side == SIDES[0] else fastconv.functional.conv2d
        return lambda: conv2d(x, w, b, padding=1)
    batch = 256 if what.endswith("threads") else size
    network, ours = what.split()[0], side != SIDES[0]
    if network == "lenet":
        model = models.LeNet(fastconv, fused=True) if ours else models.LeNet(torch.nn)
    else:
        model = models.FashionCNN(torch.nn)
        model = fastconv.optimize(model) if ours else model
    model, x = model.to(device), torch.rand(batch, *INPUTS[network], device=device)
    labels = torch.randint(10, (batch,), device=device)
    if "inference" in what:
        return torch.no_grad()(functools.partial(model.eval(), x))

    def step():
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()

    return step


def test_cliffs(benchmark, device, sweep):
    """Times every size, and names those that take CLIFF times what their neighbours do."""
    if device.type != "cpu":
        pytest.skip("swept on the CPU alone")
    times = {}

    def run():
        for size in SWEPT:
            times[size] = _fastest(_swept(sweep, size))

    benchmark.pedantic(run, rounds=1, iterations=1)
    cliffs = [
        {"size": size, "seconds": seconds, "expected": expected}
        for size, seconds in times.items()
        for expected in [_trend(times, size)]
        if seconds > CLIFF * expected
    ]
    benchmark.extra_info.update(suite="cliffs", sweep=sweep, seconds=times, cliffs=cliffs)


def _swept(sweep: str, size: int) -> Callable:
    op, shape, k, window = SWEEPS[sweep](size)
    x = torch.rand(shape)
    if op == "max_pool2d":
        return functools.partial(fastconv.functional.max_pool2d, x, window)
    filter = (k, shape[1], window, window)[: len(shape)]
    return functools.partial(getattr(fastconv.functional, op), x, torch.rand(filter))


def _fastest(function: Callable, seconds: float = 0.02) -> float:
    """The shortest of the calls that fit the time."""
    function()
    found, end = [], time.perf_counter() + seconds
    while len(found) < 10 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return min(found)


def _trend(times: dict[int, float], size: int) -> float:
    """What a size should take: the median of its neighbours."""
    return statistics.median(times[n] for n in times if 0 < abs(n - size) <= NEIGHBOURS)
