# SPDX-License-Identifier: MIT
"""The layers are torch.nn's in everything but the computation; convert and restore swap them."""

import copy
import inspect
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from networks import allocated
from torch import nn
from torch.profiler import profile

import fastconv
from fastconv import functional as G

FUNCTIONS = [
    (getattr(G, name), getattr(F, name))
    for name in (
        *("conv1d", "conv2d", "conv3d"),
        *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
        "linear",
    )
]

# Layer, arguments, size of the input.
LAYERS = [
    ("Conv2d", dict(in_channels=3, out_channels=8, kernel_size=3), (2, 3, 9, 8)),
    (
        "Conv2d",
        dict(in_channels=4, out_channels=6, kernel_size=(3, 2), stride=2, padding=1, groups=2),
        (2, 4, 9, 8),
    ),
    (
        "Conv2d",
        dict(in_channels=3, out_channels=3, kernel_size=3, dilation=(1, 2), groups=3, bias=False),
        (2, 3, 9, 8),
    ),
    ("Conv2d", dict(in_channels=3, out_channels=5, kernel_size=(4, 3), padding="same"), (2, 3, 9, 8)),
    ("Conv2d", dict(in_channels=3, out_channels=5, kernel_size=2, padding="valid"), (3, 9, 8)),
    *(
        (
            "Conv2d",
            dict(in_channels=3, out_channels=5, kernel_size=(4, 3), padding=padding, padding_mode=mode),
            (2, 3, 9, 8),
        )
        for mode, padding in itertools.product(
            ("zeros", "reflect", "replicate", "circular"), ((1, 2), "same")
        )
    ),
    ("Conv1d", dict(in_channels=4, out_channels=6, kernel_size=3, stride=2, padding=1, groups=2), (2, 4, 9)),
    ("Conv1d", dict(in_channels=3, out_channels=5, kernel_size=4, padding="same", dilation=2), (3, 9)),
    (
        "Conv1d",
        dict(in_channels=3, out_channels=5, kernel_size=3, padding=2, padding_mode="reflect"),
        (2, 3, 9),
    ),
    ("Conv1d", dict(in_channels=3, out_channels=5, kernel_size=4, padding="valid"), (2, 3, 9)),
    ("Conv3d", dict(in_channels=2, out_channels=4, kernel_size=(2, 3, 1), padding=1), (2, 2, 4, 5, 6)),
    ("Conv3d", dict(in_channels=2, out_channels=4, kernel_size=2, padding="valid"), (2, 2, 4, 5, 6)),
    ("Conv3d", dict(in_channels=4, out_channels=4, kernel_size=2, stride=2, groups=4), (4, 4, 5, 6)),
    (
        "Conv3d",
        dict(in_channels=2, out_channels=3, kernel_size=3, padding=1, padding_mode="circular"),
        (2, 2, 4, 5, 6),
    ),
    ("MaxPool1d", dict(kernel_size=3, stride=2, padding=1, return_indices=True), (2, 3, 9)),
    ("MaxPool1d", dict(kernel_size=2, dilation=2, ceil_mode=True), (3, 9)),
    ("MaxPool3d", dict(kernel_size=2, return_indices=True), (2, 3, 4, 5, 6)),
    ("MaxPool3d", dict(kernel_size=(1, 3, 2), stride=(2, 1, 2), padding=(0, 1, 1)), (3, 4, 5, 6)),
    ("MaxPool2d", dict(kernel_size=2), (2, 3, 9, 8)),
    (
        "MaxPool2d",
        dict(kernel_size=(3, 2), stride=(1, 2), padding=1, dilation=(1, 2), ceil_mode=True),
        (3, 9, 8),
    ),
    ("MaxPool2d", dict(kernel_size=3, stride=2, return_indices=True), (2, 3, 9, 8)),
    ("AvgPool2d", dict(kernel_size=2), (2, 3, 9, 8)),
    (
        "AvgPool2d",
        dict(kernel_size=(3, 2), stride=(1, 2), padding=1, ceil_mode=True, count_include_pad=False),
        (3, 9, 8),
    ),
    ("AvgPool2d", dict(kernel_size=3, stride=2, divisor_override=4), (2, 3, 9, 8)),
    ("AvgPool1d", dict(kernel_size=3, stride=2, padding=1), (2, 3, 9)),
    ("AvgPool1d", dict(kernel_size=2, ceil_mode=True, count_include_pad=False), (3, 9)),
    ("AvgPool3d", dict(kernel_size=2), (2, 3, 4, 5, 6)),
    (
        "AvgPool3d",
        dict(kernel_size=(1, 3, 2), stride=(2, 1, 2), padding=(0, 1, 1), divisor_override=5),
        (3, 4, 5, 6),
    ),
    ("Linear", dict(in_features=7, out_features=5), (4, 7)),
    ("Linear", dict(in_features=7, out_features=5, bias=False), (2, 3, 4, 7)),
    ("Linear", dict(in_features=7, out_features=5), (7,)),
]
LAYER_IDS = [f"{name}-{i}" for i, (name, _, _) in enumerate(LAYERS)]
each_layer = pytest.mark.parametrize(("name", "arguments", "size"), LAYERS, ids=LAYER_IDS)


