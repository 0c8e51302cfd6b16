# SPDX-License-Identifier: MIT
"""What the nodes of an optimized graph call: functions of tensors and parameters.

A `Run` is one or more stages; several are one `functional.chain`. `Bound` gives it the parameters of the
modules that they came from, as they are at each call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv import functional

CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


@dataclass
class Norm:
    """Batch-norm by running statistics, of weight and bias where it has them, mean and variance.

    dims: How many dimensions its input may have; () takes any.
    """

    eps: float
    weight: bool
    bias: bool
    dims: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return 2 + self.weight + self.bias

    def __call__(self, x: Tensor, params: list[Tensor]) -> Tensor:
        if self.dims and x.dim() not in self.dims:
            raise ValueError(f"expected {' or '.join(map(str, self.dims))}D input, got {x.dim()}D input")
        *affine, mean, variance = params
        weight = affine.pop(0) if self.weight else None
        bias = affine.pop(0) if self.bias else None
        return F.batch_norm(x, mean, variance, weight, bias, eps=self.eps)


@dataclass
class Stage:
    """max_pool(relu(norm(layer(x)))), each of the three optional.

    axes: Spatial axes of a convolution, 0 for a linear layer.
    conv: (stride, padding, dilation, groups) of a convolution.
    pad: Widths and mode for F.pad, where a convolution pads with other values than zeros.
    edges: Its zero padding as four ints, top, left, bottom, right; None where a chain can't have it.
    pool: Arguments of max_pool2d.
    flatten: Whether all dimensions but the first are flattened in front.
    """

    axes: int
    bias: bool
    conv: tuple = ()
    pad: tuple | None = None
    edges: tuple | None = None
    norm: Norm | None = None
    relu: bool = False
    pool: dict | None = None
    flatten: bool = False

    @property
    def count(self) -> int:
        """Parameters: weight, bias, and those of the norm."""
        return 1 + self.bias + (self.norm.count if self.norm else 0)

    @property
    def chains(self) -> bool:
        """Whether it can be a stage of `functional.chain`."""
        return self.axes == 0 or self.axes == 2 and self.edges is not None

    def plan(self) -> tuple:
        act, bias = "relu" if self.relu else "none", self.bias or self.norm is not None
        if self.axes == 0:
            return functional.linear_stage(act=act, bias=bias)
        stride, _, dilation, groups = self.conv
        pool = {f"pool_{name}": value for name, value in (self.pool or {}).items()}
        return functional.conv_stage(
            act=act,
            bias=bias,
            stride=stride,
            padding=self.edges,
            dilation=dilation,
            groups=groups,
            **pool,
        )

    @property
    def dims(self) -> int:
        """Dimensions of a batched output, whose second are the channels or features."""
        return 2 + self.axes

    def by_parts(self, x: Tensor, params: list[Tensor]) -> Tensor:
        """The layer, then the norm as it stands, of whichever dimension; then the rest."""
        count = 1 + self.bias
        y = Stage(self.axes, self.bias, self.conv, self.pad, flatten=self.flatten)(x, *params[:count])
        y = self.norm(y, params[count:]) if self.norm else y
        y = F.relu(y) if self.relu else y
        return functional.max_pool2d(y, **self.pool) if self.pool else y

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.flatten:
            x = torch.flatten(x, 1)
        if self.axes == 0:
            return (functional.linear_relu if self.relu else functional.linear)(x, weight, bias)
        if self.pad:
            x = F.pad(x, self.pad[0], mode=self.pad[1])
        if self.relu:
            pool = {f"pool_{name}": value for name, value in (self.pool or {}).items()}
            return functional.conv2d_relu_max_pool2d(x, weight, bias, *self.conv, **pool)
        y = CONVOLUTIONS[self.axes](x, weight, bias, *self.conv)
        return functional.max_pool2d(y, **self.pool) if self.pool else y

    def folded(self, params: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Weight and bias with the norm in them, rounded once."""
        if self.norm is None:
            return params
        rest = list(params)
        *_, mean, variance = rest
        weight, bias = rest.pop(0), rest.pop(0) if self.bias else None
        dtype = weight.dtype
        wide = torch.float32 if weight.element_size() < 4 else torch.float64
        scale = (variance.to(wide) + self.norm.eps).rsqrt()
        if self.norm.weight:
            scale = scale * rest.pop(0).to(wide)
        shift = -mean.to(wide) if bias is None else bias.to(wide) - mean.to(wide)
        shift = shift * scale
        if self.norm.bias:
            shift = shift + rest.pop(0).to(wide)
        weight = weight.to(wide) * scale.reshape(-1, *[1] * (weight.dim() - 1))
        return weight.to(dtype), shift.to(dtype)


class Step:
    """A callable with the names that torch.fx wants of a function."""

    __module__ = "fastconv"

    def __init__(self, name: str):
        self.__name__ = self.__qualname__ = name


