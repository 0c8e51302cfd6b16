# SPDX-License-Identifier: MIT
"""Whole models: torch.nn's layers swapped for fastconv's, and back."""

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from fastconv import modules

Model = TypeVar("Model", bound=nn.Module)

SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: modules.Conv1d,
    nn.Conv2d: modules.Conv2d,
    nn.Conv3d: modules.Conv3d,
    nn.MaxPool1d: modules.MaxPool1d,
    nn.MaxPool2d: modules.MaxPool2d,
    nn.MaxPool3d: modules.MaxPool3d,
    nn.AvgPool1d: modules.AvgPool1d,
    nn.AvgPool2d: modules.AvgPool2d,
    nn.AvgPool3d: modules.AvgPool3d,
    nn.Linear: modules.Linear,
}


def _swap(model: Model, classes: Mapping[type[nn.Module], type[nn.Module]]) -> Model:
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
    return model


def convert(model: Model) -> Model:
    """Swaps torch.nn's convolution, pooling and linear layers for fastconv's, in place; returns the model.

    Parameters, buffers, hooks, names and training state are untouched: only the class of each layer
        changes. Subclasses of torch.nn's layers stay as they are.

    >>> type(convert(nn.Sequential(nn.Linear(2, 3)))[0])
    <class 'fastconv.modules.Linear'>
    """
    return _swap(model, SWAPS)


def restore(model: Model) -> Model:
    """Undoes `convert`, in place; returns the model. What torch.nn has no layer for stays as it is.

    >>> type(restore(modules.Linear(2, 3)))
    <class 'torch.nn.modules.linear.Linear'>
    """
    return _swap(model, {ours: theirs for theirs, ours in SWAPS.items()})
