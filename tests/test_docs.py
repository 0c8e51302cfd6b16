# SPDX-License-Identifier: MIT
"""What the package says of its public names: type hints, and the examples in their docstrings."""

import importlib
import inspect
from importlib import resources

import pytest

import fastconv

MODULES = ("fastconv", "fastconv.data", "fastconv.functional", "fastconv.kernels", "fastconv.models")


def public():
    """Functions and methods that users call, each with its name."""
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            each = getattr(module, name)
            if inspect.isfunction(each):
                yield f"{module.__name__}.{name}", each
            elif inspect.isclass(each):
                own = [(key, value) for key, value in vars(each).items() if inspect.isfunction(value)]
                yield from (
                    (f"{module.__name__}.{name}.{key}", value) for key, value in own if key[:2] != "__"
                )


PUBLIC = dict(public())


@pytest.mark.parametrize("name", PUBLIC)
def test_type_hints(name):
    signature = inspect.signature(PUBLIC[name])
    parameters = [p for p in signature.parameters.values() if p.name != "self"]
    assert not [p.name for p in parameters if p.annotation is p.empty]
    assert signature.return_annotation is not signature.empty


def test_type_checkers_are_told():
    assert (resources.files(fastconv) / "py.typed").is_file()
