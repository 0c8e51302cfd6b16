# SPDX-License-Identifier: MIT
"""Max-pool, whose backward and gather are each other's gradients, and average pooling, whose passes are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastconv import ops
from fastconv.autograd import vmap
from fastconv.autograd.function import (
    Arguments,
    Function,
    by_dims,
    is_transformed,
    save,
    wants_gradient,
    without_gradient,
)

# --- max-pool -----------------------------------------------------------------------------------------------
# `window` is the tuple (kernel_size, stride, padding, dilation, ceil_mode) that the operators take.


class MaxPool(Function):
    @staticmethod
    def forward(input, window, kernel):
        return ops.max_pool(input, *window, True, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, ctx.window, ctx.kernel = inputs
        _, offsets = output
        without_gradient(ctx, offsets)
        save(ctx, offsets)
        ctx.input_size = input.shape

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return None, None, None
        (offsets,) = ctx.saved_tensors
        return max_pool_backward(grad_output, offsets, ctx.input_size, ctx.window, ctx.kernel), None, None

    @staticmethod
    def tangent(ctx, input_t, *_):
        (offsets,) = ctx.saved_tensors
        return max_pool_gather(input_t, offsets, ctx.window, ctx.kernel), None

    @staticmethod
    def mapped(info, in_dims, input, window, kernel):
        return vmap.folded(lambda x: max_pool_with_offsets(x, window, kernel), info, in_dims, input)


_MAX_POOL = by_dims(MaxPool)


class MaxPoolInputGrad(Function):
    @staticmethod
    def forward(grad_output, offsets, input_size, window, kernel):
        return ops.max_pool_backward(grad_output, offsets, input_size, *window, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, offsets, ctx.input_size, ctx.window, ctx.kernel = inputs
        save(ctx, offsets)

    @staticmethod
    def backward(ctx, grad_grad_input):
        (offsets,) = ctx.saved_tensors
        return max_pool_gather(grad_grad_input, offsets, ctx.window, ctx.kernel), None, None, None, None

    @staticmethod
    def tangent(ctx, grad_output_t, *_):
        (offsets,) = ctx.saved_tensors
        return max_pool_backward(grad_output_t, offsets, ctx.input_size, ctx.window, ctx.kernel)

    @staticmethod
    def mapped(info, in_dims, grad_output, offsets, input_size, window, kernel):
        size = (max(info.batch_size, 1) * input_size[0], *input_size[1:])
        return vmap.folded(
            lambda g, o: max_pool_backward(g, o, size, window, kernel), info, in_dims, grad_output, offsets
        )


class MaxPoolGather(Function):
    @staticmethod
    def forward(input, offsets, window, kernel):
        return ops.max_pool_gather(input, offsets, *window, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, offsets, ctx.window, ctx.kernel = inputs
        save(ctx, offsets)
        ctx.input_size = input.shape

    @staticmethod
    def backward(ctx, grad_output):
        (offsets,) = ctx.saved_tensors
        return (
            max_pool_backward(grad_output, offsets, ctx.input_size, ctx.window, ctx.kernel),
            None,
            None,
            None,
        )

    @staticmethod
    def tangent(ctx, input_t, *_):
        (offsets,) = ctx.saved_tensors
        return max_pool_gather(input_t, offsets, ctx.window, ctx.kernel)

    @staticmethod
    def mapped(info, in_dims, input, offsets, window, kernel):
        return vmap.folded(lambda x, o: max_pool_gather(x, o, window, kernel), info, in_dims, input, offsets)


class MaxPoolIndices(Function):
    @staticmethod
    def forward(offsets, input_size, window, kernel):
        return ops.max_pool_indices(offsets, input_size, *window, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx, _):
        return None, None, None, None

    @staticmethod
    def tangent(ctx, *_):
        return None

    @staticmethod
    def mapped(info, in_dims, offsets, input_size, window, kernel):
        size = (max(info.batch_size, 1) * input_size[0], *input_size[1:])
        return vmap.folded(lambda o: max_pool_indices(o, size, window, kernel), info, in_dims, offsets)


def max_pool(input: Tensor, window: Arguments, kernel: str = "") -> Tensor:
    """The maxima alone."""
    if wants_gradient(input):
        return _MAX_POOL[input.dim()].apply(input, window, kernel)[0]
    return ops.max_pool(input, *window, False, kernel)[0]


def max_pool_with_offsets(input: Tensor, window: Arguments, kernel: str = "") -> tuple[Tensor, Tensor]:
    """The maxima, and where in each window they lay."""
    if wants_gradient(input):
        return _MAX_POOL[input.dim()].apply(input, window, kernel)
    return ops.max_pool(input, *window, True, kernel)


def max_pool_backward(grad_output, offsets, input_size, window, kernel=""):
    if wants_gradient(grad_output):
        return MaxPoolInputGrad.apply(grad_output, offsets, input_size, window, kernel)
    return ops.max_pool_backward(grad_output, offsets, input_size, *window, kernel)


def max_pool_gather(input, offsets, window, kernel=""):
    if wants_gradient(input):
        return MaxPoolGather.apply(input, offsets, window, kernel)
    return ops.max_pool_gather(input, offsets, *window, kernel)


def max_pool_indices(
    offsets: Tensor, input_size: Sequence[int], window: Arguments, kernel: str = ""
) -> Tensor:
    """What the offsets of a [N, ...] batch are as positions in a plane of the input, as torch counts them."""
    if is_transformed():
        return MaxPoolIndices.apply(offsets, input_size, window, kernel)
    return ops.max_pool_indices(offsets, input_size, *window, kernel)


# --- average pooling ----------------------------------------------------------------------------------------
# `window` is the tuple (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override) that
# the operators take.


class AvgPool(Function):
    @staticmethod
    def forward(input, window, kernel):
        return ops.avg_pool(input, *window, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, ctx.window, ctx.kernel = inputs
        ctx.input_size, ctx.channels_last = input.shape, _is_channels_last(input)

    @staticmethod
    def backward(ctx, grad_output):
        grad_input = avg_pool_backward(grad_output, ctx.input_size, ctx.window, ctx.channels_last, ctx.kernel)
        return grad_input, None, None

    @staticmethod
    def tangent(ctx, input_t, *_):
        return avg_pool(input_t, ctx.window, ctx.kernel)

    @staticmethod
    def mapped(info, in_dims, input, window, kernel):
        return vmap.folded(lambda x: avg_pool(x, window, kernel), info, in_dims, input)


_AVG_POOL = by_dims(AvgPool)


class AvgPoolInputGrad(Function):
    @staticmethod
    def forward(grad_output, input_size, window, channels_last, kernel):
        return ops.avg_pool_backward(grad_output, input_size, *window, channels_last, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.input_size, ctx.window, ctx.channels_last, ctx.kernel = inputs

    @staticmethod
    def backward(ctx, grad_grad_input):
        return avg_pool(grad_grad_input, ctx.window, ctx.kernel), None, None, None, None

    @staticmethod
    def tangent(ctx, grad_output_t, *_):
        return avg_pool_backward(grad_output_t, ctx.input_size, ctx.window, ctx.channels_last, ctx.kernel)

    @staticmethod
    def mapped(info, in_dims, grad_output, input_size, window, channels_last, kernel):
        size = (max(info.batch_size, 1) * input_size[0], *input_size[1:])
        return vmap.folded(
            lambda g: avg_pool_backward(g, size, window, channels_last, kernel), info, in_dims, grad_output
        )


def _is_channels_last(input):
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.dim())
    return layout is not None and not input.is_contiguous() and input.is_contiguous(memory_format=layout)


def avg_pool(input: Tensor, window: Arguments, kernel: str = "") -> Tensor:
    if wants_gradient(input):
        return _AVG_POOL[input.dim()].apply(input, window, kernel)
    return ops.avg_pool(input, *window, kernel)


def avg_pool_backward(grad_output, input_size, window, channels_last, kernel=""):
    if wants_gradient(grad_output):
        return AvgPoolInputGrad.apply(grad_output, input_size, window, channels_last, kernel)
    return ops.avg_pool_backward(grad_output, input_size, *window, channels_last, kernel)
