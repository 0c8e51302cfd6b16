# SPDX-License-Identifier: MIT
"""Derivatives of every Function, of every order, and what tracers make of them."""

import copy

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastconv
from fastconv import autograd, ops
from fastconv import functional as G

CHAIN = (
    G.conv_stage(act="relu", padding=1, pool_kernel_size=2)
    + G.conv_stage(bias=False, pool_kernel_size=(1, 2), pool_stride=(1, 1))
    + G.linear_stage(act="relu")
    + G.linear_stage()
)
CALLS = {
    "conv2d": (lambda x, w, b: G.conv2d(x, w, b), (2, 2, 5, 4), (3, 2, 3, 2), (3,)),
    "conv2d without bias": (lambda x, w: G.conv2d(x, w, padding=1), (2, 2, 3, 4), (3, 2, 3, 2)),
    "conv2d strided, dilated": (
        lambda x, w, b: G.conv2d(x, w, b, (2, 1), (1, 2), (1, 2)),
        (2, 2, 6, 5),
        (3, 2, 3, 2),
        (3,),
    ),
    "conv2d grouped": (lambda x, w, b: G.conv2d(x, w, b, groups=2), (1, 4, 4, 4), (6, 2, 2, 3), (6,)),
    "conv2d depthwise": (lambda x, w, b: G.conv2d(x, w, b, 2, 1, 1, 3), (1, 3, 5, 4), (3, 1, 3, 3), (3,)),
    "conv2d same": (lambda x, w, b: G.conv2d(x, w, b, padding="same"), (1, 2, 4, 5), (2, 2, 2, 4), (2,)),
    "conv2d unbatched": (lambda x, w, b: G.conv2d(x, w, b), (2, 4, 4), (3, 2, 3, 2), (3,)),
    "conv1d": (lambda x, w, b: G.conv1d(x, w, b, 2, 1, 2), (2, 2, 9), (3, 2, 3), (3,)),
    "conv3d": (
        lambda x, w, b: G.conv3d(x, w, b, (1, 2, 1), groups=2),
        (1, 2, 3, 4, 3),
        (2, 1, 2, 3, 2),
        (2,),
    ),
    "conv2d_relu": (lambda x, w, b: G.conv2d_relu_max_pool2d(x, w, b), (2, 2, 5, 4), (3, 2, 3, 2), (3,)),
    "conv2d_relu_max_pool2d": (
        lambda x, w, b: G.conv2d_relu_max_pool2d(x, w, b, 1, 1, pool_kernel_size=2),
        (2, 2, 5, 6),
        (3, 2, 3, 3),
        (3,),
    ),
    "conv2d_relu_max_pool2d overlapping": (
        lambda x, w: G.conv2d_relu_max_pool2d(
            x, w, None, 1, "same", 1, 2, pool_kernel_size=3, pool_stride=2, pool_padding=1
        ),
        (1, 4, 6, 5),
        (4, 2, 2, 3),
    ),
    "batch_norm_relu": (
        lambda x, w, b: G.batch_norm_relu_max_pool2d(x, None, None, w, b),
        (3, 2, 3, 4),
        (2,),
        (2,),
    ),
    "batch_norm_relu_max_pool2d": (
        lambda x, w, b: G.batch_norm_relu_max_pool2d(x, None, None, w, b, pool_kernel_size=2),
        (2, 3, 5, 6),
        (3,),
        (3,),
    ),
    "batch_norm_relu_max_pool2d overlapping": (
        lambda x, b: G.batch_norm_relu_max_pool2d(
            x, None, None, None, b, eps=0.1, pool_kernel_size=3, pool_stride=2, pool_padding=1
        ),
        (2, 2, 6, 5),
        (2,),
    ),
    "max_pool2d": (lambda x: G.max_pool2d(x, 2), (2, 3, 4, 6)),
    "max_pool2d overlapping": (lambda x: G.max_pool2d(x, 3, 1, 1), (2, 2, 5, 4)),
    "max_pool2d dilated": (lambda x: G.max_pool2d(x, (2, 3), 2, (1, 0), (1, 2)), (1, 2, 6, 7)),
    "max_pool2d ceil": (lambda x: G.max_pool2d(x, 2, 2, ceil_mode=True), (1, 2, 5, 7)),
    "max_pool2d indices": (lambda x: G.max_pool2d(x, 2, return_indices=True)[0], (1, 2, 4, 4)),
    "max_pool1d": (lambda x: G.max_pool1d(x, 3, 2, 1), (2, 3, 7)),
    "max_pool3d": (lambda x: G.max_pool3d(x, 2, (1, 2, 2)), (1, 2, 3, 4, 4)),
    "avg_pool1d": (lambda x: G.avg_pool1d(x, 3, 2, 1), (2, 3, 7)),
    "avg_pool3d": (lambda x: G.avg_pool3d(x, 2, (1, 2, 2)), (1, 2, 3, 4, 4)),
    "avg_pool2d": (lambda x: G.avg_pool2d(x, 2), (2, 3, 4, 6)),
    "avg_pool2d overlapping": (lambda x: G.avg_pool2d(x, 3, 1, 1, count_include_pad=False), (2, 2, 5, 4)),
    "avg_pool2d ceil": (lambda x: G.avg_pool2d(x, (3, 2), 2, (1, 0), ceil_mode=True), (1, 2, 6, 7)),
    "avg_pool2d divisor": (lambda x: G.avg_pool2d(x, 2, 3, divisor_override=3), (2, 5, 7)),
    "linear": (lambda x, w, b: G.linear(x, w, b), (4, 3), (5, 3), (5,)),
    "linear without bias": (lambda x, w: G.linear(x, w), (4, 3), (5, 3)),
    "linear leading dimensions": (lambda x, w, b: G.linear(x, w, b), (2, 3, 4), (5, 4), (5,)),
    "linear vector": (lambda x, w, b: G.linear(x, w, b), (4,), (5, 4), (5,)),
    "linear_relu": (lambda x, w, b: G.linear_relu(x, w, b), (2, 3, 4), (5, 4), (5,)),
    "chain": (
        lambda *inputs: G.chain(inputs[0], CHAIN, *inputs[1:]),
        (2, 2, 5, 6),
        (3, 2, 3, 3),
        (3,),
        (2, 3, 2, 2),
        (4, 2),
        (4,),
        (2, 4),
        (2,),
    ),
    "chain of linear layers": (
        lambda x, w, v, b: G.chain(x, G.linear_stage(act="relu", bias=False) + G.linear_stage(), w, v, b),
        (2, 3, 5),
        (4, 5),
        (3, 4),
        (3,),
    ),
    "chain of one convolution": (
        lambda x, w: G.chain(x, G.conv_stage(bias=False, stride=2, padding=(0, 1, 2, 0), groups=2), w),
        (2, 4, 5, 6),
        (6, 2, 3, 2),
    ),
}


