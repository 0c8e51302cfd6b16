# SPDX-License-Identifier: MIT
"""Layers of one and of three axes: examples worked by hand, nested loops, and the kernels they reach."""

import itertools

import pytest
import torch
from torch.profiler import profile

import fastconv
from fastconv import functional as G
from fastconv import kernels


def test_conv1d_by_hand():
    layer = fastconv.Conv1d(1, 1, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[0.25, 0.5, 0.25]]]))
    assert layer(torch.ones(1, 1, 5)).tolist() == [[[1.0, 1.0, 1.0]]]
    assert layer(torch.ones(1, 5)).tolist() == [[1.0, 1.0, 1.0]]
    # correlation, not convolution: the filter isn't turned round
    assert G.conv1d(torch.tensor([[0.0, 0, 1, 0, 0]]), torch.tensor([[[1.0, 2, 3]]])).tolist() == [[3, 2, 1]]
    assert G.conv1d(torch.ones(1, 5), torch.ones(1, 1, 3), padding=1, stride=2).tolist() == [[2, 3, 2]]


def test_conv1d_gradients_by_hand():
    x = torch.tensor([[1.0, 2, 3, 4]], requires_grad=True)
    w = torch.tensor([[[1.0, -1]]], requires_grad=True)
    G.conv1d(x, w).backward(torch.tensor([[1.0, 10, 100]]))
    assert x.grad.tolist() == [[1, 9, 90, -100]]
    assert w.grad.tolist() == [[[1 + 20 + 300, 2 + 30 + 400]]]


def test_max_pool1d_by_hand():
    x = torch.tensor([[3.0, 1, 4, 1, 5]], requires_grad=True)
    y, where = fastconv.MaxPool1d(2, return_indices=True)(x)
    assert y.tolist() == [[3, 4]] and where.tolist() == [[0, 2]]
    y.backward(torch.tensor([[10.0, 20]]))
    assert x.grad.tolist() == [[10, 0, 20, 0, 0]]
    assert fastconv.MaxPool1d(2, ceil_mode=True)(x).tolist() == [[3, 4, 5]]


def test_avg_pool_by_hand():
    signal = torch.tensor([[3.0, 0, 6, 9]], requires_grad=True)
    y = fastconv.AvgPool1d(2)(signal)
    assert y.tolist() == [[1.5, 7.5]]
    y.backward(torch.tensor([[2.0, 20]]))
    assert signal.grad.tolist() == [[1, 1, 10, 10]]
    assert G.avg_pool1d(signal, 3, 1, 1).tolist() == [[1, 3, 5, 5]]
    assert G.avg_pool1d(signal, 3, 1, 1, count_include_pad=False).tolist() == [[1.5, 3, 5, 7.5]]
    cube = torch.arange(8.0).view(1, 1, 2, 2, 2)
    assert fastconv.AvgPool3d(2)(cube).tolist() == [[[[[3.5]]]]]
    assert G.avg_pool3d(cube, (1, 2, 2), divisor_override=2).flatten().tolist() == [3, 11]


def test_avg_pool3d_keeps_channels_last():
    """As the other layers do, where torch's on a CPU does not."""
    x = torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    y = G.avg_pool3d(x, 2)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert grad.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(("conv", "size"), [(G.conv1d, (7,)), (G.conv2d, (4, 5)), (G.conv3d, (2, 3, 4))])
def test_a_filter_of_one_tap_is_a_matrix_product_at_each_pixel(conv, size):
    x, matrix = torch.randn(2, 3, *size), torch.randn(4, 3)
    y = conv(x, matrix.view(4, 3, *[1] * len(size)))
    torch.testing.assert_close(y, torch.einsum("kc,nc...->nk...", matrix, x))


def loops(x, w, b, stride, padding, dilation):
    """conv3d term by term."""
    (n, _, *size), (k, _, *taps) = x.shape, w.shape
    out = [
        (s + 2 * p - d * (t - 1) - 1) // step + 1
        for s, t, p, d, step in zip(size, taps, padding, dilation, stride, strict=True)
    ]
    y = b.view(1, k, 1, 1, 1).repeat(n, 1, *out)
    for at in itertools.product(*map(range, out)):
        for tap in itertools.product(*map(range, taps)):
            cell = [
                a * s + t * d - p for a, s, t, d, p in zip(at, stride, tap, dilation, padding, strict=True)
            ]
            if all(0 <= i < s for i, s in zip(cell, size, strict=True)):
                y[(..., *at)] += x[(..., *cell)] @ w[(..., *tap)].T
    return y


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation"),
    [((1, 1, 1), (0, 0, 0), (1, 1, 1)), ((2, 1, 3), (1, 2, 0), (1, 2, 1))],
)
def test_conv3d_is_its_nested_loops(stride, padding, dilation, layout):
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64).contiguous(memory_format=layout)
    w, b = torch.randn(4, 3, 2, 3, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    y = G.conv3d(x, w, b, stride, padding, dilation)
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, loops(x, w, b, stride, padding, dilation))


