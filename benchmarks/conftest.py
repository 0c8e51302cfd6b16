# SPDX-License-Identifier: MIT
"""What all benchmarks share: options, the device, full float32, and how contenders are timed.

    pytest benchmarks/ --benchmark-only [--full] [--device cpu|cuda] [--benchmark-json results.json]

A test times one contender of a group for pytest-benchmark's table. Ratios don't come from that table but from
the paired timer, in which all contenders of the group take turns: they stand in the closing table, and in
each result's extra_info.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch

import fastconv
from fastconv import _training
from fastconv._timing import compare

_results = pytest.StashKey[dict]()


def pytest_addoption(parser):
    group = parser.getgroup("fastconv")
    group.addoption("--full", action="store_true", help="more shapes and dtypes, longer timings")
    group.addoption("--device", help="cpu or cuda (default: a GPU if there is one and this build can use it)")


def pytest_configure(config):
    config.stash[_results] = {}


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    name = request.config.getoption("--device")
    return torch.device(name) if name else _training.best_device()[0]


@pytest.fixture(scope="session", autouse=True)
def full_float32():
    with _training.fp32_precision("ieee"):
        yield


@pytest.fixture
def measure(benchmark, device, request) -> Callable:
    """measure(group, contenders, name, flops=None, **extra) times `name` of `contenders` (name -> function).

    All contenders of a group are compared in turns at its first test. `extra` goes to extra_info as it is.
    """
    results = request.config.stash[_results]

    def run(
        group: str, contenders: dict[str, Callable], name: str, flops: int | None = None, **extra
    ) -> None:
        if group not in results:
            seconds = 4.0 if request.config.getoption("--full") else 0.8
            results[group] = compare(contenders, seconds=seconds, device=device)
        paired = results[group]
        benchmark.group = group
        benchmark.extra_info.update(
            implementation=name,
            device=str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            fastconv=fastconv.__version__,
            seconds=asdict(paired.time(name)),
            times_as_fast_as={base: asdict(paired.ratio(name, base)) for base in contenders if base != name},
            **extra,
        )
        if flops is not None:
            benchmark.extra_info.update(flops=flops, gflop_per_s=flops / paired.time(name).median / 1e9)
        function = contenders[name]
        if device.type == "cuda":
            benchmark(lambda: (function(), torch.cuda.synchronize()))
        else:
            benchmark(function)

    return run


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's table
def pytest_terminal_summary(terminalreporter, config):
    results = config.stash[_results]
    if not results:
        return
    line = terminalreporter.write_line
    terminalreporter.section("in turns: microseconds, and times as fast as torch with quartiles")
    width = max(len(name) for result in results.values() for name in result.samples)
    for group, result in results.items():
        line(group)
        for name in result.samples:
            base = baseline(name, result.samples)
            text = f"  {name:{width}}{1e6 * result.time(name).median:12,.1f}"
            if base != name:
                ratio = result.ratio(name, base)
                text += f"{ratio.median:8.2f} ({ratio.low:.2f}-{ratio.high:.2f}) of {base}"
            line(text)


def baseline(name: str, contenders) -> str:
    """Whom a contender is compared with in the closing table: torch in its layout, else torch as it comes."""
    same_layout = f"torch {name.split()[-1]}"
    return same_layout if same_layout in contenders else "torch contiguous"
