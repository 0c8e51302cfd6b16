# SPDX-License-Identifier: MIT
"""One call of an operator for each kernel table: by fastconv, by torch in the same dtype, and exactly.

A case says the sizes (`Conv`, `Pool`, `AvgPool`, `Norm`, `Linear`, `Chain`); `Numbers` fills it, in one of
`LAYOUTS`. "whole" numbers are small integers, whose sums float32 holds exactly: every row must give the exact
result, rounded once. "normal" numbers follow the error rule. "tf32" numbers are those, rounded to TF32.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from reference import array

from fastconv import functional as G
from fastconv import kernels, ops
from fastconv._accuracy import allowance
from fastconv._training import fp32_precision

ROWS = kernels.list()
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}


def _spread(value, count):
    return (value,) * count if isinstance(value, int) else tuple(value)


@dataclass(frozen=True)
class Pool:
    n: int
    c: int
    size: tuple[int, ...]
    kernel: int | tuple[int, ...]
    stride: int | tuple[int, ...] | None = None
    padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    ceil: bool = False

    @property
    def window(self):
        axes = len(self.size)
        stride = self.kernel if self.stride is None else self.stride
        return (*(_spread(v, axes) for v in (self.kernel, stride, self.padding, self.dilation)), self.ceil)


@dataclass(frozen=True)
class AvgPool:
    n: int
    c: int
    size: tuple[int, ...]
    kernel: int | tuple[int, ...]
    stride: int | tuple[int, ...] | None = None
    padding: int | tuple[int, ...] = 0
    ceil: bool = False
    count_include_pad: bool = True
    divisor: int | None = None

    @property
    def window(self):
        axes = len(self.size)
        stride = self.kernel if self.stride is None else self.stride
        spread = (_spread(v, axes) for v in (self.kernel, stride, self.padding))
        return (*spread, self.ceil, self.count_include_pad, self.divisor)


@dataclass(frozen=True)
class Norm:
    """`pool` is kernel, stride, padding; `mean` is added to the input."""

    n: int
    c: int
    size: tuple[int, ...]
    pool: tuple | None = (2, 2, 0)
    act: str = "relu"
    affine: bool = True
    mean: float = 0

    @property
    def pool_case(self):
        return None if self.pool is None else Pool(self.n, self.c, self.size, *self.pool)

    @property
    def pool_arguments(self):
        return ((), (), ()) if self.pool is None else self.pool_case.window[:3]


@dataclass(frozen=True)
class Conv:
    """`padding` is "same", a number, or all fronts, then all backs; `pool` is kernel, stride, padding."""

    n: int
    c: int
    k: int
    size: tuple[int, ...]
    kernel: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | str | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    bias: bool = True
    pool: tuple[int, int, int] | None = (2, 2, 0)

    @property
    def taps(self):
        return _spread(self.kernel, len(self.size))

    @property
    def conv(self):
        """stride, padding, dilation, groups, as the operators take them."""
        axes = len(self.size)
        dilation = _spread(self.dilation, axes)
        if self.padding == "same":
            total = [d * (t - 1) for d, t in zip(dilation, self.taps, strict=True)]
            padding = (*(t // 2 for t in total), *(t - t // 2 for t in total))
        else:
            padding = _spread(self.padding, 2 * axes)
        return _spread(self.stride, axes), padding, dilation, self.groups

    @property
    def input_size(self):
        return (self.n, self.c, *self.size)

    @property
    def weight_size(self):
        return (self.k, self.c // self.groups, *self.taps)

    @property
    def output_size(self):
        return (self.n, self.k, *reference.conv_output_size(self.size, self.taps, self.conv))

    @property
    def pool_case(self):
        """The pool behind the convolution, shrunk to its output where that is smaller; None without one."""
        if self.pool is None:
            return None
        kernel, stride, padding = self.pool
        out = self.output_size[2:]
        fits = tuple(min(kernel, o) for o in out)
        return Pool(self.n, self.k, tuple(out), fits, stride, tuple(min(padding, f // 2) for f in fits))

    @property
    def pool_arguments(self):
        return ((), (), ()) if self.pool is None else self.pool_case.window[:3]

    @property
    def pooled_size(self):
        case = self.pool_case
        if case is None:
            return self.output_size
        kernel, stride, padding = case.window[:3]
        pooled = reference.conv_output_size(case.size, kernel, (stride, padding * 2, (1,) * len(kernel), 1))
        return (self.n, self.k, *pooled)


@dataclass(frozen=True)
class Linear:
    """`rows` are the leading dimensions."""

    rows: tuple[int, ...]
    n: int
    k: int
    bias: bool = True


@dataclass(frozen=True)
class Chain:
    """Convolutions with ReLU, then linear layers with ReLU; `relu` says whether the last stage has one.

    Without convolutions the input has `rows` of `features`.
    """

    convs: tuple[Conv, ...] = ()
    linears: tuple[int, ...] = ()
    rows: int = 0
    features: int = 0
    bias: bool = True
    relu: bool = False

    @classmethod
    def of(cls, n, c, size, convs, linears=(), **options):
        """`convs` are (k, kernel, further arguments of Conv); input sizes follow from what stands before."""
        made = []
        for k, kernel, further in convs:
            made.append(Conv(n, c, k, tuple(size), kernel, **{"pool": None, **further}))
            _, c, *size = made[-1].pooled_size
        return cls(tuple(made), linears, **options)

    @property
    def input_size(self):
        return self.convs[0].input_size if self.convs else (self.rows, self.features)

    @property
    def stages(self):
        """(Conv or None, outputs, act) of each."""
        found = [(conv, conv.k, "relu") for conv in self.convs] + [(None, n, "relu") for n in self.linears]
        found[-1] = (*found[-1][:2], "relu" if self.relu else "none")
        return found

    @property
    def plan(self):
        plan = ()
        for conv, _, act in self.stages:
            if conv is None:
                plan += G.linear_stage(act=act, bias=self.bias)
                continue
            stride, padding, dilation, groups = conv.conv
            kernel, strides, paddings = conv.pool_arguments
            pool = dict(pool_kernel_size=kernel, pool_stride=strides, pool_padding=paddings) if kernel else {}
            plan += G.conv_stage(
                act=act,
                bias=self.bias,
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=groups,
                **pool,
            )
        return plan

    @property
    def weight_sizes(self):
        sizes, features = [], math.prod(self.convs[-1].pooled_size[1:]) if self.convs else self.features
        for conv, outputs, _ in self.stages:
            sizes.append((outputs, features) if conv is None else conv.weight_size)
            features = outputs if conv is None else features
        return sizes


# --- numbers and their layout -------------------------------------------------------------------------------


def _channels_last(t):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats[t.dim()]) if t.dim() in formats else t


def _transposed(t):
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() >= 2 else t


def _sliced(t):
    """Every other cell of a tensor of NaN, an odd number of cells from its start."""
    holder = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), torch.nan)
    holder[..., 1::2] = t
    return holder[..., 1::2]


def _expanded(t):
    """Ones, all at one address: the gradient that sum() sends back."""
    return t.new_ones(()).expand(t.shape)


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": _channels_last,
    "transposed": _transposed,
    "sliced": _sliced,
    "expanded": _expanded,
}


def to_tf32(t):
    """float32 rounded to the 10 bits of mantissa that TF32 has, ties away from zero."""
    rounded = ((t.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return torch.where(t.isfinite(), rounded, t)


@dataclass(frozen=True)
class Numbers:
    """What fills the tensors of a problem, and where they lie."""

    kind: str = "normal"
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    device: str = "cpu"

    def __call__(self, name, *size):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name}{size}".encode()))
        if self.kind == "whole":
            values = torch.randint(-3, 4, size, generator=generator).to(self.dtype)
        else:
            values = torch.randn(size, generator=generator, dtype=torch.float64).to(self.dtype)
            values = to_tf32(values) if self.kind == "tf32" else values
        return LAYOUTS[self.layout](values.to(self.device))


# --- problems -----------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """Tensors by name, three ways. Where `exact` is None, torch's are exact.

    sums_quotients: Rounded quotients or roots go on, so that not even whole numbers have an exact result.
    """

    run: Callable[[str], dict]
    by_torch: Callable[[], dict]
    by_definition: Callable[[], dict] | None = None
    sums_quotients: bool = False

    @cached_property
    def theirs(self):
        return self.by_torch()

    @cached_property
    def exact(self):
        return self.by_definition()

    def wrong(self, outputs, numbers):
        """What is wrong with fastconv's tensors, in sentences.

        "X alone" is X, asked for alone; "X behind Y" is X of what Y has saved.
        """
        for what, ours in outputs.items():
            name = what.partition(" ")[0]
            if self.by_definition is None:
                if not torch.equal(_no_nan(ours), _no_nan(self.theirs[name])):
                    yield f"{name} differs from torch's"
                continue
            exact = self.exact[name]
            if tuple(ours.shape) != exact.shape or ours.dtype != numbers.dtype:
                yield f"{name} is {ours.dtype} of size {tuple(ours.shape)}"
            elif numbers.kind == "whole" and not self.sums_quotients:
                if not torch.equal(ours.cpu(), torch.from_numpy(exact.astype("float64")).to(ours.dtype)):
                    yield f"{name} is not exact"
            elif ours.numel():
                with fp32_precision("tf32" if numbers.kind == "tf32" else "ieee"):
                    error, allowed = self.error_and_allowance(name, ours)
                if not error <= allowed:
                    yield f"{name} has an error of {error:.3g}, allowed is {allowed:.3g}"

    def error_and_allowance(self, name, ours):
        """The error rule: at most twice the error of torch's own kernel plus 2 ulp of the largest value."""
        exact = self.exact[name]
        error, theirs = (float(abs(array(t) - exact).max()) for t in (ours, self.theirs[name]))
        return error, allowance(theirs, float(abs(exact).max()), ours.dtype)