def tensors(sizes, device="cpu", dtype=torch.float64):
    """Random tensors that want gradients; no two values of one lie close, as ties have no derivative."""
    for size in sizes:
        count = torch.Size(size).numel()
        spread = (torch.randperm(count) - count / 2 + 0.3) / count * 3
        yield spread.reshape(size).to(device, dtype).requires_grad_()


@pytest.mark.parametrize("name", CALLS)
def test_first_and_second_derivatives(name, device):
    call, *sizes = CALLS[name]
    inputs = tuple(tensors(sizes, device))
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if len(call) > 2])
def test_gradients_of_one_input_alone(name):
    """The others cost nothing: their gradients are not computed, and what is computed does not change."""
    call, *sizes = CALLS[name]
    inputs = list(tensors(sizes))
    whole = torch.autograd.grad(call(*inputs).square().sum(), inputs)
    for i, expected in enumerate(whole):
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(inputs)]
        output = call(*alone)
        output.square().sum().backward()
        assert all((t.grad is not None) == t.requires_grad for t in alone)
        torch.testing.assert_close(alone[i].grad, expected, rtol=1e-14, atol=1e-14)
        assert gradgradcheck(
            lambda t, i=i: call(*(t if i == j else o.detach() for j, o in enumerate(inputs))), inputs[i]
        )


@pytest.mark.parametrize(
    "name",
    [
        "conv2d strided, dilated",
        "conv2d_relu_max_pool2d",
        "batch_norm_relu_max_pool2d",
        "linear_relu",
        "chain",
    ],
)
def test_third_derivative(name):
    call, *sizes = CALLS[name]
    inputs = tuple(tensors(sizes))

    def slope(*inputs):
        output = call(*inputs).square().sum()
        (grad,) = torch.autograd.grad(output, inputs[1], create_graph=True)
        return grad

    assert gradgradcheck(slope, inputs)


