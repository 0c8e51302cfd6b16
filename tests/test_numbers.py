# SPDX-License-Identifier: MIT
"""Numbers worked out by hand, and a network's first steps."""

import pytest
import torch
from problems import DTYPES, forced, row_parameters
from torch import nn

import fastconv
from fastconv import functional as G


def whole(rows, dtype=torch.float32, device="cpu"):
    return torch.tensor(rows, dtype=dtype, device=device)


IMAGE = [
    [1, 2, 0, 1, 3, 1],
    [0, 1, 2, 3, 1, 0],
    [2, 1, 0, 1, 2, 1],
    [1, 0, 1, 2, 0, 3],
    [3, 2, 1, 0, 1, 2],
    [0, 1, 2, 1, 1, 0],
]
# The corners and the centre of each 3x3 patch, added: the first is 1 + 0 + 1 + 2 + 0 = 4.
CROSS = [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
CROSSED = [[4, 7, 8, 5], [5, 6, 5, 10], [6, 5, 6, 4], [6, 5, 4, 7]]


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize(("row", "device"), row_parameters("conv", "fprop"))
def test_a_cross_slid_over_an_image(row, device, dtype):
    with forced(row):
        output = G.conv2d(whole([[IMAGE]], dtype, device), whole([[CROSS]], dtype, device))
    assert output.tolist() == [[CROSSED]]


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize(("row", "device"), row_parameters("max_pool", "forward"))
def test_max_pool_of_4x4_by_2x2(row, device, dtype):
    image = [[1, 3, 2, 1], [4, 2, 0, 5], [7, 7, -1, -2], [6, 1, -3, -4]]
    with forced(row):
        values, indices = G.max_pool2d(whole([[image]], dtype, device), 2, return_indices=True)
    assert values.tolist() == [[[[4, 5], [7, -1]]]]
    assert indices.tolist() == [[[[4, 7], [8, 10]]]]


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize(("row", "device"), row_parameters("avg_pool", "forward"))
def test_avg_pool_of_4x4_by_2x2(row, device, dtype):
    image = whole([[[[1, 3, 2, 1], [4, 2, 0, 5], [7, 7, -1, -2], [6, 2, -3, -4]]]], dtype, device)
    with forced(row):
        assert G.avg_pool2d(image, 2).tolist() == [[[[2.5, 2], [5.5, -2.5]]]]
        # With padding the corners hold one cell of four, and 2x2 in the middle: 2 + 0 + 7 - 1 = 8.
        padded = [[[0.25, 1.25, 0.25], [2.75, 2, 0.75], [1.5, -0.25, -1]]]
        assert G.avg_pool2d(image, 2, padding=1).tolist() == [padded]
        inside = [[[1, 2.5, 1], [5.5, 2, 1.5], [6, -0.5, -4]]]
        assert G.avg_pool2d(image, 2, padding=1, count_include_pad=False).tolist() == [inside]


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize(("row", "device"), row_parameters("avg_pool", "backward"))
def test_the_gradient_of_an_average(row, device, dtype):
    """Each cell of a window gets the window's gradient over the number of its cells."""
    image = torch.ones(1, 1, 4, 4, dtype=dtype, device=device, requires_grad=True)
    grad = whole([[[[4, 8], [-12, 2]]]], dtype, device)
    with forced(row):
        G.avg_pool2d(image, 2).backward(grad)
    assert image.grad.tolist() == [[[[1, 1, 2, 2], [1, 1, 2, 2], [-3, -3, 0.5, 0.5], [-3, -3, 0.5, 0.5]]]]


RGB = [
    [[1, 0, 2, 1], [0, 1, 1, 0], [2, 1, 0, 1], [1, 0, 1, 2]],
    [[0, 1, 0, 1], [1, 2, 1, 0], [0, 1, 2, 1], [1, 0, 0, 1]],
    [[2, 1, 1, 0], [0, 0, 1, 2], [1, 2, 0, 1], [0, 1, 1, 0]],
]
FILTER = [
    [[1, 0, -1], [2, 0, -2], [1, 0, -1]],  # left minus right, the middle row twice
    [[0, 1, 0], [1, -4, 1], [0, 1, 0]],  # the neighbours minus four times the centre
    [[1, 1, 1], [0, 0, 0], [-1, -1, -1]],  # top row minus bottom row
]
BIAS = 5
# Top left: red (1 + 0 + 2) - (2 + 2 + 0) = -1, green (1 + 1 + 1 + 1) - 8 = -4,
# blue (2 + 1 + 1) - (1 + 2 + 0) = 1, bias 5: 1. The others likewise.
FILTERED = [[1, 5], [7, 0]]


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize(("row", "device"), row_parameters("conv", "fprop"))
def test_three_channels_and_a_bias(row, device, dtype):
    with forced(row):
        output = G.conv2d(
            whole([RGB], dtype, device), whole([FILTER], dtype, device), whole([BIAS], dtype, device)
        )
    assert output.tolist() == [[FILTERED]]


def test_the_gradients_of_a_cross():
    """An input cell's gradient counts the filters that touch it; a filter cell's adds the inputs it met."""
    x = whole([[IMAGE]]).requires_grad_()
    w = whole([[CROSS]]).requires_grad_()
    G.conv2d(x, w).sum().backward()
    assert x.grad.tolist() == [
        [
            [
                [1, 1, 2, 2, 1, 1],
                [1, 2, 3, 3, 2, 1],
                [2, 3, 5, 5, 3, 2],
                [2, 3, 5, 5, 3, 2],
                [1, 2, 3, 3, 2, 1],
                [1, 1, 2, 2, 1, 1],
            ]
        ]
    ]
    assert w.grad[0, 0, 0, 0] == sum(IMAGE[i][j] for i in range(4) for j in range(4))
    assert w.grad[0, 0, 1, 2] == sum(IMAGE[i + 1][j + 2] for i in range(4) for j in range(4))


def test_linear():
    x, w, b = whole([[1, 2, 3], [-1, 0, 2]]), whole([[1, 0, -1], [2, 1, 0]]), whole([10, -4])
    assert G.linear(x, w, b).tolist() == [[8, 0], [7, -6]]
    assert G.linear_relu(x, w, b).tolist() == [[8, 0], [7, 0]]


# --- LeNet --------------------------------------------------------------------------------------------------


def lenet(layers):
    torch.manual_seed(0)
    return fastconv.models.LeNet(layers)


def test_the_graph_of_a_loss_reads_like_the_network():
    loss = nn.MSELoss()(lenet(fastconv)(torch.randn(2, 1, 32, 32)), torch.randn(2, 10))
    names, node = [], loss.grad_fn
    while node is not None:
        names.append(node.name().removesuffix("Backward0").removesuffix("Backward"))
        node = next(
            (after for after, _ in node.next_functions if after and "AccumulateGrad" not in after.name()),
            None,
        )
    block = ["MaxPool2d", "Relu", "Conv2d"]
    assert names == ["MseLoss", "Linear", "Relu", "Linear", "Relu", "Linear", "View", *block, *block]


def test_lenet_has_ten_parameters():
    shapes = [tuple(p.shape) for p in lenet(fastconv).parameters()]
    assert shapes == [
        (6, 1, 5, 5), (6,), (16, 6, 5, 5), (16,), (120, 400), (120,), (84, 120), (84,), (10, 84), (10,)
    ]  # fmt: skip


def test_adam_moves_every_parameter_as_torch_does():
    """Three steps in float64.

    Adam divides a gradient by its own size, so one that is zero but for rounding moves its parameter by up
    to the learning rate either way; in float64 the roundings, about 1e-15, are far below every real gradient.
    """
    models = [lenet(layers).double() for layers in (nn, fastconv)]
    images, target = torch.randn(8, 1, 32, 32).double(), torch.randn(8, 10).double()
    before = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    for model in models:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            nn.MSELoss()(model(images), target).backward()
            optimizer.step()
    theirs, ours = (dict(model.named_parameters()) for model in models)
    for name, start in before.items():
        assert (ours[name] != start).any(), f"{name} did not move"
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-9, msg=name)
