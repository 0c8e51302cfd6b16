# SPDX-License-Identifier: MIT
"""Layers that drop in for torch.nn's: the same arguments, parameters, initialisation, state_dict and repr.

They are subclasses of torch.nn's layers and replace only the computation.
"""

from torch import nn

from fastconv import functional

__all__ = [
    "AvgPool2d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvReLUPool2d",
    "Linear",
    "LinearReLU",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
]


def _padded(conv, input):
    """Input and padding of a convolution: modes other than zeros pad the input first, as in torch.nn."""
    if conv.padding_mode == "zeros":
        return input, conv.padding
    return nn.functional.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0


class Conv1d(nn.Conv1d):
    """torch.nn.Conv1d on fastconv's kernels.

    Shapes: input [N, C, W] or [C, W], weight [K, C/groups, S], bias [K] -> [N, K, Q] or [K, Q].
    """

    def _conv_forward(self, input, weight, bias):
        input, padding = _padded(self, input)
        return functional.conv1d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d on fastconv's kernels.

    Shapes: input [N, C, H, W] or [C, H, W], weight [K, C/groups, R, S], bias [K] -> [N, K, P, Q] or [K,
        P, Q].
    """

    def _conv_forward(self, input, weight, bias):
        input, padding = _padded(self, input)
        return functional.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv3d(nn.Conv3d):
    """torch.nn.Conv3d on fastconv's kernels.

    Shapes: input [N, C, D, H, W] or [C, D, H, W], weight [K, C/groups, T, R, S], bias [K] -> [N, K, Z, P,
        Q] or [K, Z, P, Q].
    """

    def _conv_forward(self, input, weight, bias):
        input, padding = _padded(self, input)
        return functional.conv3d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


def _max_pool(function, pool, input):
    return function(
        input,
        pool.kernel_size,
        pool.stride,
        pool.padding,
        pool.dilation,
        ceil_mode=pool.ceil_mode,
        return_indices=pool.return_indices,
    )


class MaxPool1d(nn.MaxPool1d):
    """torch.nn.MaxPool1d on fastconv's kernels.

    Shapes: input [N, C, W] or [C, W] -> [N, C, Q] or [C, Q].
    """

    def forward(self, input):
        return _max_pool(functional.max_pool1d, self, input)


class MaxPool2d(nn.MaxPool2d):
    """torch.nn.MaxPool2d on fastconv's kernels.

    Shapes: input [N, C, H, W] or [C, H, W] -> [N, C, P, Q] or [C, P, Q].
    """

    def forward(self, input):
        return _max_pool(functional.max_pool2d, self, input)


class MaxPool3d(nn.MaxPool3d):
    """torch.nn.MaxPool3d on fastconv's kernels.

    Shapes: input [N, C, D, H, W] or [C, D, H, W] -> [N, C, Z, P, Q] or [C, Z, P, Q].
    """

    def forward(self, input):
        return _max_pool(functional.max_pool3d, self, input)


class AvgPool2d(nn.AvgPool2d):
    """torch.nn.AvgPool2d on fastconv's kernels.

    Shapes: input [N, C, H, W] or [C, H, W] -> [N, C, P, Q] or [C, P, Q].
    """

    def forward(self, input):
        return functional.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class Linear(nn.Linear):
    """torch.nn.Linear on fastconv's kernels.

    Shapes: input [..., in_features], weight [out_features, in_features], bias [out_features] -> [...,
        out_features].
    """

    def forward(self, input):
        return functional.linear(input, self.weight, self.bias)


class ConvReLUPool2d(Conv2d):
    """Conv2d, ReLU and MaxPool2d as one operator.

    Args:
        pool_kernel_size: Window of the pool, int or pair; None pools nothing.
        pool_stride: Int or pair; None is pool_kernel_size.
        pool_padding: Int or pair.

    The other arguments, the parameters and the state_dict are those of Conv2d.
    """

    def __init__(self, *args, pool_kernel_size=2, pool_stride=None, pool_padding=0, **kwargs):
        super().__init__(*args, **kwargs)
        self.pool_kernel_size = pool_kernel_size
        self.pool_stride = pool_stride
        self.pool_padding = pool_padding

    def _conv_forward(self, input, weight, bias):
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

    def extra_repr(self):
        pool = f", pool_kernel_size={self.pool_kernel_size}"
        if self.pool_stride is not None:
            pool += f", pool_stride={self.pool_stride}"
        if self.pool_padding != 0:
            pool += f", pool_padding={self.pool_padding}"
        return super().extra_repr() + pool


class LinearReLU(Linear):
    """Linear and ReLU as one operator. Arguments, parameters and state_dict are those of Linear."""

    def forward(self, input):
        return functional.linear_relu(input, self.weight, self.bias)
