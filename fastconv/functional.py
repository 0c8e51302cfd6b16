# SPDX-License-Identifier: MIT
"""torch.nn.functional's signatures on fastconv's kernels, and their fused forms.

Tensors are float32, float64, float16 or bfloat16, on CPU or CUDA, of any strides; channels_last in gives
channels_last out. Errors are those of torch.nn.functional: TypeError for an argument of a wrong type,
RuntimeError for a wrong value, NotImplementedError (a RuntimeError) for a dtype without a kernel.
"""

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastconv import autograd, kernels, ops

__all__ = [
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "batch_norm_relu_max_pool2d",
    "chain",
    "conv1d",
    "conv2d",
    "conv2d_relu_max_pool2d",
    "conv3d",
    "conv_stage",
    "linear",
    "linear_relu",
    "linear_stage",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
]

Ints: TypeAlias = kernels.Ints
Padding: TypeAlias = Ints | str
Plan: TypeAlias = tuple[int, ...]  # of a chain
Pooled: TypeAlias = Any  # a Tensor; with return_indices a pair of them


def _values(value: Any, count: int, op: str, name: str) -> tuple[int, ...]:
    """`value`, an int or a sequence of 1 or `count` ints, as a tuple of `count`."""
    if type(value) is int:  # as a layer has it, or the next; the checks below take longer
        return (value,) * count
    if type(value) is tuple and len(value) == count:
        for each in value:
            if type(each) is not int:
                break
        else:
            return value
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return (value,) * count  # type: ignore[return-value]  # a SymInt stands for an int
    if not isinstance(value, (tuple, list)) or not all(isinstance(v, (int, torch.SymInt)) for v in value):
        raise TypeError(f"{op}(): argument {name!r} must be an int or a tuple of ints, got {value!r}")
    if len(value) == 1:
        return tuple(value) * count
    if len(value) != count:
        many = f"{count} ints" if count > 1 else "1 int in a tuple"
        raise RuntimeError(f"{op}: {name} must be an int or {many}, got {value!r}")
    return tuple(value)


def _tensor(value: object, op: str, name: str, optional: bool = False) -> None:
    if not isinstance(value, Tensor) and not (optional and value is None):
        raise TypeError(f"{op}(): argument {name!r} must be a Tensor, got {type(value).__name__}")


def _batched(input: Tensor, axes: int, op: str) -> tuple[Tensor, bool]:
    """`input` with a batch, and whether it had one."""
    _tensor(input, op, "input")
    if input.dim() == axes + 2:
        return input, True
    if input.dim() == axes + 1:
        return input.unsqueeze(0), False
    raise RuntimeError(
        f"{op}: input must have {axes + 1} (unbatched) or {axes + 2} (batched) dimensions, "
        f"got size {list(input.shape)}"
    )


