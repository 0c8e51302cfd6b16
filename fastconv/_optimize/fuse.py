# SPDX-License-Identifier: MIT
"""Rewrites a torch.fx graph: layers become fastconv's, and those that belong together become one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from fastconv._optimize import layers as recognised
from fastconv._optimize.layers import Layer
from fastconv._optimize.steps import BatchNormReLU, Bound, Pool, ReLUPool, Run, Stage

# Kinds of layers in a row that become one step, longest first; each but the first reads the one before, and
# nothing else does.
PATTERNS = (
    ("conv2d", "norm", "relu", "max_pool"),
    ("conv2d", "norm", "max_pool", "relu"),
    ("conv2d", "norm", "relu"),
    ("conv2d", "norm", "max_pool"),
    ("conv2d", "relu", "max_pool"),
    ("conv2d", "max_pool", "relu"),
    ("conv2d", "relu"),
    ("conv2d", "max_pool"),
    ("conv2d", "norm"),
    ("conv2d",),
    ("conv1d", "norm"),
    ("conv1d",),
    ("conv3d", "norm"),
    ("conv3d",),
    ("linear", "norm", "relu"),
    ("linear", "norm"),
    ("linear", "relu"),
    ("linear",),
    ("batch_norm", "relu", "max_pool"),
    ("batch_norm", "max_pool", "relu"),
    ("batch_norm", "relu"),
    ("relu", "max_pool"),
    ("max_pool",),
    ("pool",),
)
MOST_STAGES = 16  # of a chain


@dataclass
class Block:
    """Layers that one pattern has matched."""

    layers: list[Layer]

    @property
    def first(self) -> fx.Node:
        return self.layers[0].node

    @property
    def last(self) -> fx.Node:
        return self.layers[-1].node

    @property
    def stage(self) -> Stage | None:
        return self.layers[0].stage

    def complete(self) -> None:
        """Tells the stage what follows the convolution or linear layer."""
        for layer in self.layers[1:]:
            if layer.kind == "norm":
                self.stage.norm = layer.norm
            elif layer.kind == "relu":
                self.stage.relu = True
            elif layer.kind == "max_pool":
                self.stage.pool = layer.options


@dataclass
class Fused:
    """A step's node, what it was made of, and why of no more."""

    blocks: list[Block]
    node: fx.Node
    why: str = ""

    @property
    def step(self):
        target = self.node.target
        return target.step if isinstance(target, Bound) else target


def fuse(graph: fx.Graph, root: nn.Module) -> list[Fused]:
    """Rewrites `graph`, whose modules and attributes are `root`'s, in place.

    Returns what became of its layers, in the graph's order. Values, gradients and side effects are those of
    the graph as it was, but for rounding.
    """
    _drop_identities(graph, root)
    layers = {node: layer for node in graph.nodes if (layer := recognised.recognise(node, root))}
    order = _Order(graph)
    blocks, whys, taken = [], {}, set()
    for node, layer in layers.items():
        if node in taken:
            continue
        path, why = _path(layer, layers, order)
        kinds = tuple(each.kind for each in path)
        pattern = next(
            (p for p in PATTERNS if kinds[: len(p)] == p and not _keeps_written(path, p, root)), None
        )
        if pattern is None or pattern[0] == "relu" and layer.options["inplace"]:
            continue  # who else reads the input of a ReLU in place sees it done
        block = Block(path[: len(pattern)])
        if block.stage:
            block.complete()
            whys[block.first] = why if len(pattern) == len(path) else ""
        blocks.append(block)
        taken.update(each.node for each in block.layers)
    runs, renamed = list(_runs(blocks, layers, order)), {}
    found = [_replace(graph, run, flattens, whys, renamed) for run, flattens in runs]
    steps = {fused.node: fused.step for fused in found}
    for node, step in steps.items():
        if isinstance(step, BatchNormReLU):
            step.owns_input = _owns_input(node, steps)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return found


def _owns_input(node, steps):
    """Whether the input is a convolution's output that nothing else reads, nor that one's backward."""
    x = node.args[0]
    made_by = steps.get(x)
    return (
        isinstance(made_by, Run)
        and len(x.users) == 1
        and len(made_by.stages) == 1
        and not made_by.stages[0].relu
        and not made_by.stages[0].pool
    )


def _drop_identities(graph, root):
    for node in list(graph.nodes):
        asks = recognised.is_flatten(node)
        if asks is not None:
            x = node.args[0]
            if recognised.recognise(x, root):
                with graph.inserting_before(node):
                    node.replace_all_uses_with(graph.call_function(torch.flatten, (x, 1)))
                for each in (node, *asks):
                    if not each.users:
                        graph.erase_node(each)
            continue
        layer = recognised.recognise(node, root)
        if layer and layer.kind == "identity":
            node.replace_all_uses_with(layer.input)
            graph.erase_node(node)


