# SPDX-License-Identifier: MIT
"""`optimize`: a model with another forward over the same modules.

The forward is traced by torch.fx, once for each combination of training flags, and rewritten by `fuse`. It is
made again where a module is replaced, changes its class or gets a hook.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import types
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from fastconv._optimize import layers
from fastconv._optimize.fuse import Fused, fuse
from fastconv._optimize.report import Report
from fastconv._optimize.steps import Run
from fastconv._optimize.swap import SWAPS, Model


class NotTraceable(Exception):
    """Why a forward can't be traced."""


def optimize(model: Model, *, verbose: bool = False) -> Model:
    """The model with its layers on fastconv's kernels, and fused where they belong together.

    The result has the class of the model, or one derived from it, and the same modules, Parameters, buffers
    and hooks: it trains, and its `state_dict` has the same keys. Use it in the model's place, for train(),
    to() and the like too. The model itself stays as it is.

    Its forward is traced by torch.fx: what a forward decides by other things than its tensors and training
    flags is decided once. Where a forward can't be traced, those of its submodules are, one by one. Layers
    with hooks or parametrizations stay as they are.

    In training batch-norm, ReLU and max-pool behind a convolution are one operator (on a CPU). In eval mode
    batch-norm is folded into the convolution before it. The folded weights are kept, and made anew where a
    parameter or buffer has changed by an operation that torch counts (as load_state_dict's or an optimizer's;
    not one on `.data` or through numpy: call eval() after such).

    Args:
        model: Any module.
        verbose: Print what became of each layer, and why of those that stay.

    Raises:
        TypeError: `model` is not a module.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10))
    >>> optimize(model)(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize(): argument 'model' must be an nn.Module, got {type(model).__name__}")
    report = Report(type(model).__name__)
    found = _optimized(model, "", {}, report)
    if verbose:
        print(report)
    return found


def _optimized(module, path, seen, report):
    """The module optimized; itself where there is nothing to gain. `seen` has those of before, by id."""
    if id(module) not in seen:
        seen[id(module)] = (module, _optimize_one(module, path, seen, report))
    return seen[id(module)][1]


def _optimize_one(module, path, seen, report):
    kind = type(module)
    if isinstance(module, Optimized) or kind.__module__.startswith("fastconv.modules"):
        return module
    if isinstance(module, torch.jit.ScriptModule) or "forward" in module.__dict__:
        report.leave(path, module, "has a forward of its own making")
        return module
    why = layers.why_left(module)
    if why:
        report.leave(path, module, why)
        return module
    if kind in SWAPS:
        twin = _twin(module, SWAPS[kind])
        report.swap(path, module)
        return twin
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    if kind.__module__.startswith("torch.nn") and kind not in containers:
        return module
    try:
        if kind in (nn.ModuleList, nn.ModuleDict):
            raise NotTraceable("")
        found = Optimized.of(module)
    except NotTraceable as error:
        if str(error):
            report.leave(path, module, f"can't be traced as a whole: {error}")
        children = {
            name: child
            if child is None
            else _optimized(child, f"{path}.{name}" if path else name, seen, report)
            for name, child in module._modules.items()
        }
        if all(child is module._modules[name] for name, child in children.items()):
            return module
        twin = _twin(module, kind)
        twin.__dict__["_modules"] = children
        return twin
    plan = found.__dict__["_plan"]
    report.add(path, plan)
    return found if plan.gains else module


def _twin(module, kind):
    """The same module with another class: parameters, buffers, children and hooks are shared."""
    twin = kind.__new__(kind)
    twin.__dict__.update(module.__dict__)
    return twin


# --- a traced model -----------------------------------------------------------------------------------------


class Optimized:
    """Comes before a module's own class: a forward by `_plan` where that has one for the call."""

    _is_replica = False  # torch.nn.DataParallel sets it; without it here, asking takes a while

    @classmethod
    def of(cls, module: nn.Module) -> nn.Module:
        """Raises NotTraceable."""
        twin = _twin(module, _class(_base(module)))
        twin.__dict__["_plan"] = Plan(twin)
        return twin

    def forward(self, *args, **kwargs):
        program = self._plan.program(self, len(args)) if not kwargs else None
        if program is None:
            return super().forward(*args, **kwargs)
        return program(self, *args)

    def train(self, mode: bool = True):
        self._plan.forget()
        return super().train(mode)

    def __reduce_ex__(self, protocol):
        state = self.__dict__.copy()
        del state["_plan"]
        return _rebuilt, (type(self).__mro__[2],), state

    def __setstate__(self, state):
        super().__setstate__(state)
        self.__dict__["_plan"] = Plan(self)


def _base(module):
    return nn.Module if isinstance(module, fx.GraphModule) else type(module)


@functools.cache
def _class(base):
    ours = Optimized.forward
    forward = types.FunctionType(ours.__code__, ours.__globals__, "forward", None, ours.__closure__)
    with contextlib.suppress(TypeError, ValueError):  # where there is no signature
        forward.__signature__ = inspect.signature(base.forward)
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (Optimized, base), {**names, "_traced": base.forward, "forward": forward})


def _rebuilt(base):
    kind = _class(base)
    return kind.__new__(kind)


