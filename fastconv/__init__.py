# SPDX-License-Identifier: MIT
"""Convolution, pooling and linear layers for PyTorch on hand-written kernels, drop-in for torch.nn's.

    from fastconv import Conv2d, MaxPool2d, Linear

The same signatures, parameters and numbers as torch.nn, forward and backward, on CPU and CUDA, with the same
bits on every run. `fastconv.convert(model)` swaps the layers of an existing model.
"""

# ruff: noqa: E402  (the library is checked against the running torch before anything uses it)
from fastconv._load import load

load()

from fastconv import autograd, data, functional, kernels, models  # noqa: F401  (registers them)
from fastconv._explain import Explanation, explain
from fastconv._optimize import convert, optimize, restore
from fastconv.modules import (
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    Chain,
    Conv1d,
    Conv2d,
    Conv3d,
    ConvReLUPool2d,
    LazyConv1d,
    LazyConv2d,
    LazyConv3d,
    LazyLinear,
    Linear,
    LinearReLU,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
)

__version__ = "0.1.0"

__all__ = [
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "Chain",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvReLUPool2d",
    "Explanation",
    "LazyConv1d",
    "LazyConv2d",
    "LazyConv3d",
    "LazyLinear",
    "Linear",
    "LinearReLU",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "convert",
    "data",
    "explain",
    "functional",
    "kernels",
    "models",
    "optimize",
    "restore",
]
