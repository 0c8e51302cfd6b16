# SPDX-License-Identifier: MIT
"""What works with torch.nn's layers works with fastconv's: modes, hooks, states, parametrizations."""

import contextlib
import copy
import os
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import parametrizations, parametrize, prune
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastconv

OURS, THEIRS = fastconv, nn


def fused_conv(layers):
    if layers is OURS:
        return layers.ConvReLUPool2d(3, 4, 3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))


def chain(layers):
    members = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)
    return layers.Chain(*members) if layers is OURS else nn.Sequential(*members)


IMAGES = (2, 3, 8, 8)
LAYERS = {
    "Conv1d": (lambda layers: layers.Conv1d(3, 4, 3), (2, 3, 9)),
    "Conv2d": (lambda layers: layers.Conv2d(3, 4, 3), IMAGES),
    "Conv3d": (lambda layers: layers.Conv3d(3, 4, 3), (2, 3, 4, 5, 6)),
    "MaxPool2d": (lambda layers: layers.MaxPool2d(2), IMAGES),
    "AvgPool2d": (lambda layers: layers.AvgPool2d(2), IMAGES),
    "Linear": (lambda layers: layers.Linear(8, 5), IMAGES),
    "LinearReLU": (
        lambda layers: OURS.LinearReLU(8, 5) if layers is OURS else nn.Sequential(nn.Linear(8, 5), nn.ReLU()),
        IMAGES,
    ),
    "ConvReLUPool2d": (fused_conv, IMAGES),
    "Chain": (chain, IMAGES),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
with_weights = pytest.mark.parametrize(
    "name", [name for name in LAYERS if "Pool2d" not in name or "Conv" in name]
)


def pair(name):
    """torch.nn's layer, fastconv's with the same parameters, and an input, in float64."""
    make, size = LAYERS[name]
    torch.manual_seed(0)
    theirs = make(THEIRS)
    torch.manual_seed(0)
    return theirs.double(), make(OURS).double(), torch.randn(size, dtype=torch.float64)


def gradients(layer, x):
    """Output, gradient of the input, and those of the parameters."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    output = layer(x)
    output.square().sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


def check_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


# --- subclasses and modes -----------------------------------------------------------------------------------


class Tagged(torch.Tensor):
    pass


@each_layer
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_tensor_subclass(name, needs_gradient):
    """Goes through, and may be written into behind a layer, but for a ReLU, which keeps its output."""
    theirs, ours, x = pair(name)
    x = x.as_subclass(Tagged).requires_grad_(needs_gradient)
    outputs = [nn.functional.relu(layer(x), inplace="ReLU" not in name) for layer in (ours, theirs)]
    assert type(outputs[0]) is type(outputs[1]) is Tagged
    check_same(*outputs)
    if needs_gradient:
        check_same(*(torch.autograd.grad(each.square().sum(), x)[0] for each in outputs))


class Recorder(TorchDispatchMode):
    def __init__(self):
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


@each_layer
def test_operators_are_seen_by_name(name):
    """By a dispatch mode and by the profiler, forward and backward."""
    expected = {
        "MaxPool2d": {"max_pool", "max_pool_backward"},
        "AvgPool2d": {"avg_pool", "avg_pool_backward"},
        "Linear": {"linear_act", "linear_dgrad", "linear_wgrad"},
        "LinearReLU": {"linear_act", "linear_act_backward"},
        "ConvReLUPool2d": {"conv_act_pool", "conv_act_pool_backward"},
        "Chain": {"chain", "chain_backward"},
    }.get(name, {"conv_fprop", "conv_dgrad", "conv_wgrad"})
    _, layer, x = pair(name)
    with Recorder() as recorded:
        gradients(layer, x)
    assert {each for each in recorded.names if "fastconv" in each} == {
        f"fastconv::{each}" for each in expected
    }
    assert not {each for each in recorded.names if "conv" in each and "fastconv" not in each}
    with profile() as profiled:
        gradients(layer, x)
    assert {f"fastconv::{each}" for each in expected} <= {event.name for event in profiled.events()}


@pytest.mark.parametrize("name", ["MaxPool2d", "ConvReLUPool2d", "Chain"])
def test_no_gradient_for_what_has_none(name):
    """Backward makes no zeros for the offsets' gradient, and takes an output without a gradient."""
    _, layer, x = pair(name)
    output, grad = layer(x.requires_grad_()), torch.ones(())
    with Recorder() as recorded:
        output.backward(grad.double().expand_as(output))
    assert not {each for each in recorded.names if "zeros" in each}
    x.grad = None
    Forgets.apply(layer(x)).sum().backward()
    assert x.grad is None


class Forgets(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad_output):
        return None


@each_layer
def test_deterministic_algorithms(name):
    """Nothing to complain of, and the same bits."""
    _, layer, x = pair(name)
    plain = gradients(layer, x)
    torch.use_deterministic_algorithms(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = gradients(layer, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@each_layer
def test_default_dtype(name):
    torch.set_default_dtype(torch.float64)
    try:
        theirs, ours = (LAYERS[name][0](layers) for layers in (THEIRS, OURS))
        assert all(p.dtype is torch.float64 for p in ours.parameters())
        ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
        x = torch.randn(LAYERS[name][1])
        check_same(gradients(ours, x), gradients(theirs, x))
    finally:
        torch.set_default_dtype(torch.float32)


def cpu_amp(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older form is deprecated
        return torch.cpu.amp.autocast(dtype=dtype)


@each_layer
@pytest.mark.parametrize("autocast", [lambda dtype: torch.autocast("cpu", dtype), cpu_amp])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, autocast, dtype):
    """Convolution and linear work in the type that is set, a pool in its input's; around a block and as a
    decorator. Gradients have the type of what they belong to."""
    theirs, ours, x = (each.float() for each in pair(name))
    outputs = []
    for layer in (theirs, ours):
        leaf = x.clone().requires_grad_()
        with autocast(dtype):
            output = layer(leaf)
            with torch.autocast("cpu", enabled=False):
                assert layer(leaf).dtype is torch.float32
        assert autocast(dtype)(layer)(leaf).dtype is output.dtype
        output.float().square().sum().backward()
        assert all(each.grad.dtype is torch.float32 for each in (leaf, *layer.parameters()))
        assert output.dtype is (torch.float32 if name in ("MaxPool2d", "AvgPool2d") else dtype)
        outputs.append(output)
    torch.testing.assert_close(*outputs, rtol=0.05, atol=0.05)


@with_weights
def test_gradient_scaler(name):
    """A power of two changes no bit; a step with an infinite gradient is left out."""
    _, ours, x = pair(name)
    results = []
    for enabled in (True, False):
        layer = copy.deepcopy(ours).float()
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        for scale in (1.0, 1e36, 1.0):
            if scale > 1 and not enabled:
                continue
            optimizer.zero_grad()
            scaler.scale((layer(x.float()) * scale).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(layer.state_dict())
    assert all(torch.equal(results[0][key], value) for key, value in results[1].items())
    assert any(not torch.equal(value.double(), ours.state_dict()[key]) for key, value in results[0].items())


@each_layer
def test_fake_tensors(name):
    """Sizes, types and strides without numbers, of the output and of every gradient."""
    make, size = LAYERS[name]
    found = []
    for mode in (FakeTensorMode(), contextlib.nullcontext()):
        with mode:
            layer, x = make(OURS), torch.randn(size, requires_grad=True)
            output = layer(x)
            output.sum().backward()
            tensors = [output, x.grad, *(p.grad for p in layer.parameters())]
            assert all(isinstance(each, FakeTensor) == isinstance(mode, FakeTensorMode) for each in tensors)
            found.append([(each.shape, each.dtype, each.stride()) for each in tensors])
    assert found[0] == found[1]


@each_layer
def test_device_context(name):
    """`with torch.device(...)` is a mode that every function passes through."""
    with torch.device("meta"):
        layer = LAYERS[name][0](OURS)
        assert layer(torch.randn(LAYERS[name][1])).device.type == "meta"
    theirs, ours, x = pair(name)
    with torch.device("cpu"):
        check_same(gradients(ours, x), gradients(theirs, x))


@each_layer
def test_inference_mode(name):
    theirs, ours, x = pair(name)
    with torch.inference_mode():
        output = ours(x)
        assert output.is_inference()
        check_same(output, theirs(x))
    if list(ours.parameters()):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            ours.train()(output if output.shape == x.shape else torch.inference_mode()(torch.clone)(x))


# --- processes ----------------------------------------------------------------------------------------------


class Features(torch.utils.data.Dataset):
    """Images behind a layer, which runs where an item is asked for."""

    def __init__(self, layer, images):
        self.layer, self.images = layer, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        with torch.no_grad():
            return self.layer(self.images[index : index + 1])[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@each_layer
def test_forked_workers_of_a_data_loader(name, threads):
    """After the process has computed on several threads, which a fork doesn't take along."""
    threads(2)
    _, layer, _ = pair(name)
    images = torch.randn(8, *LAYERS[name][1][1:], dtype=torch.float64)
    with torch.no_grad():
        expected = layer(images)
    loader = torch.utils.data.DataLoader(
        Features(layer, images), 4, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    check_same(torch.cat(list(loader)), expected)


def _step(layer, x):
    torch.set_num_threads(1)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer(x).square().sum().backward()
    optimizer.step()


@with_weights
def test_shared_memory(name):
    """Another process trains the same parameters."""
    theirs, ours, x = pair(name)
    ours.share_memory()
    worker = torch.multiprocessing.get_context("fork").Process(target=_step, args=(ours, x))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    _step(theirs, x)
    check_same(list(ours.parameters()), list(theirs.parameters()))


# --- hooks --------------------------------------------------------------------------------------------------


def hooked(layer, calls):
    """Hooks of every kind that change what passes."""

    def seen(kind, *values):
        shapes = [tuple(v.shape) for each in values for v in (each if isinstance(each, tuple) else [each])]
        calls.append((kind, shapes))

    def pre(module, args, kwargs):
        seen("forward pre", args)
        return (args[0] * 2,), kwargs

    def post(module, args, kwargs, output):
        seen("forward", args, output)
        return output + 1

    def backward_pre(module, grad_output):
        seen("backward pre", grad_output)
        return (grad_output[0] * 3,)

    def backward(module, grad_input, grad_output):
        seen("backward", grad_input, grad_output)
        return (grad_input[0] * 5,)

    layer.register_forward_pre_hook(pre, with_kwargs=True)
    layer.register_forward_hook(post, with_kwargs=True)
    layer.register_full_backward_pre_hook(backward_pre)
    layer.register_full_backward_hook(backward)
    for parameter in layer.parameters():
        parameter.register_hook(lambda grad: seen("parameter", grad))
        parameter.register_post_accumulate_grad_hook(lambda p: seen("accumulated", p))


@each_layer
def test_hooks(name):
    theirs, ours, x = pair(name)
    calls, expected = [], []
    hooked(ours, calls)
    hooked(theirs, expected)
    found = gradients(ours, x)
    check_same(found, gradients(theirs, x))
    assert sorted(calls) == sorted(expected) and calls[:2] == expected[:2]


@each_layer
def test_a_hook_that_is_always_called(name):
    _, layer, _ = pair(name)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append("called"), always_call=True)
    with pytest.raises(RuntimeError):
        layer(torch.zeros([1] * 7, dtype=torch.int64))
    assert calls == ["called"]


@each_layer
def test_global_hooks(name):
    """They see every layer, those of a chain too."""
    _, layer, x = pair(name)
    expected, called = layer(x), []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        check_same(layer(x), expected)
    finally:
        hook.remove()
    assert set(called) == set(layer.modules())


@with_weights
def test_frozen_layer(name):
    theirs, ours, x = pair(name)
    for layer in (theirs, ours):
        layer.requires_grad_(False)
    check_same(gradients(ours, x), gradients(theirs, x))


def saved_bytes(layer, x):
    sizes = {}

    def pack(tensor):
        sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(sizes.values())


@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "Conv3d", "Linear"])
def test_frozen_parts_save_less(name):
    """No more than torch's own layer, whatever is frozen."""
    theirs, ours, x = pair(name)
    for bits in range(8):
        x.requires_grad_(bool(bits & 1))
        for layer in (theirs, ours):
            layer.weight.requires_grad_(bool(bits & 2))
            layer.bias.requires_grad_(bool(bits & 4))
        assert saved_bytes(ours, x) <= saved_bytes(theirs, x)
        if bits:
            leaves = [[t for t in (x, *layer.parameters()) if t.requires_grad] for layer in (ours, theirs)]
            outputs = [layer(x).square().sum() for layer in (ours, theirs)]
            check_same(*(torch.autograd.grad(y, wanted) for y, wanted in zip(outputs, leaves, strict=True)))


@each_layer
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(name, use_reentrant):
    _, layer, x = pair(name)
    found = gradients(checkpointed(layer, use_reentrant), x)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(layer, x), strict=True))


def checkpointed(layer, use_reentrant):
    outer = nn.Sequential(layer)
    outer.forward = lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)
    return outer