def _autocasts(device: str) -> bool:  # torch's own function raises for a device without autocast, as meta is
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def _autocast(input: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype, where autocast is on for their device."""
    tensors = (input, *others)
    if not torch._C._is_any_autocast_enabled():
        return tensors
    device = input.device.type
    if not _autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Tensor | None) -> Tensor | None:
        if t is None or not t.is_floating_point() or t.dtype == torch.float64:
            return t
        return t.to(dtype)

    return tuple(cast(t) for t in tensors)


def _conv_padding(
    padding: Padding, weight: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...], op: str
) -> tuple[int, ...]:
    """Fronts, then backs. 'same' puts the odd cell behind, as torch does."""
    if not isinstance(padding, str):
        return _values(padding, len(stride), op, "padding") * 2
    if padding == "valid":
        return (0,) * (2 * len(stride))
    if padding != "same":
        raise RuntimeError(f"{op}: padding must be ints, 'same' or 'valid', got {padding!r}")
    if any(s != 1 for s in stride):
        raise RuntimeError(f"{op}: padding='same' needs stride 1, got {stride}")
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    return tuple(t // 2 for t in total) + tuple(t - t // 2 for t in total)


def _conv_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Padding,
    dilation: Ints,
    groups: int,
    axes: int,
    op: str,
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Any, ...], bool]:
    """Checked, normalised and batched: (input, weight, bias, conv, batched)."""
    input, batched = _batched(input, axes, op)
    _tensor(weight, op, "weight")
    _tensor(bias, op, "bias", optional=True)
    if weight.dim() != axes + 2:
        raise RuntimeError(f"{op}: weight must have {axes + 2} dimensions, got size {list(weight.shape)}")
    if not isinstance(groups, (int, torch.SymInt)):
        raise TypeError(f"{op}(): argument 'groups' must be an int, got {groups!r}")
    stride = _values(stride, axes, op, "stride")
    dilation = _values(dilation, axes, op, "dilation")
    padding = _conv_padding(padding, weight, stride, dilation, op)
    return *_autocast(input, weight, bias), (stride, padding, dilation, groups), batched


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Padding,
    dilation: Ints,
    groups: int,
    axes: int,
    op: str,
) -> Tensor:
    if not is_compiling():
        output = ops.eager_conv(
            axes, input, weight, bias, stride, padding, dilation, groups, kernels.forced()
        )
        if output is not None:
            return output
    input, weight, bias, conv, batched = _conv_arguments(
        input, weight, bias, stride, padding, dilation, groups, axes, op
    )
    output = autograd.conv.conv_fprop(input, weight, bias, conv, kernels.forced())
    return output if batched else output.squeeze(0)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """torch.nn.functional.conv1d: input [N, C, W] or [C, W], weight [K, C/groups, S] -> [N, K, Q] or [K, Q].

    Arguments and extents as in `conv2d`, along one axis.

    >>> conv1d(torch.randn(2, 3, 32), torch.randn(8, 3, 5)).shape
    torch.Size([2, 8, 28])
    """
    return _conv(input, weight, bias, stride, padding, dilation, groups, 1, "conv1d")


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """torch.nn.functional.conv2d.

    Args:
        input: [N, C, H, W] or [C, H, W].
        weight: [K, C/groups, R, S].
        bias: [K], or None.
        stride, dilation: Int or pair.
        padding: Int, pair, 'valid', or 'same' (which needs stride 1).
        groups: Divides C and K.

    Returns:
        [N, K, P, Q] or [K, P, Q], with P = (H + 2 padding - dilation (R - 1) - 1) // stride + 1, Q alike.

    >>> conv2d(torch.randn(2, 3, 32, 32), torch.randn(8, 3, 5, 5), stride=2).shape
    torch.Size([2, 8, 14, 14])
    """
    return _conv(input, weight, bias, stride, padding, dilation, groups, 2, "conv2d")


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """torch.nn.functional.conv3d: input [N, C, D, H, W] or [C, D, H, W], weight [K, C/groups, T, R, S] ->
    [N, K, Z, P, Q] or [K, Z, P, Q].

    Arguments and extents as in `conv2d`, along three axes.

    >>> conv3d(torch.randn(2, 3, 8, 16, 16), torch.randn(8, 3, 3, 3, 3)).shape
    torch.Size([2, 8, 6, 14, 14])
    """
    return _conv(input, weight, bias, stride, padding, dilation, groups, 3, "conv3d")


def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    pool_kernel_size: Ints | None = None,
    pool_stride: Ints | None = None,
    pool_padding: Ints = 0,
) -> Tensor:
    """max_pool2d(relu(conv2d(...)), ...) as one operator; the full activation is not kept for backward.

    Args:
        pool_kernel_size: Int or pair; None pools nothing.
        pool_stride: Int or pair; None is pool_kernel_size.
        pool_padding: Int or pair, at most half of pool_kernel_size.

    The other arguments are those of `conv2d`. Shapes as conv2d, then max_pool2d.

    >>> x, weight = torch.randn(2, 3, 32, 32), torch.randn(8, 3, 5, 5)
    >>> conv2d_relu_max_pool2d(x, weight, pool_kernel_size=2).shape
    torch.Size([2, 8, 14, 14])
    """
    op = "conv2d_relu_max_pool2d"
    input, weight, bias, conv, batched = _conv_arguments(
        input, weight, bias, stride, padding, dilation, groups, 2, op
    )
    pool = _fused_pool(pool_kernel_size, pool_stride, pool_padding, op)
    output = autograd.conv_act_pool.conv_act_pool(input, weight, bias, conv, "relu", pool, kernels.forced())
    return output if batched else output.squeeze(0)


def _fused_pool(
    kernel_size: Ints | None, stride: Ints | None, padding: Ints, op: str
) -> tuple[tuple[int, ...], ...]:
    """The pool at the end of a fused operator, as (kernel_size, stride, padding)."""
    if kernel_size is None:
        return (), (), ()
    kernel_size = _values(kernel_size, 2, op, "pool_kernel_size")
    stride = kernel_size if stride is None else _values(stride, 2, op, "pool_stride")
    return kernel_size, stride, _values(padding, 2, op, "pool_padding")


def batch_norm_relu_max_pool2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    pool_kernel_size: Ints | None = None,
    pool_stride: Ints | None = None,
    pool_padding: Ints = 0,
    overwrite_input: bool = False,
) -> Tensor:
    """max_pool2d(relu(batch_norm(..., training=True)), ...) as one operator; nothing between them is kept.

    A channel's values are normalised by their own mean and biased variance. The pool comes first:
    relu(scale x + shift) is greatest where x is, or where x is least if the scale is negative.

    Args:
        input: [N, C, H, W], more than one value a channel.
        running_mean, running_var: [C], moved by `momentum` towards the batch's mean and unbiased variance, in
            place; or None.
        weight, bias: [C], or None for ones and zeros.
        momentum, eps: As torch.nn.functional.batch_norm takes them.
        overwrite_input: Backward may write the gradient of `input` over it, for an input that nothing else
            reads, not even in a backward. Done where the graph is not kept.

    The other arguments are those of `conv2d_relu_max_pool2d`. Inputs on a GPU, of other dimensions or of
    another dtype than the parameters', as under autocast, go through torch's batch-norm.

    Returns:
        [N, C, H, W], or [N, C, P, Q] as max_pool2d.

    Raises:
        ValueError: There is one value a channel.

    >>> mean, variance = torch.zeros(8), torch.ones(8)
    >>> batch_norm_relu_max_pool2d(torch.randn(2, 8, 14, 14), mean, variance, pool_kernel_size=2).shape
    torch.Size([2, 8, 7, 7])
    """
    op = "batch_norm_relu_max_pool2d"
    _tensor(input, op, "input")
    for name, tensor in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        _tensor(tensor, op, name, optional=True)
    pool = _fused_pool(pool_kernel_size, pool_stride, pool_padding, op)
    return autograd.batch_norm.norm_act_pool(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        momentum,
        eps,
        pool,
        kernels.forced(),
        overwrite_input,
    )


def _pool_arguments(
    input: Tensor, kernel_size: Ints, stride: Ints | None, padding: Ints, axes: int, op: str
) -> tuple[Any, ...]:
    """Checked, normalised and batched: (input, batched, kernel_size, stride, padding)."""
    images, batched = _batched(input, axes, op)
    kernel_size = _values(kernel_size, axes, op, "kernel_size")
    # torch also takes an empty stride for none.
    stride = kernel_size if stride is None or stride in ((), []) else _values(stride, axes, op, "stride")
    return images, batched, kernel_size, stride, _values(padding, axes, op, "padding")


def max_pool1d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Pooled:
    """torch.nn.functional.max_pool1d: input [N, C, W] or [C, W] -> [N, C, Q] or [C, Q].

    Arguments as in `max_pool2d`, along one axis.

    >>> max_pool1d(torch.tensor([[[1.0, 3.0, 2.0, 0.0]]]), 2)
    tensor([[[3., 2.]]])
    """
    return _max_pool(
        input, kernel_size, stride, padding, dilation, ceil_mode, return_indices, 1, "max_pool1d"
    )


def max_pool2d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Pooled:
    """torch.nn.functional.max_pool2d.

    Args:
        input: [N, C, H, W] or [C, H, W].
        kernel_size, padding, dilation: Int or pair; padding at most half of the window's span.
        stride: Int or pair; None is kernel_size.
        ceil_mode: A last window may hang over the end.
        return_indices: Also return int64 positions in the H x W plane.

    Returns:
        [N, C, P, Q] or [C, P, Q], and with return_indices the positions, of the same shape. NaN wins over
        every number; among equals the first in row-major order wins.

    >>> max_pool2d(torch.randn(2, 3, 32, 32), 3, stride=2, padding=1).shape
    torch.Size([2, 3, 16, 16])
    """
    return _max_pool(
        input, kernel_size, stride, padding, dilation, ceil_mode, return_indices, 2, "max_pool2d"
    )


def max_pool3d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Pooled:
    """torch.nn.functional.max_pool3d: [N, C, D, H, W] or [C, D, H, W] -> [N, C, Z, P, Q] or [C, Z, P, Q].

    Arguments as in `max_pool2d`, along three axes.

    >>> max_pool3d(torch.randn(2, 3, 8, 16, 16), (1, 2, 2)).shape
    torch.Size([2, 3, 8, 8, 8])
    """
    return _max_pool(
        input, kernel_size, stride, padding, dilation, ceil_mode, return_indices, 3, "max_pool3d"
    )


def _max_pool(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None,
    padding: Ints,
    dilation: Ints,
    ceil_mode: bool,
    return_indices: bool,
    axes: int,
    op: str,
) -> Pooled:
    if not return_indices and not is_compiling():
        output = ops.eager_max_pool(
            axes, input, kernel_size, stride, padding, dilation, ceil_mode, kernels.forced()
        )
        if output is not None:
            return output
    images, batched, *pool = _pool_arguments(input, kernel_size, stride, padding, axes, op)
    window = (*pool, _values(dilation, axes, op, "dilation"), bool(ceil_mode))
    if not return_indices:
        output = autograd.pool.max_pool(images, window, kernels.forced())
        return output if batched else output.squeeze(0)
    output, offsets = autograd.pool.max_pool_with_offsets(images, window, kernels.forced())
    indices = autograd.pool.max_pool_indices(offsets, images.shape, window, kernels.forced())
    return (output, indices) if batched else (output.squeeze(0), indices.squeeze(0))


def avg_pool1d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """torch.nn.functional.avg_pool1d: input [N, C, W] or [C, W] -> [N, C, Q] or [C, Q].

    Arguments as in `avg_pool2d`, along one axis.

    >>> avg_pool1d(torch.tensor([[[1.0, 3.0, 2.0, 0.0]]]), 2)
    tensor([[[2., 1.]]])
    """
    return _avg_pool(input, kernel_size, stride, padding, ceil_mode, count_include_pad, None, 1, "avg_pool1d")


def avg_pool2d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """torch.nn.functional.avg_pool2d.

    Args:
        input: [N, C, H, W] or [C, H, W].
        kernel_size, padding: Int or pair; padding at most half of the window.
        stride: Int or pair; None is kernel_size.
        ceil_mode: A last window may hang over the end; what hangs over counts as no cell.
        count_include_pad: Padding counts as cells that hold zero.
        divisor_override: Divides each sum, whatever its window counts; not zero.

    Returns:
        [N, C, P, Q] or [C, P, Q].

    >>> avg_pool2d(torch.randn(2, 3, 32, 32), 2).shape
    torch.Size([2, 3, 16, 16])
    """
    return _avg_pool(
        input,
        kernel_size,
        stride,
        padding,
        ceil_mode,
        count_include_pad,
        divisor_override,
        2,
        "avg_pool2d",
    )


def avg_pool3d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """torch.nn.functional.avg_pool3d: [N, C, D, H, W] or [C, D, H, W] -> [N, C, Z, P, Q] or [C, Z, P, Q].

    Arguments as in `avg_pool2d`, along three axes.

    >>> avg_pool3d(torch.randn(2, 3, 8, 16, 16), 2).shape
    torch.Size([2, 3, 4, 8, 8])
    """
    return _avg_pool(
        input,
        kernel_size,
        stride,
        padding,
        ceil_mode,
        count_include_pad,
        divisor_override,
        3,
        "avg_pool3d",
    )


def _avg_pool(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None,
    padding: Ints,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    axes: int,
    op: str,
) -> Tensor:
    images, batched, *pool = _pool_arguments(input, kernel_size, stride, padding, axes, op)
    if divisor_override is not None and type(divisor_override) is not int:
        raise TypeError(
            f"{op}(): argument 'divisor_override' must be an int or None, got {divisor_override!r}"
        )
    window = (*pool, bool(ceil_mode), bool(count_include_pad), divisor_override)
    output = autograd.pool.avg_pool(images, window, kernels.forced())
    return output if batched else output.squeeze(0)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear: input [..., K], weight [N, K], bias [N] or None -> [..., N].

    >>> linear(torch.randn(128, 20), torch.randn(30, 20), torch.randn(30)).shape
    torch.Size([128, 30])
    """
    if not is_compiling():
        output = ops.eager_linear(input, weight, bias, kernels.forced())
        if output is not None:
            return output
    return _linear(input, weight, bias, "none", "linear")


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """relu(linear(input, weight, bias)) as one operator. Shapes as `linear`.

    >>> linear_relu(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    tensor([[3., 0.]])
    """
    return _linear(input, weight, bias, "relu", "linear_relu")


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None, act: str, op: str) -> Tensor:
    _tensor(input, op, "input")
    _tensor(weight, op, "weight")
    _tensor(bias, op, "bias", optional=True)
    input, weight, bias = _autocast(input, weight, bias)
    return autograd.linear.linear_act(input, weight, bias, act, kernels.forced())