def test_retain_graph():
    for call, *sizes in CALLS.values():
        inputs = list(tensors(sizes))
        output = call(*inputs).square().sum()
        first = torch.autograd.grad(output, inputs, retain_graph=True)
        second = torch.autograd.grad(output, inputs, retain_graph=True)
        graph = torch.autograd.grad(output, inputs, create_graph=True)
        for a, b, c in zip(first, second, graph, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c.detach(), rtol=1e-14, atol=1e-14)


def test_no_gradient_no_graph():
    x, w = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3, requires_grad=True)
    assert G.conv2d(x, w.detach()).grad_fn is None
    with torch.no_grad():
        assert G.conv2d(x, w).grad_fn is None
    with torch.inference_mode():
        assert not G.conv2d(x, w).requires_grad


def test_changed_input_is_noticed():
    x, w = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3, requires_grad=True)
    output = G.conv2d(x, w)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_indices_have_no_gradient():
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    _, indices = G.max_pool2d(x, 2, return_indices=True)
    assert indices.dtype is torch.int64 and not indices.requires_grad


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_names_in_the_graph_of_any_axes(axes):
    x = torch.randn(1, 3, *[8] * axes, requires_grad=True)
    for name, call in {"Conv": "conv{}d", "MaxPool": "max_pool{}d", "AvgPool": "avg_pool{}d"}.items():
        other = torch.randn(4, 3, *[3] * axes) if name == "Conv" else 2
        assert getattr(G, call.format(axes))(x, other).grad_fn.name() == f"{name}{axes}dBackward"


def test_names_in_the_graph():
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    w = torch.randn(4, 3, 3, 3)
    names = {
        "Conv2dReLUMaxPool2d": G.conv2d_relu_max_pool2d(x, w, pool_kernel_size=2),
        "Linear": G.linear(x, torch.randn(5, 8)),
        "LinearReLU": G.linear_relu(x, torch.randn(5, 8)),
        "Chain": G.chain(x, G.conv_stage(bias=False), w),
    }
    for name, output in names.items():
        assert output.grad_fn.name() == f"{name}Backward"


# --- tracers ------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["layers", "fused"])
def lenet(request):
    return fastconv.models.LeNet(fused=request.param)


def gradients(model, images, call=None):
    model.zero_grad()
    (model if call is None else call)(images).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(lenet, dynamic):
    compiled = torch.compile(lenet, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (3, 5):
        images = torch.randn(batch, 1, 32, 32)
        torch.testing.assert_close(compiled(images), lenet(images))
        found, expected = gradients(lenet, images, compiled), gradients(lenet, images)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], msg=name)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fused(backend):
    model = torch.nn.Sequential(
        fastconv.ConvReLUPool2d(1, 4, 3),
        fastconv.AvgPool2d(3, 2),
        torch.nn.Flatten(),
        fastconv.LinearReLU(4 * 3 * 3, 5),
    )
    images = torch.randn(3, 1, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    found, expected = gradients(model, images, compiled), gradients(model, images)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)


def test_func_grad(lenet):
    images = torch.randn(3, 1, 32, 32)
    expected = gradients(lenet, images)

    def loss(parameters, images):
        return torch.func.functional_call(lenet, parameters, images).square().mean()

    found = torch.func.grad(loss)(dict(lenet.named_parameters()), images)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)


def test_checkpoint(lenet):
    from torch.utils.checkpoint import checkpoint

    images = torch.randn(3, 1, 32, 32)
    expected = gradients(lenet, images)
    found = gradients(lenet, images, lambda x: checkpoint(lenet, x, use_reentrant=False))
    for name in expected:
        assert torch.equal(found[name], expected[name])


def test_autocast(lenet):
    images = torch.randn(3, 1, 32, 32)
    twin = fastconv.restore(copy.deepcopy(lenet))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = lenet(images), twin(images)
    assert ours.dtype is theirs.dtype is torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)
    ours.float().sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in lenet.parameters())


# --- operators ----------------------------------------------------------------------------------------------

CONV = ((1, 2), (1, 0, 2, 1), (2, 1), 2)
POOL = ((3, 2), (2, 1), (1, 0))
WINDOW = (*POOL, (1, 2), True)
AVERAGE = (*POOL, True, False)