def test_one_axis_is_two_axes_of_which_one_is_of_extent_one():
    """The same kernels, and so the same bits, forward and backward."""
    tensors = torch.randn(5, 3, 40), torch.randn(6, 3, 5), torch.randn(6)

    def run(block, tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = block(*leaves)
        return [t.flatten() for t in (y, *torch.autograd.grad(y.square().sum(), leaves))]

    one = run(lambda x, w, b: G.max_pool1d(G.conv1d(x, w, b, padding=2), 2), tensors)
    flat = (tensors[0][:, :, None], tensors[1][:, :, None], tensors[2])
    two = run(lambda x, w, b: G.max_pool2d(G.conv2d(x, w, b, padding=(0, 2)), (1, 2)), flat)
    assert all(map(torch.equal, one, two))


def test_whole_tensors_of_one_and_three_axes_are_not_copied():
    signal = torch.nn.Sequential(fastconv.Conv1d(3, 4, 3, padding=1), fastconv.MaxPool1d(2))
    volume = torch.nn.Sequential(fastconv.Conv3d(3, 4, 3), fastconv.MaxPool3d(2))
    for model, size, layout in (
        (signal, (4, 3, 16), torch.contiguous_format),
        (volume, (2, 3, 6, 6, 6), torch.contiguous_format),
        (volume, (2, 3, 6, 6, 6), torch.channels_last_3d),
    ):
        if len(size) == 5:
            model = model.to(memory_format=layout)
        x = torch.randn(size).contiguous(memory_format=layout).requires_grad_()
        with profile() as recorded:
            y = model(x)
            torch.autograd.grad(y, [x, *model.parameters()], torch.ones_like(y))
        names = {event.name for event in recorded.events()}
        assert {"fastconv::conv_dgrad", "fastconv::conv_wgrad", "fastconv::max_pool_backward"} <= names
        assert not names & {"aten::copy_", "aten::clone", "aten::contiguous", "aten::convolution"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("op", "sizes", "passes"),
    [
        # of one input channel dgrad has a single column, and nobody asks a first layer for it
        ("conv1d", dict(input=(64, 1, 200), weight=(6, 1, 5)), ["fprop"]),
        ("conv1d", dict(input=(64, 1, 1000), weight=(16, 1, 3), padding=1), ["fprop", "wgrad"]),
        ("conv1d", dict(input=(64, 16, 1000), weight=(32, 16, 3)), ["fprop", "dgrad", "wgrad"]),
        ("conv2d", dict(input=(64, 1, 28, 28), weight=(8, 1, 1, 1)), ["fprop", "wgrad"]),
        ("conv2d", dict(input=(64, 16, 28, 28), weight=(8, 16, 1, 1)), ["fprop", "dgrad", "wgrad"]),
        ("max_pool1d", dict(input=(64, 1, 100), kernel_size=2), ["forward", "backward"]),
        ("avg_pool1d", dict(input=(64, 1, 100), kernel_size=3, padding=1), ["forward", "backward"]),
    ],
)
def test_one_axis_and_one_tap_reach_more_than_the_naive_kernels(op, sizes, passes, device):
    capability = {"capability": (9, 0)} if device == "cuda" else {}
    chosen = {
        each["pass_"]: each["chosen"] for each in kernels.explain(op, device=device, **capability, **sizes)
    }
    assert set(passes) <= set(chosen)
    assert not [name for name in map(chosen.get, passes) if name.endswith("_naive")]


def network(layers, axes):
    conv, pool = getattr(layers, f"Conv{axes}d"), getattr(layers, f"MaxPool{axes}d")
    torch.manual_seed(0)
    return torch.nn.Sequential(
        conv(2, 8, 3, padding=1),
        torch.nn.ReLU(),
        pool(2),
        conv(8, 4, 3),
        torch.nn.Flatten(),
        torch.nn.LazyLinear(5),
    )


@pytest.mark.parametrize(("axes", "size"), [(1, (12,)), (3, (6, 6, 6))])
def test_networks_train(axes, size):
    x = torch.randn(3, 2, *size)
    theirs, ours = network(torch.nn, axes), network(fastconv, axes)
    outputs = [model(x) for model in (theirs, ours)]
    ours[-1].load_state_dict(theirs[-1].state_dict())
    for model in (theirs, ours):
        model(x).square().sum().backward()
    torch.testing.assert_close(ours(x), outputs[0])
    torch.testing.assert_close(
        [p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()], rtol=1e-4, atol=1e-5
    )
