# SPDX-License-Identifier: MIT
"""Recognises layers among the nodes of a torch.fx graph: modules, functions and methods alike.

A layer has a kind, the words that `fuse.PATTERNS` are made of:

    conv1d, conv2d, conv3d, linear   with `stage` and parameters
    norm                             batch-norm by running statistics, with `stage.norm`'s parameters
    batch_norm                       batch-norm by the batch's statistics
    relu, max_pool, flatten          as a convolution takes them
    pool                             any other pooling layer that fastconv has
    identity                         what only passes its input on
"""

from __future__ import annotations

import functools
import inspect
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastconv import _C, functional, modules
from fastconv._optimize.steps import Norm, Stage, batch_norm_arguments
from fastconv._optimize.swap import SWAPS

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_DEVICES = ("cpu", "cuda") if _C.build_info()["cuda"] else ("cpu",)


@dataclass
class Layer:
    """One node of the graph as a layer.

    input: The node of its input.
    params: Of a stage or a norm, in order: a node, or (dict, key) of a module.
    stage: Of a convolution or linear layer.
    norm: Of a norm.
    call: Of a pool the function of the input that does it, with `options`; of a batch_norm what BatchNormReLU
        takes, a function of the input and `params`.
    """

    kind: str
    node: fx.Node
    name: str
    input: fx.Node
    params: list = field(default_factory=list)
    stage: Stage | None = None
    norm: Norm | None = None
    call: Callable | None = None
    options: dict = field(default_factory=dict)
    note: str = ""


def has_hook(module: nn.Module) -> bool:
    return any(hook_dicts(module))


def hook_dicts(module: nn.Module) -> tuple[dict, ...]:
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def why_left(module: nn.Module) -> str | None:
    """Why a module that looks like a layer of ours stays as it is; None where it need not, or doesn't."""
    for kind in SWAPS:
        if isinstance(module, kind):
            if nn.utils.parametrize.is_parametrized(module):
                return "is parametrized"
            if has_hook(module):
                return "has hooks"
            if type(module) not in (kind, SWAPS[kind]) and not type(module).__module__.startswith("fastconv"):
                return f"is a subclass of {kind.__name__}, {type(module).__name__}"
    return None


def recognise(node: fx.Node, root: nn.Module) -> Layer | None:
    """The layer that a node is; None where it is something else or has a hook."""
    if node.op == "call_module":
        module = root.get_submodule(node.target)
        reader = _MODULES.get(type(module))
        if reader is None or has_hook(module) or len(node.args) != 1 or node.kwargs:
            return None
        layer = reader(node, module)
    elif node.op in ("call_function", "call_method"):
        reader = (_FUNCTIONS if node.op == "call_function" else _METHODS).get(node.target)
        layer = reader(node, root) if reader else None
    else:
        return None
    if layer is None or not isinstance(layer.input, fx.Node) or any(p is layer.input for p in layer.params):
        return None
    return layer if all(map(_takes, (layer.input, *layer.params))) else None


def _takes(value) -> bool:
    """Whether fastconv has kernels for a node's tensor; True where nothing is known of it."""
    tensor = value.meta.get("example_value") if isinstance(value, fx.Node) else None
    return not isinstance(tensor, Tensor) or (
        tensor.dtype in _DTYPES
        and tensor.layout is torch.strided
        and tensor.device.type in _DEVICES
        and not is_traceable_wrapper_subclass(tensor)
    )


def is_written(node: fx.Node, root: nn.Module) -> bool:
    """Whether something may write into a node's value, or into a view of it."""
    return any(
        _writes(user, node, root) or (_name(user, root) in _VIEWS and is_written(user, root))
        for user in node.users
    )


def _name(node, root):
    if node.op == "call_module":
        return type(root.get_submodule(node.target)).__name__.lower()
    return getattr(node.target, "__name__", node.target)


