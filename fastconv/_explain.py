# SPDX-License-Identifier: MIT
"""`explain`: what runs in a model, operator by operator, on which kernels, and how fast.

The model runs once in a `TorchDispatchMode`, which sees each operator that it comes down to, fastconv's and
torch's. Each is timed there and then, on its own arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import textwrap
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from fastconv import _C, _flops, _peaks, _timing, ops  # noqa: F401  (_flops: flop_registry's entries)
from fastconv._optimize.model import Optimized
from fastconv._optimize.steps import Step
from fastconv.autograd.chain import stages

WIDTH = 120  # columns of a table
_FREE = (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided)


@dataclass(frozen=True)
class Layer:
    """An operator that has run, or several of torch's that only take time.

    name: The path of the module that called it, from the first to the last of a chain where it is known;
        the model's class for itself; "others".
    operator: "conv2d + relu + max_pool", "conv2d wgrad", "chain of 5 stages", "torch's addmm".
    seconds: A call.
    sizes: Of its tensor arguments, without empty ones.
    dtype: Of the first of them.
    kernel: The row's name; "" where torch has run.
    rows: All of the rows that were considered, as `kernels.explain` gives them.
    parts: Of a composed row the launches that it makes, as dicts with "chosen" and "rows".
    flops: Multiply-adds of convolutions and linear layers, two each, as torch.utils.flop_counter counts.
    bytes: All tensors read or written once.
    share: Of the peak that it is nearer to; above 1 where the data stays in a cache.

    flops, bytes and share are None of "others".
    """

    name: str
    operator: str
    seconds: float
    sizes: tuple[tuple[int, ...], ...] = ()
    dtype: torch.dtype | None = None
    kernel: str = ""
    rows: tuple[dict, ...] = ()
    parts: tuple[dict, ...] = ()
    flops: int | None = None
    bytes: int | None = None
    share: float | None = None


@dataclass(frozen=True)
class Explanation:
    """What `explain` has found; `str` makes a table of it.

    name: The model's class.
    layers: In the order in which they ran; "others", where there are any, at the end.
    seconds: A call of the whole model (and its backward pass), with what Python takes.
    peaks: What the shares are of.
    """

    name: str
    layers: list[Layer]
    seconds: float
    peaks: _peaks.Peaks

    def __str__(self) -> str:
        total = Layer(
            "total",
            "",
            math.fsum(layer.seconds for layer in self.layers),
            flops=sum(layer.flops or 0 for layer in self.layers),
            bytes=sum(layer.bytes or 0 for layer in self.layers),
        )
        head = ("layer", "operator", "kernel", "MFLOP", "MB", "us", "GFLOP/s", "GB/s", "of peak")
        return "\n".join(
            [
                *_table([head, *map(_cells, self.layers), _cells(total)]),
                *(line for layer in self.layers if layer.flops is None for line in _others(layer)),
                f"{self.name} as a whole: {1e6 * self.seconds:,.1f} us. Peaks: "
                f"{self.peaks.flops_per_s / 1e9:,.0f} GFLOP/s (torch's matrix product), "
                f"{self.peaks.bytes_per_s / 1e9:,.1f} GB/s (copy)",
            ]
        )

    @property
    def reasons(self) -> str:
        """For each operator of fastconv the rows of its table, what they cost or why they are rejected;
        behind it those of a composed row's parts."""
        return "\n".join(line for layer in self.layers if layer.kernel for line in _reasons(layer))


def explain(model: nn.Module, example: Tensor | tuple, *, backward: bool = False) -> Explanation:
    """Which operators run in a model, on which kernels, how long they take and how near they are to a peak.

        print(fastconv.explain(model, images))

    The model is run in its present mode, a few times. Its buffers, gradients and torch's random state are
    afterwards what they were.

    Args:
        model: Any module, of torch.nn's layers, fastconv's, converted or optimized.
        example: Its argument, or the tuple of its arguments.
        backward: Gradients of the parameters too, of those of the arguments that require one.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `backward` is asked for, but nothing that the model returns has a gradient.
        Exception: Whatever the model raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain(): argument 'model' must be an nn.Module, got {type(model).__name__}")
    arguments = example if isinstance(example, tuple) else (example,)
    tensors = [leaf for leaf in tree_leaves((arguments, list(model.parameters()))) if _is_float(leaf)]
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = tensors[0].dtype if tensors else torch.float32
    wanted = [tensor for tensor in tensors if tensor.requires_grad]

    def run(recorder=None):
        recorder = recorder or contextlib.nullcontext()
        with recorder:
            outputs = model(*arguments)
        if backward:
            _backward(outputs, wanted, recorder)

    gpus = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus), _own_buffers(model), torch.set_grad_enabled(backward):
        run()  # what is made once is made
        recorder = _Recorder(model, device)
        with recorder.paths():
            run(recorder)
        seconds = _timing.alone(run, seconds=0.1, device=device)
    peaks = _peaks.measure(device, dtype)
    name = type(model).__name__
    return Explanation(name, [_with_share(layer, peaks) for layer in recorder.found()], seconds, peaks)


def _is_float(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _backward(outputs, inputs, recorder):
    outputs = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not outputs or not inputs:
        raise ValueError("explain(): backward=True, but nothing that the model returns has a gradient")
    ones = [torch.ones_like(output) for output in outputs]
    with recorder:
        torch.autograd.grad(outputs, inputs, ones, allow_unused=True)


@contextlib.contextmanager
def _own_buffers(model):
    """The model works on copies of its buffers; a buffer that two modules share has one copy. Those of
    TorchScript can't be replaced, and get their values back."""
    scripted = {module: isinstance(module, torch.jit.ScriptModule) for module in model.modules()}
    values = [(b, b.clone()) for module, is_so in scripted.items() if is_so for b in module.buffers()]
    held = [module._buffers for module, is_so in scripted.items() if not is_so]
    before = list(map(dict, held))
    copies = {}
    try:
        for buffers in held:
            for name, buffer in buffers.items():
                if buffer is not None:
                    buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
        yield
    finally:
        for buffers, known in zip(held, before, strict=True):
            buffers.clear()
            buffers.update(known)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