_ACTS = {"none": 0, "relu": 1}


def conv_stage(
    *,
    act: str = "none",
    bias: bool = True,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    pool_kernel_size: Ints | None = None,
    pool_stride: Ints | None = None,
    pool_padding: Ints = 0,
) -> Plan:
    """max_pool2d(act(conv2d(...))) as a stage of a `chain`.

    Args:
        act: "none" or "relu".
        bias: Whether the stage has a bias.
        padding: Int, pair, or four ints: the fronts, then the backs.

    The other arguments are those of `conv2d_relu_max_pool2d`.

    Returns:
        A plan of one stage; plans are added to make longer ones.

    >>> len(conv_stage(act="relu", pool_kernel_size=2))
    18
    """
    op = "conv_stage"
    fronts_and_backs = padding if isinstance(padding, (tuple, list)) and len(padding) == 4 else None
    pool: tuple[int, ...] = (0,) * 6
    if pool_kernel_size is not None:
        kernel_size = _values(pool_kernel_size, 2, op, "pool_kernel_size")
        strides = kernel_size if pool_stride is None else _values(pool_stride, 2, op, "pool_stride")
        pool = (*kernel_size, *strides, *_values(pool_padding, 2, op, "pool_padding"))
    return (
        0,
        _ACTS[act],
        int(bias),
        *_values(stride, 2, op, "stride"),
        *(fronts_and_backs or _values(padding, 2, op, "padding") * 2),
        *_values(dilation, 2, op, "dilation"),
        groups,
        *pool,
    )


