# SPDX-License-Identifier: MIT
"""Batch-norm by the batch's statistics, ReLU and max-pool as one operator: what test_kernels.py doesn't
show, and the layers around it."""

import copy

import problems
import pytest
import torch
import torch.nn.functional as F
from problems import EPS, ROWS, Problem, Rejected, attempt, on_backends
from torch import nn

import fastconv
from fastconv import functional as G
from fastconv import ops

POOL = ((2, 2), (2, 2), (0, 0))
NONE = ((), (), ())


def each_row(pass_):
    rows = [row for row in ROWS if (row["op"], row["pass_"]) == ("norm_act_pool", pass_)]
    return pytest.mark.parametrize(
        ("row", "backend"), [each for row in rows for each in on_backends(row)], indirect=["backend"]
    )


def run(row, backend, call):
    """call(kernel, *tensors) by a row; the test is skipped where it rejects that."""
    try:
        return attempt(row["name"], Problem(call, by_torch=None))
    except Rejected as reason:
        pytest.skip(f"{row['name']} {reason}")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@each_row("forward")
def test_the_first_of_equals_the_last_nan_and_scales_of_every_sign(row, backend, layout):
    x = torch.randint(-2, 3, (2, 6, 4, 6)).float()
    x[0, 4, 1, 3], x[1, 5, 2, 2] = torch.nan, torch.inf
    x = x.contiguous(memory_format=layout)
    w, b = torch.tensor([1.0, -1, 0, 2, 1, 1]), torch.tensor([0.5, 0.5, 0.25, -0.5, 0, 0])
    pool = NONE if row["name"].endswith(("_naive", "_slices")) else POOL

    def call(kernel):
        inputs = (t.to(backend.device) for t in (x, w, b))
        return problems.ops.norm_act_pool(*inputs, EPS, "relu", *pool, kernel)

    y, offsets, mean, _ = (t.cpu() for t in run(row, backend, call))
    normal = F.batch_norm(x.double(), None, None, w.double(), b.double(), True, 0, EPS)
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3)), equal_nan=True)
    if pool is NONE:
        return torch.testing.assert_close(y.double(), normal.relu(), equal_nan=True, rtol=1e-5, atol=1e-6)
    expected, indices = F.max_pool2d(normal, 2, return_indices=True)
    torch.testing.assert_close(y.double(), expected.relu(), equal_nan=True, rtol=1e-5, atol=1e-6)
    found = ops.max_pool_indices(offsets, x.shape, *POOL, (1, 1), False, "")
    passed = ~(expected <= 0)  # no other gradients are used
    assert passed.float().mean() > 0.5 and torch.equal(found[passed], indices[passed])
    assert y[:, 4:].isnan().all()


@each_row("forward")
def test_a_mean_far_larger_than_the_deviation(row, backend):
    """Sums of squares would cancel to nothing: of 1e4 and 1 in float32 half of the digits."""
    x = (torch.randn(8, 3, 8, 8, dtype=torch.float64) + 1e4).float()
    pool = NONE if row["name"].endswith(("_naive", "_slices")) else POOL
    y, _, mean, invstd = run(
        row,
        backend,
        lambda kernel: problems.ops.norm_act_pool(
            x.to(backend.device), None, None, EPS, "none", *pool, kernel
        ),
    )
    axes, exact = (0, 2, 3), x.double()
    torch.testing.assert_close(mean.cpu(), exact.mean(axes), rtol=1e-14, atol=0)
    torch.testing.assert_close(
        invstd.cpu(), (exact.var(axes, correction=0) + EPS).rsqrt(), rtol=1e-10, atol=0
    )
    normal = F.batch_norm(exact, None, None, None, None, True, 0, EPS)
    if pool is POOL:
        normal = F.max_pool2d(normal, 2)
    torch.testing.assert_close(y.cpu().double(), normal, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("values", [0, 1])
@pytest.mark.parametrize("pool", [POOL, NONE])
def test_of_few_values(values, pool):
    """None: no mean; one: it is the mean."""
    x = torch.full((values, 2, 1, 1), 3.0)
    if pool is POOL:
        x = x.expand(values, 2, 2, 2).contiguous()
    y, offsets, mean, invstd = ops.norm_act_pool(x, None, torch.ones(2), EPS, "relu", *pool, "")
    assert y.shape == (values, 2, 1, 1) and mean.isnan().all() == (values == 0)
    grads = ops.norm_act_pool_backward(
        torch.ones_like(y), y, offsets, x, None, mean, invstd, "relu", *pool, [True] * 3, ""
    )
    assert grads[0].shape == x.shape
    assert torch.equal(grads[2], torch.full((2,), float(values)))
    if values:
        assert torch.equal(y, torch.ones_like(y)) and torch.equal(mean, torch.full((2,), 3.0).double())


# --- the functional form ------------------------------------------------------------------------------------


def by_parts(x, mean, var, w, b, pool=True, **options):
    y = F.relu(F.batch_norm(x, mean, var, w, b, True, **options))
    return G.max_pool2d(y, 2) if pool else y


def fused(x, mean, var, w, b, pool=True, **options):
    return G.batch_norm_relu_max_pool2d(x, mean, var, w, b, **options, pool_kernel_size=2 if pool else None)


def arguments(*size, dtype=torch.float64):
    c = size[1]
    w, b = torch.randn(c, dtype=dtype), torch.randn(c, dtype=dtype)
    return torch.randn(size, dtype=dtype), torch.zeros(c, dtype=dtype), torch.ones(c, dtype=dtype), w, b


class Kept:
    """Keeps what is saved for backward."""

    def __init__(self):
        self.tensors = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda i: self.tensors[i])

    def pack(self, tensor):
        self.tensors.append(tensor)
        return len(self.tensors) - 1