def operator_samples():
    """Arguments for every operator, by its name."""
    x, w, b = torch.randn(2, 4, 7, 6), torch.randn(6, 2, 3, 2), torch.randn(6)
    y = ops.conv_fprop(x, w, b, *CONV, "")
    fused, fused_offsets = ops.conv_act_pool(x, w, b, *CONV, "relu", *POOL, True, "")
    pooled, offsets = ops.max_pool(x, *WINDOW, True, "")
    rows, matrix = torch.randn(2, 3, 5), torch.randn(4, 5)
    products = ops.linear_act(rows, matrix, None, "relu", "")
    yield "conv_fprop", (x, w, b, *CONV)
    yield "conv_fprop", (x, w, None, *CONV, "cpu/conv_fprop_naive")
    yield "conv_dgrad", (torch.randn_like(y), w, x.shape, *CONV)
    yield "conv_wgrad", (torch.randn_like(y), x, w.shape, *CONV, True)
    yield "conv_wgrad", (torch.randn_like(y), x, w.shape, *CONV, False)
    for save in (True, False):
        yield "conv_act_pool", (x, w, b, *CONV, "relu", *POOL, save)
        yield "conv_act_pool", (x, w, b, *CONV, "none", [], [], [], save)
        yield "max_pool", (x, *WINDOW, save)
    yield (
        "conv_act_pool_backward",
        (torch.randn_like(fused), fused, fused_offsets, x, w, *CONV, "relu", *POOL, [True, True, True]),
    )
    yield "max_pool_backward", (torch.randn_like(pooled), offsets, x.shape, *WINDOW)
    yield "max_pool_gather", (x, offsets, *WINDOW)
    yield "max_pool_indices", (offsets, x.shape, *WINDOW)
    for divisor in (None, 3):
        averages = ops.avg_pool(x, *AVERAGE, divisor, "")
        yield "avg_pool", (x, *AVERAGE, divisor)
        for layout in (False, True):
            yield "avg_pool_backward", (torch.randn_like(averages), x.shape, *AVERAGE, divisor, layout)
    for pool in (POOL, ([], [], [])):
        norm, norm_offsets, mean, invstd = ops.norm_act_pool(x, b[:4], None, 1e-5, "relu", *pool, "")
        yield "norm_act_pool", (x, b[:4], None, 1e-5, "relu", *pool)
        for mask in ([True, True, True], [False, True, False]):
            saved = (norm, norm_offsets, x, b[:4], mean, invstd)
            yield "norm_act_pool_backward", (torch.randn_like(norm), *saved, "relu", *pool, mask)
        saved = (norm, norm_offsets, x.clone(), b[:4], mean, invstd)
        yield "norm_act_pool_backward_", (torch.randn_like(norm), *saved, "relu", *pool, [True, False])
    yield "linear_act", (rows, matrix, None, "relu")
    yield "linear_dgrad", (torch.randn_like(products), matrix)
    yield "linear_wgrad", (torch.randn_like(products), rows, True)
    yield (
        "linear_act_backward",
        (torch.randn_like(products), products, rows, matrix, "relu", [True, False, False]),
    )
    images, filters, weights = torch.randn(3, 2, 5, 6), torch.randn(3, 2, 3, 3), torch.randn(5, 3)
    plan = (
        *G.conv_stage(act="relu", padding=(1, 0, 0, 1), pool_kernel_size=(3, 4)),
        *G.linear_stage(act="relu"),
    )
    params = [filters, torch.randn(3), weights, torch.randn(5)]
    outputs, saved = ops.chain(images, params, plan, True, "")
    for save in (True, False):
        yield "chain", (images, params, plan, save)
    for mask in (0b11111, 0b01100):
        yield "chain_backward", (torch.randn_like(outputs), outputs, images, params, saved, plan, mask)


@pytest.mark.usefixtures("poisoned_memory")  # what no kernel writes of chain's `saved` is always the same
def test_opcheck():
    samples = list(operator_samples())
    assert {name for name, _ in samples} == {
        name.removeprefix("fastconv::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fastconv::")
    }
    for name, arguments in samples:
        torch.library.opcheck(getattr(torch.ops.fastconv, name).default, arguments)


def with_gradients(arguments):
    """The arguments in float64, and the tensors among them that get gradients."""

    def leaf(value):
        if isinstance(value, list):
            return [leaf(each) for each in value]
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.detach().double().requires_grad_() if floating else value

    arguments = [leaf(value) for value in arguments]
    flat = [each for value in arguments for each in (value if isinstance(value, list) else [value])]
    return arguments, [each for each in flat if isinstance(each, torch.Tensor) and each.requires_grad]


