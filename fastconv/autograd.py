# SPDX-License-Identifier: MIT
"""Gradients of the operators, as `torch.autograd.Function`s.

fprop, dgrad and wgrad are closed under differentiation: the gradient of each is made of the other two. So
each is a Function whose backward calls the others', and derivatives of every order follow. The same holds for
max-pool's backward and gather, for the two passes of average pooling, and for linear's three products.

Plain calls of convolution, linear and max-pool do not come here: csrc/glue/eager.cpp has the same backward
passes in C++, and comes here for derivatives of a higher order.

Each Function is entered through a function of the same meaning in lower case, which calls the
operator directly where no gradient is wanted. `kernel` names rows to force; it is kept for
backward, which runs on another thread.

All Functions but those of fused operators have a derivative in forward mode and a rule for vmap
(fastconv/_vmap.py); where either is wanted, fused operators are made of the others.
"""

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function

from fastconv import _vmap, ops

Arguments: TypeAlias = tuple[Any, ...]  # those that an operator takes beside its tensors


class Function(torch.autograd.Function):
    """A Function with a lean `apply`: torch's own binds the signature on each call, which costs more.

    `tangent` is its derivative in forward mode and `mapped` its rule for vmap. They become `jvp` and `vmap`
    only where one is wanted, since torch.compile takes no Function that has these.
    """

    tangent = mapped = None

    @classmethod
    def apply(cls, *args):
        if torch.compiler.is_compiling():
            return super().apply(*args)
        if ops.is_overridden(args) and not torch._C._is_torch_function_mode_enabled():
            return handle_torch_function(cls.apply, args, *args)
        if is_transformed():
            return super(Function, _with_rules(cls)).apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)


@functools.cache
def _with_rules(function):
    rules = {"jvp": staticmethod(function.tangent), "vmap": staticmethod(function.mapped)}
    return type(function.__name__, (function,), rules)


def _by_dims(function):
    """A Function for tensors of each number of dimensions, named after their axes: that is read in graphs."""
    return {axes + 2: type(f"{function.__name__}{axes}d", (function,), {}) for axes in (1, 2, 3)}