def _no_nan(t):
    """A copy where NaN equals NaN."""
    return t.cpu().nan_to_num(7, posinf=torch.inf, neginf=-torch.inf)


def _torch_conv(x, w, b, conv):
    if x.element_size() == 2 and x.device.type == "cpu":  # torch 2.13 crashes on some of these
        return _torch_conv(x.float(), w.float(), None if b is None else b.float(), conv).to(x.dtype)
    stride, padding, dilation, groups = conv
    axes = len(stride)
    fronts, backs = padding[:axes], padding[axes:]
    if fronts != backs:
        around = [p for pair in zip(reversed(fronts), reversed(backs), strict=True) for p in pair]
        x, fronts = F.pad(x, around), 0
    return (F.conv1d, F.conv2d, F.conv3d)[axes - 1](x, w, b, stride, fronts, dilation, groups)


def _torch_pool(x, case):
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(case.size) - 1]
    return pool(x, *case.window, return_indices=True)


def _torch_gradients(function, grad_output, **inputs):
    """The gradients of function(**inputs), named after the inputs; those that are None are left out."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items() if t is not None}
    output = function(*(leaves.get(name) for name in inputs))
    grads = torch.autograd.grad(output, list(leaves.values()), grad_output)
    return {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _named(names, tensors, wanted=True):
    """Operators return an empty bias gradient where none is wanted."""
    found = dict(zip(names, tensors, strict=True))
    if not wanted:
        del found["grad_bias"]
    return found


def _conv_tensors(case, numbers):
    bias = numbers("bias", case.k) if case.bias else None
    return numbers("input", *case.input_size), numbers("weight", *case.weight_size), bias


def _arrays(*tensors):
    return [None if t is None else array(t) for t in tensors]


def conv_fprop(case, numbers):
    x, w, b = _conv_tensors(case, numbers)
    return Problem(
        lambda kernel: {"output": ops.conv_fprop(x, w, b, *case.conv, kernel)},
        lambda: {"output": _torch_conv(x, w, b, case.conv)},
        lambda: {"output": reference.conv_fprop(*_arrays(x, w, b), case.conv)},
    )


def conv_dgrad(case, numbers):
    x, w, _ = _conv_tensors(case, numbers)
    gy = numbers("grad_output", *case.output_size)
    return Problem(
        lambda kernel: {"grad_input": ops.conv_dgrad(gy, w, x.shape, *case.conv, kernel)},
        lambda: _torch_gradients(lambda x: _torch_conv(x, w, None, case.conv), gy, input=x),
        lambda: {"grad_input": reference.conv_dgrad(*_arrays(gy, w), x.shape, case.conv)},
    )


def conv_wgrad(case, numbers):
    x, w, b = _conv_tensors(case, numbers)
    gy = numbers("grad_output", *case.output_size)
    names = ("grad_weight", "grad_bias")
    return Problem(
        lambda kernel: _named(
            names, ops.conv_wgrad(gy, x, w.shape, *case.conv, case.bias, kernel), case.bias
        ),
        lambda: _torch_gradients(lambda w, b: _torch_conv(x, w, b, case.conv), gy, weight=w, bias=b),
        lambda: _named(names, reference.conv_wgrad(*_arrays(gy, x), w.shape, case.conv)),
    )


def conv_act_pool(case, numbers):
    x, w, b = _conv_tensors(case, numbers)

    def by_torch():
        y = F.relu(_torch_conv(x, w, b, case.conv))
        return {"output": y if case.pool is None else _torch_pool(y, case.pool_case)[0]}

    def by_definition():
        y = reference.conv_fprop(*_arrays(x, w, b), case.conv).clip(min=0)
        return {"output": y if case.pool is None else reference.max_pool(y, case.pool_case.window)}

    def run(kernel):
        arguments = (x, w, b, *case.conv, "relu", *case.pool_arguments)
        output, _ = ops.conv_act_pool(*arguments, True, kernel)
        alone, none = ops.conv_act_pool(*arguments, False, kernel)
        assert torch.equal(output, alone) and none.numel() == 0
        return {"output": output}

    return Problem(run, by_torch, by_definition)


def conv_act_pool_backward(case, numbers):
    x, w, b = _conv_tensors(case, numbers)
    unpooled = F.relu(_torch_conv(x, w, b, case.conv))
    y, offsets, indices = unpooled, x.new_empty(0, dtype=torch.uint8), None
    if case.pool is not None:
        y, indices = _torch_pool(unpooled, case.pool_case)
        _, offsets = ops.max_pool(unpooled, *case.pool_case.window, True, "")
    gy = numbers("grad_output", *y.shape)
    names = ("grad_input", "grad_weight", "grad_bias")

    def run(kernel):
        arguments = (gy, y, offsets, x, w, *case.conv, "relu", *case.pool_arguments)
        found = _named(
            names, ops.conv_act_pool_backward(*arguments, [True, True, case.bias], kernel), case.bias
        )
        alone = ops.conv_act_pool_backward(*arguments, [True, False, False], kernel)[0]
        assert torch.equal(found["grad_input"], alone)
        alone = ops.conv_act_pool_backward(*arguments, [False, True, False], kernel)[1]
        assert torch.equal(found["grad_weight"], alone)
        return found

    def by_torch():
        def block(x, w, b):
            y = F.relu(_torch_conv(x, w, b, case.conv))
            return y if case.pool is None else _torch_pool(y, case.pool_case)[0]

        return _torch_gradients(block, gy, input=x, weight=w, bias=b)

    def by_definition():
        grad = array(gy) * (array(y) > 0)
        if indices is not None:
            grad = reference.max_pool_backward(grad, indices.cpu().numpy(), unpooled.shape)
        gx = reference.conv_dgrad(grad, array(w), x.shape, case.conv)
        return _named(names, (gx, *reference.conv_wgrad(grad, array(x), w.shape, case.conv)))

    return Problem(run, by_torch, by_definition)


def _pool_tensors(case, numbers):
    x = numbers("input", case.n, case.c, *case.size)
    y, indices = _torch_pool(x, case)
    return x, y, indices


def max_pool(case, numbers):
    x, y, indices = _pool_tensors(case, numbers)

    def run(kernel):
        output, offsets = ops.max_pool(x, *case.window, True, kernel)
        alone, none = ops.max_pool(x, *case.window, False, kernel)
        assert torch.equal(output, alone) and none.numel() == 0
        return {"output": output, "indices": ops.max_pool_indices(offsets, x.shape, *case.window, "")}

    return Problem(run, lambda: {"output": y, "indices": indices})


def max_pool_indices(case, numbers):
    x, _, indices = _pool_tensors(case, numbers)
    _, offsets = ops.max_pool(x, *case.window, True, "")
    return Problem(
        lambda kernel: {"indices": ops.max_pool_indices(offsets, x.shape, *case.window, kernel)},
        lambda: {"indices": indices},
    )


def max_pool_backward(case, numbers):
    x, y, indices = _pool_tensors(case, numbers)
    _, offsets = ops.max_pool(x, *case.window, True, "")
    gy = numbers("grad_output", *y.shape)
    return Problem(
        lambda kernel: {"grad_input": ops.max_pool_backward(gy, offsets, x.shape, *case.window, kernel)},
        lambda: _torch_gradients(lambda x: _torch_pool(x, case)[0], gy, input=x),
        lambda: {"grad_input": reference.max_pool_backward(array(gy), indices.cpu().numpy(), x.shape)},
    )


def max_pool_gather(case, numbers):
    x, _, indices = _pool_tensors(case, numbers)
    _, offsets = ops.max_pool(x, *case.window, True, "")
    other = numbers("other", *x.shape)
    return Problem(
        lambda kernel: {"output": ops.max_pool_gather(other, offsets, *case.window, kernel)},
        lambda: {"output": other.flatten(2).gather(2, indices.flatten(2)).reshape(indices.shape)},
    )


def _torch_average(x, case):
    axes = len(case.size)
    if axes == 3 and x.element_size() == 2 and x.device.type == "cpu":  # torch has no such kernel
        return _torch_average(x.float(), case).to(x.dtype)
    kernel, stride, padding, *rest = case.window
    if axes == 1:  # torch has no divisor_override there
        return F.avg_pool2d(x.unsqueeze(-2), (1, *kernel), (1, *stride), (0, *padding), *rest).squeeze(-2)
    return (F.avg_pool2d, F.avg_pool3d)[axes - 2](x, *case.window)


def avg_pool(case, numbers):
    x = numbers("input", case.n, case.c, *case.size)
    out = _torch_average(x.cpu().float(), case).shape[2:]
    return Problem(
        lambda kernel: {"output": ops.avg_pool(x, *case.window, kernel)},
        lambda: {"output": _torch_average(x, case)},
        lambda: {"output": reference.avg_pool(array(x), case.window, out)},
    )


def avg_pool_backward(case, numbers):
    x = numbers("input", case.n, case.c, *case.size)
    gy = numbers("grad_output", *_torch_average(x.cpu().float(), case).shape)
    channels_last = numbers.layout == "channels_last"
    return Problem(
        lambda kernel: {
            "grad_input": ops.avg_pool_backward(gy, x.shape, *case.window, channels_last, kernel)
        },
        lambda: _torch_gradients(lambda x: _torch_average(x, case), gy, input=x),
        lambda: {"grad_input": reference.avg_pool_backward(array(gy), case.window, tuple(x.shape))},
        sums_quotients=True,
    )


EPS = 1e-5


def _norm_tensors(case, numbers):
    x = numbers("input", case.n, case.c, *case.size)
    if case.mean:
        x = LAYOUTS[numbers.layout](x + case.mean)
    if not case.affine:
        return x, None, None
    return x, numbers("weight", case.c), numbers("bias", case.c) + 2  # few outputs are rests of a subtraction


def _torch_norm(x, w, b):
    return torch.native_batch_norm(x, w, b, None, None, True, 0.0, EPS)[0]


def _exact_norm(case, x, w, b):
    x = array(x)
    w, b = (array(w), array(b)) if case.affine else (np.ones(case.c, x.dtype), np.zeros(case.c, x.dtype))
    return x, w, b


def _acted(case, y):
    return y.clip(min=0) if case.act == "relu" else y


def norm_act_pool(case, numbers):
    x, w, b = _norm_tensors(case, numbers)

    def by_torch():
        y = _acted(case, _torch_norm(x, w, b))
        return {"output": y if case.pool is None else _torch_pool(y, case.pool_case)[0]}

    def by_definition():
        y = _acted(case, reference.batch_norm(*_exact_norm(case, x, w, b), EPS))
        return {"output": y if case.pool is None else reference.max_pool(y, case.pool_case.window)}

    return Problem(
        lambda kernel: {"output": ops.norm_act_pool(x, w, b, EPS, case.act, *case.pool_arguments, kernel)[0]},
        by_torch,
        by_definition,
        sums_quotients=True,
    )


def norm_act_pool_backward(case, numbers):
    """Of windows whose maxima lie where ours found them: others may lie as near, within rounding."""
    x, w, b = _norm_tensors(case, numbers)
    y, offsets, mean, invstd = ops.norm_act_pool(x, w, b, EPS, case.act, *case.pool_arguments, "")
    gy = numbers("grad_output", *y.shape)
    names = ("grad_input", "grad_weight", "grad_bias")[: 3 if case.affine else 1]

    def run(kernel):
        arguments = (gy, y, offsets, x, w, mean, invstd, case.act, *case.pool_arguments)
        found = ops.norm_act_pool_backward(*arguments, [True] * 3, kernel)
        for i in range(3):
            alone = ops.norm_act_pool_backward(*arguments, [i == j for j in range(3)], kernel)
            assert torch.equal(_no_nan(alone[i]), _no_nan(found[i]))
            assert not any(other.numel() for j, other in enumerate(alone) if i != j)
        return dict(zip(names, found, strict=False))

    @functools.cache
    def unpooled():
        grad = array(gy) * (array(y) > 0) if case.act == "relu" else array(gy)
        if case.pool is None:
            return grad
        indices = ops.max_pool_indices(offsets, x.shape, *case.pool_case.window, "")
        return reference.max_pool_backward(grad, indices.cpu().numpy(), x.shape)

    def by_torch():
        grad = torch.from_numpy(unpooled().astype("float64")).to(x)
        return _torch_gradients(_torch_norm, grad, input=x, weight=w, bias=b)

    def by_definition():
        x_, w_, _ = _exact_norm(case, x, w, b)
        return dict(zip(names, reference.batch_norm_backward(unpooled(), x_, w_, EPS), strict=False))

    return Problem(run, by_torch, by_definition, sums_quotients=True)


def _linear_tensors(case, numbers):
    bias = numbers("bias", case.n) if case.bias else None
    return numbers("input", *case.rows, case.k), numbers("weight", case.n, case.k), bias


def _rows(a):
    return a.reshape(math.prod(a.shape[:-1]), a.shape[-1])


def linear_fprop(case, numbers):
    x, w, b = _linear_tensors(case, numbers)

    def exact():
        y = array(x) @ array(w).T
        y = y if b is None else y + array(b)
        return {"output": y, "activated": y.clip(min=0)}

    return Problem(
        lambda kernel: {
            "output": ops.linear_act(x, w, b, "none", kernel),
            "activated": ops.linear_act(x, w, b, "relu", kernel),
        },
        lambda: {"output": F.linear(x, w, b), "activated": F.relu(F.linear(x, w, b))},
        exact,
    )


def linear_dgrad(case, numbers):
    x, w, _ = _linear_tensors(case, numbers)
    gy = numbers("grad_output", *case.rows, case.n)
    return Problem(
        lambda kernel: {"grad_input": ops.linear_dgrad(gy, w, kernel)},
        lambda: _torch_gradients(lambda x: F.linear(x, w), gy, input=x),
        lambda: {"grad_input": array(gy) @ array(w)},
    )


def linear_wgrad(case, numbers):
    x, w, b = _linear_tensors(case, numbers)
    gy = numbers("grad_output", *case.rows, case.n)
    names = ("grad_weight", "grad_bias")
    return Problem(
        lambda kernel: _named(names, ops.linear_wgrad(gy, x, case.bias, kernel), case.bias),
        lambda: _torch_gradients(lambda w, b: F.linear(x, w, b), gy, weight=w, bias=b),
        lambda: _named(names, (_rows(array(gy)).T @ _rows(array(x)), _rows(array(gy)).sum(0))),
    )


def linear_act_backward(case, numbers):
    x, w, b = _linear_tensors(case, numbers)
    y = F.relu(F.linear(x, w, b))
    gy = numbers("grad_output", *y.shape)
    names = ("grad_input", "grad_weight", "grad_bias")

    def exact():
        grad = array(gy) * (array(y) > 0)
        rows = _rows(grad)
        return _named(names, (grad @ array(w), rows.T @ _rows(array(x)), rows.sum(0)))

    return Problem(
        lambda kernel: _named(
            names,
            ops.linear_act_backward(gy, y, x, w, "relu", [True, True, case.bias], kernel),
            case.bias,
        ),
        lambda: _torch_gradients(lambda x, w, b: F.relu(F.linear(x, w, b)), gy, input=x, weight=w, bias=b),
        exact,
    )


def _few(weight):
    """Whole numbers that stay small from stage to stage: three of each output's weights, -1, 0 or 1."""
    order = (
        torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)).flatten(1).argsort(1).argsort(1)
    )
    return torch.where((order < 3).reshape(weight.shape).to(weight.device), weight.clamp(-1, 1), 0)


