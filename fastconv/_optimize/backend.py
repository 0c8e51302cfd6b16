# SPDX-License-Identifier: MIT
"""torch.compile(model, backend="fastconv"): what torch.compile captures goes through `fuse` as well."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable

import torch
from torch import fx

from fastconv._optimize.fuse import fuse

GROUP, NAME = "torch_dynamo_backends", "fastconv"


def backend(
    graph: fx.GraphModule, example_inputs: list, *, mode: str | None = None, options: dict | None = None
) -> Callable:
    """Fuses a captured graph's layers into fastconv's operators; inductor, torch's own, compiles the rest.

    Args:
        graph: As torch.compile captures it; rewritten in place.
        example_inputs: Its inputs.
        mode, options: torch.compile's, for inductor.

    Returns:
        A function of the inputs.
    """
    import torch._inductor  # slow to import

    patches = torch._inductor.list_mode_options(mode) if mode else {}
    rewrite(graph)
    with _compiling():
        return torch._inductor.compile(graph, example_inputs, options={**patches, **(options or {})})


def rewrite(graph: fx.GraphModule) -> None:
    """Fuses the layers of a graph, in place."""
    fuse(graph.graph, graph)
    graph.recompile()


@contextlib.contextmanager
def _compiling():
    """As later versions of torch do, says that what runs is being traced."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def register() -> None:
    """Makes the backend known where the package's entry point does not, as in a tree that isn't installed."""
    try:
        known = importlib.metadata.distribution("fastconv").entry_points.select(group=GROUP, name=NAME)
    except importlib.metadata.PackageNotFoundError:
        known = ()
    if not known:
        from torch._dynamo import register_backend  # slow to import

        register_backend(backend, name=NAME)