def linear_stage(*, act: str = "none", bias: bool = True) -> Plan:
    """act(linear(...)) as a stage of a `chain`, "none" or "relu". Behind a convolution it flattens first.

    >>> len(linear_stage())
    3
    """
    return (1, _ACTS[act], int(bias))


def chain(input: Tensor, plan: Plan, *params: Tensor) -> Tensor:
    """A straight run of convolutions and linear layers as one operator.

    What lies between them stays in the processor's cache where a kernel can, and backward needs little of it.

    Args:
        input: [N, C, H, W]; [..., K] where the first stage is linear.
        plan: The sum of the stages, `conv_stage(...) + ... + linear_stage(...)`: up to 16, the
            convolutions in front.
        params: The weights in order, each followed by its bias where the stage has one.

    Returns:
        The last stage's output.

    >>> plan = conv_stage(act="relu", pool_kernel_size=2, bias=False) + linear_stage()
    >>> weights = torch.randn(6, 1, 5, 5), torch.randn(10, 6 * 14 * 14), torch.randn(10)
    >>> chain(torch.randn(2, 1, 32, 32), plan, *weights).shape
    torch.Size([2, 10])
    """
    if not is_compiling():
        output = ops.eager_chain(input, plan, params, kernels.forced())
        if output is not None:
            return output
    _tensor(input, "chain", "input")
    try:
        if _autocasts(input.device.type):
            input, *params = _autocast(input, *params)  # type: ignore[assignment]
        if not plan or plan[0] != 1 or input.dim() == 2:
            return autograd.chain.chain(input, plan, params, kernels.forced())
        rows = input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
        output = autograd.chain.chain(rows, plan, params, kernels.forced())
        return output.reshape(*input.shape[:-1], output.shape[-1])
    except (AttributeError, TypeError):  # asked for only now: it takes longer than the rest
        for param in params:
            _tensor(param, "chain", "params")
        raise