def _writes(user: fx.Node, node: fx.Node, root: nn.Module) -> bool:
    if user.op == "output":
        return False
    if user.op == "call_module":
        module = root.get_submodule(user.target)
        known = type(module).__module__.startswith(("torch.nn.", "fastconv."))
        return not known or bool(getattr(module, "inplace", False))
    if user.kwargs.get("out") is node:
        return True
    name = _name(user, root)
    if user.op == "call_function":
        if not (user.target.__module__ or "torch").startswith(("torch", "_operator", "builtins", "fastconv")):
            return True
        if hasattr(user.target, "__code__") and "inplace" in user.target.__code__.co_varnames:
            given = _bound(user, inspect.signature(user.target))
            return given is None or given.get("inplace") is not False
    written = user.target in (operator.setitem, setattr) or name in _IN_PLACE or re.search("[^_]_$", name)
    return bool(written) and user.args[:1] == (node,)


_IN_PLACE = {f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")} | {
    f"i{name}" for name in ("and", "or", "xor", "lshift", "rshift")
}
_VIEWS = {
    *("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "getitem"),
    *("transpose", "permute", "t", "movedim", "swapaxes", "expand", "expand_as", "contiguous", "to", "type"),
    *("narrow", "select", "chunk", "split", "unbind", "diagonal", "unfold", "detach", "alias", "getattr"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alphadropout", "identity"),
}


def attribute(root: nn.Module, target: str) -> tuple[dict, str]:
    """Where a get_attr node's tensor lies: (dict, key)."""
    *path, name = target.split(".")
    return _place(root.get_submodule(".".join(path)), name)


def _place(module: nn.Module, name: str) -> tuple[dict, str]:
    for where in (module._parameters, module._buffers, module.__dict__):
        if name in where:
            return where, name
    raise AttributeError(f"{type(module).__name__} has no tensor {name!r}")


def _params(module: nn.Module, *names: str) -> list:
    return [_place(module, name) for name in names if getattr(module, name) is not None]


# --- modules ------------------------------------------------------------------------------------------------


def _conv_module(node, module):
    axes = len(module.kernel_size)
    pad, padding, edges = None, module.padding, None
    if module.padding_mode != "zeros":
        pad, padding = (tuple(module._reversed_padding_repeated_twice), module.padding_mode), 0
    elif axes == 2:
        left, right, top, bottom = module._reversed_padding_repeated_twice
        edges = (top, left, bottom, right)
    conv = (module.stride, padding, module.dilation, module.groups)
    stage = Stage(axes, module.bias is not None, conv, pad, edges)
    return _layer(f"conv{axes}d", node, stage=stage, params=_params(module, "weight", "bias"))


def _linear_module(node, module):
    stage = Stage(0, module.bias is not None)
    return _layer("linear", node, stage=stage, params=_params(module, "weight", "bias"))


def _norm_module(node, module):
    if module.training or module.running_mean is None:
        call = functools.partial(batch_norm_arguments, module)
        return _layer("batch_norm", node, call=call) if isinstance(module, nn.BatchNorm2d) else None
    dims = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}[type(module)]
    norm = Norm(module.eps, module.weight is not None, module.bias is not None, dims)
    params = _params(module, "weight", "bias", "running_mean", "running_var")
    return _layer("norm", node, norm=norm, params=params)


def _max_pool_module(node, module):
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    return _max_pool(node, _axes(module), {name: getattr(module, name) for name in names})


def _avg_pool_module(node, module):
    call = getattr(functional, f"avg_pool{_axes(module)}d")
    names = [name for name in inspect.signature(call).parameters if name != "input"]
    return _layer("pool", node, call=call, options={name: getattr(module, name) for name in names})


def _dropout_module(node, module):
    return None if module.training else _layer("identity", node)


def _flatten_module(node, module):
    return _layer("flatten", node) if (module.start_dim, module.end_dim) == (1, -1) else None


def _axes(pool):
    return int(type(pool).__name__[-2])  # MaxPool2d


def _layer(kind, node, input=None, **more):
    name = node.target if node.op == "call_module" else getattr(node.target, "__name__", node.target)
    return Layer(kind, node, str(name), node.args[0] if input is None else input, **more)


_MODULES = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv_module),
    **dict.fromkeys((modules.Conv1d, modules.Conv2d, modules.Conv3d), _conv_module),
    **dict.fromkeys((nn.Linear, modules.Linear), _linear_module),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _max_pool_module),
    **dict.fromkeys((modules.MaxPool1d, modules.MaxPool2d, modules.MaxPool3d), _max_pool_module),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _avg_pool_module),
    **dict.fromkeys((modules.AvgPool1d, modules.AvgPool2d, modules.AvgPool3d), _avg_pool_module),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _norm_module),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _dropout_module),
    **dict.fromkeys((nn.AlphaDropout, nn.FeatureAlphaDropout), _dropout_module),
    nn.Identity: lambda node, module: _layer("identity", node),
    nn.ReLU: lambda node, module: _layer("relu", node, options={"inplace": module.inplace}),
    nn.Flatten: _flatten_module,
}


