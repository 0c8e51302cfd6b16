# SPDX-License-Identifier: MIT
"""The operators of `fastconv.ops`, run by rows of the CUDA tables on the emulator.

`Emulator` has the functions of `fastconv.ops`, with the same arguments, for CPU tensors. It does for a row
what csrc/glue does: fills the argument struct, takes workspace, launches. Every tensor is copied into memory
of its own, far from all others, and registered with the checker, so that a stray access never lands in
another tensor. What the checker finds is raised as RuntimeError. aarch64.py runs the rows of the CPU
tables in the same way, by a library, memory and checks of its own.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from fastconv import ops

from . import build

ORDERS = ("forward", "reverse", "random")
_ACTS = ("none", "relu")  # enum Act
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # enum Dtype
INPUT, _OUTPUT, _SCRATCH = 0, 1, 2  # enum Access of memory.h
_GAP = 1 << 16  # bytes of nobody's memory around each tensor
_ALIGN = 512  # of a storage, as torch's allocator for GPUs has it

# --- the library --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row of a table; `args` is its argument struct, `dtypes` and `layouts` are bits of the enums."""

    op: str
    pass_: str
    name: str
    args: str
    dtypes: int
    layouts: int
    min_level: int


@functools.cache
def library() -> ctypes.CDLL:
    """The emulator with all CUDA kernels of the product."""
    loaded = build.load("product")
    loaded.simt_rows.restype = loaded.simt_structs.restype = ctypes.c_char_p
    loaded.simt_default_args.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p]
    loaded.simt_why_not.argtypes = loaded.simt_workspace_bytes.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    loaded.simt_why_not.restype = loaded.simt_run.restype = ctypes.c_char_p
    loaded.simt_workspace_bytes.restype = ctypes.c_int64
    loaded.simt_fill_chain.argtypes = [ctypes.c_void_p, ctypes.c_size_t] * 2 + [ctypes.c_void_p]
    loaded.simt_run.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p]
    return loaded


@functools.cache
def rows(library) -> dict[str, Row]:
    """The rows of a library by name."""
    lines = [line.split() for line in library.simt_rows().decode().splitlines()]
    return {name: Row(op, pass_, name, args, *map(int, bits)) for op, pass_, name, args, *bits in lines}


def _ctype(types, kind):
    """Of a field: `kind` is the name of a type, with "*8" behind it an array of eight."""
    name, _, count = kind.partition("*")
    return types[name] * int(count) if count else types[name]


@functools.cache
def structs(library) -> SimpleNamespace:
    """The structs of csrc/core/args.h as ctypes.Structures, by the list in rows.cpp.

    Raises:
        RuntimeError: Sizes or offsets are not those of the compiler: the list lacks a field.
    """
    types = {
        "enum": ctypes.c_uint8,
        "bool": ctypes.c_bool,
        "int": ctypes.c_int,
        "int64": ctypes.c_int64,
        "double": ctypes.c_double,
        "pointer": ctypes.c_void_p,
    }
    simple = set(types)
    for line in library.simt_structs().decode().splitlines():
        name, size, *listed = line.split()
        names, kinds, offsets = listed[::3], listed[1::3], list(map(int, listed[2::3]))
        fields = [(field, _ctype(types, kind)) for field, kind in zip(names, kinds, strict=True)]
        types[name] = made = type(name, (ctypes.Structure,), {"_fields_": fields, "__slots__": ()})
        if ctypes.sizeof(made) != int(size) or [getattr(made, field).offset for field in names] != offsets:
            raise RuntimeError(
                f"tests/simt/rows.cpp does not list all fields of {name}, as they stand in args.h"
            )
    return SimpleNamespace(**{name: made for name, made in types.items() if name not in simple})


# --- tensors, and the fields of argument structs as tuples --------------------------------------------------


def _meta(value):
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return [_meta(each) for each in value]
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _layout(*tensors):
    """enum Layout, as csrc/glue/tensor.cpp finds it."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if all(t.is_contiguous() for t in tensors):
        return 0
    if all(t.dim() in formats and t.is_contiguous(memory_format=formats[t.dim()]) for t in tensors):
        return 1
    return 2


def _allows_tf32(emulator, of_torch):
    """What csrc/glue/device.cpp reads of torch's flags: those of cudnn.conv or of cuda.matmul."""
    return emulator.device == Emulator.device and of_torch.fp32_precision == "tf32"