def _chain_tensors(case, numbers):
    """The input, and the parameters as the operator takes them."""
    plain, params = replace(numbers, layout="contiguous"), []
    lay_out = LAYOUTS[numbers.layout if numbers.layout != "expanded" else "contiguous"]
    for i, size in enumerate(case.weight_sizes):
        weight = plain(f"weight{i}", *size)
        params.append(lay_out(_few(weight) if numbers.kind == "whole" else weight / size[-1]))
        if case.bias:
            params.append(numbers(f"bias{i}", size[0]))
    return numbers("input", *case.input_size), params


def _torch_chain(case, x, *params):
    params = iter(params)
    for conv, _, act in case.stages:
        w, b = next(params), next(params) if case.bias else None
        x = F.linear(x.flatten(1), w, b) if conv is None else _torch_conv(x, w, b, conv.conv)
        x = F.relu(x) if act == "relu" else x
        x = x if conv is None or conv.pool is None else _torch_pool(x, conv.pool_case)[0]
    return x


def _exact_chain(case, x, params):
    """Of each stage its input, weight, output, and where the pool's maxima lay."""
    params = iter(_arrays(*params))
    x = array(x)
    for conv, _, act in case.stages:
        w, b = next(params), next(params) if case.bias else None
        y = (
            _rows(x.reshape(x.shape[0], math.prod(x.shape[1:]))) @ w.T + (0 if b is None else b)
            if conv is None
            else (reference.conv_fprop(x, w, b, conv.conv))
        )
        y, indices = y.clip(min=0) if act == "relu" else y, None
        filtered = y.shape
        if conv is not None and conv.pool is not None:
            _, indices = _torch_pool(torch.from_numpy(y.astype("float64")), conv.pool_case)
            y = reference.max_pool(y, conv.pool_case.window)
        yield conv, act, x, w, y, indices, filtered
        x = y