def is_transformed() -> bool:
    """Whether derivatives in forward mode or transforms of torch.func may be wanted."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def wants_gradient(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        # torch.jit.trace takes the operators alone, which get their gradients by fastconv/_gradients.py.
        return torch._C._get_tracing_state() is None
    return is_transformed()


def _save(ctx, *tensors):
    """For both modes."""
    ctx.save_for_backward(*tensors)
    if is_transformed():
        ctx.save_for_forward(*tensors)


def without_gradient(ctx, output):
    """`output` is not differentiable: backward gets None for it, not zeros, which take a while to make."""
    ctx.mark_non_differentiable(output)
    ctx.set_materialize_grads(False)


def _sum(terms):
    """The sum of those that are not None, or None: tensors, or tuples of them."""
    total = None
    for term in terms:
        if term is None:
            continue
        if total is None:
            total = term
        elif isinstance(term, tuple):
            total = tuple(a + b for a, b in zip(total, term, strict=True))
        else:
            total = total + term
    return total


# --- convolution --------------------------------------------------------------------------------------------
# `conv` is the tuple (stride, padding, dilation, groups) that the operators take,
# padding as fronts, then backs.


class Conv(Function):
    @staticmethod
    def forward(input, weight, bias, conv, kernel):
        return ops.conv_fprop(input, weight, bias, *conv, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _, ctx.conv, ctx.kernel = inputs
        ctx.input_size, ctx.weight_size, ctx.output_size = input.shape, weight.shape, output.shape
        if is_transformed():
            return _save(ctx, input, weight)
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
        return _sum(terms)

    @staticmethod
    def mapped(info, in_dims, input, weight, bias, conv, kernel):
        return _vmap.conv_fprop(conv_fprop, info, in_dims, input, weight, bias, conv, kernel)


_CONV = _by_dims(Conv)


class ConvInputGrad(Function):
    @staticmethod
    def forward(grad_output, weight, input_size, conv, kernel):
        return ops.conv_dgrad(grad_output, weight, input_size, *conv, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, weight, ctx.input_size, ctx.conv, ctx.kernel = inputs
        _save(ctx, grad_output, weight)

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
        return _sum(
            conv_dgrad(g, w, ctx.input_size, ctx.conv, ctx.kernel)
            for g, w in pairs
            if g is not None and w is not None
        )

    @staticmethod
    def mapped(info, in_dims, grad_output, weight, input_size, conv, kernel):
        return _vmap.conv_dgrad(conv_dgrad, info, in_dims, grad_output, weight, input_size, conv, kernel)


class ConvWeightGrad(Function):
    @staticmethod
    def forward(grad_output, input, weight_size, conv, bias, kernel):
        return ops.conv_wgrad(grad_output, input, weight_size, *conv, bias, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, ctx.weight_size, ctx.conv, ctx.bias, ctx.kernel = inputs
        _save(ctx, grad_output, input)

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
        return _sum(terms)

    @staticmethod
    def mapped(info, in_dims, grad_output, input, weight_size, conv, bias, kernel):
        return _vmap.conv_wgrad(
            conv_wgrad, info, in_dims, grad_output, input, weight_size, conv, bias, kernel
        )


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


# --- convolution, ReLU and max-pool fused -------------------------------------------------------------------
# `pool` is the tuple (kernel_size, stride, padding), three empty tuples where nothing pools.


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
        _save(ctx, offsets)
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
        return _vmap.folded(lambda x: max_pool_with_offsets(x, window, kernel), info, in_dims, input)


_MAX_POOL = _by_dims(MaxPool)


class MaxPoolInputGrad(Function):
    @staticmethod
    def forward(grad_output, offsets, input_size, window, kernel):
        return ops.max_pool_backward(grad_output, offsets, input_size, *window, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, offsets, ctx.input_size, ctx.window, ctx.kernel = inputs
        _save(ctx, offsets)

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
        return _vmap.folded(
            lambda g, o: max_pool_backward(g, o, size, window, kernel), info, in_dims, grad_output, offsets
        )


class MaxPoolGather(Function):
    @staticmethod
    def forward(input, offsets, window, kernel):
        return ops.max_pool_gather(input, offsets, *window, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, offsets, ctx.window, ctx.kernel = inputs
        _save(ctx, offsets)
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
        return _vmap.folded(lambda x, o: max_pool_gather(x, o, window, kernel), info, in_dims, input, offsets)


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
        return _vmap.folded(lambda o: max_pool_indices(o, size, window, kernel), info, in_dims, offsets)


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
        return _vmap.folded(lambda x: avg_pool(x, window, kernel), info, in_dims, input)


_AVG_POOL = _by_dims(AvgPool)


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
        return _vmap.folded(
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


# --- linear -------------------------------------------------------------------------------------------------


class Linear(Function):
    @staticmethod
    def forward(input, weight, bias, act, kernel):
        return ops.linear_act(input, weight, bias, act, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _, ctx.act, ctx.kernel = inputs
        ctx.output_size = output.shape
        if is_transformed() or ctx.act != "none":
            return _save(ctx, input, weight, output if ctx.act != "none" else None)
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
        return _sum(terms)

    @staticmethod
    def mapped(info, in_dims, input, weight, bias, act, kernel):
        return _vmap.linear(linear_act, conv_fprop, info, in_dims, input, weight, bias, kernel)


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
        _save(ctx, grad_output, weight)

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
        return _sum(linear_dgrad(g, w, ctx.kernel) for g, w in pairs if g is not None and w is not None)

    @staticmethod
    def mapped(info, in_dims, grad_output, weight, kernel):
        return _vmap.linear_dgrad(linear_dgrad, conv_dgrad, info, in_dims, grad_output, weight, kernel)


class LinearWeightGrad(Function):
    @staticmethod
    def forward(grad_output, input, bias, kernel):
        return ops.linear_wgrad(grad_output, input, bias, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, ctx.bias, ctx.kernel = inputs
        _save(ctx, grad_output, input)

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
        return _sum(terms)

    @staticmethod
    def mapped(info, in_dims, grad_output, input, bias, kernel):
        return _vmap.linear_wgrad(conv_wgrad, info, in_dims, grad_output, input, bias, kernel)


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
