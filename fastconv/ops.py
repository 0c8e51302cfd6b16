# SPDX-License-Identifier: MIT
"""The operators `fastconv::*`, one function each, without gradients; and layers in eager mode.

Eager calls enter through the extension module, which costs less than half of `torch.ops`; tracers see only
`torch.ops`. Both reach the same dispatcher. Arguments are those of the schemas in csrc/bindings.cpp.
"""

from collections.abc import Callable
from typing import Any

import torch

from fastconv import _C

is_overridden = torch._C._has_torch_function  # by __torch_function__, of a tensor or a mode


def _operator(name: str) -> Callable[..., Any]:
    eager = getattr(_C, name)
    traced = getattr(torch.ops.fastconv, name).default

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or is_overridden(args):
            return traced(*args)
        return eager(*args)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"`{traced._schema}`"
    return call


conv_fprop = _operator("conv_fprop")
conv_dgrad = _operator("conv_dgrad")
conv_wgrad = _operator("conv_wgrad")
conv_act_pool = _operator("conv_act_pool")
conv_act_pool_backward = _operator("conv_act_pool_backward")
max_pool = _operator("max_pool")
max_pool_backward = _operator("max_pool_backward")
max_pool_gather = _operator("max_pool_gather")
max_pool_indices = _operator("max_pool_indices")
avg_pool = _operator("avg_pool")
avg_pool_backward = _operator("avg_pool_backward")
norm_act_pool = _operator("norm_act_pool")
norm_act_pool_backward = _operator("norm_act_pool_backward")
norm_act_pool_backward_ = _operator("norm_act_pool_backward_")
linear_act = _operator("linear_act")
linear_dgrad = _operator("linear_dgrad")
linear_wgrad = _operator("linear_wgrad")
linear_act_backward = _operator("linear_act_backward")
chain = _operator("chain")
chain_backward = _operator("chain_backward")

# Whole layers, with gradients; None where only the long way will do (csrc/glue/eager.cpp).
eager_chain = _C.eager_chain
eager_conv = _C.eager_conv
eager_linear = _C.eager_linear
eager_max_pool = _C.eager_max_pool