def test_gradients_of_raw_operators():
    """Right, or refused: none is lost without a word."""
    refused = set()
    for name, arguments in operator_samples():
        arguments, leaves = with_gradients(arguments)
        call = getattr(torch.ops.fastconv, name)
        if name == "max_pool_indices":
            assert not leaves
            continue
        if name.rstrip("_").endswith("_backward") and name.split("_")[0] in (
            "conv",
            "linear",
            "norm",
            "chain",
        ):
            with pytest.raises(
                RuntimeError, match=f"{name} is a raw operator without a gradient.*functional"
            ):
                call(*arguments)
            refused.add(name)
            continue

        def outputs(*_, call=call, arguments=arguments):
            found = call(*arguments)
            return [each for each in (found if isinstance(found, tuple) else [found]) if each.requires_grad]

        assert outputs()
        assert torch.autograd.gradcheck(outputs, leaves)
        with torch.no_grad():
            call(*arguments)
    assert refused == {
        f"{name}_backward" for name in ("conv_act_pool", "linear_act", "norm_act_pool", "chain")
    } | {"norm_act_pool_backward_"}


def test_raw_operators_called_from_python_have_gradients():
    x, w = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3, requires_grad=True)
    output = ops.conv_fprop(x, w, None, (1, 1), (0, 0, 0, 0), (1, 1), 1, "")
    assert output.grad_fn.name() == "Conv2dBackward"
    with pytest.raises(RuntimeError, match="weight must have 4 dimensions"):
        ops.conv_fprop(x, w[0], None, (1, 1), (0, 0, 0, 0), (1, 1), 1, "")


@pytest.mark.usefixtures("poisoned_memory")
def test_operators_are_the_functions_of_ops():
    for name, arguments in operator_samples():
        again = copy.deepcopy(arguments)  # some are written over
        torch.testing.assert_close(
            getattr(torch.ops.fastconv, name)(*arguments),
            getattr(ops, name)(*again, *([] if isinstance(again[-1], str) and "/" in again[-1] else [""])),
            rtol=0,
            atol=0,
        )


def test_meta_tensors_have_the_strides_of_real_ones():
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 4, 7, 6).contiguous(memory_format=layout)
        w = torch.randn(6, 2, 3, 2)
        for real, meta in (
            (
                autograd.conv.conv_fprop(x, w, None, CONV),
                autograd.conv.conv_fprop(x.to("meta"), w.to("meta"), None, CONV),
            ),
            (autograd.pool.max_pool(x, WINDOW), autograd.pool.max_pool(x.to("meta"), WINDOW)),
            (
                autograd.pool.avg_pool(x, (*AVERAGE, None)),
                autograd.pool.avg_pool(x.to("meta"), (*AVERAGE, None)),
            ),
        ):
            assert meta.device.type == "meta"
            assert (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype)


class Undefined(torch.autograd.Function):
    """Passes its input on, and no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


TWO_OUTPUTS = {  # operators with an output that has no gradient
    "batch_norm_relu_max_pool2d": lambda x, w: G.batch_norm_relu_max_pool2d(
        x * w.sum(), None, None, pool_kernel_size=2
    ),
    "chain": lambda x, w: G.chain(x, G.conv_stage(act="relu", bias=False, pool_kernel_size=2), w),
    "conv2d_relu_max_pool2d": lambda x, w: G.conv2d_relu_max_pool2d(x, w, pool_kernel_size=2),
    "max_pool2d": lambda x, w: G.max_pool2d(x * w.sum(), 2),
}


@pytest.mark.parametrize("op", TWO_OUTPUTS)
def test_no_gradient_is_made_of_zeros(op):
    x, w = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    y = TWO_OUTPUTS[op](x, w)
    ones = torch.ones_like(y)
    with torch.profiler.profile() as profile:
        y.backward(ones)
    names = {event.key for event in profile.key_averages()}
    assert any(name.startswith("fastconv::") and name.endswith("_backward") for name in names)
    assert not {name for name in names if "zero" in name}
    grads = torch.autograd.grad(Undefined.apply(TWO_OUTPUTS[op](x, w)).sum(), (x, w), allow_unused=True)
    assert grads == (None, None)
