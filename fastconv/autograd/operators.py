# SPDX-License-Identifier: MIT
"""Gradients of operators that are called by themselves, as graphs of torch.jit.trace and torch.export do.

They are those of this package's Functions. An operator that is not listed refuses what would lose a gradient.
"""

import torch

from fastconv import _C
from fastconv.autograd import batch_norm, chain, conv, conv_act_pool, linear, pool
from fastconv.autograd.function import is_transformed


def _conv_act_pool(input, weight, bias, *args):
    arguments = args[:4], args[4], args[5:8], args[9]  # conv, act, pool, kernel
    output, offsets = conv_act_pool.conv_act_pool_with_offsets(input, weight, bias, *arguments)
    return output, output.new_empty(0) if offsets is None else offsets


def _chain_of_stages(input, params, plan, _, kernel):
    if is_transformed():
        return chain.chain(input, plan, params, kernel), input.new_empty(0)
    return chain.Chain.apply(input, plan, kernel, *params)


def _norm_act_pool(input, weight, bias, eps, _, *args):
    return batch_norm.BatchNormReLUMaxPool2d.apply(input, weight, bias, eps, args[:3], args[3], False)


GRADIENTS = {
    "conv_fprop": lambda x, w, b, *args: conv.conv_fprop(x, w, b, args[:4], *args[4:]),
    "conv_dgrad": lambda g, w, size, *args: conv.conv_dgrad(g, w, size, args[:4], *args[4:]),
    "conv_wgrad": lambda g, x, size, *args: conv.conv_wgrad(g, x, size, args[:4], *args[4:]),
    "conv_act_pool": _conv_act_pool,
    "max_pool": lambda x, *args: pool.max_pool_with_offsets(x, args[:5], args[6]),
    "max_pool_backward": lambda g, o, size, *args: pool.max_pool_backward(g, o, size, args[:5], args[5]),
    "max_pool_gather": lambda x, o, *args: pool.max_pool_gather(x, o, args[:5], args[5]),
    "avg_pool": lambda x, *args: pool.avg_pool(x, args[:6], args[6]),
    "avg_pool_backward": lambda g, size, *args: pool.avg_pool_backward(g, size, args[:6], *args[6:]),
    "norm_act_pool": _norm_act_pool,
    "linear_act": linear.linear_act,
    "linear_dgrad": linear.linear_dgrad,
    "linear_wgrad": linear.linear_wgrad,
    "chain": _chain_of_stages,
}


def _checked(name, function):
    def call(*args):
        if torch._C._are_functorch_transforms_active():  # one of them is at work here, and takes no Function
            raise NotImplementedError(
                f"fastconv::{name}: torch.func has no rule for the raw operator; call fastconv.functional"
            )
        return function(*args)

    return call


_C.set_gradients({f"fastconv::{name}": _checked(name, function) for name, function in GRADIENTS.items()})