# --- functions and methods ----------------------------------------------------------------------------------


def _bound(node, signature) -> dict[str, Any] | None:
    """The node's arguments by name, with defaults; None where they don't fit."""
    try:
        bound = signature.bind(*node.args, **node.kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    return bound.arguments


def _constant(*values) -> bool:
    """Whether there is no node of the graph among the values."""
    found = []
    fx.node.map_arg(values, found.append)
    return not found


def _source(value, root):
    """A parameter as `Layer.params` holds it."""
    return attribute(root, value.target) if value.op == "get_attr" else value


def _stage_params(given, root, *names):
    values = [given[name] for name in names if given[name] is not None]
    return [_source(value, root) for value in values] if all(map(_is_node, values)) else None


def _is_node(value):
    return isinstance(value, fx.Node)


def _conv_function(axes):
    function = getattr(functional, f"conv{axes}d")
    signature = inspect.signature(function)

    def read(node, root):
        given = _bound(node, signature)
        if given is None:
            return None
        params = _stage_params(given, root, "weight", "bias")
        conv = tuple(given[name] for name in ("stride", "padding", "dilation", "groups"))
        if params is None or not _constant(conv):
            return None
        edges = _edges(conv[1]) if axes == 2 else None
        stage = Stage(axes, given["bias"] is not None, conv, None, edges)
        return _layer(f"conv{axes}d", node, given["input"], stage=stage, params=params)

    return read


def _edges(padding):
    if isinstance(padding, int):
        return (padding,) * 4
    if padding == "valid":
        return (0,) * 4
    if isinstance(padding, str):
        return None  # 'same' follows from the weight, which may not be known yet
    return (*padding, *padding) * (2 // len(padding))


def _linear_function(node, root):
    given = _bound(node, _LINEAR)
    params = given and _stage_params(given, root, "weight", "bias")
    if not params:
        return None
    stage = Stage(0, given["bias"] is not None)
    return _layer("linear", node, given["input"], stage=stage, params=params)


_LINEAR = inspect.signature(functional.linear)
_NORM = inspect.signature(F.batch_norm)
_FLATTEN = inspect.signature(lambda input, start_dim=0, end_dim=-1: None)
_RELU = inspect.signature(lambda input, inplace=False: None)


def _norm_function(node, root):
    given = _bound(node, _NORM)
    names = ("weight", "bias", "running_mean", "running_var")
    params = given and _stage_params(given, root, *names)
    options = given and {name: given[name] for name in ("momentum", "eps")}
    if params is None or not _constant(given["training"], options):
        return None
    there = [name for name in names if given[name] is not None]
    if given["training"]:

        def call(x, *params):
            absent = {"running_mean": None, "running_var": None}
            return {**absent, **dict(zip(there, params, strict=True)), **options}

        return _layer("batch_norm", node, given["input"], call=call, params=params)
    if there[-2:] != ["running_mean", "running_var"]:
        return None
    norm = Norm(given["eps"], "weight" in there, "bias" in there)
    return _layer("norm", node, given["input"], norm=norm, params=params)


def _max_pool_function(axes):
    signature = inspect.signature(getattr(functional, f"max_pool{axes}d"))

    def read(node, root):
        given = _bound(node, signature)
        input = given and given.pop("input")
        return _max_pool(node, axes, given, input) if given and _constant(given) else None

    return read


def _max_pool(node, axes, options, input=None):
    call = getattr(functional, f"max_pool{axes}d")
    plain = options["dilation"] in (1, (1,) * axes, [1] * axes) and not options["ceil_mode"]
    if axes == 2 and plain and not options["return_indices"]:
        options = {name: options[name] for name in ("kernel_size", "stride", "padding")}
        options["stride"] = options["stride"] or None  # torch also takes an empty stride for none
        return _layer("max_pool", node, input, call=call, options=options)
    note = "pools with dilation, ceil_mode or return_indices" if axes == 2 else ""
    return _layer("pool", node, input, call=call, options=options, note=note)


def _avg_pool_function(axes):
    call = getattr(functional, f"avg_pool{axes}d")
    signature = inspect.signature(call)

    def read(node, root):
        given = _bound(node, signature)
        input = given and given.pop("input")
        return _layer("pool", node, input, call=call, options=given) if given and _constant(given) else None

    return read


def _relu_function(node, root):
    given = _bound(node, _RELU)
    if given is None:
        return None
    inplace = given["inplace"] or node.target in (F.relu_, torch.relu_, "relu_")
    return _layer("relu", node, given["input"], options={"inplace": inplace})


def _flatten_function(node, root):
    given = _bound(node, _FLATTEN)
    if given is None or (given["start_dim"], given["end_dim"]) != (1, -1):
        return None
    return _layer("flatten", node, given["input"])


def _dropout_function(function):
    signature = inspect.signature(function)

    def read(node, root):
        given = _bound(node, signature)
        return _layer("identity", node, given["input"]) if given and given["training"] is False else None

    return read


def is_flatten(node: fx.Node) -> list[fx.Node] | None:
    """Whether a node is x.view(x.size(0), -1), or the like: the nodes that ask for the size."""
    if node.op != "call_method" or node.target not in ("view", "reshape") or node.kwargs:
        return None
    x, *sizes = node.args
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = sizes[0]
    if len(sizes) != 2 or sizes[1] != -1:
        return None
    size, tensor = sizes[0], x.meta.get("example_value")
    if isinstance(tensor, Tensor) and tensor.dim():
        known = size.meta.get("example_value") if _is_node(size) else size
        return [] if _equal(known, tensor.shape[0]) else None
    if not _is_node(size):
        return None
    if size.op == "call_method" and size.target == "size" and size.args == (x, 0):
        return [size]
    if size.op == "call_function" and size.target is operator.getitem and size.args[1] == 0:
        shape = size.args[0]
        by_method = shape.op == "call_method" and shape.target == "size" and shape.args == (x,)
        if by_method or (shape.target is getattr and shape.args == (x, "shape")):
            return [size, shape]
    return None


def _equal(a, b):
    """Whether two extents are known to be equal, whatever the shapes that are not known yet."""
    if type(a) is type(b) is int:
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    return isinstance(a, (int, torch.SymInt)) and statically_known_true(a == b)


_DROPOUTS = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
)
_FUNCTIONS = {
    torch.conv1d: _conv_function(1),
    torch.conv2d: _conv_function(2),
    torch.conv3d: _conv_function(3),
    F.linear: _linear_function,
    F.batch_norm: _norm_function,
    **{getattr(F, f"max_pool{axes}d"): _max_pool_function(axes) for axes in (1, 2, 3)},
    **{getattr(torch, f"max_pool{axes}d"): _max_pool_function(axes) for axes in (1, 2, 3)},
    **{getattr(F, f"avg_pool{axes}d"): _avg_pool_function(axes) for axes in (1, 2, 3)},
    **{function: _dropout_function(function) for function in _DROPOUTS},
    **dict.fromkeys((F.relu, torch.relu, F.relu_, torch.relu_), _relu_function),
    torch.flatten: _flatten_function,
}
_METHODS = {
    **dict.fromkeys(("relu", "relu_"), _relu_function),
    "flatten": _flatten_function,
}