def _path(layer, layers, order):
    """The layers from `layer` on, each the only reader of the one before; and why they end there."""
    path = [layer]
    while True:
        users = path[-1].node.users
        if len(users) != 1:
            return path, f"its value is used {len(users)} times" if users else ""
        following = layers.get(next(iter(users)))
        if following is None or following.input is not path[-1].node:
            return path, ""
        if (
            following.norm
            and layer.stage
            and layer.stage.dims not in (following.norm.dims or [layer.stage.dims])
        ):
            return path, "what follows takes no such input"
        why = order.why_not_earlier(following, layer.node)
        if why:
            return path, why
        path.append(following)


def _keeps_written(path, pattern, root):
    """Whether backward of the pattern would need its output, where that of its layers doesn't and something
    writes into it: with a ReLU before the pool, the output says where the ReLU has passed."""
    if "relu" not in pattern or pattern[-1] != "max_pool":
        return False
    return recognised.is_written(path[len(pattern) - 1].node, root)


class _Order:
    """The order of a graph's nodes, and whether a layer can be computed earlier than where it stands."""

    def __init__(self, graph: fx.Graph):
        self.place = {node: i for i, node in enumerate(graph.nodes)}
        # Graphs of torch.compile also have calls that have no value but an effect on all that follows, such
        # as switching gradients or autocast off. They tell of each value; graphs of torch.fx tell of none.
        tell = any("example_value" in node.meta for node in graph.nodes)
        self.switches = [
            i
            for node, i in self.place.items()
            if tell and node.op == "call_function" and "example_value" not in node.meta
        ]

    def why_not_earlier(self, layer: Layer, first: fx.Node) -> str:
        """Why the layer can't be computed where `first` stands; "" where it can."""
        start, end = self.place[first], self.place[layer.node]
        if any(start < i < end for i in self.switches):
            return "gradients or autocast are switched before what follows"
        computed = [p for p in layer.params if isinstance(p, fx.Node) and p.op != "placeholder"]
        if any(self.place[p] > start for p in computed):
            return "what follows has parameters that are computed later"
        return ""


def _runs(blocks, layers, order):
    """Blocks that become one step, with the flatten nodes between them."""
    starts = {block.first: block for block in blocks}
    done = set()
    for block in blocks:
        if block.first in done:
            continue
        run, flattens = [block], []
        while len(run) < MOST_STAGES and run[-1].stage and run[-1].stage.chains:
            following, flatten = _following(run[-1], starts, layers)
            if following is None or any(
                order.why_not_earlier(each, block.first) for each in following.layers
            ):
                break
            if flatten is not None:
                following.stage.flatten = True
                flattens.append(flatten)
            run.append(following)
        done.update(each.first for each in run)
        yield run, flattens


def _following(block, starts, layers):
    """The block that can follow in a chain and the flatten node between; (None, None) where none can."""

    def only_user(node):
        return next(iter(node.users)) if len(node.users) == 1 else None

    flatten, node = None, only_user(block.last)
    layer = layers.get(node)
    if layer and layer.kind == "flatten" and block.stage.axes:
        flatten, node = node, only_user(node)
    following = starts.get(node)
    if following is None or following.layers[0].input is not (block.last if flatten is None else flatten):
        return None, None
    stage = following.stage
    if not stage or not stage.chains:
        return None, None
    # A convolution follows convolutions alone, a linear layer linear ones or a flatten.
    convolutions = block.stage.axes > 0 and flatten is None
    return (following, flatten) if convolutions == (stage.axes > 0) else (None, None)


def _replace(graph, run, flattens, whys, renamed):
    """Puts one step in the place of a run's layers; `renamed` has the new nodes of those that are gone."""
    head = run[0].layers[0]
    if head.stage:
        step = Run([block.stage for block in run])
    elif head.kind in ("relu", "batch_norm"):
        pool = next((layer.options for layer in run[0].layers if layer.kind == "max_pool"), None)
        step = ReLUPool(pool) if head.kind == "relu" else BatchNormReLU(head.call, pool)
    else:
        step = Pool(head.call, head.options)
    params = [p for block in run for layer in block.layers for p in layer.params]
    arguments = [renamed.get(p, p) for p in params if isinstance(p, fx.Node)]
    if params:
        places = iter(range(len(arguments)))
        sources = [next(places) if isinstance(p, fx.Node) else p for p in params]
        if len(arguments) < len(params):
            step = Bound(step, sources)
    # Parameters that are computed come before; so it stands where the first layer was, and sees its input
    # as that one did.
    with graph.inserting_before(run[0].first):
        node = graph.call_function(step, (renamed.get(head.input, head.input), *arguments))
    run[-1].last.replace_all_uses_with(node)
    renamed[run[-1].last] = node
    gone = [layer.node for block in run for layer in block.layers] + flattens
    for old in sorted(gone, reverse=True):
        graph.erase_node(old)
    why = whys.get(run[-1].first, "") if len(run) == 1 else ""
    return Fused(run, node, why)