def pair(name, arguments, **extra):
    """torch.nn's layer and fastconv's, from the same seed."""
    made = []
    for layers in (nn, fastconv):
        torch.manual_seed(1)
        made.append(getattr(layers, name)(**arguments, **extra))
    return made


def first(output):
    return output[0] if isinstance(output, tuple) else output


def check_equal_work(theirs, ours, x, tolerance):
    """Outputs, and gradients of input and parameters."""
    results = []
    for layer in (theirs, ours):
        leaf = x.detach().clone().requires_grad_()
        layer.zero_grad()
        output = first(layer(leaf))
        torch.manual_seed(2)
        output.backward(torch.randn_like(output, memory_format=torch.contiguous_format))
        results.append([output, leaf.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("ours", "theirs"), FUNCTIONS, ids=lambda f: f.__name__)
def test_function_signatures(ours, theirs):
    try:
        parameters = inspect.signature(theirs).parameters
    except ValueError:  # a builtin: its signature stands in the first line of its docstring
        names = theirs.__doc__.split("(")[1].split(")")[0]
        expected = [part.split("=") for part in names.replace(" ", "").split(",")]
        found = inspect.signature(ours).parameters
        assert list(found) == [name for name, *_ in expected]
        assert [str(p.default) for p in found.values() if p.default is not p.empty] == [
            default[0] for _, *default in expected if default
        ]
    else:  # boolean_dispatch hides max_pool's
        assert set(parameters) <= {"args", "kwargs"}
        expected = inspect.signature(getattr(F, f"_{ours.__name__}")).parameters
        assert [(p.name, p.default) for p in inspect.signature(ours).parameters.values()] == [
            (p.name, p.default) for p in expected.values()
        ]


@pytest.mark.parametrize(
    "name", [*(f"{kind}{axes}d" for kind in ("Conv", "MaxPool", "AvgPool") for axes in (1, 2, 3)), "Linear"]
)
def test_class_signatures(name):
    ours, theirs = getattr(fastconv, name), getattr(nn, name)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert issubclass(ours, theirs)


@each_layer
def test_same_start(name, arguments, size):
    theirs, ours = pair(name, arguments)
    assert repr(ours) == repr(theirs)
    mine, yours = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(yours)
    assert all(torch.equal(mine[key], yours[key]) for key in mine)
    torch.manual_seed(3)
    other = getattr(nn, name)(**arguments)
    ours.load_state_dict(other.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert all(torch.equal(theirs.state_dict()[key], value) for key, value in other.state_dict().items())


@each_layer
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own advice
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_same_work(name, arguments, size, dtype, device):
    theirs, ours = pair(name, arguments, **({} if "Pool" in name else dict(device=device, dtype=dtype)))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    if name == "AvgPool3d" and dtype.itemsize == 2 and device == "cpu":
        pytest.skip("torch has no AvgPool3d of float16 and bfloat16 on a CPU")
    check_equal_work(theirs, ours, torch.randn(size, device=device, dtype=dtype), tolerance)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_conversion_of_dtype(mode):
    """half(), double() and bfloat16() of a layer made in float32."""
    for change in ("half", "bfloat16", "double"):
        theirs, ours = pair(
            "Conv2d", dict(in_channels=3, out_channels=4, kernel_size=3, padding=1, padding_mode=mode)
        )
        theirs, ours = getattr(theirs, change)(), getattr(ours, change)()
        x = torch.randn(2, 3, 6, 6, dtype=ours.weight.dtype)
        assert ours(x).dtype is theirs(x).dtype
        torch.testing.assert_close(ours(x), theirs(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("weight_channels_last", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["Conv2d", "MaxPool2d", "AvgPool2d", "Conv3d", "MaxPool3d"])
def test_strides(name, channels_last, weight_channels_last):
    """channels_last in, channels_last out, forward and backward, where torch does so.

    The gradient comes back in the layout of the output.
    """
    arguments = (
        dict(in_channels=3, out_channels=5, kernel_size=3) if name.startswith("Conv") else dict(kernel_size=2)
    )
    deep = name.endswith("3d")
    last = torch.channels_last_3d if deep else torch.channels_last
    strides = []
    for layer in pair(name, arguments):
        if weight_channels_last:
            layer = layer.to(memory_format=last)
        x = torch.randn((2, 3, 6, 8, 7) if deep else (2, 3, 8, 7))
        x = x.contiguous(memory_format=last if channels_last else torch.contiguous_format).requires_grad_()
        y = layer(x)
        grads = torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))
        strides.append([t.stride() for t in (y, *grads)])
    assert strides[0] == strides[1]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_no_hidden_copies(layout):
    """Whole passes of dense tensors run on the tensors as they are."""
    model = nn.Sequential(
        fastconv.Conv2d(3, 8, 3, padding=1, groups=1),
        fastconv.MaxPool2d(2),
        fastconv.ConvReLUPool2d(8, 6, 3),
        fastconv.AvgPool2d(2),
    ).to(memory_format=layout)
    head = fastconv.LinearReLU(5, 4)
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=layout).requires_grad_()
    rows = torch.randn(3, 7, 5, requires_grad=True)
    with profile() as recorded:
        y, z = model(x), head(rows)
        torch.autograd.grad(y, [x, *model.parameters()], torch.ones_like(y))
        torch.autograd.grad(z.sum(), [rows, *head.parameters()])
    names = {event.name for event in recorded.events()}
    assert {"fastconv::conv_fprop", "fastconv::conv_wgrad", "fastconv::linear_act_backward"} <= names
    assert not names & {
        "aten::copy_",
        "aten::clone",
        "aten::contiguous",
        "aten::_to_copy",
        "aten::convolution",
    }


def test_only_what_is_wanted_is_computed():
    """A first layer needs no gradient of its input, a frozen layer none of its weight."""
    layer = fastconv.Conv2d(3, 4, 3)

    def passes(x, y):
        with profile() as recorded:
            y.sum().backward()
        return {event.name for event in recorded.events() if event.name.startswith("fastconv::")}

    x = torch.randn(2, 3, 6, 6)
    assert passes(x, layer(x)) == {"fastconv::conv_wgrad"}
    layer.zero_grad()
    layer.requires_grad_(False)
    x.requires_grad_()
    assert passes(x, layer(x)) == {"fastconv::conv_dgrad"}
    assert layer.weight.grad is None and x.grad is not None


def test_frozen_bias_and_weight():
    for frozen, live in (("weight", "bias"), ("bias", "weight")):
        for name, arguments, size in (LAYERS[0], LAYERS[-3]):
            theirs, ours = pair(name, arguments)
            for layer in (theirs, ours):
                getattr(layer, frozen).requires_grad_(False)
                torch.manual_seed(0)
                layer(torch.randn(size)).square().sum().backward()
                assert getattr(layer, frozen).grad is None
            torch.testing.assert_close(
                getattr(ours, live).grad, getattr(theirs, live).grad, rtol=1e-5, atol=1e-4
            )


@each_layer
def test_copies(name, arguments, size):
    _, ours = pair(name, arguments)
    x = torch.randn(size)
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), loaded):
        assert type(other) is type(ours)
        assert torch.equal(first(other(x)), first(ours(x)))


