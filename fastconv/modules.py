# SPDX-License-Identifier: MIT
"""Layers that drop in for torch.nn's: the same arguments, parameters, initialisation, state_dict and repr.

They are subclasses of torch.nn's layers and replace only the computation. What a call takes, returns and
raises is said in fastconv.functional.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastconv import functional

__all__ = [
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "Chain",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvReLUPool2d",
    "LazyConv1d",
    "LazyConv2d",
    "LazyConv3d",
    "LazyLinear",
    "Linear",
    "LinearReLU",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
]


def _padded(conv: nn.modules.conv._ConvNd, input: Tensor) -> tuple[Tensor, functional.Padding]:
    """Input and padding of a convolution: modes other than zeros pad the input first, as in torch.nn."""
    if conv.padding_mode == "zeros":
        return input, conv.padding
    return nn.functional.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0


class Conv1d(nn.Conv1d):
    """torch.nn.Conv1d on fastconv's kernels.

    Shapes: input [N, C, W] or [C, W], weight [K, C/groups, S], bias [K] -> [N, K, Q] or [K, Q].

    >>> Conv1d(3, 8, kernel_size=5)(torch.randn(2, 3, 32)).shape
    torch.Size([2, 8, 28])
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = _padded(self, input)
        return functional.conv1d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d on fastconv's kernels.

    y[n, k] = bias[k] + sum over c of weight[k, c] * x[n, c], where * is the cross-correlation of planes.

    Shapes: input [N, C, H, W] or [C, H, W], weight [K, C/groups, R, S], bias [K] -> [N, K, P, Q] or [K,
        P, Q].

    >>> Conv2d(3, 8, kernel_size=5, stride=2)(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 8, 14, 14])
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = _padded(self, input)
        return functional.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv3d(nn.Conv3d):
    """torch.nn.Conv3d on fastconv's kernels.

    Shapes: input [N, C, D, H, W] or [C, D, H, W], weight [K, C/groups, T, R, S], bias [K] -> [N, K, Z, P,
        Q] or [K, Z, P, Q].

    >>> Conv3d(3, 8, kernel_size=3, padding=1)(torch.randn(2, 3, 8, 16, 16)).shape
    torch.Size([2, 8, 8, 16, 16])
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = _padded(self, input)
        return functional.conv3d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class LazyConv1d(nn.LazyConv1d):
    """torch.nn.LazyConv1d, which becomes fastconv's Conv1d at its first call.

    >>> LazyConv1d(8, kernel_size=3, padding=1)(torch.randn(2, 3, 32)).shape
    torch.Size([2, 8, 32])
    """

    cls_to_become = Conv1d


class LazyConv2d(nn.LazyConv2d):
    """torch.nn.LazyConv2d, which becomes fastconv's Conv2d at its first call.

    >>> LazyConv2d(8, kernel_size=3, padding=1)(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 8, 32, 32])
    """

    cls_to_become = Conv2d


class LazyConv3d(nn.LazyConv3d):
    """torch.nn.LazyConv3d, which becomes fastconv's Conv3d at its first call.

    >>> LazyConv3d(8, kernel_size=3, padding=1)(torch.randn(2, 3, 8, 16, 16)).shape
    torch.Size([2, 8, 8, 16, 16])
    """

    cls_to_become = Conv3d


class MaxPool1d(nn.MaxPool1d):
    """torch.nn.MaxPool1d on fastconv's kernels.

    Shapes: input [N, C, W] or [C, W] -> [N, C, Q] or [C, Q].

    >>> MaxPool1d(2)(torch.randn(2, 3, 32)).shape
    torch.Size([2, 3, 16])
    """

    def forward(self, input: Tensor) -> functional.Pooled:
        return functional.max_pool1d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class MaxPool2d(nn.MaxPool2d):
    """torch.nn.MaxPool2d on fastconv's kernels.

    Shapes: input [N, C, H, W] or [C, H, W] -> [N, C, P, Q] or [C, P, Q].

    >>> MaxPool2d(2)(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 3, 16, 16])
    """

    def forward(self, input: Tensor) -> functional.Pooled:
        return functional.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class MaxPool3d(nn.MaxPool3d):
    """torch.nn.MaxPool3d on fastconv's kernels.

    Shapes: input [N, C, D, H, W] or [C, D, H, W] -> [N, C, Z, P, Q] or [C, Z, P, Q].

    >>> MaxPool3d(2)(torch.randn(2, 3, 8, 16, 16)).shape
    torch.Size([2, 3, 4, 8, 8])
    """

    def forward(self, input: Tensor) -> functional.Pooled:
        return functional.max_pool3d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


def _avg_pool(
    function: Callable[..., Tensor], pool: Any, input: Tensor, *divisor_override: int | None
) -> Tensor:
    return function(
        input,
        pool.kernel_size,
        pool.stride,
        pool.padding,
        pool.ceil_mode,
        pool.count_include_pad,
        *divisor_override,
    )


class AvgPool1d(nn.AvgPool1d):
    """torch.nn.AvgPool1d on fastconv's kernels.

    Shapes: input [N, C, W] or [C, W] -> [N, C, Q] or [C, Q].

    >>> AvgPool1d(2)(torch.randn(2, 3, 32)).shape
    torch.Size([2, 3, 16])
    """

    def forward(self, input: Tensor) -> Tensor:
        return _avg_pool(functional.avg_pool1d, self, input)


class AvgPool2d(nn.AvgPool2d):
    """torch.nn.AvgPool2d on fastconv's kernels.

    Shapes: input [N, C, H, W] or [C, H, W] -> [N, C, P, Q] or [C, P, Q].

    >>> AvgPool2d(2)(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 3, 16, 16])
    """

    def forward(self, input: Tensor) -> Tensor:
        return _avg_pool(functional.avg_pool2d, self, input, self.divisor_override)


class AvgPool3d(nn.AvgPool3d):
    """torch.nn.AvgPool3d on fastconv's kernels.

    Shapes: input [N, C, D, H, W] or [C, D, H, W] -> [N, C, Z, P, Q] or [C, Z, P, Q].

    >>> AvgPool3d(2)(torch.randn(2, 3, 8, 16, 16)).shape
    torch.Size([2, 3, 4, 8, 8])
    """

    def forward(self, input: Tensor) -> Tensor:
        return _avg_pool(functional.avg_pool3d, self, input, self.divisor_override)


class Linear(nn.Linear):
    """torch.nn.Linear on fastconv's kernels: y = x weight^T + bias.

    Shapes: input [..., in_features], weight [out_features, in_features], bias [out_features] -> [...,
        out_features].

    >>> Linear(20, 30)(torch.randn(128, 20)).shape
    torch.Size([128, 30])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)


