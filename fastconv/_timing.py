# SPDX-License-Identifier: MIT
"""A paired timer: peers run in turn, and are compared turn by turn.

Machines drift (clocks, temperature, neighbours), so a ratio of two times measured minutes apart says little.
Here the peers take turns, A B A B ..., and each ratio is taken between two neighbouring turns. The first
50 ms of a turn are dropped: until then the worker threads of the peer before may still spin on the cores. A
sample is a run of calls long enough for the clock, timed by CUDA events where the device is a GPU: one pair
around the run, or one around each call where something is to be done between calls.
"""

from __future__ import annotations

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SETTLE = 0.05  # seconds dropped at the start of a turn
SAMPLE = 0.02  # seconds that a sample lasts at least
MIN_TURNS = 3  # turns of each peer, even when the budget is spent
MAX_CALLS = 100_000  # calls in a sample at most
MAX_EVENTS = 200  # the same where each call has events of its own


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of `count` samples."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Quartiles:
        """`values` must hold at least one number."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))

    def inverted(self, factor: float = 1.0) -> Quartiles:
        """The same for `factor` / value (seconds a call to calls a second, for instance)."""
        return Quartiles(factor / self.median, factor / self.high, factor / self.low, self.count)


@dataclass(frozen=True)
class Result:
    """`samples[peer][i]`: seconds a call of `peer` took in turn `i`; every peer has as many turns."""

    samples: dict[str, list[float]]

    def time(self, peer: str) -> Quartiles:
        """Seconds a call."""
        return Quartiles.of(self.samples[peer])

    def ratio(self, peer: str, base: str) -> Quartiles:
        """How many times as fast as `base` the `peer` is, turn by turn."""
        return Quartiles.of([b / p for b, p in zip(self.samples[base], self.samples[peer], strict=True)])


def compare(
    peers: dict[str, Callable[[], object]],
    *,
    seconds: float = 2.0,
    device: str | torch.device = "cpu",
    between: Callable[[], object] | None = None,
) -> Result:
    """Time `peers` (name -> function without arguments) against one another.

    `seconds` is the time for the turns after warm-up; each peer gets at least three, however slow it is.
    `device` is where the peers work; on "cuda" they are timed by events on the current device and stream.
    `between` is called before each call there and not timed, to empty a cache for instance.

    Raises ValueError without peers, with a `seconds` that is not positive, or with `between` on a CPU.
    """
    if not peers:
        raise ValueError("compare: peers must not be empty")
    if not seconds > 0:
        raise ValueError(f"compare: seconds must be positive, got {seconds}")
    clock = _cuda_time if torch.device(device).type == "cuda" else _cpu_time
    if between is not None:
        if clock is _cpu_time:
            raise ValueError(f"compare: between is for a GPU, got device {device}")
        clock = functools.partial(_cuda_time_of_each, between)
    samples: dict[str, list[float]] = {name: [] for name in peers}
    collecting = gc.isenabled()
    gc.disable()
    try:
        most = MAX_CALLS if between is None else MAX_EVENTS
        calls = {name: min(most, _calls(function, clock)) for name, function in peers.items()}
        deadline = time.perf_counter() + seconds
        turn = 0
        while turn < MIN_TURNS or time.perf_counter() < deadline:
            for name, function in peers.items():
                _settle(function, clock)
                samples[name].append(clock(function, calls[name]) / calls[name])
            turn += 1
    finally:
        if collecting:
            gc.enable()
    return Result(samples)


def alone(
    function: Callable[[], object], *, seconds: float = 0.01, device: str | torch.device = "cpu"
) -> float:
    """Seconds a call of `function` takes where there is nothing to compare: what disturbs only adds to
    them, so it is the fastest of samples of a millisecond, five or as many as fit into `seconds`.

    `device` as in `compare`.
    """
    clock = _cuda_time if torch.device(device).type == "cuda" else _cpu_time
    clock(function, 1)  # the first call may allocate, load or compile
    calls = min(MAX_CALLS, math.ceil(0.001 / max(clock(function, 1), 1e-9)))
    samples, deadline = [], time.perf_counter() + seconds
    while len(samples) < 5 or time.perf_counter() < deadline:
        samples.append(clock(function, calls) / calls)
    return max(min(samples), 1e-9)


def _calls(function, clock) -> int:
    """Warms `function` up; the number of calls that make a sample."""
    clock(function, 1)  # the first call may allocate, load or compile
    fastest = _settle(function, clock)
    return min(MAX_CALLS, max(1, math.ceil(SAMPLE / fastest)))


def _settle(function, clock) -> float:
    """Calls `function` until SETTLE has passed; the seconds of the fastest call."""
    end = time.perf_counter() + SETTLE
    fastest = math.inf
    while fastest == math.inf or time.perf_counter() < end:
        fastest = min(fastest, clock(function, 1))
    return max(fastest, 1e-9)


def _cpu_time(function, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return time.perf_counter() - start


def _cuda_time(function, calls: int) -> float:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000  # elapsed_time is in milliseconds


def _cuda_time_of_each(between, function, calls: int) -> float:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in events:
        between()
        start.record()
        function()
        end.record()
    end.synchronize()
    return sum(start.elapsed_time(end) for start, end in events) / 1000