def _extent3(values, missing=1):
    return (*[missing] * (3 - len(values)), *values)


def _view(t):
    if t is None:
        return ()
    n, c, *spatial = t.stride()
    return (t.data_ptr(), n, c, *[0] * (3 - len(spatial)), *spatial)


def _features(t, shape=None):
    """A tensor of a chain; a matrix whose columns are C x H x W numbers, those of `shape`."""
    if t is None or t.dim() == 4:
        return _view(t)
    row, column = t.stride()
    if shape is None:
        return (t.data_ptr(), row, column)
    return (t.data_ptr(), row, shape.H * shape.W * column, 0, shape.W * column, column)


def _matrix(t):
    return () if t is None else (t.data_ptr(), *t.stride())


def _dense(bias):
    return None if bias is None else bias.contiguous()


def _data(t):
    return None if t is None else t.data_ptr()


def _wanted(t):
    """Operators return an empty tensor for a gradient that is not wanted."""
    return None if t.dim() == 1 and t.numel() == 0 else t


def _rows_of(t):
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _fill_window(window, out, kernel, stride, padding, dilation):
    window.kernel, window.stride = _extent3(kernel), _extent3(stride)
    window.padding, window.dilation = _extent3(padding, 0), _extent3(dilation)
    window.out = _extent3(out.shape[2:])


class _Call:
    """One launch of a row: the tensors it may touch, in the emulator's memory, and its argument struct."""

    def __init__(self, emulator, kernels):
        self.emulator, self.library = emulator, emulator.library
        kernel, _, self.forward = kernels.partition(",")
        self.row = rows(self.library)[kernel]
        emulator.clear()
        args = getattr(structs(self.library), self.row.args)
        self._memory = [emulator.memory(ctypes.sizeof(args))]
        self.args = args.from_address(self._memory[0].data_ptr())
        self.library.simt_default_args(self.row.op.encode(), self.row.pass_.encode(), self.address)

    @property
    def address(self):
        """Of the argument struct."""
        return ctypes.addressof(self.args)

    def keep(self, *numbers, dtype=torch.int64):
        """The address of numbers in memory."""
        numbers = torch.tensor(numbers, dtype=dtype)
        self._memory.append(self.emulator.memory(numbers.nbytes).view(dtype).copy_(numbers))
        return self._memory[-1].data_ptr()

    def input(self, name, tensor):
        """A copy of a tensor, where elements that share an address keep sharing one."""
        if tensor is None:
            return None
        copy = self._empty_like(tensor)
        once = tuple(slice(0, 1) if s == 0 else slice(None) for s in tensor.stride())
        copy[once].copy_(tensor[once])
        return self._register(name, copy, INPUT)

    def output(self, name, meta):
        """A tensor to be written, like a meta tensor; None for one that is not wanted."""
        if _wanted(meta) is None:
            return None
        return self._register(name, self._empty_like(meta), _OUTPUT)

    def scratch(self, name, meta):
        """A tensor of which some may stay unwritten."""
        return self._register(name, self._empty_like(meta), _SCRATCH)

    def _empty_like(self, tensor):
        """Uninitialised memory of its own with the sizes, strides and alignment of a tensor."""
        item = tensor.element_size()
        cells = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        offset = tensor.storage_offset() * item % _ALIGN if tensor.device.type != "meta" else 0
        memory = self.emulator.memory(cells * item + offset + _ALIGN + 2 * _GAP)
        start = _GAP + (-memory.data_ptr() - _GAP) % _ALIGN + offset
        place = memory[start : start + cells * item].view(tensor.dtype)
        return place.as_strided(tensor.shape, tensor.stride())

    def _register(self, name, tensor, access):
        self.emulator.register(name, tensor, access)
        return tensor

    def fill(self, common, tensor, *laid_out):
        """What all structs have: dtype, target, layout."""
        common.dtype = DTYPES.index(tensor.dtype) if tensor.dtype in DTYPES else 0
        common.target = (self.emulator.device, self.emulator.level)
        common.layout = _layout(*laid_out)

    def run(self):
        """Launches. Raises RuntimeError where the row rejects the call, and with what the checker found."""
        name = self.row.name.encode()
        if reason := self.library.simt_why_not(name, self.address):
            raise RuntimeError(f"kernel {self.row.name} cannot take this call: it {reason.decode()}")
        workspace = None
        if bytes_ := int(self.library.simt_workspace_bytes(name, self.address)):
            workspace = self.scratch("workspace", torch.empty(bytes_, dtype=torch.uint8, device="meta"))
        if report := self.emulator.launch(name, self.address, _data(workspace)):
            raise RuntimeError(f"{self.row.name}, {self.emulator.order} order:\n{report.decode()}")


