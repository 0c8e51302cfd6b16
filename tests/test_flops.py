# SPDX-License-Identifier: MIT
"""torch.utils.flop_counter counts fastconv's operators as it counts torch's own."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastconv
from fastconv import functional as F


def flops(model, x):
    """Of forward and backward."""
    with FlopCounterMode(display=False) as counted:
        model(x).sum().backward()
    assert counted.get_total_flops() > 0
    return counted.get_total_flops()


def parameters(*sizes):
    return [torch.randn(size, requires_grad=True) for size in sizes]


@pytest.mark.parametrize("make", ["layers", "convert", "optimize"])
@pytest.mark.parametrize("network", ["lenet", "fashion_cnn", "mlp", "cifarnet"])
def test_networks(network, make):
    size = (3, 32, 32) if network == "cifarnet" else (1, 28, 28)
    theirs = fastconv.models.build(network, nn, size)
    if make == "layers":
        ours = fastconv.models.build(network, fastconv, size)
    else:
        ours = getattr(fastconv, make)(fastconv.models.build(network, nn, size))
    x = torch.randn(2, *size)
    assert flops(ours, x) == flops(theirs, x)


@pytest.mark.parametrize("mask", [(1, 1, 1), (0, 1, 1), (1, 0, 0), (0, 0, 1), (0, 1, 0)])
@pytest.mark.parametrize(
    ("ours", "theirs", "sizes"),
    [
        (
            lambda x, w, b: F.conv2d_relu_max_pool2d(x, w, b, (1, 2), 1, (1, 2), pool_kernel_size=2),
            lambda x, w, b: nn.functional.max_pool2d(
                nn.functional.conv2d(x, w, b, (1, 2), 1, (1, 2)).relu(), 2
            ),
            [(2, 4, 9, 12), (6, 4, 3, 3), (6,)],
        ),
        (F.linear_relu, lambda *args: nn.functional.linear(*args).relu(), [(2, 3, 4), (5, 4), (5,)]),
        (F.conv1d, nn.functional.conv1d, [(2, 4, 9), (6, 4, 3), (6,)]),
        (F.conv3d, nn.functional.conv3d, [(2, 4, 5, 6, 7), (6, 4, 3, 2, 1), (6,)]),
    ],
    ids=["conv2d_relu_max_pool2d", "linear_relu", "conv1d", "conv3d"],
)
def test_functions(ours, theirs, sizes, mask):
    args = parameters(*sizes)
    for arg, wanted in zip(args, mask, strict=True):
        arg.requires_grad_(bool(wanted))
    assert flops(lambda x: ours(x, *args[1:]), args[0]) == flops(lambda x: theirs(x, *args[1:]), args[0])


@pytest.mark.parametrize("frozen", [(), (0,), (0, 1), (0, 1, 2), (0, 3), (0, 1, 2, 3, 4)])
def test_chain(frozen):
    """Counted as its parts, whichever gradients are wanted."""
    args = parameters((2, 1, 12, 12), (4, 1, 3, 3), (4,), (6, 4, 3, 2), (10, 6 * 6), (10,))
    for i in frozen:
        args[i].requires_grad_(False)
    plan = (
        F.conv_stage(act="relu", pool_kernel_size=3, pool_stride=2, pool_padding=1)
        + F.conv_stage(bias=False, stride=(1, 3))
        + F.linear_stage()
    )

    def parts(x, w1, b1, w2, w3, b3):
        x = nn.functional.max_pool2d(nn.functional.conv2d(x, w1, b1).relu(), 3, 2, 1)
        return nn.functional.linear(nn.functional.conv2d(x, w2, None, (1, 3)).flatten(1), w3, b3)

    ours = flops(lambda x: F.chain(x, plan, *args[1:]), args[0])
    assert ours == flops(lambda x: parts(x, *args[1:]), args[0])


def test_groups():
    """As many as the products there are: torch leaves the groups out of the gradient of a weight."""
    x, weight = parameters((2, 4, 9, 9), (6, 2, 3, 3))
    forward = 2 * (2 * 6 * 7 * 7) * (2 * 3 * 3)
    assert flops(lambda x: F.conv2d(x, weight, groups=2), x) == 3 * forward