class LazyLinear(nn.LazyLinear):
    """torch.nn.LazyLinear, which becomes fastconv's Linear at its first call.

    >>> LazyLinear(30)(torch.randn(128, 20)).shape
    torch.Size([128, 30])
    """

    cls_to_become = Linear


class ConvReLUPool2d(Conv2d):
    """Conv2d, ReLU and MaxPool2d as one operator: y = max_pool2d(max(conv2d(x), 0)).

    Args:
        pool_kernel_size: Window of the pool, int or pair; None pools nothing.
        pool_stride: Int or pair; None is pool_kernel_size.
        pool_padding: Int or pair.

    The other arguments, the parameters and the state_dict are those of Conv2d.

    >>> ConvReLUPool2d(3, 8, kernel_size=5, pool_kernel_size=2)(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 8, 14, 14])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        pool_kernel_size: functional.Ints | None = 2,
        pool_stride: functional.Ints | None = None,
        pool_padding: functional.Ints = 0,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.pool_kernel_size = pool_kernel_size
        self.pool_stride = pool_stride
        self.pool_padding = pool_padding

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = _padded(self, input)
        return functional.conv2d_relu_max_pool2d(
            input,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            pool_kernel_size=self.pool_kernel_size,
            pool_stride=self.pool_stride,
            pool_padding=self.pool_padding,
        )

    def extra_repr(self) -> str:
        pool = f", pool_kernel_size={self.pool_kernel_size}"
        if self.pool_stride is not None:
            pool += f", pool_stride={self.pool_stride}"
        if self.pool_padding != 0:
            pool += f", pool_padding={self.pool_padding}"
        return super().extra_repr() + pool  # type: ignore[no-untyped-call]


class LinearReLU(Linear):
    """Linear and ReLU as one operator: y = max(x weight^T + bias, 0).

    Arguments, parameters and state_dict are those of Linear.

    >>> LinearReLU(20, 30)(torch.randn(128, 20)).shape
    torch.Size([128, 30])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear_relu(input, self.weight, self.bias)


