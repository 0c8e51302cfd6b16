# SPDX-License-Identifier: MIT
"""What all benchmarks share: options, the device, full float32, how contenders are timed, what is recorded.

    pytest benchmarks/ --benchmark-only [--full] [--device cpu|cuda] [--benchmark-json results.json]
                       [--guard | --write-baseline]

A test times one contender of a group for pytest-benchmark's table. Ratios don't come from that table but from
the paired timer, in which all contenders of the group take turns: they stand in the closing table, and in
each result's extra_info. `python -m benchmarks.report results.json` makes tables and plots of a JSON file.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import fastconv
from fastconv import _peaks, _training
from fastconv._timing import compare

sys.path.append(str(Path(__file__).resolve().parents[1]))  # behind what is installed
from benchmarks.device import chosen, flush, kernel_seconds  # noqa: E402
from benchmarks.guard import Guard, machine_class  # noqa: E402

_results, _guard = pytest.StashKey[dict](), pytest.StashKey[Guard]()


def pytest_addoption(parser):
    group = parser.getgroup("fastconv")
    group.addoption("--full", action="store_true", help="more shapes, passes and dtypes, longer timings")
    group.addoption("--rows", action="store_true", help="every kernel that takes a pass, by name")
    group.addoption("--device", help="cpu or cuda (default: a GPU if there is one and this build can use it)")
    group.addoption(
        "--guard",
        nargs="?",
        const="",
        metavar="BASELINE",
        help="fail where a ratio to torch has fallen by a third from a file of benchmarks/baseline, "
        "by default that of this class of machine",
    )
    group.addoption("--write-baseline", action="store_true", help="record the ratios for --guard")


def pytest_configure(config):
    config.stash[_results] = {}
    config.stash[_guard] = Guard(config.getoption("--guard"), config.getoption("--write-baseline"))


def pytest_sessionfinish(session):
    session.config.stash[_guard].write(chosen(session.config))


def pytest_benchmark_update_machine_info(config, machine_info):
    """Says what the figures depend on, and not what the machine is called."""
    del machine_info["node"]
    device = chosen(config)
    machine_info.update(
        {"class": machine_class(device)},
        device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        fastconv=fastconv.__version__,
        full_float32=True,
    )


def pytest_benchmark_update_json(benchmarks, output_json):
    """Quartiles are enough: thousands of single times are left out."""
    for each in output_json["benchmarks"]:
        each["stats"].pop("data", None)


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return chosen(request.config)


@pytest.fixture(scope="session", autouse=True)
def full_float32():
    with _training.fp32_precision("ieee"):
        yield


@pytest.fixture(scope="session")
def peaks(device, full_float32) -> _peaks.Peaks:
    """What this machine reaches in this run: a matrix product, a copy."""
    return _peaks.measure(device)


@pytest.fixture
def measure(benchmark, device, peaks, request) -> Callable:
    """measure(group, contenders, name, **extra) times `name` of `contenders` (name -> function).

    All contenders of a group are compared in turns at its first test. `extra` goes to extra_info as it is;
    with `flops` and `bytes` among it go the rates, and the share of the peak that is nearer. On a GPU the L2
    cache is flushed before each call whose `bytes` would fit it, and what the kernels alone take is recorded.
    """
    results, guard = request.config.stash[_results], request.config.stash[_guard]
    seconds = 4.0 if request.config.getoption("--full") else 0.8

    def run(group: str, contenders: dict[str, Callable], name: str, **extra) -> None:
        between = flush(device, extra.get("bytes"))
        timed = functools.partial(compare, seconds=seconds, device=device, between=between)
        if group not in results:
            results[group] = timed(contenders)
        paired = results[group]
        benchmark.group = group
        benchmark.extra_info.update(
            suite=request.module.__name__.removeprefix("test_"),
            implementation=name,
            device=str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            fastconv=fastconv.__version__,
            seconds=asdict(paired.time(name)),
            times_as_fast_as={
                base: asdict(paired.ratio(name, base))
                for base in contenders
                if base != name and not base.startswith(("fastconv", "cpu/", "cuda/"))
            },
            **extra,
        )
        if "flops" in extra:
            benchmark.extra_info.update(
                _rates(extra["flops"], extra["bytes"], paired.time(name).median, peaks)
            )
        function, base = contenders[name], baseline(name, contenders)
        if name.startswith("fastconv"):
            pair = {each: contenders[each] for each in (name, base)}
            guard.check(
                f"{group}: {name}",
                paired.ratio(name, base).median,
                lambda: timed(pair).ratio(name, base).median,
                device,
            )
        if device.type == "cuda":
            alone = kernel_seconds(function, device)
            benchmark.extra_info.update(kernel_seconds=alone, l2_flushed=between is not None)
            benchmark(lambda: (function(), torch.cuda.synchronize()))
        else:
            benchmark(function)

    return run


def _rates(flops: int, bytes: int, seconds: float, peaks: _peaks.Peaks) -> dict:
    return {
        "gflop_per_s": flops / seconds / 1e9,
        "gbyte_per_s": bytes / seconds / 1e9,
        "share_of_peak": peaks.least_seconds(flops, bytes) / seconds,
        "peaks": asdict(peaks),
    }


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
