# SPDX-License-Identifier: MIT
"""The kernel tables: what there is, what a call would use and why, and how to force a row."""

import builtins
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch

from fastconv import _C

__all__ = ["explain", "force", "list"]

Ints: TypeAlias = int | Sequence[int]  # one for all axes, or one for each

_forced = ""

# What `explain` knows: the tables' name of an op, and its spatial axes.
_OPS = {
    **{f"conv{axes}d": ("conv", axes) for axes in (1, 2, 3)},
    "conv2d_relu_max_pool2d": ("conv_act_pool", 2),
    **{f"{kind}_pool{axes}d": (f"{kind}_pool", axes) for kind in ("max", "avg") for axes in (1, 2, 3)},
    "batch_norm_relu_max_pool2d": ("norm_act_pool", 2),
    "linear": ("linear", 0),
    "chain": ("chain", 2),
}


def list() -> builtins.list[dict[str, Any]]:
    """Every row of every table, in table order.

    Returns:
        A dict a row: name, file (its source, below csrc/), source_hash (of that file and all that it
            includes, as built), op, pass_, device ("cpu" or "cuda"), dtypes, layouts, built (whether this
            build can launch it), emulated (whether this source has passed its tests on the emulator) and
            gpu (the name of the GPU on which it has, or None). The last two are None for the CPU's rows.

    >>> [row["name"] for row in list() if row["op"] == "linear" and row["name"].endswith("fprop_naive")]
    ['cpu/linear_fprop_naive', 'cuda/linear_fprop_naive']
    """
    recorded = json.loads(Path(__file__).with_name("kernels.json").read_text())
    return [{**row, **_evidence(row, recorded.get(row["name"]))} for row in _C.list_rows()]


def _evidence(row: dict[str, Any], entry: dict[str, Any] | None) -> dict[str, Any]:
    """What an entry of kernels.json says of the row; nothing where it speaks of another source."""
    if row["device"] == "cpu":
        return {"emulated": None, "gpu": None}
    if entry is None or entry["source_hash"] != row["source_hash"]:
        return {"emulated": False, "gpu": None}
    return {key: entry[key] for key in ("emulated", "gpu")}


@contextmanager
def force(*names: str) -> Iterator[None]:
    """Calls made inside use the named rows instead of the cheapest ones, and so do their backward passes.

    A name applies to the table it belongs to; the other tables choose as usual.
    It holds for the whole process.

    Raises:
        ValueError: There is no row of that name.
        RuntimeError: From a call inside, where the row cannot take it; the message says why.

    >>> from fastconv import functional
    >>> with force("cpu/linear_fprop_naive"):
    ...     functional.linear(torch.ones(1, 2), torch.ones(1, 2))
    tensor([[2.]])
    """
    global _forced
    for name in names:
        if not _C.is_row_name(name):
            raise ValueError(
                f"kernels.force: no row is named {name!r}; fastconv.kernels.list() has the names"
            )
    before, _forced = _forced, ",".join(names)
    try:
        yield
    finally:
        _forced = before


def forced() -> str:
    """The names in force, separated by commas."""
    return _forced


def explain(
    op: str,
    *,
    input: Sequence[int],
    weight: Sequence[int] | None = None,
    kernel_size: Ints | None = None,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    ceil_mode: bool = False,
    pool_kernel_size: Ints | None = None,
    pool_stride: Ints | None = None,
    pool_padding: Ints = 0,
    plan: Sequence[int] | None = None,
    params: Sequence[Sequence[int]] | None = None,
    device: str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    layout: str = "contiguous",
    capability: tuple[int, int] | None = None,
) -> builtins.list[dict[str, Any]]:
    """Which row a call would use in each pass, and why not the others.

    On a GPU, float32 may be in TF32 where torch's flags allow it, as they stand.

    Args:
        op: "conv1d" to "conv3d", "conv2d_relu_max_pool2d", "max_pool1d" to "max_pool3d",
            "avg_pool1d" to "avg_pool3d", "batch_norm_relu_max_pool2d", "linear" or "chain".
        input, weight: Sizes, batched.
        kernel_size, stride, padding, dilation, groups, ceil_mode: As the op takes them.
        pool_kernel_size, pool_stride, pool_padding: Of conv2d_relu_max_pool2d and batch_norm_relu_max_pool2d.
        plan, params: Of chain; of the parameters the sizes.
        device: "cpu" or "cuda".
        layout: "contiguous" or, where there are two axes or three, "channels_last".
        capability: Of the GPU that is asked about, (8, 0) for sm_80; None: this machine's, else (9, 0).

    Returns:
        A dict a pass: pass_, chosen (a row's name), rows: dicts with name, reason (why not, or None),
            cost_us (predicted microseconds, None where rejected), built. A chain's forward pass is that of
            inference, its backward that of training.

    Raises:
        ValueError: Unknown op, an argument that it needs is missing, or there is no such layout.
        RuntimeError: The sizes are not a call that the op takes.

    >>> [each["pass_"] for each in explain("conv2d", input=(64, 1, 32, 32), weight=(6, 1, 5, 5))]
    ['fprop', 'dgrad', 'wgrad']
    """
    if op not in _OPS:
        raise ValueError(f"kernels.explain: op must be one of {', '.join(_OPS)}, got {op!r}")
    name, axes = _OPS[op]
    if axes == 1 and layout == "channels_last":
        raise ValueError(f"kernels.explain: {op} has no layout channels_last, as torch has none of one axis")
    needed: dict[str, Any] = {"weight": weight}
    pools = name in ("max_pool", "avg_pool")
    if pools:
        needed = {"kernel_size": kernel_size}
    elif op == "chain":
        needed = {"plan": plan, "params": params}
    elif name == "norm_act_pool":
        needed = {}
    for argument, value in needed.items():
        if value is None:
            raise ValueError(f"kernels.explain: {op} needs {argument}")

    def many(argument: str, value: Ints) -> builtins.list[int]:  # an int, or one for each axis
        if isinstance(value, int):
            return [value] * axes
        if len(value) != axes:
            raise RuntimeError(f"{op}: {argument} must be one int or {axes}, got {tuple(value)}")
        return [int(v) for v in value]

    pool_kernel: builtins.list[int] = []
    pool_strides, pool_paddings = pool_kernel, pool_kernel
    if pools:
        pool_kernel = many("kernel_size", needed["kernel_size"])
        pool_strides = pool_kernel if stride is None else many("stride", stride)
        pool_paddings = many("padding", padding)
    elif pool_kernel_size is not None:
        pool_kernel = many("pool_kernel_size", pool_kernel_size)
        pool_strides = pool_kernel if pool_stride is None else many("pool_stride", pool_stride)
        pool_paddings = many("pool_padding", pool_padding)
    return _C.explain(
        op=name,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        layout=layout,
        level=10 * capability[0] + capability[1] if capability and device == "cuda" else 0,
        input=builtins.list(input),
        weight=builtins.list(weight or ()),
        stride=many("stride", 1 if stride is None else stride),
        padding=many("padding", padding) * 2,
        dilation=many("dilation", dilation),
        groups=groups,
        pool_kernel=pool_kernel,
        pool_stride=pool_strides,
        pool_padding=pool_paddings,
        ceil_mode=ceil_mode,
        plan=builtins.list(plan or ()),
        params=[builtins.list(size) for size in params or ()],
    )
