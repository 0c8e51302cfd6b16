# SPDX-License-Identifier: MIT
"""FLOPs of the operators for `torch.utils.flop_counter`, counted as torch counts its own.

A multiplication and an addition are two; bias, ReLU and pooling count nothing, and neither does what a fused
backward makes again. A formula takes an operator's arguments, its tensors as their sizes.
"""

from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula

from fastconv._chain import stages
from fastconv.autograd import conv_output_size

_ops = torch.ops.fastconv


def _conv(output_size, weight_size):
    return 2 * output_size[0] * prod(output_size[2:]) * prod(weight_size)


@register_flop_formula(_ops.conv_fprop)
def _conv_fprop(input, weight, *_, out_shape, **__):
    return _conv(out_shape, weight)


@register_flop_formula(_ops.conv_dgrad)
def _conv_dgrad(grad_output, weight, *_, **__):
    return _conv(grad_output, weight)


@register_flop_formula(_ops.conv_wgrad)
def _conv_wgrad(grad_output, input, weight_size, *_, **__):
    return _conv(grad_output, weight_size)


@register_flop_formula(_ops.conv_act_pool)
def _conv_act_pool(input, weight, bias, stride, padding, dilation, groups, *_, **__):
    return _conv(conv_output_size(input, weight, (stride, padding, dilation, groups)), weight)


@register_flop_formula(_ops.conv_act_pool_backward)
def _conv_act_pool_backward(grad_output, output, offsets, input, weight, *args, **_):
    *conv, mask = *args[:4], args[8]
    return _conv(conv_output_size(input, weight, conv), weight) * sum(mask[:2])


def _linear(rows, weight):
    return 2 * prod(rows[:-1]) * prod(weight)


@register_flop_formula(_ops.linear_act)
def _linear_act(input, weight, *_, **__):
    return _linear(input, weight)


@register_flop_formula(_ops.linear_dgrad)
def _linear_dgrad(grad_output, weight, *_, **__):
    return _linear(grad_output, weight)


@register_flop_formula(_ops.linear_wgrad)
def _linear_wgrad(grad_output, input, *_, **__):
    return _linear(grad_output, (grad_output[-1], input[-1]))


@register_flop_formula(_ops.linear_act_backward)
def _linear_act_backward(grad_output, output, input, weight, act, mask, *_, **__):
    return _linear(input, weight) * sum(mask[:2])


def _stages(input, params, plan):
    """The FLOPs of each stage's forward, and how many parameters it has."""
    params = iter(params)
    for stage in stages(plan):
        weight = next(params)
        if stage.bias:
            next(params)
        if stage.conv is None:
            yield _linear((input[0], weight[1]), weight), 1 + stage.bias
            continue
        output = conv_output_size(input, weight, stage.conv)
        yield _conv(output, weight), 1 + stage.bias
        if stage.pool[0]:
            kernel, stride, padding = stage.pool
            ones = (1,) * len(kernel)
            output = conv_output_size(output, (*output[1:2], 0, *kernel), (stride, padding * 2, ones, 1))
        input = output


@register_flop_formula(_ops.chain)
def _chain(input, params, plan, *_, **__):
    return sum(flops for flops, _ in _stages(input, params, plan))


@register_flop_formula(_ops.chain_backward)
def _chain_backward(grad_output, output, input, params, saved, plan, mask, *_, **__):
    total, wanted, mask = 0, mask & 1, mask >> 1  # wanted: the gradient of the stage's input
    for flops, count in _stages(input, params, plan):
        total += flops * (wanted + (mask & 1))
        wanted, mask = int(wanted or mask % (1 << count) != 0), mask >> count
    return total
