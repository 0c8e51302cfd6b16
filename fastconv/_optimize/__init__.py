# SPDX-License-Identifier: MIT
"""Whole models: layers swapped (`swap`), or the model traced (`model`), its layers recognised (`layers`) and
fused by a list of patterns (`fuse`) into operators (`steps`). `backend` does the same for torch.compile.
"""

from fastconv._optimize import backend
from fastconv._optimize.model import optimize
from fastconv._optimize.swap import convert, restore

backend.register()

__all__ = ["convert", "optimize", "restore"]
