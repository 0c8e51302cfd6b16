# SPDX-License-Identifier: MIT
"""Layers that drop in for torch.nn's: the same arguments, parameters, initialisation, state_dict and repr.

They are subclasses of torch.nn's layers and replace only the computation.
"""

from torch import nn

from fastconv import functional

__all__ = ["Conv2d", "ConvReLUPool2d", "Linear", "LinearReLU", "MaxPool2d"]


def _padded(conv, input):
    """Input and padding of a convolution: modes other than zeros pad the input first, as in torch.nn."""
    if conv.padding_mode == "zeros":
        return input, conv.padding
    return nn.functional.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d on fastconv's kernels.

    Shapes: input [N, C, H, W] or [C, H, W], weight [K, C/groups, R, S], bias [K] -> [N, K, P, Q] or [K,
        P, Q].
    """

    def _conv_forward(self, input, weight, bias):
        input, padding = _padded(self, input)
        return functional.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class MaxPool2d(nn.MaxPool2d):
    """torch.nn.MaxPool2d on fastconv's kernels.

    Shapes: input [N, C, H, W] or [C, H, W] -> [N, C, P, Q] or [C, P, Q].
    """

    def forward(self, input):
        return functional.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
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