def chain(case, numbers):
    x, params = _chain_tensors(case, numbers)

    def run(kernel):
        alone, none = ops.chain(x, params, case.plan, False, kernel)
        assert none.numel() == 0
        output, _ = ops.chain(x, params, case.plan, True, kernel)
        assert torch.equal(_no_nan(output), _no_nan(alone))
        return {"output": alone}

    return Problem(
        run,
        lambda: {"output": _torch_chain(case, x, *params)},
        lambda: {"output": [*_exact_chain(case, x, params)][-1][4]},
    )


def chain_backward(case, numbers):
    if numbers.dtype.itemsize == 2:  # rounding between the stages would decide where a maximum lies
        numbers = replace(numbers, kind="whole")
    x, params = _chain_tensors(case, numbers)
    theirs = _torch_chain(case, x, *params)
    gy = numbers("grad_output", *theirs.shape)
    names = [
        f"{what}{i}" for i in range(len(case.weight_sizes)) for what in ("weight", "bias")[: 1 + case.bias]
    ]

    def run(kernel):
        found = run_behind(kernel.replace("_backward", ""), kernel)
        if kernel == "cuda/chain_backward_composed":  # which reads what any row there has saved
            for forward in ("cuda/chain_fused", "cuda/chain_fused_cluster"):
                with contextlib.suppress(Rejected):
                    others = attempt(kernel, Problem(functools.partial(run_behind, forward), dict))
                    found |= {f"{name} behind {forward}": each for name, each in others.items()}
        return found

    def run_behind(forward, kernel):
        try:
            y, saved = ops.chain(x, params, case.plan, True, forward)
        except RuntimeError as error:
            raise RuntimeError(str(error).replace(forward, kernel)) from None
        forced = f"{kernel},{forward}" if kernel else ""
        arguments = (gy, y, x, params, saved, case.plan)
        grad_input, grads = ops.chain_backward(*arguments, (1 << (1 + len(params))) - 1, forced)
        found = {"grad_input": grad_input} | {f"grad_{n}": g for n, g in zip(names, grads, strict=True)}
        alone, others = ops.chain_backward(*arguments, 1, forced)
        assert not any(g.numel() for g in others)
        none, (*_, last) = ops.chain_backward(*arguments, 1 << len(params), forced)
        assert none.numel() == 0
        if "_lanes_" in kernel:
            assert torch.equal(_no_nan(alone), _no_nan(grad_input)) and torch.equal(
                _no_nan(last), _no_nan(grads[-1])
            )
        else:  # it may choose other rows for fewer gradients
            found |= {"grad_input alone": alone, f"grad_{names[-1]} alone": last}
        return found

    def by_torch():
        return _torch_gradients(
            lambda *t: _torch_chain(case, *t), gy, **dict(zip(["input", *names], [x, *params], strict=True))
        )

    def by_definition():
        found, grad = {}, array(gy)
        for i, (conv, act, x_, w, y, indices, filtered) in reversed(
            [*enumerate(_exact_chain(case, x, params))]
        ):
            grad = grad.reshape(y.shape) * (y > 0) if act == "relu" else grad.reshape(y.shape)
            if indices is not None:
                grad = reference.max_pool_backward(grad, indices.numpy(), filtered)
            if conv is None:
                rows = x_.reshape(x_.shape[0], w.shape[1])
                gw, gb, grad = grad.T @ rows, grad.sum(0), grad @ w
            else:
                gw, gb = reference.conv_wgrad(grad, x_, w.shape, conv.conv)
                grad = reference.conv_dgrad(grad, w, x_.shape, conv.conv)
            found |= {f"grad_weight{i}": gw, f"grad_bias{i}": gb}
        return found | {"grad_input": grad}

    return Problem(run, by_torch, by_definition)