# --- states and parameters ----------------------------------------------------------------------------------


def members(layer):
    return [m for m in layer.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))]


@with_weights
def test_load_state_dict_by_assignment(name):
    """Also into a layer on the meta device, and where the fused layers have run before."""
    theirs, ours, x = pair(name)
    ours(x)
    other = copy.deepcopy(theirs)
    nn.init.normal_(next(other.parameters()))
    state = {key: value.float() for key, value in other.state_dict().items()}
    on_meta = LAYERS[name][0](OURS).to("meta")
    for layer in (ours, on_meta):
        renamed = dict(zip(layer.state_dict(), state.values(), strict=True))
        layer.load_state_dict(renamed, assign=True)
        assert all(
            p.data_ptr() == v.data_ptr() for p, v in zip(layer.parameters(), state.values(), strict=True)
        )
        torch.testing.assert_close(layer(x.float()), other(x).float())


@with_weights
def test_state_dict_hooks_and_prefixes(name):
    _, ours, x = pair(name)
    model = nn.ModuleDict({"inner": ours})
    assert all(key.startswith("a.inner.") for key in model.state_dict(prefix="a."))
    ours.register_state_dict_post_hook(lambda module, state, prefix, _: state.update({f"{prefix}extra": 1}))
    ours.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: state.pop(f"{prefix}extra"))
    state = model.state_dict()
    assert state["inner.extra"] == 1
    expected = ours(x)
    for parameter in ours.parameters():
        nn.init.zeros_(parameter)
    assert not torch.equal(ours(x), expected)
    model.load_state_dict(state)  # of the same storage
    model.load_state_dict(
        {**state, **{k: torch.ones_like(v) for k, v in state.items() if k != "inner.extra"}}
    )
    assert all(p.eq(1).all() for p in ours.parameters())


