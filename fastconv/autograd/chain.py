# SPDX-License-Identifier: MIT
"""Gradients of a chain of stages, as one `torch.autograd.Function`, and by those of its parts.

`plan` is the tuple of ints that the operators take (csrc/core/chain.h), `params` the weights in order, each
followed by its bias where it has one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastconv import ops
from fastconv.autograd.conv_act_pool import conv_act_pool, conv_act_pool_with_offsets, unfused_backward
from fastconv.autograd.function import Function, is_transformed, wants_gradient, without_gradient
from fastconv.autograd.linear import linear_act, unfused_linear_backward


class Stage(NamedTuple):
    """A stage of a plan; `conv` and `pool` are None of a linear one."""

    conv: tuple | None
    act: str
    bias: bool
    pool: tuple | None
    kernel: str


def stages(plan, kernel=""):
    ints = iter(plan)

    def take(count):
        return tuple(next(ints) for _ in range(count))

    for kind in ints:
        act, bias = ("none", "relu")[next(ints)], bool(next(ints))
        conv = pool = None
        if kind == 0:
            conv = (take(2), take(4), take(2), next(ints))
            pool = (take(2), take(2), take(2))
            if pool[0] == (0, 0):
                pool = ((), (), ())
        yield Stage(conv, act, bias, pool, kernel)


def _ends_with_relu(plan):
    """Whether backward reads the output; where it doesn't, the caller may write into it."""
    start = 0
    while start < len(plan):
        act, start = plan[start + 1], start + (18 if plan[start] == 0 else 3)
    return act == 1


class Chain(Function):
    @staticmethod
    def forward(input, plan, kernel, *params):
        return ops.chain(input, params, plan, True, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, ctx.plan, ctx.kernel, *params = inputs
        output, saved = output
        without_gradient(ctx, saved)
        ctx.save_for_backward(input, output if _ends_with_relu(ctx.plan) else None, saved, *params)

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        input, output, saved, *params = ctx.saved_tensors
        output = grad_output if output is None else output  # of its size
        mask = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
        # Of differentiable parts where the result is differentiated or mapped over.
        if torch.is_grad_enabled() or is_transformed() or _is_batched(grad_output):
            grads = _unfused_chain_backward(ctx, grad_output, input, params, mask)
        else:
            bits = sum(1 << i for i, wanted in enumerate(mask) if wanted)
            grad_input, grads = ops.chain_backward(
                grad_output, output, input, params, saved, ctx.plan, bits, ctx.kernel
            )
            grads = [grad_input, *grads]
        grads = [grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)]
        return grads[0], None, None, *grads[1:]


def _is_batched(grad):
    """By autograd.grad's is_grads_batched, which takes no operator that returns a list."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad)


def _unfused_chain_backward(ctx, grad_output, input, params, mask):
    """The gradients by the unfused Functions, stage by stage; what lies between the stages is made again."""
    params, wanted, passes = iter(params), iter(mask[1:]), []
    for stage in stages(ctx.plan, ctx.kernel):
        weight, bias = next(params), next(params) if stage.bias else None
        needs = [next(wanted), next(wanted) if stage.bias else False]
        if stage.conv is None:
            input, offsets = input.flatten(1), None
            output = linear_act(input, weight, bias, stage.act, stage.kernel)
        else:
            output, offsets = conv_act_pool_with_offsets(
                input, weight, bias, stage.conv, stage.act, stage.pool, stage.kernel
            )
        passes.append((stage, output, offsets, input, weight, needs))
        input = output
    grads, grad = [], grad_output
    for i, (stage, output, offsets, input, weight, needs) in reversed(list(enumerate(passes))):
        needs_input = mask[0] or any(any(earlier[-1]) for earlier in passes[:i])
        each = [needs_input, *needs]
        if stage.conv is None:
            found = unfused_linear_backward(stage, grad, output, input, weight, each)
        else:
            grad = grad.reshape(output.shape)
            found = unfused_backward(stage, grad, input, weight, output, offsets, each)
        grad, *found = found
        grads[:0] = found if stage.bias else found[:1]
        if not needs_input:
            grads[:0] = [None] * (len(mask) - 1 - len(grads))
            return None, *grads
    return grad, *grads


def _unfused_chain(input, plan, params, kernel):
    params = iter(params)
    for stage in stages(plan, kernel):
        weight, bias = next(params), next(params) if stage.bias else None
        if stage.conv is None:
            input = linear_act(input.flatten(1), weight, bias, stage.act, kernel)
        else:
            input = conv_act_pool(input, weight, bias, stage.conv, stage.act, stage.pool, kernel)
    return input


def chain(input: Tensor, plan: tuple[int, ...], params: Sequence[Tensor], kernel: str = "") -> Tensor:
    if is_transformed():
        return _unfused_chain(input, plan, params, kernel)
    if wants_gradient(input, *params):
        return Chain.apply(input, plan, kernel, *params)[0]
    return ops.chain(input, params, plan, False, kernel)[0]