def network(layers):
    torch.manual_seed(0)
    return nn.Sequential(
        layers.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        layers.MaxPool2d(2),
        nn.Sequential(layers.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Flatten(),
        layers.Linear(4 * 2 * 2, 5),
    )


def test_in_containers():
    theirs, ours = network(nn), network(fastconv)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 8, 8)
    check_equal_work(theirs, ours, x, 1e-5)
    assert torch.equal(nn.DataParallel(ours)(x), ours(x))


@pytest.mark.gpu
def test_data_parallel_on_a_gpu():
    ours = network(fastconv).cuda()
    x = torch.randn(4, 3, 8, 8, device="cuda")
    torch.testing.assert_close(nn.DataParallel(ours)(x), ours(x))


def test_fused_layers():
    """ConvReLUPool2d and LinearReLU are their parts in a row, with the same parameters from a seed."""
    for pool in (
        dict(pool_kernel_size=2),
        dict(pool_kernel_size=3, pool_stride=2, pool_padding=1),
        dict(pool_kernel_size=1, pool_stride=2),
        dict(pool_kernel_size=None),
    ):
        for mode in ("zeros", "circular"):
            torch.manual_seed(0)
            fused = fastconv.ConvReLUPool2d(3, 6, 3, padding=1, padding_mode=mode, **pool)
            torch.manual_seed(0)
            parts = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, padding_mode=mode), nn.ReLU())
            if pool["pool_kernel_size"]:
                parts.append(nn.MaxPool2d(*pool.values()))
            assert list(fused.state_dict()) == ["weight", "bias"]
            assert torch.equal(fused.weight, parts[0].weight)
            for size in ((2, 3, 9, 8), (3, 9, 8)):
                x = torch.randn(size)
                check_equal_work(parts, fused, x, 1e-5)
                with torch.no_grad():
                    torch.testing.assert_close(fused(x), parts(x))
    assert repr(fastconv.ConvReLUPool2d(1, 2, 3, pool_stride=1, pool_padding=1)) == (
        "ConvReLUPool2d(1, 2, kernel_size=(3, 3), stride=(1, 1), "
        "pool_kernel_size=2, pool_stride=1, pool_padding=1)"
    )
    torch.manual_seed(0)
    fused = fastconv.LinearReLU(7, 5)
    torch.manual_seed(0)
    check_equal_work(nn.Sequential(nn.Linear(7, 5), nn.ReLU()), fused, torch.randn(2, 3, 7), 1e-6)