class Run(Step):
    """Stages one behind the other: step(input, *parameters of all stages)."""

    def __init__(self, stages: list[Stage]):
        super().__init__("chain" if len(stages) > 1 else "conv" if stages[0].axes else "linear")
        self.stages = stages
        self.plan = sum((stage.plan() for stage in stages), ()) if len(stages) > 1 else None
        self.folds = any(stage.norm for stage in stages)
        self.conv_first = stages[0].axes > 0
        self._cache = ((), (), ())  # key, the tensors that it tells of, what came of them

    def __call__(self, x: Tensor, *params: Tensor) -> Tensor:
        if self.folds:
            # Without a batch, or with more than one dimension of it, the norm's channels are not the layer's.
            if x.dim() != self.stages[0].dims:
                return self._by_parts(x, params)
            params = self._folded(params)
        if self.plan is not None and (not self.conv_first or x.dim() == 4):
            return functional.chain(x, self.plan, *params)
        params = iter(params)
        for stage in self.stages:
            weight = next(params)
            x = stage(x, weight, next(params) if stage.bias or stage.norm else None)
        return x

    def _folded(self, params):
        if not _may_cache(params):
            return self._fold(params)
        key = [(id(p), p._version, p.data_ptr(), p.dtype) for p in params]
        cached, _, values = self._cache
        if cached != key:
            with torch.inference_mode(False), torch.no_grad():
                values = self._fold(params)
            self._cache = (key, params, values)
        return values

    def _fold(self, params):
        return [value for stage, own in self._each(params) for value in stage.folded(own)]

    def _by_parts(self, x, params):
        for stage, own in self._each(params):
            x = stage.by_parts(x, own)
        return x

    def _each(self, params):
        """The stages, each with its own parameters."""
        start = 0
        for stage in self.stages:
            yield stage, params[start : start + stage.count]
            start += stage.count

    def forget(self) -> None:
        """Folded weights are made anew at the next call."""
        self._cache = ((), (), ())

    def __getstate__(self):
        return {**self.__dict__, "_cache": ((), (), ())}


def _may_cache(params) -> bool:
    """Whether what is made of the parameters may be kept: plain tensors, and no gradient goes to them."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    wants_gradient = torch.is_grad_enabled()
    return not any(
        type(p) not in (Tensor, torch.nn.Parameter) or wants_gradient and p.requires_grad or p.is_inference()
        for p in params
    )


class Pool(Step):
    """A pooling layer by itself: fastconv's function with its arguments."""

    def __init__(self, function: Callable, arguments: dict):
        super().__init__(function.__name__)
        self.function, self.arguments = function, arguments

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x, **self.arguments)


class ReLUPool(Step):
    """max_pool(relu(x)): the two commute, and behind the pool less is left to do and to keep."""

    def __init__(self, pool: dict):
        super().__init__("relu_max_pool")
        self.pool = pool

    def __call__(self, x: Tensor) -> Tensor:
        return F.relu(functional.max_pool2d(x, **self.pool))


class BatchNormReLU(Step):
    """max_pool(relu(batch_norm(x))) by the batch's own statistics, the pool optional.

    `arguments` has those of F.batch_norm behind the input, but for `training`, of the input and parameters.
    owns_input: Whether nothing else reads the input.
    """

    owns_input = False

    def __init__(self, arguments: Callable, pool: dict | None):
        super().__init__("batch_norm_relu" if pool is None else "batch_norm_relu_max_pool")
        self.arguments = arguments
        self.pool = {f"pool_{name}": value for name, value in (pool or {}).items()}

    def __call__(self, x: Tensor, *params: Tensor) -> Tensor:
        return functional.batch_norm_relu_max_pool2d(
            x, **self.arguments(x, *params), **self.pool, overwrite_input=self.owns_input
        )


def batch_norm_arguments(module: torch.nn.BatchNorm2d, x: Tensor) -> dict:
    """What the module's forward gives to F.batch_norm in training; counts the batch, as that does.

    Raises:
        ValueError: `x` is not 4D.
    """
    module._check_input_dim(x)
    momentum = module.momentum
    tracks = module.training and module.track_running_stats
    if tracks and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if momentum is None:  # a plain average of all batches
            momentum = 1 / float(module.num_batches_tracked)
    return {
        "running_mean": module.running_mean if tracks else None,
        "running_var": module.running_var if tracks else None,
        "weight": module.weight,
        "bias": module.bias,
        "momentum": momentum or 0.0,
        "eps": module.eps,
    }


class Bound(Step):
    """A step whose parameters are read at each call: from (dict, key), or, for an int, the argument there."""

    def __init__(self, step: Step, sources: list):
        super().__init__(step.__name__)
        self.step, self.sources = step, sources
        self.takes_arguments = any(isinstance(source, int) for source in sources)

    def __call__(self, x: Tensor, *arguments: Tensor) -> Tensor:
        if self.takes_arguments:
            params = [arguments[s] if isinstance(s, int) else s[0][s[1]] for s in self.sources]
        else:
            params = [where[name] for where, name in self.sources]
        return self.step(x, *params)
