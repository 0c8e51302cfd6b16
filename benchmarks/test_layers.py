# SPDX-License-Identifier: MIT
"""Single layers: shape x pass x layout x implementation, checked against float64 before they are timed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch

import fastconv
from benchmarks.device import captured, chosen
from benchmarks.shapes import SHAPES, Shape
from fastconv import _training
from fastconv._accuracy import allowance

IMPLEMENTATIONS = {"torch": torch.nn.functional, "fastconv": fastconv.functional}
COMPILED = "torch.compile"  # with --full
GRAPHS = ("torch graph", "torch graph TF32", "fastconv graph")  # on a GPU; torch's with cudnn.benchmark
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DRAWS = 3  # of random operands that errors are averaged over, so that luck counts for less

pytestmark = pytest.mark.benchmark(max_time=0.15, min_rounds=3, warmup=True, warmup_iterations=3)


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("--full")
    cases = [
        pytest.param(shape, dtype, backward, layout, implementation, id="-".join(words))
        for shape in SHAPES
        if full or not shape.full
        for dtype in ([torch.float32, torch.bfloat16] if full else [torch.float32])
        for backward in (False, True)
        for layout in _layouts(shape)
        for implementation in _forms(metafunc.config)
        for words in [[*_group(shape, dtype, backward).split(), layout, *implementation.split()]]
    ]
    metafunc.parametrize("shape, dtype, backward, layout, implementation", cases)


def _forms(config) -> tuple[str, ...]:
    compiled = (COMPILED,) if config.getoption("--full") else ()
    return (*IMPLEMENTATIONS, *compiled, *(GRAPHS if chosen(config).type == "cuda" else ()))


def _group(shape: Shape, dtype: torch.dtype, backward: bool) -> str:
    direction = "forward+backward" if backward else "forward"
    return f"{shape.name} {str(dtype).removeprefix('torch.')} {direction}"


def _layouts(shape: Shape) -> list[str]:
    return list(LAYOUTS) if len(shape.input) == 4 else ["contiguous"]


def test_layer(measure, device, request, shape, dtype, backward, layout, implementation):
    forms = _forms(request.config)
    found = _errors(shape, dtype, device, layout, forms)
    for tensor, error in found["fastconv"].items():
        assert error["largest_error"] <= error["allowed"], f"{shape.name} {layout} {tensor}: {error}"
    measure(
        _group(shape, dtype, backward),
        _contenders(shape, dtype, device, backward, forms),
        f"{implementation} {layout}",
        flops=shape.flops(backward),
        bytes=shape.bytes(backward, dtype.itemsize),
        shape=asdict(shape),
        dtype=str(dtype).removeprefix("torch."),
        direction="forward+backward" if backward else "forward",
        layout=layout,
        errors=found[implementation],
    )


def _operands(
    shape: Shape, dtype: torch.dtype, device, layout: str, draw: int = 0
) -> dict[str, torch.Tensor]:
    """Random input, weight, bias (where the op has them), output gradient; equal values in every layout."""
    generator = torch.Generator().manual_seed(draw)
    sizes = {"input": shape.input, "grad_output": shape.output}
    if shape.weight:
        sizes |= {"weight": shape.weight, "bias": shape.weight[:1]}
    operands = {}
    for name, size in sizes.items():
        value = torch.randn(size, generator=generator).to(device, dtype)
        operands[name] = value.to(memory_format=LAYOUTS[layout]) if value.ndim == 4 else value
    return operands


def _contender(form: str, shape: Shape, operands: dict, backward: bool) -> Callable[[], tuple]:
    """A function that returns the output, and with `backward` the gradients of input, weight and bias."""
    operands = dict(operands)
    grad_output = operands.pop("grad_output")
    if backward:
        operands = {name: value.detach().requires_grad_() for name, value in operands.items()}
    leaves = [operands[name] for name in ("input", "weight", "bias") if name in operands]
    functional = IMPLEMENTATIONS["fastconv" if form.startswith("fastconv") else "torch"]
    if shape.op == "conv2d":
        forward = functools.partial(functional.conv2d, *leaves, shape.stride, shape.padding, 1, shape.groups)
    elif shape.kernel_size:
        pool = getattr(functional, shape.op)
        forward = functools.partial(pool, *leaves, shape.kernel_size, shape.stride, shape.padding)
    else:
        forward = functools.partial(functional.linear, *leaves)
    if form == COMPILED:
        torch.compiler.reset()  # it compiles a function again for a few shapes only
        forward = torch.compile(forward, dynamic=False)

    def call():
        output = forward()
        return (output, *torch.autograd.grad(output, leaves, grad_output)) if backward else (output,)

    if form not in GRAPHS:
        return call
    with _training.fp32_precision("tf32" if form.endswith("TF32") else "ieee"):
        torch.backends.cudnn.benchmark = True
        try:
            return captured(call)
        finally:
            torch.backends.cudnn.benchmark = False


@functools.lru_cache(maxsize=1)
def _contenders(shape: Shape, dtype: torch.dtype, device, backward: bool, forms) -> dict[str, Callable]:
    """Every form in every layout, on the same numbers."""
    contenders = {}
    for layout in _layouts(shape):
        operands = _operands(shape, dtype, device, layout)
        for form in forms:
            contenders[f"{form} {layout}"] = _contender(form, shape, operands, backward)
    return contenders


@functools.cache
def _errors(shape: Shape, dtype: torch.dtype, device: torch.device, layout: str, forms) -> dict:
    """The errors of a form, tensor by tensor: {"largest_error", "largest" value, "allowed" error}.

    They are differences from float64 on the CPU; the error rule allows twice torch's error and 2 ulp.
    """
    names = ("output", "grad_input", "grad_weight", "grad_bias")
    totals = {form: {} for form in forms}
    for draw in range(DRAWS):
        operands = _operands(shape, dtype, device, layout, draw)
        exact = {name: value.cpu().double() for name, value in operands.items()}
        right = _contender("torch", shape, exact, backward=True)()
        for form, tensors in totals.items():
            found = _contender(form, shape, operands, backward=True)()
            for name, value, wanted in zip(names, found, right, strict=False):  # a pool has no weight
                error = (value.detach().cpu().double() - wanted.detach()).abs().max().item() / DRAWS
                entry = tensors.setdefault(name, {"largest_error": 0.0, "largest": 0.0})
                entry["largest_error"] += error
                entry["largest"] = max(entry["largest"], wanted.abs().max().item())
    for tensors in totals.values():
        for name, entry in tensors.items():
            entry["allowed"] = allowance(totals["torch"][name]["largest_error"], entry["largest"], dtype)
    return totals