@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "Conv3d", "Linear"])
def test_lazy(name):
    """They become the layers without the name, of the size of their first input."""
    axes = int(name[-2]) if name != "Linear" else 0
    arguments, x = ((4, 3), torch.randn(2, 5, *(7,) * axes)) if axes else ((4,), torch.randn(2, 5))
    lazy = getattr(fastconv, f"Lazy{name}")(*arguments)
    torch.manual_seed(0)
    output = lazy(x)
    assert type(lazy) is getattr(fastconv, name)
    torch.manual_seed(0)
    expected = getattr(nn, f"Lazy{name}")(*arguments)
    torch.testing.assert_close(output, expected(x))
    assert lazy.state_dict().keys() == expected.state_dict().keys()


@pytest.mark.parametrize("fused", [False, True])
def test_meta_device(fused):
    """Sizes without numbers."""
    with torch.device("meta"):
        network = fastconv.models.LeNet(fused=fused)
        assert network(torch.empty(3, 1, 32, 32)).shape == (3, 10)


# --- a chain ------------------------------------------------------------------------------------------------


def chained(layers):
    """LeNet-like layers of every kind that a chain takes."""
    return [
        layers.Conv2d(2, 6, 3, padding="same", dilation=2),
        nn.ReLU(),
        layers.MaxPool2d(3, 2, 1),
        layers.Conv2d(6, 4, 3, stride=(1, 2), padding=(0, 1), groups=2, bias=False),
        nn.Flatten(),
        layers.Linear(4 * 3 * 3, 7),
        nn.ReLU(),
        layers.Linear(7, 5, bias=False),
    ]


