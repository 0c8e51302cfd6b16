# SPDX-License-Identifier: MIT
"""Kernels know nothing of torch, and each layer includes only what stands above it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {".h", ".cpp", ".cu", ".cuh", ".inl"}
FOLDERS = ("core", "cpu", "cuda", "glue")

# What a folder may include: folders of csrc, and, after a colon, libraries' headers.
ALLOWED = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda": {"core", "cuda", ":cuda"},
    "glue": {"core", "cpu", "cuda", "glue", ":torch"},
    ".": {"core", "cpu", "cuda", "glue", ":torch"},
}
LIBRARIES = {
    ":torch": re.compile(r"(torch|ATen|c10|pybind11|Python\.h)\b"),
    ":cuda": re.compile(r"(cuda|mma|nv|cub|cooperative_groups)"),
}

# What a module of the package may import at its top.
IMPORTS = {
    "ops": {"_C"},
    "autograd/vmap": set(),
    "autograd/function": {"ops"},
    "autograd/conv": {"autograd", "autograd.function", "ops"},
    "autograd/pool": {"autograd", "autograd.function", "ops"},
    "autograd/linear": {"autograd", "autograd.conv", "autograd.function", "ops"},
    "autograd/conv_act_pool": {"autograd.conv", "autograd.function", "autograd.pool", "ops"},
    "autograd/batch_norm": {"autograd.function", "autograd.pool", "ops"},
    "autograd/chain": {"autograd.conv_act_pool", "autograd.function", "autograd.linear", "ops"},
    "autograd/operators": {"_C", "autograd", "autograd.function"},
    "kernels": {"_C"},
    "_flops": {"autograd.chain", "autograd.conv"},
    "functional": {"autograd", "kernels", "ops"},
    "modules": {"functional"},
    "models": {"modules"},
    "_optimize/swap": {"modules"},
    "_optimize/steps": {"functional"},
    "_optimize/layers": {"_C", "_optimize.steps", "_optimize.swap", "functional", "modules"},
    "_optimize/fuse": {"_optimize", "_optimize.layers", "_optimize.steps"},
    "_optimize/backend": {"_optimize.fuse"},
    "_optimize/report": set(),
    "_optimize/model": {
        "_optimize",
        "_optimize.fuse",
        "_optimize.report",
        "_optimize.steps",
        "_optimize.swap",
    },
    "_timing": set(),
    "_peaks": {"_timing"},
    "_explain": {
        "_C",
        "_flops",
        "_peaks",
        "_timing",
        "_optimize.model",
        "_optimize.steps",
        "autograd.chain",
        "ops",
    },
    "_files": set(),
    "_accuracy": set(),
    "_report": {"_files"},
    "_distributed": set(),
    "_training": {"_C", "_accuracy", "_distributed", "data"},
    "bench": {"_accuracy", "_report", "_timing", "_training", "models"},
    "validate": {"_accuracy", "_report", "_training", "bench", "data", "models"},
    "show": {"_files", "_report", "_training", "data", "models", "train"},
    "train": {"_distributed", "_files", "_report", "_training", "data", "models"},
}


def kind(include, csrc):
    for name, pattern in LIBRARIES.items():
        if pattern.match(include):
            return name
    folder = include.split("/")[0]
    return folder if "/" in include and (csrc / folder).is_dir() else ""


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("folder", ALLOWED)
def test_includes(folder):
    csrc = ROOT / "csrc"
    pattern = "*" if folder == "." else "**/*"
    files = [path for path in (csrc / folder).glob(pattern) if path.suffix in SOURCES]
    assert files
    found = {(path.name, name): kind(name, csrc) for path in files for name in includes(path)}
    wrong = [where for where, what in found.items() if what and what not in ALLOWED[folder]]
    assert not wrong
    assert any(found.values()), "nothing but system headers: the search is broken"


def test_no_other_folder():
    assert {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()} == set(FOLDERS)


@pytest.mark.parametrize("module", IMPORTS)
def test_imports(module):
    tree = ast.parse((ROOT / "fastconv" / f"{module}.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "fastconv":
            found |= {alias.name for alias in node.names} if node.module == "fastconv" else {node.module[9:]}
    assert found == IMPORTS[module]
