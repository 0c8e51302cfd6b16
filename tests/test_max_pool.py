# SPDX-License-Identifier: MIT
"""max_pool2d exactly as torch: values, indices and gradients; and what it stores to know them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from problems import forced, row_parameters

from fastconv import functional as G
from fastconv import ops

NAN, INF = float("nan"), float("inf")


def special(*size):
    """Few distinct values, so that ties abound, with NaN and both infinities."""
    values = torch.tensor([NAN, -INF, -INF, INF, -1.0, 0.0, -0.0, 1.0, 1.0, 2.0, 2.0, 2.0])
    return values[torch.randint(len(values), size)]


def images():
    yield "special", special(2, 3, 9, 8)
    yield "all -inf", torch.full((1, 2, 9, 8), -INF)
    yield "all NaN", torch.full((1, 2, 9, 8), NAN)
    yield "one value", torch.full((1, 2, 9, 8), 3.0)
    yield "mostly -inf", torch.where(torch.rand(2, 3, 9, 8) < 0.9, -INF, 1.0)


WINDOWS = [
    dict(kernel_size=kernel, stride=stride, padding=padding, dilation=dilation, ceil_mode=ceil)
    for kernel, stride, padding, dilation, ceil in itertools.product(
        (2, 3, (3, 2)), (None, 1, (2, 3)), (0, 1), (1, (2, 1)), (False, True)
    )
]


def same(a, b):
    """Equal, NaN to NaN and the sign of zero included."""
    return a.shape == b.shape and torch.equal(a.cpu().view(torch.int32), b.cpu().view(torch.int32))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("row", "device"), row_parameters("max_pool", "forward"))
def test_values_and_indices(row, device):
    for (name, x), window, layout in itertools.product(
        images(), WINDOWS, (torch.contiguous_format, torch.channels_last)
    ):
        values, indices = F.max_pool2d(x, **window, return_indices=True)
        placed = x.to(device, memory_format=layout)
        with forced(row):
            found, where = G.max_pool2d(placed, **window, return_indices=True)
            alone = G.max_pool2d(placed, **window)
        values = values.nan_to_num(NAN, INF, -INF)
        assert same(found.nan_to_num(NAN, INF, -INF), values) and same(found, alone), (name, window)
        assert torch.equal(where.cpu(), indices), (name, window)
        assert where.is_contiguous(memory_format=layout)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("row", "device"), row_parameters("max_pool", "backward"))
def test_gradients(row, device):
    """Whole numbers, so that the order of the additions shows in nothing."""
    for (name, x), window, layout in itertools.product(
        images(), WINDOWS, (torch.contiguous_format, torch.channels_last)
    ):
        theirs = x.clone().requires_grad_()
        output = F.max_pool2d(theirs, **window)
        grad = torch.randint(-9, 10, output.shape).float()
        output.backward(grad)
        ours = x.to(device).clone(memory_format=layout).requires_grad_()
        with forced(row):
            G.max_pool2d(ours, **window).backward(grad.to(device))
        assert torch.equal(ours.grad.cpu(), theirs.grad), (name, window)


@pytest.mark.parametrize(
    "x", [torch.randn(3, 7, 6), torch.randn(0, 3, 7, 6)], ids=["unbatched", "empty batch"]
)
def test_shapes(x):
    for window in WINDOWS:
        ours, theirs = (pool(x, **window, return_indices=True) for pool in (G.max_pool2d, F.max_pool2d))
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    x = special(2, 3, 9, 8).to(dtype)
    for window in WINDOWS:
        ours, theirs = (pool(x, **window, return_indices=True) for pool in (G.max_pool2d, F.max_pool2d))
        assert torch.equal(ours[0].nan_to_num(7), theirs[0].nan_to_num(7)) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize(("kernel", "dtype"), [((15, 17), torch.uint8), ((16, 16), torch.int32)])
def test_offsets_are_as_narrow_as_can_be(kernel, dtype):
    """255 cells fit a byte; the last cell of a larger window is found as well."""
    x = torch.zeros(1, 1, 20, 20)
    x[..., kernel[0] - 1, kernel[1] - 1] = 1
    window = (kernel, (1, 1), (0, 0), (1, 1), False)
    output, offsets = ops.max_pool(x, *window, True, "")
    assert offsets.dtype is dtype and offsets[0, 0, 0, 0] == kernel[0] * kernel[1] - 1
    _, indices = F.max_pool2d(x, kernel, 1, return_indices=True)
    assert torch.equal(ops.max_pool_indices(offsets, x.shape, *window, ""), indices)


def test_windows_that_hold_no_input():
    """Dilation may step over the whole input; torch refuses such a padding."""
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    output = G.max_pool2d(x, 2, 1, 5, 10)
    assert output.isneginf().any()
    output.backward(torch.ones_like(output))
    assert x.grad.isfinite().all()


def test_unpooling_takes_the_indices():
    x = torch.randn(2, 3, 8, 8)
    output, indices = G.max_pool2d(x, 2, return_indices=True)
    unpooled = F.max_unpool2d(output, indices, 2)
    assert torch.equal(unpooled.flatten(2).gather(2, indices.flatten(2)), output.flatten(2))
