# SPDX-License-Identifier: MIT
"""Each pass of each operator, by fastconv's rows and by torch: what test_passes and gpu_check time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks import shapes
from benchmarks.shapes import Shape
from fastconv import kernels, ops

_aten = torch.ops.aten
# A convolution with ReLU and a 2x2 max-pool behind it.
FUSED = "conv2d_relu_max_pool2d"
_GEMMS = ("fprop", "dgrad", "wgrad")
# "backward" of a linear layer is that of one with a ReLU behind it.
PASSES = {
    "conv2d": _GEMMS,
    "linear": (*_GEMMS, "backward"),
    "max_pool2d": ("forward", "backward"),
    "avg_pool2d": ("forward", "backward"),
    FUSED: ("forward", "backward"),
}


def _fused(shape: Shape) -> Shape:
    return replace(shape, name=f"{shape.name}_relu_pool", op=FUSED)


_conv = Shape("tiny_conv", "conv2d", (2, 3, 8, 9), (4, 3, 3, 3), padding=1)
TINY = [
    _conv,
    _fused(_conv),
    Shape("tiny_pool", "max_pool2d", (2, 3, 8, 9), kernel_size=2, stride=2),
    Shape("tiny_avg_pool", "avg_pool2d", (2, 3, 8, 9), kernel_size=2, stride=2),
    Shape("tiny_linear", "linear", (3, 20), (7, 20)),
]
# Those that are measured with --full alone come last.
SHAPES = [
    *(_fused(each) for each in shapes.SHAPES if each.name in ("lenet_conv1", "lenet_conv2", "fashion_conv1")),
    *sorted(shapes.SHAPES, key=lambda shape: shape.full),
]


def _output(shape: Shape) -> tuple[int, ...]:
    n, k, *extent = shape.output
    return (n, k, *(each // 2 for each in extent)) if shape.op == FUSED else shape.output


def _gradients(shape: Shape, pass_: str) -> int:
    """How many products a pass is: those with a ReLU behind them go backward in one."""
    return 2 if pass_ == "backward" and shape.weight else 1


def flops(shape: Shape, pass_: str) -> int:
    return _gradients(shape, pass_) * shape.flops(False)


def least_bytes(shape: Shape, pass_: str, itemsize: int) -> int:
    """What a pass has to move: operands and results once, in both directions where it makes all gradients."""
    x, w, y = map(math.prod, (shape.input, shape.weight or (0,), _output(shape)))
    return itemsize * (_gradients(shape, pass_) * (x + w) + y)


def operands_of(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": shape.input, "gy": _output(shape)}
    if shape.weight:
        sizes |= {"w": shape.weight, "b": shape.weight[:1]}
    if shape.op == FUSED:  # small integers: no sum is rounded, so no ReLU or pool decides by luck
        values = {name: torch.randint(-3, 4, size, generator=generator) for name, size in sizes.items()}
    else:
        values = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return {name: value.to(device, dtype) for name, value in values.items()}


def largest_error(found: tuple, exact: tuple) -> float:
    """The worst, over the results, of the largest error in units of the largest value."""
    return max(
        ((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-300)).item()
        for a, b in zip(found, exact, strict=True)
    )


def rows_of(shape: Shape, pass_: str, dtype: torch.dtype, device: str) -> list[tuple[str, bool]]:
    """The rows that this build can launch and that take the call, and whether each is the one chosen."""
    sizes = {"input": shape.input, "stride": shape.stride, "padding": shape.padding, "groups": shape.groups}
    sizes |= {"weight": shape.weight} if shape.weight else {"kernel_size": shape.kernel_size}
    sizes |= {"pool_kernel_size": 2, "pool_stride": 2} if shape.op == FUSED else {}
    passes = kernels.explain(shape.op, device=device, dtype=dtype, **sizes)
    each = next(each for each in passes if each["pass_"] == pass_)
    accepting = [row["name"] for row in each["rows"] if row["reason"] is None and row["built"]]
    return [(name, name == each["chosen"]) for name in accepting]


def calls_of(shape: Shape, pass_: str, t: dict) -> tuple[Callable, Callable]:
    """One pass by fastconv, a function of the row's name, and by torch; both return tuples of tensors."""
    x, gy, w, b = (t.get(name) for name in ("x", "gy", "w", "b"))
    if shape.op == "linear":
        return _linear(pass_, x, gy, w, b)
    stride, padding, groups = [shape.stride] * 2, [shape.padding] * 2, shape.groups
    if shape.op == "max_pool2d":
        return _max_pool(pass_, x, gy, ([shape.kernel_size] * 2, stride, padding, [1, 1], False))
    if shape.op == "avg_pool2d":
        return _avg_pool(pass_, x, gy, ([shape.kernel_size] * 2, stride, padding, False, True, None))
    conv = (stride, padding * 2, [1, 1], groups)

    def backward(gy, *mask):
        rest = (stride, padding, [1, 1], False, [0, 0], groups, mask)
        found = _aten.convolution_backward(gy, x, w, list(b.shape), *rest)
        return tuple(each for each in found if each is not None)

    if pass_ == "dgrad":
        ours = lambda row: (ops.conv_dgrad(gy, w, list(x.shape), *conv, row),)  # noqa: E731
        return ours, lambda: backward(gy, True, False, False)
    if pass_ == "wgrad":
        ours = lambda row: ops.conv_wgrad(gy, x, list(w.shape), *conv, True, row)  # noqa: E731
        return ours, lambda: backward(gy, False, True, True)
    fprop = functools.partial(F.conv2d, x, w, b, stride, padding, 1, groups)
    if pass_ == "fprop":
        return lambda row: (ops.conv_fprop(x, w, b, *conv, row),), lambda: (fprop(),)
    pool = ("relu", [2, 2], [2, 2], [0, 0])
    if pass_ == "forward":
        ours = lambda row: ops.conv_act_pool(x, w, b, *conv, *pool, True, row)[:1]  # noqa: E731
        return ours, lambda: (F.max_pool2d(F.relu(fprop()), 2),)
    y, offsets = ops.conv_act_pool(x, w, b, *conv, *pool, True, "")
    z = F.relu(fprop())
    indices = F.max_pool2d(z, 2, return_indices=True)[1]

    def unfused():
        gz = _aten.max_pool2d_with_indices_backward(gy, z, *pool[1:], [1, 1], False, indices)
        return backward(_aten.threshold_backward(gz, z, 0), True, True, True)

    everything = [True, True, True]
    ours = lambda row: ops.conv_act_pool_backward(gy, y, offsets, x, w, *conv, *pool, everything, row)  # noqa: E731
    return ours, unfused


