# SPDX-License-Identifier: MIT
"""Gradients of operators that are called by themselves, as graphs of torch.jit.trace and torch.export do.

They are those of fastconv/autograd.py. An operator that is not listed refuses what would lose a gradient.
"""

import torch

from fastconv import _C, _chain, _norm, autograd


def _conv_act_pool(input, weight, bias, *args):
    conv, act, pool, _, kernel = args[:4], args[4], args[5:8], *args[8:]
    output, offsets = autograd.conv_act_pool_with_offsets(input, weight, bias, conv, act, pool, kernel)
    return output, output.new_empty(0) if offsets is None else offsets


def _chain_of_stages(input, params, plan, _, kernel):
    if autograd.is_transformed():
        return _chain.chain(input, plan, params, kernel), input.new_empty(0)
    return _chain.Chain.apply(input, plan, kernel, *params)


def _norm_act_pool(input, weight, bias, eps, _, *args):
    return _norm.BatchNormReLUMaxPool2d.apply(input, weight, bias, eps, args[:3], args[3], False)


GRADIENTS = {
    "conv_fprop": lambda x, w, b, *args: autograd.conv_fprop(x, w, b, args[:4], *args[4:]),
    "conv_dgrad": lambda g, w, size, *args: autograd.conv_dgrad(g, w, size, args[:4], *args[4:]),
    "conv_wgrad": lambda g, x, size, *args: autograd.conv_wgrad(g, x, size, args[:4], *args[4:]),
    "conv_act_pool": _conv_act_pool,
    "max_pool": lambda x, *args: autograd.max_pool_with_offsets(x, args[:5], args[6]),
    "max_pool_backward": lambda g, o, size, *args: autograd.max_pool_backward(g, o, size, args[:5], args[5]),
    "max_pool_gather": lambda x, o, *args: autograd.max_pool_gather(x, o, args[:5], args[5]),
    "avg_pool": lambda x, *args: autograd.avg_pool(x, args[:6], args[6]),
    "avg_pool_backward": lambda g, size, *args: autograd.avg_pool_backward(g, size, args[:6], *args[6:]),
    "norm_act_pool": _norm_act_pool,
    "linear_act": autograd.linear_act,
    "linear_dgrad": autograd.linear_dgrad,
    "linear_wgrad": autograd.linear_wgrad,
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
