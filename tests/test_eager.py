# SPDX-License-Identifier: MIT
"""The short way of plain calls (csrc/glue/eager.cpp): when it is taken, that it equals the long way."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import fastconv
from fastconv import functional as G
from fastconv import ops

SHORT_WAYS = ("eager_chain", "eager_conv", "eager_linear", "eager_max_pool")
CALLS = {
    "conv1d": (lambda x, w, b: G.conv1d(x, w, b, 2, 1), (2, 2, 9), (6, 2, 3)),
    "conv2d": (lambda x, w, b: G.conv2d(x, w, b, (2, 1), (1, 0), 1), (2, 2, 6, 7), (6, 2, 3, 3)),
    "conv2d grouped": (lambda x, w, b: G.conv2d(x, w, b, 1, 2, 2, 2), (2, 4, 6, 7), (6, 2, 3, 3)),
    "conv3d": (lambda x, w, b: G.conv3d(x, w, b), (1, 2, 4, 5, 4), (6, 2, 3, 2, 3)),
    "linear": (lambda x, w, b: G.linear(x, w, b), (3, 2, 5), (6, 5)),
    "max_pool1d": (lambda x: G.max_pool1d(x, 3, 2, 1), (2, 4, 9)),
    "max_pool2d": (lambda x: G.max_pool2d(x, (3, 2), None, 1, (1, 2), True), (2, 2, 7, 8)),
    "max_pool3d": (lambda x: G.max_pool3d(x, 2), (1, 2, 4, 5, 4)),
}


@pytest.fixture
def taken(monkeypatch):
    """Whether the short way was taken, of each call."""
    seen = []

    def watched(function):
        def call(*args):
            output = function(*args)
            seen.append(output is not None)
            return output

        return call

    for name in SHORT_WAYS:
        monkeypatch.setattr(ops, name, watched(getattr(ops, name)))
    return seen


def tensors(name):
    torch.manual_seed(0)
    _, *sizes = CALLS[name]
    made = [torch.randn(size) for size in sizes]
    return made if len(made) == 1 else [*made, torch.randn(sizes[1][0])]


def results(name, wanted):
    """Names in the graph; output and gradients, first and second."""
    inputs = [t.requires_grad_(i in wanted) for i, t in enumerate(tensors(name))]
    leaves = [t for t in inputs if t.requires_grad]
    output = CALLS[name][0](*inputs)
    first = torch.autograd.grad(output, leaves, torch.ones_like(output), retain_graph=True)
    graph = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(
        sum(g.square().sum() for g in graph), leaves, allow_unused=True, materialize_grads=True
    )
    node = output.grad_fn
    return (node.name(), type(node).__name__), [output, *first, *graph, *second]


@pytest.mark.parametrize(
    "name, wanted",
    [
        (name, wanted)
        for name, (_, *sizes) in CALLS.items()
        for wanted in ([{0, 1, 2}, {0}, {1}, {2}, {0, 2}] if len(sizes) > 1 else [{0}])
    ],
)
def test_both_ways_have_the_same_bits(name, wanted, taken, monkeypatch):
    short = results(name, wanted)
    assert taken and all(taken)
    for each in SHORT_WAYS:
        monkeypatch.setattr(ops, each, lambda *_: None)
    long = results(name, wanted)
    assert short[0] == long[0]
    assert all(torch.equal(a, b) for a, b in zip(short[1], long[1], strict=True))


class Subclass(torch.Tensor):
    pass


class Mode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def _dual(x, w):
    with forward_ad.dual_level():
        return G.conv2d(forward_ad.make_dual(x, x), w)


def _under(mode):
    def call(x, w):
        with mode():
            return G.conv2d(x, w)

    return call


UNUSUAL = {
    "no batch": lambda x, w: G.conv2d(x[0], w),
    "padding by a word": lambda x, w: G.conv2d(x, w, padding="same"),
    "a list": lambda x, w: G.conv2d(x, w, stride=[1, 1]),
    "an int beyond 64 bits": lambda x, w: pytest.raises(ValueError, G.conv2d, x, w, stride=2**64),
    "a subclass": lambda x, w: G.conv2d(x.as_subclass(Subclass), w),
    "sparse": lambda x, w: pytest.raises(RuntimeError, G.conv2d, x.to_sparse(), w),
    "a function mode": _under(Mode),
    "autocast": _under(lambda: torch.autocast("cpu", torch.bfloat16)),
    "a tangent": _dual,
    "vmap": lambda x, w: torch.func.vmap(lambda x: G.conv2d(x, w))(x[:, None]),
    "grad": lambda x, w: torch.func.grad(lambda x: G.conv2d(x, w).sum())(x),
    "a tracer": lambda x, w: torch.jit.trace(lambda x: G.conv2d(x, w), x, check_trace=False),
    "a proxy": lambda x, w: torch.fx.experimental.proxy_tensor.make_fx(lambda x, w: G.conv2d(x, w))(x, w),
    "another device": lambda x, w: G.conv2d(x.to("meta"), w.to("meta")),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_goes_the_long_way(name, taken):
    UNUSUAL[name](torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3))
    assert taken and not any(taken)


def test_plain_modules_go_the_short_way(taken):
    model = nn.Sequential(
        fastconv.Conv2d(1, 2, 3), fastconv.MaxPool2d(2), nn.Flatten(), fastconv.Linear(8, 3)
    )
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            model(torch.randn(2, 1, 6, 6))
        with torch.inference_mode():
            model(torch.randn(2, 1, 6, 6))
    assert len(taken) == 12 and all(taken)


@pytest.mark.parametrize("rows", [(2,), (2, 3), ()])
def test_chains_without_gradients_go_the_short_way(rows, taken):
    """Those that have a batch of one dimension."""
    conv = G.conv_stage(act="relu", padding=1, pool_kernel_size=2, bias=False) + G.linear_stage()
    images, weights = torch.randn(2, 1, 4, 4), [torch.randn(3, 1, 3, 3), torch.randn(5, 12), torch.randn(5)]
    linear = G.linear_stage(act="relu", bias=False) + G.linear_stage()
    calls = [
        lambda: G.chain(images, conv, *weights),
        lambda: G.chain(torch.ones(*rows, 12), linear, torch.ones(5, 12), torch.ones(4, 5), torch.ones(4)),
    ]
    for call, short in zip(calls, (True, len(rows) == 1), strict=True):
        taken.clear()
        found = call()
        assert taken == [short]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "eager_chain", lambda *_: None)
            assert torch.equal(call(), found)
    taken.clear()
    images.requires_grad_()
    assert calls[0]().requires_grad and taken == [False]
    with torch.no_grad():
        calls[0]()
    with torch.autocast("cpu", torch.bfloat16):
        assert calls[0]().dtype is torch.bfloat16
    assert taken == [False, True, False]


def test_kernels_in_force_are_kept_for_backward():
    from fastconv import _C, kernels

    x = torch.randn(1, 1, 6, 6, requires_grad=True)
    with kernels.force("cpu/max_pool_naive", "cpu/max_pool_backward_naive"):
        output, seen = _C.watch(lambda: G.max_pool2d(x, 2))
    assert [each["chosen"] for each in seen] == ["cpu/max_pool_naive"]
    _, seen = _C.watch(lambda: output.sum().backward())
    assert [each["chosen"] for each in seen] == ["cpu/max_pool_backward_naive"]


def test_tangents_of_gradients():
    """Forward mode over a graph that was made outside it."""
    found = []
    for layers in (nn.functional, G):
        x, w = torch.arange(50.0).reshape(1, 2, 5, 5).requires_grad_(), torch.ones(3, 2, 2, 2)
        output = layers.max_pool2d(layers.conv2d(x, w), 2)
        with forward_ad.dual_level():
            grad = forward_ad.make_dual(torch.ones_like(output), torch.full_like(output, 2))
            found.append(forward_ad.unpack_dual(torch.autograd.grad(output, x, grad)[0]))
    torch.testing.assert_close(*(each.tangent for each in found))


def test_compiled_autograd():
    """A graph of plain calls whose backward is compiled."""
    from torch._dynamo import compiled_autograd

    model, images = fastconv.models.LeNet(), torch.randn(2, 1, 32, 32)
    model(images).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    for _ in range(2):  # the second time from its cache
        model.zero_grad()
        output = model(images).sum()
        with compiled_autograd._enable(torch.compile(backend="eager")):
            output.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)