@pytest.mark.parametrize("layers", [nn, fastconv], ids=["nn", "fastconv"])
def test_chain(layers):
    torch.manual_seed(0)
    plain = nn.Sequential(*chained(nn))
    chain = fastconv.Chain(*chained(layers))
    assert chain.state_dict().keys() == plain.state_dict().keys()
    chain.load_state_dict(plain.state_dict())
    check_equal_work(plain, chain, torch.randn(19, 2, 10, 9), 1e-5)


def test_chain_is_one_operator():
    chain = fastconv.Chain(*chained(fastconv))
    output = chain(torch.randn(2, 2, 10, 9))
    assert output.grad_fn.name() == "ChainBackward"
    fused = fastconv.models.LeNet(fused=True)
    assert fused(torch.randn(2, 1, 32, 32)).grad_fn.name() == "ChainBackward"


def test_chain_prepares_each_kind_of_call():
    """What is kept of a call serves only those that agree in sizes, strides, dtype and forced kernels."""
    torch.manual_seed(0)
    plain = nn.Sequential(*chained(nn)[:4])
    chain = fastconv.Chain(*copy.deepcopy(plain))
    images = [torch.randn(n, 2, h, w) for n in (1, 17) for h, w in ((10, 9), (9, 10))]
    images += [x.contiguous(memory_format=torch.channels_last) for x in images]
    images += [torch.randn(1, 2, 10, 18)[..., i::2] for i in (0, 1)]
    calls = [(x, name) for x in images for name in ("cpu/chain_composed", "cpu/chain_lanes_portable")]
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64, torch.float32):
            for x, name in calls + calls[::-1]:
                with fastconv.kernels.force(name):
                    output = chain.to(dtype)(x.to(dtype))
                expected = plain.to(dtype)(x.to(dtype))
                torch.testing.assert_close(output, expected)
                assert output.stride() == expected.stride()


def test_chain_leading_dimensions():
    plain = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    chain = fastconv.Chain(*copy.deepcopy(plain))
    check_equal_work(plain, chain, torch.randn(2, 3, 7), 1e-6)
    assert chain(torch.randn(7)).shape == (3,) and chain(torch.randn(0, 7)).shape == (0, 3)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "at least one layer"),
        ([nn.MaxPool2d(2)], "does not fit: MaxPool2d"),
        ([nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)], "does not fit: BatchNorm2d"),
        ([nn.Conv2d(1, 2, 3), nn.Linear(2, 3)], "needs a Flatten between a convolution and Linear"),
        ([nn.Flatten(), nn.Linear(2, 3)], "can flatten only in front of"),
        ([nn.Conv2d(1, 2, 3), nn.Flatten(2), nn.Linear(2, 3)], "all dimensions but the first: Flatten"),
        ([nn.Linear(2, 3), nn.Conv2d(1, 2, 3)], "does not fit: Conv2d"),
        ([nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")], "padding_mode='reflect'"),
        ([nn.Conv2d(1, 2, 3), nn.MaxPool2d(2, ceil_mode=True)], "without dilation, ceil_mode"),
        ([type("Mine", (nn.Linear,), {"forward": lambda self, x: x})(2, 3)], "does not fit: Mine"),
    ],
)
def test_chain_says_what_does_not_fit(layers, message):
    with pytest.raises(ValueError, match=message):
        fastconv.Chain(*layers)