# --- recording ----------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Notes each operator, with the module that called it and, in backward, that whose gradient it is for."""

    def __init__(self, model: nn.Module, device: torch.device):
        super().__init__()
        self.device = device
        self.top = type(model).__name__
        self.modules = {id(module): path for path, module in model.named_modules()}
        self.steps = {
            id(fused.step): f"{path}.{name}" if path else name
            for path, module in model.named_modules()
            if isinstance(module, Optimized)
            for program in module._plan.programs.values()
            for fused in program.fused
            for name in [_names(fused)]
        }
        self.stack = []
        self.by_node = {}  # sequence numbers of autograd's nodes -> where in the model they were made
        self.layers, self.others = [], []

    @contextlib.contextmanager
    def paths(self):
        """Keeps `stack` while modules, and the steps of optimized ones, are called.

        Not by hooks: fused layers run one by one where there is one.
        """
        kinds = {nn.Module: self._module, **{kind: self._step for kind in Step.__subclasses__()}}
        before = {kind: kind.__call__ for kind in kinds}
        try:
            for kind, path_of in kinds.items():
                kind.__call__ = self._tracking(before[kind], path_of)
            yield
        finally:
            for kind, call in before.items():
                kind.__call__ = call

    def _tracking(self, call, path_of):
        def tracked(called, *args, **kwargs):
            path = path_of(called)
            if path is None:
                return call(called, *args, **kwargs)
            self.stack.append(path)
            try:
                return call(called, *args, **kwargs)
            finally:
                self.stack.pop()

        return tracked

    def _module(self, module):
        return self.modules.get(id(module))

    def _step(self, step):
        return self.steps.get(id(step))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.is_view or function.overloadpacket in _FREE:
            return function(*args, **kwargs)
        node = torch._C._current_autograd_node()
        if node is None:
            path = self.stack[-1] if self.stack else ""
            self.by_node.setdefault(torch.autograd._get_sequence_nr() - 1, path)
        else:
            path = self.by_node.get(node._sequence_nr(), "")
        if function.namespace == "fastconv":
            return self._ours(path or self.top, function, args)
        return self._torchs(path or self.top, function, args, kwargs)

    def _ours(self, path, function, args):
        packet = function.overloadpacket
        args = (*args, *(each.default_value for each in function._schema.arguments[len(args) :]))
        given = {each.name: arg for each, arg in zip(function._schema.arguments, args, strict=True)}
        call = getattr(ops, packet.__name__)
        outputs, launches = _C.watch(lambda: call(*args))
        seconds = _timing.alone(lambda: call(*args), device=self.device)
        flops = flop_registry[packet](*args, out_val=outputs) if packet in flop_registry else 0
        kernel = {}
        if launches:  # none are made for no images
            first, *parts = launches
            kernel = {"kernel": first["chosen"], "rows": tuple(first["rows"]), "parts": tuple(parts)}
        self._add(path, _operator(packet.__name__, given), seconds, args, outputs, flops=flops, **kernel)
        return outputs

    def _torchs(self, path, function, args, kwargs):
        packet, name = function.overloadpacket, function.overloadpacket.__name__
        mine, mine_by_name = args, kwargs
        if function._schema.is_mutable:  # which can be called only once on what it writes into
            mine, mine_by_name = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
        seconds = _timing.alone(lambda: function(*mine, **mine_by_name), seconds=0.002, device=self.device)
        outputs = function(*args, **kwargs)
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=outputs)
            self._add(path, f"torch's {name}", seconds, args, outputs, flops=flops)
        elif "pool" in name:
            self._add(path, f"torch's {name}", seconds, args, outputs, flops=0)
        else:
            self.others.append((name.strip("_"), seconds))
        return outputs

    def _add(self, path, operator, seconds, args, outputs, **more):
        tensors, made = (
            [leaf for leaf in tree_leaves(each) if isinstance(leaf, Tensor)] for each in (args, outputs)
        )
        sizes = tuple(tuple(tensor.shape) for tensor in tensors if tensor.numel())
        moved = sum(map(_bytes, tensors + made))
        self.layers.append(Layer(path, operator, seconds, sizes, tensors[0].dtype, bytes=moved, **more))

    def found(self) -> list[Layer]:
        if not self.others:
            return self.layers
        counts = Counter(name for name, _ in self.others)
        words = ", ".join(f"{name} x{count}" for name, count in counts.most_common())
        seconds = math.fsum(seconds for _, seconds in self.others)
        return [*self.layers, Layer("others", f"torch's {words}", seconds)]