# By a row's op and pass_.
PROBLEMS = {
    ("conv", "fprop"): conv_fprop,
    ("conv", "dgrad"): conv_dgrad,
    ("conv", "wgrad"): conv_wgrad,
    ("conv_act_pool", "forward"): conv_act_pool,
    ("conv_act_pool", "backward"): conv_act_pool_backward,
    ("max_pool", "forward"): max_pool,
    ("max_pool", "backward"): max_pool_backward,
    ("max_pool", "gather"): max_pool_gather,
    ("max_pool", "indices"): max_pool_indices,
    ("avg_pool", "forward"): avg_pool,
    ("avg_pool", "backward"): avg_pool_backward,
    ("norm_act_pool", "forward"): norm_act_pool,
    ("norm_act_pool", "backward"): norm_act_pool_backward,
    ("linear", "fprop"): linear_fprop,
    ("linear", "dgrad"): linear_dgrad,
    ("linear", "wgrad"): linear_wgrad,
    ("linear_act", "backward"): linear_act_backward,
    ("chain", "forward"): chain,
    ("chain", "backward"): chain_backward,
}


@dataclass(frozen=True)
class Backend:
    """Where a row runs: "cpu", "gpu", a CUDA row on the "emulator", a CPU row on emulated "aarch64"."""

    name: str
    emulator: object | None = None

    @property
    def device(self):
        return "cuda" if self.name == "gpu" else "cpu"

    def runs(self, row):
        return self.name in _backends(row)


