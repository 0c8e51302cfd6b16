# SPDX-License-Identifier: MIT
"""What the Functions of this package have in common."""

import functools
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function

from fastconv import ops

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


def by_dims(function):
    """A Function for tensors of each number of dimensions, named after their axes: that is read in graphs."""
    return {axes + 2: type(f"{function.__name__}{axes}d", (function,), {}) for axes in (1, 2, 3)}


def is_transformed() -> bool:
    """Whether derivatives in forward mode or transforms of torch.func may be wanted."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def wants_gradient(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        # torch.jit.trace takes the operators alone, which get their gradients by operators.py.
        return torch._C._get_tracing_state() is None
    return is_transformed()


def save(ctx, *tensors):
    """For both modes."""
    ctx.save_for_backward(*tensors)
    if is_transformed():
        ctx.save_for_forward(*tensors)


def without_gradient(ctx, output):
    """`output` is not differentiable: backward gets None for it, not zeros, which take a while to make."""
    ctx.mark_non_differentiable(output)
    ctx.set_materialize_grads(False)


def sum_of(terms):
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