def _names(fused) -> str:
    first, last = (block.layers[0].name for block in (fused.blocks[0], fused.blocks[-1]))
    return first if first == last else f"{first} to {last}"


def _bytes(tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _with_share(layer: Layer, peaks: _peaks.Peaks) -> Layer:
    if layer.flops is None:
        return layer
    return dataclasses.replace(layer, share=peaks.least_seconds(layer.flops, layer.bytes) / layer.seconds)


# --- words --------------------------------------------------------------------------------------------------


def _operator(name: str, given: dict) -> str:
    """What an operator of fastconv does, in the words of the layers."""
    if name.startswith("chain"):
        words = f"chain of {len(list(stages(given['plan'])))} stages"
    elif name.startswith("linear"):
        words = "linear"
    elif name.startswith("norm"):
        words = "batch_norm"
    else:
        axes = next(value.dim() for value in given.values() if isinstance(value, Tensor)) - 2
        words = f"conv{axes}d" if name.startswith("conv") else f"{name[:8]}{axes}d"
    if given.get("act") == "relu":
        words += " + relu"
    if given.get("pool_kernel"):
        words += " + max_pool"
    last = name.rpartition("_")[2]
    return f"{words} {last}" if last in ("backward", "dgrad", "wgrad", "gather", "indices") else words


def lines(rows, chosen: str) -> list[str]:
    """A line a row: its predicted cost, or why it is rejected; a star marks the one that is taken."""
    width = max(len(row["name"]) for row in rows)
    return [
        f"  {'*' if row['name'] == chosen else ' '} {row['name']:{width}}  "
        + (row["reason"] if row["reason"] is not None else f"{row['cost_us']:.1f} us")
        + ("" if row["built"] else " (not in this build)")
        for row in rows
    ]


def _size(size) -> str:
    return "x".join(map(str, size))


def _cells(layer: Layer) -> tuple[str, ...]:
    if layer.flops is None:
        return layer.name, "torch's, see below", "", "", "", f"{1e6 * layer.seconds:,.1f}", "", "", ""
    return (
        layer.name,
        layer.operator,
        _kernel(layer),
        f"{layer.flops / 1e6:,.2f}",
        f"{layer.bytes / 1e6:,.3f}",
        f"{1e6 * layer.seconds:,.1f}",
        f"{layer.flops / layer.seconds / 1e9:,.1f}",
        f"{layer.bytes / layer.seconds / 1e9:,.1f}",
        "" if layer.share is None else f"{layer.share:.0%}",
    )


def _others(layer: Layer) -> list[str]:
    return textwrap.wrap(f"{layer.name}: {layer.operator}", WIDTH, subsequent_indent="  ")


def _kernel(layer: Layer) -> str:
    """The row's family; in place of a composed row, those that it runs."""
    if not layer.parts:
        return _family(layer.kernel, layer.rows)
    parts = (_family(part["chosen"], part["rows"]) for part in layer.parts)
    return " + ".join(dict.fromkeys(family for family in parts if family != "composed"))


def _family(name: str, rows) -> str:
    """A row's name without what all rows of its table begin with."""
    common = os.path.commonprefix([row["name"] for row in rows]).rpartition("_")[0]
    return name.removeprefix(common).removeprefix("_")


def _reasons(layer: Layer):
    yield f"{layer.name}: {layer.operator}, {' '.join(map(_size, layer.sizes))}: {layer.kernel}"
    yield from lines(layer.rows, layer.kernel)
    for part in layer.parts:
        yield f"{layer.name}, part of {layer.kernel}: {part['chosen']}"
        yield from lines(part["rows"], part["chosen"])


def _table(rows) -> list[str]:
    """Lines with the columns aligned, the numbers to the right; what is too long is cut."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for column, least in ((2, 20), (0, 16), (2, 12)):
        spare = WIDTH - sum(widths) - 2 * (len(widths) - 1)
        widths[column] = min(widths[column], max(least, widths[column] + spare))
    return ["  ".join(map(_cell, row, widths, range(len(widths)))).rstrip() for row in rows]


def _cell(text, width, column):
    if len(text) > width:
        text = "..." + text[len(text) - width + 3 :] if column == 0 else text[: width - 3] + "..."
    return text.ljust(width) if column < 3 else text.rjust(width)
