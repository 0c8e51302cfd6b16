# SPDX-License-Identifier: MIT
"""Convolution: fprop, dgrad and wgrad, each of whose gradients is made of the other two.

`conv` is the tuple (stride, padding, dilation, groups) that the operators take, padding as fronts, then
backs.
"""

from torch import Tensor

from fastconv import ops
from fastconv.autograd import vmap
from fastconv.autograd.function import (
    Arguments,
    Function,
    by_dims,
    is_transformed,
    save,
    sum_of,
    wants_gradient,
)


class Conv(Function):
    @staticmethod
    def forward(input, weight, bias, conv, kernel):
        return ops.conv_fprop(input, weight, bias, *conv, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _, ctx.conv, ctx.kernel = inputs
        ctx.input_size, ctx.weight_size, ctx.output_size = input.shape, weight.shape, output.shape
        if is_transformed():
            return save(ctx, input, weight)
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None)

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_input = grad_weight = grad_bias = None
        if needs_input:
            grad_input = conv_dgrad(grad_output, weight, ctx.input_size, ctx.conv, ctx.kernel)
        if needs_weight:
            grad_weight, grad_bias = conv_wgrad(
                grad_output, input, ctx.weight_size, ctx.conv, needs_bias, ctx.kernel
            )
        elif needs_bias:
            grad_bias = grad_output.sum([0, *range(2, grad_output.dim())])
        return grad_input, grad_weight, grad_bias if needs_bias else None, None, None

    @staticmethod
    def tangent(ctx, input_t, weight_t, bias_t, *_):
        input, weight = ctx.saved_tensors
        terms = []
        if bias_t is not None:
            terms.append(bias_t.reshape(-1, *(1,) * (len(ctx.output_size) - 2)).expand(ctx.output_size))
        if input_t is not None:
            terms.append(conv_fprop(input_t, weight, None, ctx.conv, ctx.kernel))
        if weight_t is not None:
            terms.append(conv_fprop(input, weight_t, None, ctx.conv, ctx.kernel))
        return sum_of(terms)

    @staticmethod
    def mapped(info, in_dims, input, weight, bias, conv, kernel):
        return vmap.conv_fprop(conv_fprop, info, in_dims, input, weight, bias, conv, kernel)


_CONV = by_dims(Conv)


class ConvInputGrad(Function):
    @staticmethod
    def forward(grad_output, weight, input_size, conv, kernel):
        return ops.conv_dgrad(grad_output, weight, input_size, *conv, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, weight, ctx.input_size, ctx.conv, ctx.kernel = inputs
        save(ctx, grad_output, weight)

    @staticmethod
    def backward(ctx, grad_grad_input):
        grad_output, weight = ctx.saved_tensors
        grad_grad_output = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_grad_output = conv_fprop(grad_grad_input, weight, None, ctx.conv, ctx.kernel)
        if ctx.needs_input_grad[1]:
            grad_weight, _ = conv_wgrad(
                grad_output, grad_grad_input, weight.shape, ctx.conv, False, ctx.kernel
            )
        return grad_grad_output, grad_weight, None, None, None

    @staticmethod
    def tangent(ctx, grad_output_t, weight_t, *_):
        grad_output, weight = ctx.saved_tensors
        pairs = ((grad_output_t, weight), (grad_output, weight_t))
        return sum_of(
            conv_dgrad(g, w, ctx.input_size, ctx.conv, ctx.kernel)
            for g, w in pairs
            if g is not None and w is not None
        )

    @staticmethod
    def mapped(info, in_dims, grad_output, weight, input_size, conv, kernel):
        return vmap.conv_dgrad(conv_dgrad, info, in_dims, grad_output, weight, input_size, conv, kernel)


class ConvWeightGrad(Function):
    @staticmethod
    def forward(grad_output, input, weight_size, conv, bias, kernel):
        return ops.conv_wgrad(grad_output, input, weight_size, *conv, bias, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, ctx.weight_size, ctx.conv, ctx.bias, ctx.kernel = inputs
        save(ctx, grad_output, input)

    @staticmethod
    def backward(ctx, grad_grad_weight, grad_grad_bias):
        grad_output, input = ctx.saved_tensors
        grad_grad_output = grad_input = None
        if ctx.needs_input_grad[0]:
            bias = grad_grad_bias if ctx.bias else None
            grad_grad_output = conv_fprop(input, grad_grad_weight, bias, ctx.conv, ctx.kernel)
        if ctx.needs_input_grad[1]:
            grad_input = conv_dgrad(grad_output, grad_grad_weight, input.shape, ctx.conv, ctx.kernel)
        return grad_grad_output, grad_input, None, None, None, None

    @staticmethod
    def tangent(ctx, grad_output_t, input_t, *_):
        grad_output, input = ctx.saved_tensors
        terms = []
        if grad_output_t is not None:
            terms.append(conv_wgrad(grad_output_t, input, ctx.weight_size, ctx.conv, ctx.bias, ctx.kernel))
        if input_t is not None:
            weight_t, _ = conv_wgrad(grad_output, input_t, ctx.weight_size, ctx.conv, False, ctx.kernel)
            terms.append((weight_t, weight_t.new_zeros(ctx.weight_size[0] if ctx.bias else 0)))
        return sum_of(terms)

    @staticmethod
    def mapped(info, in_dims, grad_output, input, weight_size, conv, bias, kernel):
        return vmap.conv_wgrad(conv_wgrad, info, in_dims, grad_output, input, weight_size, conv, bias, kernel)


def conv_fprop(
    input: Tensor, weight: Tensor, bias: Tensor | None, conv: Arguments, kernel: str = ""
) -> Tensor:
    if wants_gradient(input, weight, bias):
        return _CONV[weight.dim()].apply(input, weight, bias, conv, kernel)
    return ops.conv_fprop(input, weight, bias, *conv, kernel)


def conv_dgrad(grad_output, weight, input_size, conv, kernel=""):
    if wants_gradient(grad_output, weight):
        return ConvInputGrad.apply(grad_output, weight, input_size, conv, kernel)
    return ops.conv_dgrad(grad_output, weight, input_size, *conv, kernel)


def conv_wgrad(grad_output, input, weight_size, conv, bias, kernel=""):
    if wants_gradient(grad_output, input):
        return ConvWeightGrad.apply(grad_output, input, weight_size, conv, bias, kernel)
    return ops.conv_wgrad(grad_output, input, weight_size, *conv, bias, kernel)


def conv_output_size(input_size, weight_size, conv):
    stride, padding, dilation, _ = conv
    axes = len(stride)
    spatial = [
        (input_size[2 + i] + padding[i] + padding[axes + i] - dilation[i] * (weight_size[2 + i] - 1) - 1)
        // stride[i]
        + 1
        for i in range(axes)
    ]
    return (input_size[0], weight_size[0], *spatial)