def test_chain_follows_its_members():
    """Hooks are called, other layers are seen, and copies are on their own."""
    chain = fastconv.Chain(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x, calls = torch.randn(2, 3), []
    expected = chain(x)
    hook = chain[0].register_forward_hook(lambda *_: calls.append("forward"))
    torch.testing.assert_close(chain(x), expected)
    assert calls == ["forward"]
    hook.remove()
    hook = chain[2].register_full_backward_hook(lambda *_: calls.append("backward"))
    chain(x).sum().backward()
    assert calls == ["forward", "backward"]
    hook.remove()
    twin = copy.deepcopy(chain)
    with torch.no_grad():
        twin[0].weight.zero_()
        chain[2] = nn.Linear(4, 5)
    torch.testing.assert_close(chain(x), nn.Sequential(*chain)(x))
    torch.testing.assert_close(twin(x), nn.Sequential(*twin)(x))
    assert chain(x).shape == (2, 5)
    nn.utils.parametrizations.weight_norm(chain[0])
    torch.testing.assert_close(chain(x), nn.Sequential(*chain)(x))
    chain.double()
    torch.testing.assert_close(chain(x.double()), nn.Sequential(*chain)(x.double()))


def test_a_fused_step_takes_half_the_memory():
    images, labels = torch.randn(1024, 1, 32, 32), torch.arange(1024) % 10
    peaks = {}
    for layers in (nn, fastconv):
        model = fastconv.models.LeNet(layers, fused=layers is fastconv)
        held = allocated(lambda model=model: F.cross_entropy(model(images), labels).backward())
        peaks[layers] = max(held)
    assert peaks[fastconv] <= peaks[nn] / 2


# --- convert and restore ------------------------------------------------------------------------------------


class Special(nn.Linear):
    """A user's own layer."""


def classes(model):
    return [type(module) for module in model.modules()]


def test_fused_lenet():
    """The same parameters under the same names, the same numbers to rounding, through fewer operators."""
    plain, fused = (fastconv.models.LeNet(fastconv, padding=2, fused=each) for each in (False, True))
    fused.load_state_dict(plain.state_dict())
    images, labels = torch.randn(19, 1, 28, 28), torch.arange(19) % 10
    outputs, gradients = [], []
    for model in (plain, fused):
        outputs.append(model(images))
        F.cross_entropy(outputs[-1], labels).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)
    assert [type(m).__name__ for m in fused.children()] == [
        "ConvReLUPool2d",
        "ConvReLUPool2d",
        "LinearReLU",
        "LinearReLU",
        "Linear",
    ]


def test_convert_and_restore():
    model = network(nn)
    before, parameters = classes(model), dict(model.named_parameters())
    model.eval()
    assert fastconv.convert(model) is model
    assert classes(model) == classes(network(fastconv)) != before
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not any(module.training for module in model.modules())
    assert fastconv.convert(model) is model  # once more changes nothing
    assert fastconv.restore(model) is model
    assert classes(model) == before


def test_convert_swaps_shared_layers_once_and_the_root_itself():
    shared = nn.Conv2d(3, 3, 3, padding=1)
    model = fastconv.convert(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2] is shared and type(shared) is fastconv.Conv2d
    assert type(fastconv.convert(nn.Linear(2, 3))) is fastconv.Linear
    for name, arguments, _ in LAYERS:
        layer = getattr(nn, name)(**arguments)
        assert type(fastconv.convert(layer)) is getattr(fastconv, name)
        assert type(fastconv.restore(layer)) is getattr(nn, name)


def test_convert_keeps_hooks_and_leaves_subclasses():
    calls = []
    model = nn.Sequential(nn.Linear(3, 3), Special(3, 3))
    model[0].register_forward_hook(lambda module, *_: calls.append(type(module)))
    fastconv.convert(model)(torch.randn(2, 3))
    assert calls == [fastconv.Linear] and type(model[1]) is Special
    fused = fastconv.ConvReLUPool2d(1, 2, 3)
    assert type(fastconv.restore(fused)) is fastconv.ConvReLUPool2d


def test_parametrized_layers_still_work():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    x = torch.randn(2, 3)
    expected = layer(x)
    torch.testing.assert_close(fastconv.convert(layer)(x), expected)
