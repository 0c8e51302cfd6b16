# SPDX-License-Identifier: MIT
"""The device that is measured, and what only a GPU has: graphs, a cache to flush, kernels' own time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from fastconv import _training

CALLS = 10  # in a graph, or profiled at once


def chosen(config) -> torch.device:
    """pytest's --device, by default a GPU if there is one and this build can use it."""
    name = config.getoption("--device")
    return torch.device(name) if name else _training.best_device()[0]


def captured(function: Callable, calls: int = 1) -> Callable:
    """`function`, `calls` times, as a CUDA graph; what the last of them returned is what a replay returns."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            results = function()

    def replay():
        graph.replay()
        return results

    return replay


def flush(device: torch.device, bytes: int | None) -> Callable | None:
    """A function that empties the L2 cache, for work on `bytes` that would stay in it; None for other work.

    Triton's benchmarks do the same: they write over a buffer that is larger than the cache.
    """
    if device.type != "cuda" or bytes is None:
        return None
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(2 * size, dtype=torch.uint8, device=device).zero_ if bytes <= size else None


def kernels(function: Callable, device: torch.device | str) -> list[dict]:
    """What `CALLS` calls of `function` launch: [{"kernel", "count", "us"}], by torch's profiler.

    "us" is the time of all `count` launches alone, without what is between them. On a CPU these are torch's
    operators.
    """
    is_gpu = torch.device(device).type == "cuda"
    function()  # the first call may allocate, load or compile
    with profile(activities=[ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU]) as found:
        for _ in range(CALLS):
            function()
        if is_gpu:
            torch.cuda.synchronize()
    field = f"self_{'device' if is_gpu else 'cpu'}_time_total"
    return [{"kernel": e.key, "count": e.count, "us": getattr(e, field)} for e in found.key_averages()]


def kernel_seconds(function: Callable, device: torch.device | str) -> float:
    """Seconds that the kernels of one call take."""
    return sum(each["us"] for each in kernels(function, device)) / CALLS / 1e6
