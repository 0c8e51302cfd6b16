# SPDX-License-Identifier: MIT
"""FLOPs of the operators, told to torch.utils.flop_counter, whose FlopCounterMode then knows them.

As torch counts: the multiply-adds of convolutions and linear layers, two each; no biases, ReLUs and pools.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from fastconv.autograd.chain import stages
from fastconv.autograd.conv import conv_output_size

_ops = torch.ops.fastconv


def _conv(output, weight):
    return 2 * math.prod(output) * math.prod(weight[1:])


@register_flop_formula(_ops.conv_fprop)
def _conv_fprop(input, weight, *_, out_shape):
    return _conv(out_shape, weight)


@register_flop_formula(_ops.conv_dgrad)
def _conv_dgrad(grad_output, weight, *_, out_shape):
    return _conv(grad_output, weight)


@register_flop_formula(_ops.conv_wgrad)
def _conv_wgrad(grad_output, input, weight_size, *_, out_shape):
    return _conv(grad_output, weight_size)


@register_flop_formula(_ops.conv_act_pool)
def _conv_act_pool(input, weight, bias, stride, padding, dilation, groups, *_, out_shape):
    return _conv(conv_output_size(input, weight, (stride, padding, dilation, groups)), weight)


@register_flop_formula(_ops.conv_act_pool_backward)
def _conv_act_pool_backward(
    grad_output, output, offsets, input, weight, stride, padding, dilation, groups, *rest, out_shape
):
    mask = rest[4]
    filtered = conv_output_size(input, weight, (stride, padding, dilation, groups))
    return (mask[0] + mask[1]) * _conv(filtered, weight)


@register_flop_formula([_ops.linear_act, _ops.linear_dgrad])
def _linear(rows, weight, *_, out_shape):
    return 2 * math.prod(rows[:-1]) * math.prod(weight)


@register_flop_formula(_ops.linear_wgrad)
def _linear_wgrad(grad_output, input, *_, out_shape):
    return 2 * math.prod(grad_output) * input[-1]


@register_flop_formula(_ops.linear_act_backward)
def _linear_act_backward(grad_output, output, input, weight, act, mask, *_, out_shape):
    return (mask[0] + mask[1]) * 2 * math.prod(grad_output[:-1]) * math.prod(weight)


@register_flop_formula(_ops.chain)
def _chain(input, params, plan, *_, out_shape):
    return sum(_stages_of(input, params, plan))


@register_flop_formula(_ops.chain_backward)
def _chain_backward(grad_output, output, input, params, saved, plan, mask, *_, out_shape):
    """A stage's gradient of the input is wanted where a gradient in front of it is."""
    total, in_front, bit = 0, mask & 1, 1
    for flops, stage in zip(_stages_of(input, params, plan), stages(plan), strict=True):
        own = mask >> bit & (3 if stage.bias else 1)
        total += flops * (bool(in_front) + (own & 1))
        in_front, bit = in_front | own, bit + 1 + stage.bias
    return total


def _stages_of(size, params, plan):
    params = iter(params)
    for stage in stages(plan):
        weight = next(params)
        if stage.bias:
            next(params)
        if stage.conv is None:
            yield 2 * size[0] * math.prod(weight)
            continue
        size = conv_output_size(size, weight, stage.conv)
        yield _conv(size, weight)
        if stage.pool[0]:
            size = _pooled(size, *stage.pool)


def _pooled(size, kernel, stride, padding):
    extents = zip(size[2:], kernel, stride, padding, strict=True)
    return (*size[:2], *((x + 2 * p - k) // s + 1 for x, k, s, p in extents))