def _operator(function):
    """An operator, of a function of the emulator, a call, the outputs as meta tensors, and the arguments."""
    name = function.__name__

    @functools.wraps(function)
    def run(self, *args):
        operator = getattr(torch.ops.fastconv, name).default
        count = len(operator._schema.arguments) - 1
        args, kernel = args[:count], "".join(args[count:])
        if not kernel:
            return getattr(ops, name)(*args, "")
        call = _Call(self, kernel)
        return function(self, call, operator(*map(_meta, args)), *args)

    return run


def _result(tensor, meta):
    """A written output, or what operators return in place of one that is not wanted."""
    return torch.empty_like(meta, device="cpu") if tensor is None else tensor.clone().reshape(meta.shape)


@dataclass
class Emulator:
    """`fastconv.ops` on the emulator. Calls that name no kernel go to the CPU.

    order: which ready thread, warp and block runs next: "forward", "reverse" or "random" (by `seed`).
    level: of the GPU that the rows believe to run on: 10 * major + minor.
    statistics: takes the text of simt_statistics() of each launch; None: nothing is counted.
    """

    order: str = "forward"
    seed: int = 1
    level: int = 90
    statistics: list[str] | None = None
    device = 1  # enum Device

    @property
    def library(self):
        return library()

    def clear(self):
        """Forgets the tensors of the last call."""
        self.library.simt_clear()

    def memory(self, size):
        """Bytes for one call, each 0xFF: part of a NaN, or -1."""
        return torch.full((size,), 0xFF, dtype=torch.uint8)

    def register(self, name, tensor, access):
        """Tells the checker of a tensor."""
        numbers = ctypes.c_int64 * tensor.dim()
        sizes, strides = numbers(*tensor.shape), numbers(*tensor.stride())
        self.library.simt_register(
            tensor.data_ptr(), name.encode(), access, tensor.element_size(), tensor.dim(), sizes, strides
        )

    def launch(self, name, args, workspace):
        """Runs a row. Returns the report of what was wrong, or None."""
        counts = self.statistics is not None
        self.library.simt_configure(ORDERS.index(self.order), self.seed, counts)
        report = self.library.simt_run(name, args, workspace) or self.library.simt_unwritten_outputs()
        self.library.simt_configure(0, 1, False)
        if counts:
            self.statistics.append(self.library.simt_statistics().decode())
        return report

    # --- convolution

    def _conv(self, call, args, x, w, y, unpooled, stride, padding, dilation, groups):
        call.fill(args, x, x, y)
        args.tf32 = _allows_tf32(self, torch.backends.cudnn.conv)
        s = args.shape
        (s.N, s.C), (s.K, _) = x.shape[:2], w.shape[:2]
        s.groups = groups
        for names, tensor in (("DHW", x), ("TRS", w), ("ZPQ", unpooled)):
            for name, size in zip(names[-len(stride) :], tensor.shape[2:], strict=True):
                setattr(s, name, size)
        s.stride, s.dilation = _extent3(stride), _extent3(dilation)
        s.padding = _extent3(padding[: len(stride)], 0)
        args.x, args.w, args.y = _view(x), _view(w), _view(y)

    @_operator
    def conv_fprop(self, call, meta, x, w, b, *conv):
        x, w, b = call.input("input", x), call.input("weight", w), call.input("bias", _dense(b))
        y = call.output("output", meta)
        self._conv(call, call.args, x, w, y, y, *conv)
        call.args.epilogue.bias = _data(b)
        call.run()
        return _result(y, meta)

    @_operator
    def conv_dgrad(self, call, meta, gy, w, input_size, *conv):
        gy, w, x = call.input("grad_output", gy), call.input("weight", w), call.output("grad_input", meta)
        self._conv(call, call.args, x, w, gy, gy, *conv)
        call.run()
        return _result(x, meta)

    @_operator
    def conv_wgrad(self, call, metas, gy, x, weight_size, *conv_and_bias):
        *conv, _ = conv_and_bias
        gy, x = call.input("grad_output", gy), call.input("input", x)
        w, b = map(call.output, ("grad_weight", "grad_bias"), metas)
        self._conv(call, call.args, x, w, gy, gy, *conv)
        call.args.bias_grad = _data(b)
        call.run()
        return tuple(map(_result, (w, b), metas))

    def _fused(self, call, args, x, w, y, offsets, conv, act, pool):
        unpooled = torch.ops.fastconv.conv_fprop(_meta(x), _meta(w), None, *conv)
        self._conv(call, args, x, w, y, unpooled, *conv)
        args.epilogue.act = _ACTS.index(act)
        if pool[0]:
            _fill_window(args.epilogue.pool, y, *pool, [1] * len(pool[0]))
        args.epilogue.offsets = _view(offsets)

    @_operator
    def conv_act_pool(self, call, metas, x, w, b, *rest):
        *conv, act, pool_kernel, pool_stride, pool_padding, _ = rest
        x, w, b = call.input("input", x), call.input("weight", w), call.input("bias", _dense(b))
        y, offsets = map(call.output, ("output", "offsets"), metas)
        self._fused(call, call.args, x, w, y, offsets, conv, act, (pool_kernel, pool_stride, pool_padding))
        call.args.epilogue.bias = _data(b)
        call.run()
        return tuple(map(_result, (y, offsets), metas))

    @_operator
    def conv_act_pool_backward(self, call, metas, gy, y, offsets, x, w, *rest):
        *conv, act, pool_kernel, pool_stride, pool_padding, _ = rest
        names = ("grad_output", "output", "offsets", "input", "weight")
        gy, y, offsets, x, w = map(call.input, names, (gy, y, _wanted(offsets), x, w))
        grads = tuple(map(call.output, ("grad_input", "grad_weight", "grad_bias"), metas))
        args = call.args
        self._fused(call, args.conv, x, w, y, offsets, conv, act, (pool_kernel, pool_stride, pool_padding))
        args.grad_y, args.grad_x, args.grad_w = map(_view, (gy, *grads[:2]))
        args.grad_b = _data(grads[2])
        call.run()
        return tuple(map(_result, grads, metas))

    # --- max-pool

    def _pool(self, call, x, y, offsets, input_size, *window):
        args = call.args
        call.fill(args, x, x, y)
        args.N, args.C, *_ = input_size
        for name, size in zip("DHW"[5 - len(input_size) :], input_size[2:], strict=True):
            setattr(args, name, size)
        _fill_window(args.window, y, *window[:4])
        args.x, args.y, args.offsets = _view(x), _view(y), _view(offsets)
        if offsets is not None:
            args.offset = 1 if offsets.dtype == torch.uint8 else 2

    @_operator
    def max_pool(self, call, metas, x, *window_and_save):
        x = call.input("input", x)
        y, offsets = map(call.output, ("output", "offsets"), metas)
        self._pool(call, x, y, offsets, x.shape, *window_and_save)
        call.run()
        return tuple(map(_result, (y, offsets), metas))

    @_operator
    def max_pool_backward(self, call, meta, gy, offsets, input_size, *window):
        gy, offsets = call.input("grad_output", gy), call.input("offsets", offsets)
        x = call.output("grad_input", meta)
        self._pool(call, x, gy, offsets, input_size, *window)
        call.run()
        return _result(x, meta)

    @_operator
    def max_pool_gather(self, call, meta, x, offsets, *window):
        x, offsets, y = call.input("input", x), call.input("offsets", offsets), call.output("output", meta)
        self._pool(call, x, y, offsets, x.shape, *window)
        call.run()
        return _result(y, meta)

    @_operator
    def max_pool_indices(self, call, meta, offsets, input_size, *window):
        offsets, y = call.input("offsets", offsets), call.output("indices", meta)
        self._pool(call, offsets, y, offsets, input_size, *window)
        call.run()
        return _result(y, meta)

    # --- average pooling

    def _average(
        self, call, x, y, input_size, kernel, stride, padding, ceil_mode, count_include_pad, divisor
    ):
        self._pool(call, x, y, None, input_size, kernel, stride, padding, [1] * len(kernel))
        call.args.divide_by = 2 if divisor is not None else 0 if count_include_pad else 1
        call.args.divisor = 1 if divisor is None else divisor

    @_operator
    def avg_pool(self, call, meta, x, *window):
        x, y = call.input("input", x), call.output("output", meta)
        self._average(call, x, y, x.shape, *window)
        call.run()
        return _result(y, meta)

    @_operator
    def avg_pool_backward(self, call, meta, gy, input_size, *window_and_layout):
        gy, x = call.input("grad_output", gy), call.output("grad_input", meta)
        self._average(call, x, gy, input_size, *window_and_layout[:-1])
        call.run()
        return _result(x, meta)

    # --- batch-norm, act and max-pool

    def _norm(self, call, args, x, y, offsets, w, mean, invstd, act, pool):
        call.fill(args, x, x, y)
        args.N, args.C, *_ = x.shape
        for name, size in zip("DHW"[5 - x.dim() :], x.shape[2:], strict=True):
            setattr(args, name, size)
        args.act = _ACTS.index(act)
        args.window.out = _extent3(y.shape[2:])
        if pool[0]:
            _fill_window(args.window, y, *pool, [1] * len(pool[0]))
            args.offset = 1 if offsets.dtype == torch.uint8 else 2
        args.x, args.y, args.offsets = _view(x), _view(y), _view(offsets)
        args.weight, args.mean, args.invstd = map(_data, (w, mean, invstd))

    @_operator
    def norm_act_pool(self, call, metas, x, w, b, eps, act, *pool):
        x, w, b = call.input("input", x), call.input("weight", _dense(w)), call.input("bias", _dense(b))
        y, offsets, mean, invstd = map(call.output, ("output", "offsets", "mean", "invstd"), metas)
        self._norm(call, call.args, x, y, offsets, w, mean, invstd, act, pool)
        call.args.eps, call.args.bias = eps, _data(b)
        call.run()
        return tuple(map(_result, (y, offsets, mean, invstd), metas))

    @_operator
    def norm_act_pool_backward(self, call, metas, gy, y, offsets, x, w, mean, invstd, act, *pool_and_mask):
        *pool, mask = pool_and_mask
        names = ("grad_output", "output", "offsets", "input", "weight", "mean", "invstd")
        tensors = (gy, y, _wanted(offsets), x, _dense(w), mean, invstd)
        gy, y, offsets, x, w, mean, invstd = map(call.input, names, tensors)
        names = ("grad_input", "grad_weight", "grad_bias")
        grads = [
            call.output(name, meta) if wanted else None
            for name, meta, wanted in zip(names, metas, mask, strict=True)
        ]
        args = call.args
        self._norm(call, args.norm, x, y, offsets, w, mean, invstd, act, pool)
        args.grad_y, args.grad_x = map(_view, (gy, grads[0]))
        args.grad_w, args.grad_b = map(_data, grads[1:])
        call.run()
        return tuple(map(_result, grads, metas))

    # --- linear

    def _linear(self, call, args, x, w, y):
        call.fill(args, x, x, w, y)
        args.tf32 = _allows_tf32(self, torch.backends.cuda.matmul)
        (args.M, args.K), args.N = x.shape, w.shape[0]
        args.x, args.w, args.y = map(_matrix, (x, w, y))

    @_operator
    def linear_act(self, call, meta, x, w, b, act):
        x, w, b = call.input("input", _rows_of(x)), call.input("weight", w), call.input("bias", _dense(b))
        y = call.output("output", _rows_of(meta))
        self._linear(call, call.args, x, w, y)
        call.args.epilogue.bias, call.args.epilogue.act = _data(b), _ACTS.index(act)
        call.run()
        return _result(y, meta)

    @_operator
    def linear_dgrad(self, call, meta, gy, w):
        gy, w = call.input("grad_output", _rows_of(gy)), call.input("weight", w)
        x = call.output("grad_input", _rows_of(meta))
        self._linear(call, call.args, x, w, gy)
        call.run()
        return _result(x, meta)

    @_operator
    def linear_wgrad(self, call, metas, gy, x, bias):
        gy, x = call.input("grad_output", _rows_of(gy)), call.input("input", _rows_of(x))
        w, b = map(call.output, ("grad_weight", "grad_bias"), metas)
        self._linear(call, call.args, x, w, gy)
        call.args.bias_grad = _data(b)
        call.run()
        return tuple(map(_result, (w, b), metas))

    @_operator
    def linear_act_backward(self, call, metas, gy, y, x, w, act, mask):
        names = ("grad_output", "output", "input", "weight")
        gy, y, x, w = map(call.input, names, (*map(_rows_of, (gy, y, x)), w))
        gx = call.output("grad_input", _rows_of(metas[0]) if mask[0] else metas[0])
        gw, gb = map(call.output, ("grad_weight", "grad_bias"), metas[1:])
        args = call.args
        self._linear(call, args.linear, x, w, y)
        args.linear.epilogue.act = _ACTS.index(act)
        args.grad_y, args.grad_x, args.grad_w = map(_matrix, (gy, gx, gw))
        args.grad_b = _data(gb)
        call.run()
        return tuple(map(_result, (gx, gw, gb), metas))

    # --- a chain

    def _chain(self, call, args, x, params, y, saved, plan):
        """Returns the parameters as the stages have them: (stage, weight, bias or None)."""
        call.fill(args, x, x)
        sizes = call.keep(*(n for t in (x, *params) for n in (t.dim(), *t.shape)))
        address = ctypes.addressof(args)
        call.library.simt_fill_chain(call.keep(*plan), len(plan), sizes, len(params), address)
        call.fill(args, x, x)
        args.inner = int(_layout(y if y.dim() == 4 else x) == 1)
        args.x, args.y, args.saved = _features(x), _features(y), _data(saved)
        waiting, found = list(params), []
        flags = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # by enum Layer
        for stage in args.stages[: args.count]:
            stage.conv.tf32 = _allows_tf32(self, flags[stage.layer])
            weight = waiting.pop(0)
            bias = waiting.pop(0) if waiting and waiting[0].dim() == 1 else None
            stage.conv.w = _features(weight, stage.conv.shape)
            stage.conv.epilogue.bias = _data(bias)
            found.append((stage, weight, bias))
        return found

    @_operator
    def chain(self, call, metas, x, params, plan, save):
        x = call.input("input", x)
        params = [call.input("params", _dense(p) if p.dim() == 1 else p) for p in params]
        y, saved = call.output("output", metas[0]), None
        if save:
            saved = call.scratch("saved", metas[1])
        self._chain(call, call.args, x, params, y, saved, plan)
        call.run()
        return tuple(map(_result, (y, saved), metas))

    @_operator
    def chain_backward(self, call, metas, gy, y, x, params, saved, plan, mask):
        x, y, saved = (call.input(name, t) for name, t in (("input", x), ("output", y), ("saved", saved)))
        params = [call.input("params", p) for p in params]
        stages = self._chain(call, call.args.chain, x, params, y, saved, plan)
        inner = torch.channels_last if call.args.chain.inner and gy.dim() == 4 else torch.contiguous_format
        gy = call.input("grad_output", gy.contiguous(memory_format=inner))
        gx = call.output("grad_input", metas[0])
        grads = [call.output("grad_params", meta) for meta in metas[1]]
        args, waiting = call.args, list(grads)
        args.forward = call.keep(*call.forward.encode(), 0, dtype=torch.uint8)
        args.grad_y, args.grad_x = _features(gy), _features(gx)
        for stage, _, bias in stages:
            stage.grad_w = _features(waiting.pop(0), stage.conv.shape)
            stage.grad_b = _data(waiting.pop(0)) if bias is not None else None
        call.run()
        return _result(gx, metas[0]), list(map(_result, grads, metas[1]))