def _linear(pass_: str, x, gy, w, b) -> tuple[Callable, Callable]:
    y = F.relu(F.linear(x, w, b))

    def unfused():
        gated = _aten.threshold_backward(gy, y, 0)
        return gated @ w, gated.t() @ x, gated.sum(0)

    everything = [True, True, True]
    return {
        "fprop": (lambda row: (ops.linear_act(x, w, b, "none", row),), lambda: (F.linear(x, w, b),)),
        "dgrad": (lambda row: (ops.linear_dgrad(gy, w, row),), lambda: (gy @ w,)),
        "wgrad": (lambda row: ops.linear_wgrad(gy, x, True, row), lambda: (gy.t() @ x, gy.sum(0))),
        "backward": (lambda row: ops.linear_act_backward(gy, y, x, w, "relu", everything, row), unfused),
    }[pass_]


def _max_pool(pass_: str, x, gy, window) -> tuple[Callable, Callable]:
    if pass_ == "forward":
        return lambda row: ops.max_pool(x, *window, True, row)[:1], lambda: (F.max_pool2d(x, *window),)
    offsets = ops.max_pool(x, *window, True, "")[1]
    indices = F.max_pool2d(x, *window, return_indices=True)[1]
    return (
        lambda row: (ops.max_pool_backward(gy, offsets, list(x.shape), *window, row),),
        lambda: (_aten.max_pool2d_with_indices_backward(gy, x, *window, indices),),
    )


def _avg_pool(pass_: str, x, gy, window) -> tuple[Callable, Callable]:
    if pass_ == "forward":
        return lambda row: (ops.avg_pool(x, *window, row),), lambda: (F.avg_pool2d(x, *window),)
    return (
        lambda row: (ops.avg_pool_backward(gy, list(x.shape), *window, False, row),),
        lambda: (_aten.avg_pool2d_backward(gy, x, *window),),
    )