class Run:
    """A straight run of layers as one operator, `functional.chain`.

    Copies of a model, as DataParallel's threads run them, share what is prepared here.

    Raises:
        ValueError: They are not such a run; the message says why.
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        self._prepared = _Prepared(tuple(members))

    def __call__(self, members: tuple[nn.Module, ...], input: Tensor) -> Tensor:
        """The output of `members`, as they are now; one by one where a hook waits for a call of one."""
        prepared = self._prepared  # as it stands: another thread may put its own there
        if members != prepared.members:
            prepared = self._prepared = _Prepared(members)
        if _has_any_global_hook() or _any_has_hook(members):
            for member in members:
                input = member(input)
            return input
        params = []
        for layer, name in prepared.params:
            found = layer._parameters.get(name)  # on the short way where it is a plain parameter
            params.append(getattr(layer, name) if found is None else found)
        return functional.chain(input, prepared.plan, *params)


class _Prepared:
    """The plan of the chain that `members` are, and its parameters as pairs of a layer and a name."""

    def __init__(self, members: tuple[nn.Module, ...]) -> None:
        self.members = members
        self.layers: list[Any] = []
        self.plan: functional.Plan = ()
        waiting = list(reversed(members))
        if not waiting:
            raise ValueError("a chain needs at least one layer")
        while waiting:
            self._add(waiting.pop(), waiting)
        names = [(layer, name) for layer in self.layers for name in ("weight", "bias")]
        self.params = [(layer, name) for layer, name in names if getattr(layer, name) is not None]

    def _add(self, layer: Any, waiting: list[Any]) -> None:
        """Adds the stage that `layer` begins; what belongs to it is taken from `waiting`, next one last."""

        def takes(kind: type[nn.Module]) -> Any:
            return waiting.pop() if waiting and _computes_as(waiting[-1], kind) else None

        flat = bool(self.plan) and isinstance(self.layers[-1], nn.Linear)
        if _computes_as(layer, nn.Flatten):
            if not self.plan or flat or not waiting or not isinstance(waiting[-1], nn.Linear):
                raise ValueError(f"a chain can flatten only in front of its first linear layer: {layer}")
            if (layer.start_dim, layer.end_dim) != (1, -1):
                raise ValueError(f"a chain can flatten only all dimensions but the first: {layer}")
            layer = waiting.pop()
        elif isinstance(layer, nn.Linear) and self.plan and not flat:
            raise ValueError(f"a chain needs a Flatten between a convolution and {layer}")
        if _computes_as(layer, nn.Linear, Linear, LinearReLU):
            relu = _computes_as(layer, LinearReLU) or takes(nn.ReLU)
            stage = functional.linear_stage(act="relu" if relu else "none", bias=layer.bias is not None)
        elif _computes_as(layer, nn.Conv2d, Conv2d, ConvReLUPool2d) and not flat:
            stage = _conv_stage(layer, takes)
        else:
            raise ValueError(
                "a chain is convolutions, each with a ReLU and a max-pool or without, then linear layers, "
                f"each with a ReLU or without; this does not fit: {layer}"
            )
        self.plan += stage
        self.layers.append(layer)


def _any_has_hook(modules: Iterable[nn.Module]) -> bool:
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return True
    return False


def _computes_as(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether a module does what one of the classes does: a subclass may override it."""
    return any(
        isinstance(module, each)
        and all(
            getattr(type(module), name, None) is getattr(each, name, None)
            for name in ("forward", "_conv_forward")
        )
        for each in classes
    )


def _conv_stage(conv: Any, takes: Callable[[type[nn.Module]], Any]) -> functional.Plan:
    if conv.padding_mode != "zeros":
        raise ValueError(f"a chain pads with zeros alone, got padding_mode={conv.padding_mode!r}: {conv}")
    if _computes_as(conv, ConvReLUPool2d):
        relu, pool = True, (conv.pool_kernel_size, conv.pool_stride, conv.pool_padding)
    else:
        relu, pool, behind = takes(nn.ReLU), (None, None, 0), takes(nn.MaxPool2d) or takes(MaxPool2d)
        if behind is not None:
            if behind.dilation not in (1, (1, 1)) or behind.ceil_mode or behind.return_indices:
                raise ValueError(f"a chain pools without dilation, ceil_mode and return_indices: {behind}")
            pool = (behind.kernel_size, behind.stride, behind.padding)
    padding = conv.padding
    if isinstance(padding, str):  # torch keeps what it comes to: the last axis first, front and back
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        padding = (top, left, bottom, right)
    return functional.conv_stage(
        act="relu" if relu else "none",
        bias=conv.bias is not None,
        stride=conv.stride,
        padding=padding,
        dilation=conv.dilation,
        groups=conv.groups,
        pool_kernel_size=pool[0],
        pool_stride=pool[1],
        pool_padding=pool[2],
    )


class Chain(nn.Sequential):
    """torch.nn.Sequential of a straight run of layers, as one operator.

    The layers are convolutions (Conv2d, each with a ReLU and a MaxPool2d behind it or without; or
    ConvReLUPool2d), then, behind a Flatten, linear ones (Linear with a ReLU or without, LinearReLU),
    torch.nn's or fastconv's. While one of them has a hook they run one by one.

    Raises:
        ValueError: The layers are not such a run.

    Parameters and state_dict are those of the Sequential.

    Shapes: [N, C, H, W], or [..., K] where the first layer is linear, to those of the last layer.

    >>> layers = Conv2d(1, 6, 5), nn.ReLU(), MaxPool2d(2), nn.Flatten(), Linear(6 * 14 * 14, 10)
    >>> Chain(*layers)(torch.randn(2, 1, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._run = Run(self)

    def forward(self, input: Tensor) -> Tensor:
        return self._run(tuple(self._modules.values()), input)
