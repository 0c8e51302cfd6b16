# SPDX-License-Identifier: MIT
"""Batch-norm by the batch's own statistics, ReLU and max-pool: one `torch.autograd.Function`, and its parts.

`pool` is the tuple (kernel_size, stride, padding) that the operator takes, three empty tuples where nothing
pools.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv import ops
from fastconv.autograd.function import Arguments, Function, is_transformed, wants_gradient
from fastconv.autograd.pool import max_pool, max_pool_backward

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class BatchNormReLUMaxPool2d(Function):
    @staticmethod
    def forward(input, weight, bias, eps, pool, kernel, overwrite):
        return ops.norm_act_pool(input, weight, bias, eps, "relu", *pool, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _, ctx.eps, ctx.pool, ctx.kernel, ctx.overwrite = inputs
        pooled, offsets, mean, invstd = output
        ctx.mark_non_differentiable(offsets, mean, invstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, pooled, offsets, mean, invstd)

    @staticmethod
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * 7
        input, weight, pooled, offsets, mean, invstd = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled() or is_transformed():  # a backward made of differentiable parts
            grads = _unfused_backward(ctx, grad_output, input, weight, pooled, offsets)
        else:
            saved = (pooled, offsets, input, weight, mean, invstd, "relu", *ctx.pool)
            grad = _laid_out_as(pooled, grad_output)
            if ctx.overwrite and mask[0] and not torch._C._autograd._get_current_graph_task_keep_graph():
                grads = ops.norm_act_pool_backward_(grad, *saved, mask[1:], ctx.kernel)
                grads = (input.detach(), *grads)
            else:
                grads = ops.norm_act_pool_backward(grad, *saved, mask, ctx.kernel)
        grads = [grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)]
        return *grads, None, None, None, None


def _laid_out_as(other, tensor):
    """A flatten behind the pool sends back the gradient of a channels_last tensor as a contiguous one."""
    layout = torch.contiguous_format if other.is_contiguous() else torch.channels_last
    return tensor.contiguous(memory_format=layout)


def _unfused_backward(ctx, grad_output, input, weight, pooled, offsets):
    """The gradients in terms of operations that can be differentiated again."""
    grad = grad_output.masked_fill(pooled <= 0, 0)
    if ctx.pool[0]:
        grad = max_pool_backward(grad, offsets, input.shape, (*ctx.pool, (1, 1), False), ctx.kernel)
    axes = (0, 2, 3)
    centred = input - input.mean(axes, keepdim=True)
    invstd = (centred.square().mean(axes, keepdim=True) + ctx.eps).rsqrt()
    normal = centred * invstd
    product = grad * normal
    rest = grad - grad.mean(axes, keepdim=True) - normal * product.mean(axes, keepdim=True)
    scale = invstd if weight is None else invstd * weight.reshape(1, -1, 1, 1)
    return scale * rest, product.sum(axes), grad.sum(axes)


def norm_act_pool(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    pool: Arguments,
    kernel: str = "",
    overwrite: bool = False,
) -> Tensor:
    """max_pool(relu(batch_norm(input))); the running statistics, or None, are moved towards the batch's.

    What the operator does not take, such as parameters of another dtype, is torch's batch-norm and ReLU.
    """
    if is_transformed() or not _takes(input, weight, bias):
        output = F.batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
        output = max_pool(output, (*pool, (1, 1), False), kernel) if pool[0] else output
        return torch.relu(output)
    if wants_gradient(input, weight, bias):
        overwrite = overwrite and _may_overwrite()
        output = BatchNormReLUMaxPool2d.apply(input, weight, bias, eps, pool, kernel, overwrite)
    else:
        output = ops.norm_act_pool(input, weight, bias, eps, "relu", *pool, kernel)
    output, _, mean, invstd = output
    if running_mean is not None:
        _move(running_mean, mean, momentum)
    if running_var is not None:
        count = _values(input)
        _move(running_var, (invstd.pow(-2) - eps) * (count / (count - 1)), momentum)
    return output


def _takes(input, weight, bias):
    return (
        input.dim() == 4
        and input.dtype in _DTYPES
        and input.device.type == "cpu"  # the CUDA kernel is plain: torch's own is faster by far
        and input.shape[1] > 0
        and _values(input) > 1  # of fewer torch has an error to tell, or nothing to do
        and all(t is None or t.dtype == input.dtype for t in (weight, bias))
    )


def _may_overwrite():
    """A compiler places tensors by itself, and what a hook on saved tensors packs may be read again."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    )


def _values(input):
    """Of a channel."""
    return input.shape[0] * input.shape[2] * input.shape[3]


def _move(running, value, momentum):
    running.copy_((value * momentum).add(running, alpha=1 - momentum))