def _backends(row):
    if row["device"] == "cuda":
        return "emulator", "gpu"
    return ("cpu",) if row["name"].endswith(("_avx2", "_avx512")) else ("cpu", "aarch64")


def on_backends(row, *values):
    """Test parameters (row, *values, backend) for each back end that runs the row, marked where it has to."""
    for backend in _backends(row):
        marks = [getattr(pytest.mark, backend)] if backend in ("gpu", "aarch64") else []
        name = "-".join((row["name"], *values, backend))
        yield pytest.param(row, *values, backend, marks=marks, id=name)


def row_parameters(op, pass_):
    """(name, device) of each row of a table as test parameters, those of CUDA kernels marked gpu."""
    return [
        pytest.param(row["name"], row["device"], marks=[pytest.mark.gpu] if row["device"] == "cuda" else [])
        for row in ROWS
        if (row["op"], row["pass_"]) == (op, pass_)
    ]


@contextlib.contextmanager
def forced(row):
    """Calls made inside use the row; the test is skipped where the row rejects one."""
    try:
        with kernels.force(row):
            yield
    except RuntimeError as error:
        if f"kernel {row} cannot take this call" in str(error):
            pytest.skip(str(error).splitlines()[0])
        raise


class Rejected(Exception):
    """A row does not take a call; the message says why."""


def in_tf32(row):
    """Whether a row, by its name, multiplies float32 in TF32."""
    return row.endswith("_tf32")


def attempt(row, problem):
    """The outputs of a problem by a row, under the flags that it asks for."""
    try:
        with fp32_precision("tf32" if in_tf32(row) else "ieee"):
            return problem.run(row)
    except RuntimeError as error:
        reason = re.fullmatch(f"kernel {row} cannot take this call: it (.+)", str(error).splitlines()[0])
        if reason is None:
            raise
        raise Rejected(reason[1]) from None
