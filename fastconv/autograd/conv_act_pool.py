# SPDX-License-Identifier: MIT
"""Convolution, ReLU and max-pool in one.

`pool` is the tuple (kernel_size, stride, padding), three empty tuples where nothing pools.
"""

import torch
from torch import Tensor

from fastconv import ops
from fastconv.autograd.conv import conv_dgrad, conv_fprop, conv_output_size, conv_wgrad
from fastconv.autograd.function import Arguments, Function, is_transformed, wants_gradient, without_gradient
from fastconv.autograd.pool import max_pool_backward, max_pool_with_offsets


class Conv2dReLUMaxPool2d(Function):
    @staticmethod
    def forward(input, weight, bias, conv, act, pool, kernel):
        return ops.conv_act_pool(input, weight, bias, *conv, act, *pool, True, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _, ctx.conv, ctx.act, ctx.pool, ctx.kernel = inputs
        pooled, offsets = output
        without_gradient(ctx, offsets)
        ctx.save_for_backward(input, weight, pooled, offsets)

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return (None,) * 7
        input, weight, pooled, offsets = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled() or is_transformed():  # a backward made of differentiable parts
            grads = unfused_backward(ctx, grad_output, input, weight, pooled, offsets, mask)
        else:
            grads = ops.conv_act_pool_backward(
                grad_output, pooled, offsets, input, weight, *ctx.conv, ctx.act, *ctx.pool, mask, ctx.kernel
            )
        grads = [grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)]
        return *grads, None, None, None, None


def unfused_backward(ctx, grad_output, input, weight, pooled, offsets, mask):
    """The gradients of the fused block by the unfused Functions, so that they can be differentiated again."""
    if ctx.act == "relu":
        grad_output = grad_output.masked_fill(pooled <= 0, 0)
    kernel_size, stride, padding = ctx.pool
    if kernel_size:
        ones = (1,) * len(kernel_size)
        window = (kernel_size, stride, padding, ones, False)
        unpooled = conv_output_size(input.shape, weight.shape, ctx.conv)
        grad_output = max_pool_backward(grad_output, offsets, unpooled, window, ctx.kernel)
    grad_input = grad_weight = grad_bias = None
    if mask[0]:
        grad_input = conv_dgrad(grad_output, weight, input.shape, ctx.conv, ctx.kernel)
    if mask[1] or mask[2]:
        grad_weight, grad_bias = conv_wgrad(grad_output, input, weight.shape, ctx.conv, mask[2], ctx.kernel)
    return grad_input, grad_weight, grad_bias


def conv_act_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Arguments,
    act: str,
    pool: Arguments,
    kernel: str = "",
) -> Tensor:
    if is_transformed():
        return _unfused(input, weight, bias, conv, act, pool, kernel)[0]
    if wants_gradient(input, weight, bias):
        return Conv2dReLUMaxPool2d.apply(input, weight, bias, conv, act, pool, kernel)[0]
    return ops.conv_act_pool(input, weight, bias, *conv, act, *pool, False, kernel)[0]


def conv_act_pool_with_offsets(input, weight, bias, conv, act, pool, kernel=""):
    """The output, and where in each window of the pool the maximum lay."""
    if is_transformed():
        return _unfused(input, weight, bias, conv, act, pool, kernel)
    if wants_gradient(input, weight, bias):
        return Conv2dReLUMaxPool2d.apply(input, weight, bias, conv, act, pool, kernel)
    return ops.conv_act_pool(input, weight, bias, *conv, act, *pool, True, kernel)


def _unfused(input, weight, bias, conv, act, pool, kernel):
    output, offsets = conv_fprop(input, weight, bias, conv, kernel), None
    if pool[0]:
        ones = (1,) * len(pool[0])
        output, offsets = max_pool_with_offsets(output, (*pool, ones, False), kernel)
    return torch.relu(output) if act == "relu" else output, offsets
