# SPDX-License-Identifier: MIT
"""What the package says of its public names: type hints, and the examples in their docstrings."""

import doctest
import importlib
import inspect
from importlib import resources

import pytest
import torch
from torch import nn

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


# Without an example: data sets, results, errors, and what the command line calls.
UNSHOWN = ("CIFAR10", "MNIST", "FashionMNIST", "Explanation", "DataError", "SizeError", "build")
EXAMPLES = {
    name: each
    for module in map(importlib.import_module, MODULES)
    for name, each in vars(module).items()
    if name in module.__all__ and callable(each) and name not in UNSHOWN
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name):
    """Each has one, and it runs as printed."""
    each = EXAMPLES[name]
    scope = {**vars(importlib.import_module(each.__module__)), "torch": torch, "nn": nn}
    (test,) = doctest.DocTestFinder(recurse=False).find(each, name, globs=scope)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


def test_type_checkers_are_told():
    assert (resources.files(fastconv) / "py.typed").is_file()
