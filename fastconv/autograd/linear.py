# SPDX-License-Identifier: MIT
"""Linear, alone or with a ReLU: three products, each of whose gradients is made of the other two."""

import torch
from torch import Tensor

from fastconv import ops
from fastconv.autograd import vmap
from fastconv.autograd.conv import conv_dgrad, conv_fprop, conv_wgrad
from fastconv.autograd.function import Function, is_transformed, save, sum_of, wants_gradient


class Linear(Function):
    @staticmethod
    def forward(input, weight, bias, act, kernel):
        return ops.linear_act(input, weight, bias, act, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _, ctx.act, ctx.kernel = inputs
        ctx.output_size = output.shape
        if is_transformed() or ctx.act != "none":
            return save(ctx, input, weight, output if ctx.act != "none" else None)
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None, None)

    @staticmethod
    def backward(ctx, grad_output):
        input, weight, output = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        if ctx.act != "none" and not torch.is_grad_enabled() and not is_transformed():
            grads = ops.linear_act_backward(grad_output, output, input, weight, ctx.act, mask, ctx.kernel)
        else:
            grads = unfused_linear_backward(ctx, grad_output, output, input, weight, mask)
        grads = [grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)]
        return *grads, None, None

    @staticmethod
    def tangent(ctx, input_t, weight_t, bias_t, *_):
        input, weight, _ = ctx.saved_tensors
        terms = [] if bias_t is None else [bias_t.expand(ctx.output_size)]
        if input_t is not None:
            terms.append(linear_act(input_t, weight, None, "none", ctx.kernel))
        if weight_t is not None:
            terms.append(linear_act(input, weight_t, None, "none", ctx.kernel))
        return sum_of(terms)

    @staticmethod
    def mapped(info, in_dims, input, weight, bias, act, kernel):
        return vmap.linear(linear_act, conv_fprop, info, in_dims, input, weight, bias, kernel)


def unfused_linear_backward(ctx, grad_output, output, input, weight, mask):
    if ctx.act == "relu":
        grad_output = grad_output.masked_fill(output <= 0, 0)
    grad_input = grad_weight = grad_bias = None
    if mask[0]:
        grad_input = linear_dgrad(grad_output, weight, ctx.kernel)
    if mask[1]:
        grad_weight, grad_bias = linear_wgrad(grad_output, input, mask[2], ctx.kernel)
    elif mask[2]:
        _, grad_bias = linear_wgrad(grad_output, grad_output.narrow(-1, 0, 0), True, ctx.kernel)
    return grad_input, grad_weight, grad_bias


class LinearReLU(Linear):
    """Linear with act="relu", under a name of its own in graphs."""


class LinearInputGrad(Function):
    @staticmethod
    def forward(grad_output, weight, kernel):
        return ops.linear_dgrad(grad_output, weight, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, weight, ctx.kernel = inputs
        save(ctx, grad_output, weight)

    @staticmethod
    def backward(ctx, grad_grad_input):
        grad_output, weight = ctx.saved_tensors
        grad_grad_output = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_grad_output = linear_act(grad_grad_input, weight, None, "none", ctx.kernel)
        if ctx.needs_input_grad[1]:
            grad_weight, _ = linear_wgrad(grad_output, grad_grad_input, False, ctx.kernel)
        return grad_grad_output, grad_weight, None

    @staticmethod
    def tangent(ctx, grad_output_t, weight_t, *_):
        grad_output, weight = ctx.saved_tensors
        pairs = ((grad_output_t, weight), (grad_output, weight_t))
        return sum_of(linear_dgrad(g, w, ctx.kernel) for g, w in pairs if g is not None and w is not None)

    @staticmethod
    def mapped(info, in_dims, grad_output, weight, kernel):
        return vmap.linear_dgrad(linear_dgrad, conv_dgrad, info, in_dims, grad_output, weight, kernel)


class LinearWeightGrad(Function):
    @staticmethod
    def forward(grad_output, input, bias, kernel):
        return ops.linear_wgrad(grad_output, input, bias, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, ctx.bias, ctx.kernel = inputs
        save(ctx, grad_output, input)

    @staticmethod
    def backward(ctx, grad_grad_weight, grad_grad_bias):
        grad_output, input = ctx.saved_tensors
        grad_grad_output = grad_input = None
        if ctx.needs_input_grad[0]:
            bias = grad_grad_bias if ctx.bias else None
            grad_grad_output = linear_act(input, grad_grad_weight, bias, "none", ctx.kernel)
        if ctx.needs_input_grad[1]:
            grad_input = linear_dgrad(grad_output, grad_grad_weight, ctx.kernel)
        return grad_grad_output, grad_input, None, None

    @staticmethod
    def tangent(ctx, grad_output_t, input_t, *_):
        grad_output, input = ctx.saved_tensors
        terms = []
        if grad_output_t is not None:
            terms.append(linear_wgrad(grad_output_t, input, ctx.bias, ctx.kernel))
        if input_t is not None:
            weight_t, _ = linear_wgrad(grad_output, input_t, False, ctx.kernel)
            terms.append((weight_t, weight_t.new_zeros(weight_t.shape[0] if ctx.bias else 0)))
        return sum_of(terms)

    @staticmethod
    def mapped(info, in_dims, grad_output, input, bias, kernel):
        return vmap.linear_wgrad(conv_wgrad, info, in_dims, grad_output, input, bias, kernel)


def linear_act(input: Tensor, weight: Tensor, bias: Tensor | None, act: str, kernel: str = "") -> Tensor:
    if act == "relu" and is_transformed():
        return torch.relu(linear_act(input, weight, bias, "none", kernel))
    if wants_gradient(input, weight, bias):
        function = Linear if act == "none" else LinearReLU
        return function.apply(input, weight, bias, act, kernel)
    return ops.linear_act(input, weight, bias, act, kernel)


def linear_dgrad(grad_output, weight, kernel=""):
    if wants_gradient(grad_output, weight):
        return LinearInputGrad.apply(grad_output, weight, kernel)
    return ops.linear_dgrad(grad_output, weight, kernel)


def linear_wgrad(grad_output, input, bias, kernel=""):
    if wants_gradient(grad_output, input):
        return LinearWeightGrad.apply(grad_output, input, bias, kernel)
    return ops.linear_wgrad(grad_output, input, bias, kernel)