def step(x, w, b, pool, overwrite, keep=False):
    """(the input's bits before and after backward, gradients)"""
    x = x.clone().requires_grad_()
    y = G.batch_norm_relu_max_pool2d(
        x, None, None, w, b, pool_kernel_size=2 if pool else None, overwrite_input=overwrite
    )
    before, needed = x.detach().clone(), [t for t in (x, w, b) if t is not None]
    grads = torch.autograd.grad(y, needed, torch.cos(y.detach()), retain_graph=keep)
    return before, x.detach(), [grad.clone() for grad in grads]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_backward_over_the_input(layout, pool, dtype):
    """The same bits; the input stays where it may be read again."""
    x, _, _, w, b = arguments(3, 5, 7, 9, dtype=dtype)
    x = x.contiguous(memory_format=layout)
    for parameters in ((w.requires_grad_(), b.requires_grad_()), (None, None)):
        before, after, plain = step(x, *parameters, pool, False)
        assert torch.equal(before, after)
        before, after, grads = step(x, *parameters, pool, True)
        assert all(map(torch.equal, grads, plain)) and torch.equal(after, grads[0])
        assert not torch.equal(before, after)
        before, after, grads = step(x, *parameters, pool, True, keep=True)
        assert all(map(torch.equal, grads, plain)) and torch.equal(before, after)
        with Kept().hooks:
            before, after, grads = step(x, *parameters, pool, True)
        assert all(map(torch.equal, grads, plain)) and torch.equal(before, after)


def test_an_input_with_gaps_is_not_written_over():
    x = torch.randn(2, 3, 4, 8)[..., ::2]
    y, offsets, mean, invstd = ops.norm_act_pool(x, None, None, EPS, "relu", *POOL, "")
    with pytest.raises(RuntimeError, match="input must be dense to be written over, got strides"):
        ops.norm_act_pool_backward_(y, y, offsets, x, None, mean, invstd, "relu", *POOL, [False, False], "")


def test_only_the_input_is_kept_at_full_size():
    x, *_, w, b = arguments(8, 4, 16, 16, dtype=torch.float32)
    output = fused(x.requires_grad_(), None, None, w, b)
    saved = output.grad_fn.saved_tensors
    assert [t.numel() for t in saved if t is not None and t.numel() >= x.numel()] == [x.numel()]
    assert sum(t.nbytes for t in saved if t is not x) < x.nbytes / 2
    assert output.grad_fn.name() == "BatchNormReLUMaxPool2dBackward"


@pytest.mark.parametrize("pool", [True, False])
def test_transforms(pool):
    """By their parts: forward mode, gradients of gradients through torch.func, vmap over parameters."""
    x, *_, w, b = arguments(3, 4, 6, 6)

    def call(function):
        return lambda x, w, b: function(x, None, None, w, b, pool).square().sum((1, 2, 3))

    ours, theirs, inputs = call(fused), call(by_parts), (x, w, b)
    for transform in (
        lambda f: torch.func.jvp(f, inputs, tuple(t.cos() for t in inputs)),
        lambda f: torch.func.grad(lambda *t: f(*t).sum(), (0, 1, 2))(*inputs),
        lambda f: torch.func.vmap(f, (None, 0, 0))(x, torch.stack([w, -w]), torch.stack([b, b])),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs))