def _old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


CHANGES = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Halved()),
    "old weight_norm": _old_weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "prune bias": lambda layer: prune.random_unstructured(layer, "bias", 0.5),
    "prune channels": lambda layer: prune.ln_structured(layer, "weight", 0.5, n=2, dim=0),
}


@with_weights
@pytest.mark.parametrize("change", CHANGES)
def test_parametrizations(name, change):
    theirs, ours, x = pair(name)
    for layer in (theirs, ours):
        torch.manual_seed(1)
        for member in members(layer):
            CHANGES[change](member)
    for layer in (theirs, ours):
        layer.eval()  # where spectral_norm leaves its vectors as they are
    check_same(gradients(ours, x), gradients(theirs, x))
    for layer in (theirs, ours):
        for member in members(layer):
            if change.startswith("prune"):
                prune.remove(member, "bias" if "bias" in change else "weight")
            elif parametrize.is_parametrized(member):
                parametrize.remove_parametrizations(member, "weight")
    check_same(gradients(ours, x), gradients(theirs, x))


@with_weights
def test_start_and_utilities(name):
    """nn.init, skip_init, parameters_to_vector, functional_call, gradient clipping."""
    theirs, ours, x = pair(name)
    for layer in (theirs, ours):
        torch.manual_seed(2)
        for member in members(layer):
            nn.init.orthogonal_(member.weight)
            nn.init.constant_(member.bias, 0.5)
    vectors = [nn.utils.parameters_to_vector(layer.parameters()) for layer in (ours, theirs)]
    assert torch.equal(*vectors)
    nn.utils.vector_to_parameters(vectors[0] / 2, ours.parameters())
    halved = {key: value.detach() / 2 for key, value in theirs.named_parameters()}
    expected = torch.func.functional_call(theirs, halved, (x,))
    check_same(ours(x), expected)
    if not isinstance(ours, nn.Sequential):
        arguments = (8, 5) if isinstance(ours, nn.Linear) else (3, 4, 3)
        skipped = nn.utils.skip_init(type(ours), *arguments, dtype=torch.float64)
        skipped.load_state_dict(ours.state_dict())
        check_same(skipped(x), expected)
    gradients(ours, x), gradients(theirs, x)
    nn.utils.vector_to_parameters(vectors[0] / 2, theirs.parameters())
    gradients(theirs, x)
    norms = [nn.utils.clip_grad_norm_(layer.parameters(), 0.1) for layer in (ours, theirs)]
    check_same(*norms)
    check_same(*([p.grad for p in layer.parameters()] for layer in (ours, theirs)))


def test_batch_norm_is_fused_by_torchs_own_tool():
    conv, norm = fastconv.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 8, 8)
    fused = nn.utils.fusion.fuse_conv_bn_eval(conv.eval(), norm.eval())
    assert type(fused) is fastconv.Conv2d
    torch.testing.assert_close(fused(x), norm(conv(x)), rtol=1e-4, atol=1e-5)
