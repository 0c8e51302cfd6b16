# SPDX-License-Identifier: MIT
"""Single passes, such as a convolution's fprop, dgrad and wgrad: the row that is chosen, against torch.

With --rows every row that takes the call is a contender, by its name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch

from benchmarks import passes
from benchmarks.shapes import Shape
from fastconv._accuracy import allowance

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

pytestmark = pytest.mark.benchmark(max_time=0.15, min_rounds=3, warmup=True, warmup_iterations=3)


def pytest_generate_tests(metafunc):
    full, rows = (metafunc.config.getoption(name) for name in ("--full", "--rows"))
    cases = [
        pytest.param(shape, pass_, name, id="-".join([*_group(shape, pass_).split(), *name.split()]))
        for shape in passes.SHAPES
        if full or shape.name in ("lenet_conv2", "lenet_conv2_relu_pool")
        for pass_ in passes.PASSES[shape.op]
        for name in [*_names(shape), *(_rows(shape, pass_) if rows else [])]
    ]
    metafunc.parametrize("shape, pass_, name", cases)


def _group(shape: Shape, pass_: str) -> str:
    return f"{shape.name} float32 {pass_}"


def _names(shape: Shape) -> list[str]:
    layouts = LAYOUTS if len(shape.input) == 4 else ["contiguous"]
    return [f"{side} {layout}" for layout in layouts for side in ("torch", "fastconv")]


def _rows(shape: Shape, pass_: str, device: str = "cpu") -> list[str]:
    """All rows that take the call on contiguous tensors, the one that is chosen first."""
    found = passes.rows_of(shape, pass_, torch.float32, device)
    return [name for name, _ in sorted(found, key=lambda row: not row[1])]


@torch.no_grad()
def test_pass(measure, device, request, shape, pass_, name):
    rows = _rows(shape, pass_, device.type)
    contenders, errors = _contenders(
        shape, pass_, device, tuple(rows if request.config.getoption("--rows") else ())
    )
    allowed = allowance(errors["torch contiguous"], 1.0, torch.float32)
    if not name.startswith("torch"):
        assert errors[name] <= allowed, f"{shape.name} {pass_} {name}: {errors[name]} of {allowed}"
    measure(
        _group(shape, pass_),
        contenders,
        name,
        flops=passes.flops(shape, pass_),
        bytes=passes.least_bytes(shape, pass_, 4),
        row=rows[0],
        shape=asdict(shape),
        dtype="float32",
        direction=pass_,
        layout="channels_last" if name.endswith("channels_last") else "contiguous",
        errors={"largest_error": errors[name], "allowed": allowed},
    )


@functools.lru_cache(maxsize=1)
def _contenders(
    shape: Shape, pass_: str, device: torch.device, rows: tuple[str, ...]
) -> tuple[dict[str, Callable], dict[str, float]]:
    """Functions, and their largest errors in units of the largest value."""
    operands = passes.operands_of(shape, torch.float32, device)
    exact = passes.calls_of(shape, pass_, {name: t.double() for name, t in operands.items()})[1]()
    contenders = {}
    for layout, format in LAYOUTS.items():
        moved = {name: t.to(memory_format=format) if t.dim() == 4 else t for name, t in operands.items()}
        ours, theirs = passes.calls_of(shape, pass_, moved)
        contenders |= {f"torch {layout}": theirs, f"fastconv {layout}": functools.partial(ours, "")}
        if layout == "contiguous":
            contenders |= {row: functools.partial(ours, row) for row in rows}
    names = [*_names(shape), *rows]
    contenders = {name: contenders[name] for name in names}
    return contenders, {name: passes.largest_error(each(), exact) for name, each in contenders.items()}