def test_a_gradient_in_another_layout():
    """As a flatten behind a channels_last tensor sends it back; and one whose elements share an address."""
    x, *_, w, b = arguments(4, 3, 8, 8)
    for layout in (torch.contiguous_format, torch.channels_last):
        images = x.contiguous(memory_format=layout).requires_grad_()
        for reduce in (lambda y: y.flatten(1).square().sum(), torch.sum):
            grads = [
                torch.autograd.grad(reduce(f(images, None, None, w, b)), images)[0] for f in (fused, by_parts)
            ]
            torch.testing.assert_close(*grads)
            assert grads[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    "change",
    [lambda x, w: (x.bfloat16(), w.float()), lambda x, w: (x[:, :, 0], w), lambda x, w: (x[:, :, 0, 0], w)],
    ids=["parameters of another dtype", "one axis", "no axis"],
)
def test_what_goes_through_torch(change):
    x, mean, var, w, b = arguments(4, 3, 8, 8)
    x, w = change(x, w)
    others = [t.to(w) for t in (mean, var)]
    expected = by_parts(x, *[t.clone() for t in others], w, b.to(w), False)
    output = fused(x, *others, w, b.to(w), False)
    assert torch.equal(output, expected) and others[0].count_nonzero() == 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: fused(torch.ones(1, 3, 1, 1), None, None, None, None, False),
            ValueError,
            "more than 1 value",
        ),
        (lambda: fused([1.0], None, None, None, None), TypeError, "'input' must be a Tensor, got list"),
        (lambda: fused(torch.ones(2, 3, 4, 4), 0.5, None, None, None), TypeError, "'running_mean' .* float"),
        (
            lambda: fused(torch.ones(2, 3, 4, 4), None, None, torch.ones(4), None),
            RuntimeError,
            r"weight must have size \[3\], got \[4\]",
        ),
        (
            lambda: fused(torch.ones(2, 3, 4, 1), None, None, None, None),
            RuntimeError,
            "spans 2, the padded input has 1",
        ),
        (
            lambda: G.batch_norm_relu_max_pool2d(torch.ones(2, 3, 4, 4), None, None, pool_kernel_size="2"),
            TypeError,
            "'pool_kernel_size' must be .* got '2'",
        ),
        (
            lambda: ops.norm_act_pool(torch.ones(2, 3), None, None, EPS, "relu", *NONE, ""),
            RuntimeError,
            r"input must have 3 to 5 dimensions .* got input of size \[2, 3\]",
        ),
        (
            lambda: ops.norm_act_pool(torch.ones(2, 3, 4, 4), None, None, EPS, "tanh", *NONE, ""),
            RuntimeError,
            "act must be 'none' or 'relu', got 'tanh'",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_what_backward_refuses():
    x = torch.randn(2, 3, 4, 4)
    y, offsets, mean, invstd = ops.norm_act_pool(x, None, None, EPS, "relu", *POOL, "")
    good = dict(grad_output=y, output=y, offsets=offsets, input=x, weight=None, mean=mean, invstd=invstd)
    for name, bad, message in (
        ("grad_output", x, r"grad_output must have size \[2, 3, 2, 2\], got \[2, 3, 4, 4\]"),
        ("output", y.double(), "output must have the dtype of grad_output, Float, got Double"),
        ("offsets", y, "offsets must be Byte on cpu, got Float on cpu"),
        ("weight", torch.ones(2), r"weight must have size \[3\], got \[2\]"),
        ("mean", mean.float(), "mean must be contiguous float64 on cpu, got Float on cpu"),
        ("invstd", invstd[:2], r"invstd must have size \[3\], got \[2\]"),
    ):
        with pytest.raises(RuntimeError, match=f"norm_act_pool_backward: {message}"):
            ops.norm_act_pool_backward(*{**good, name: bad}.values(), "relu", *POOL, [True] * 3, "")


# --- layers, by optimize ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"momentum": 0.7, "affine": False}, {"track_running_stats": False}],
    ids=["as built", "all batches alike", "without parameters", "without statistics"],
)
def test_running_statistics(options, pool):
    """After ten steps those of nn.BatchNorm2d, and then so is eval mode."""
    tail = [nn.ReLU(), nn.MaxPool2d(2)][: 1 + pool]
    model = nn.Sequential(nn.BatchNorm2d(3, **options), *tail)
    fast = fastconv.optimize(copy.deepcopy(model))
    name = "batch_norm_relu_max_pool" if pool else "batch_norm_relu"
    program = fast._plan.by_mode()[True]
    assert [node.target.__name__ for node in program.graph.nodes if node.op == "call_function"] == [name]
    for _ in range(10):
        x = 3 * torch.randn(4, 3, 6, 6) + 1
        torch.testing.assert_close(fast(x), model(x))
    theirs, ours = model.state_dict(), fast.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fast.eval()(x), model.eval()(x))


def test_a_norm_of_too_few_values_or_dimensions():
    for size, message in (((1, 3, 1, 1), "more than 1 value per channel"), ((3, 4, 4), "expected 4D input")):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
        for each in (model, fastconv.optimize(model)):
            with pytest.raises(ValueError, match=message):
                each(torch.ones(size))


def test_a_layer_that_changes_is_seen():
    """Another momentum, eps, dtype; frozen parameters."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2))
    fast, x = fastconv.optimize(copy.deepcopy(model)), torch.randn(4, 3, 6, 6)
    for each in (model, fast):
        each[0].momentum, each[0].eps = 0.5, 1.0
        each.double()[0].weight.requires_grad_(False)
        each(x.double()).square().sum().backward()
        assert each[0].weight.grad is None
    torch.testing.assert_close(fast(x.double()), model(x.double()))
    torch.testing.assert_close(fast[0].bias.grad, model[0].bias.grad)
    torch.testing.assert_close(fast[0].running_var, model[0].running_var)