class Plan:
    """The programs of a model, one for each combination of training flags, and what they rest on.

    arity: How many tensors a program takes: forward's parameters without a default.
    gains: Whether any program has a step.
    """

    def __init__(self, model: nn.Module):
        self.names = _parameter_names(model._traced)
        self.arity = len(self.names)
        self._look(model)
        flags = [module.training for module in self.members]
        try:
            for mode in (not model.training, model.training):
                nn.Module.train(model, mode)
                self._trace(model)
            for module, flag in zip(self.members, flags, strict=True):
                module.training = flag
            self._trace(model)
        finally:
            for module, flag in zip(self.members, flags, strict=True):
                module.training = flag

    def by_mode(self) -> dict[bool, Program]:
        """A program for eval mode and one for training, as far as they have been traced."""
        return {key[0]: program for key, program in self.programs.items()}

    @property
    def gains(self) -> bool:
        return any(each.fused for each in self.programs.values())

    def _look(self, model):
        """Notes what the programs rest on."""
        self.members = list(model.modules())
        self.types = list(map(type, self.members))
        children = [module._modules for module in self.members]
        self.parents = [each for each in children if each]
        self.children = list(itertools.chain.from_iterable(map(dict.values, self.parents)))
        # Layers that have a hook stay as they are; others have none, and their dicts are watched.
        hooks = itertools.chain.from_iterable(map(layers.hook_dicts, self.members[1:]))
        self.empty = [each for each in (*children, *hooks) if not each]
        self.programs = {}

    def program(self, model, count: int) -> Callable | None:
        """The function of (model, *tensors) to call; None where the model's own forward has to do."""
        if count != self.arity or _has_any_global_hook() or model._is_replica:
            return None
        if (
            any(self.empty)
            or list(map(type, self.members)) != self.types
            or list(itertools.chain.from_iterable(map(dict.values, self.parents))) != self.children
        ):
            if torch.compiler.is_compiling():
                return None
            self._look(model)
        found = self.programs.get(_flags(self.members))
        if found is None:
            if torch.compiler.is_compiling():
                return None
            try:
                found = self._trace(model)
            except NotTraceable:
                return None
        return found.function

    def _trace(self, model):
        key = _flags(self.members)
        if key not in self.programs:
            self.programs[key] = Program(model, self.names)
        return self.programs[key]

    def forget(self) -> None:
        for program in self.programs.values():
            for step in program.steps:
                if isinstance(step, Run):
                    step.forget()


def _flags(members):  # no attrgetter: torch.compile does not look into one
    return tuple([module.training for module in members])


def _parameter_names(forward):
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError) as error:
        raise NotTraceable(f"its forward has no signature: {error}") from None
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise NotTraceable("its forward takes any number of arguments")
    return [p.name for p in parameters if p.default is p.empty]


class Program:
    """A model's forward as a rewritten graph and the function that runs it."""

    def __init__(self, model: nn.Module, names: list[str]):
        self.graph = _Tracer(names).trace_forward(model)
        self.fused: list[Fused] = fuse(self.graph, model)
        self.steps = [each.step for each in self.fused]
        self.own = {each.node for each in self.fused}
        modules = {n: model.get_submodule(n.target) for n in self.graph.nodes if n.op == "call_module"}
        self.kinds = {node: type(module).__name__ for node, module in modules.items()}
        whys = {node: layers.why_left(module) for node, module in modules.items()}
        self.left = {node.target: (self.kinds[node], why) for node, why in whys.items() if why}
        self.function = _compiled(self.graph)


def _compiled(graph) -> Callable:
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<fastconv.optimize>", "exec"), scope)
    return scope["forward"]


def _switches():
    """What a forward may set for some of its layers, which a graph doesn't hold."""
    autocast = [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast


class _Tracer(fx.Tracer):
    """torch.fx's, but what it would take for a constant or run at once is refused, or a leaf."""

    traced_func_name = "_traced"

    def __init__(self, names):
        super().__init__()
        self.names = names
        self.switches = _switches()

    def trace_forward(self, model: nn.Module) -> fx.Graph:
        if not isinstance(type(model)._traced, types.FunctionType):
            raise NotTraceable("its forward is no Python function")
        try:
            return self.trace(model)
        except NotTraceable:
            raise
        except Exception as error:  # whatever a forward makes of a stand-in for its tensor
            reason = str(error).split("\n")[0] or type(error).__name__
            raise NotTraceable(reason) from None

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self.names]
        return root_fn, [self.root, *proxies]

    def create_node(self, *args, **kwargs):
        if _switches() != self.switches:
            raise NotTraceable("it switches gradients or autocast on or off")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, module, path):
        if isinstance(module, Optimized) or layers.has_hook(module):
            return True
        # A forward that is set on the instance, and code that is none of Python's, can't be looked into.
        if "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule):
            return True
        return module.__module__.startswith("fastconv.modules") or super().is_leaf_module(module, path)

    def create_arg(self, a):
        if isinstance(a, Tensor) and a not in self.tensor_attrs:
            known = itertools.chain(self.root.parameters(), self.root.buffers())
            if all(a is not each for each in known):
                raise NotTraceable("it makes a tensor of its own, which may differ from call to call")
        return super().create_arg(a)
