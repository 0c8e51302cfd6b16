# SPDX-License-Identifier: MIT
"""torch.compile, torch.export and torch.jit.trace of models, and torch.compile(backend="fastconv")."""

import copy
import os
import pathlib
import statistics
import subprocess
import sys

import networks
import pytest
import torch
import torch.nn.functional as F
from networks import check_rule, make, step
from torch import nn

import fastconv
from fastconv._optimize import backend

each_network = pytest.mark.parametrize("name", networks.NETWORKS)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
LIKE_EAGER = {"fallback_random": True}  # inductor draws dropout's masks as eager torch does


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Eager:
    """The backend but for inductor, which takes long: the rest runs as it is. Keeps the calls' names."""

    count = 0  # of graphs

    def __call__(self, graph, inputs):
        backend.rewrite(graph)
        self.count += 1
        self.calls = [getattr(n.target, "__name__", n.target) for n in graph.graph.nodes if "call" in n.op]
        with backend._compiling():
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def compiled(model, *inputs, **more):
    """The compiled model after a first call, and the backend that knows its graph."""
    torch._dynamo.reset()
    eager = Eager()
    state = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else None
    ours = torch.compile(model, fullgraph=True, backend=eager, **more)
    ours(*inputs)
    if state:
        model.load_state_dict(state)
    return ours, eager


def named(found):
    return {key.replace("_orig_mod.", ""): value for key, value in found.items()}


# --- optimized models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lenet", "fashion_cnn", "resnet18"])
@each_mode
def test_optimized_model(name, training):
    """Compiles as one graph, and its steps stay whole."""
    model, images = make(name)
    fast = fastconv.optimize(model).train(training)
    expected = copy.deepcopy(fast)
    ours = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(named(step(ours, images)), step(expected, images))


@pytest.mark.parametrize("name", ["lenet", "fashion_cnn"])
def test_optimized_model_by_inductor(name):
    model, images = make(name)
    fast = fastconv.optimize(model)
    expected = copy.deepcopy(fast)
    ours = torch.compile(fast, fullgraph=True, options=LIKE_EAGER)
    torch.testing.assert_close(named(step(ours, images)), step(expected, images), rtol=1e-3, atol=1e-4)


def older_flags():
    """Export asks for torch's older flag, which stands for both; the fixture of all tests sets but one."""
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision


@pytest.mark.parametrize("name", ["lenet", "fashion_cnn", "functional"])
def test_export(name, tmp_path):
    """An exported program, for batches of any size, runs in a new process that imports fastconv."""
    older_flags()
    model, images = make(name)
    fast = fastconv.optimize(model).eval()
    sizes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    with torch.no_grad():
        program = torch.export.export(fast, (images,), dynamic_shapes=sizes)
        images = images[:5]
        expected = fast(images)
    assert program.state_dict.keys() == model.state_dict().keys()
    if name != "functional":
        assert sum("fastconv" in str(node.target) for node in program.graph.nodes) == 1  # the chain
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((images, expected), tmp_path / "tensors.pt")
    code = """if True:
    import torch, fastconv
    images, expected = torch.load("tensors.pt")
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load("program.pt2").module()(images), expected)
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    step_of_program, step_of_model = step(program.module(), images), step(fast, images)
    torch.testing.assert_close(step_of_program, step_of_model, rtol=1e-4, atol=1e-5)


def test_export_with_gradients():
    """A program exported to train trains; its gradients are right, and theirs too."""
    older_flags()
    model = fastconv.models.LeNet().double()
    images = torch.randn(2, 1, 32, 32, dtype=torch.float64, requires_grad=True)

    def gradients(model):
        (first,) = torch.autograd.grad(model(images).tanh().sum(), images, create_graph=True)
        return first, *torch.autograd.grad(first.square().sum(), list(model.parameters()), allow_unused=True)

    module = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(gradients(module), gradients(model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_aot_inductor(tmp_path):
    """Compiled ahead of time, a model runs in a new process that imports fastconv."""
    older_flags()
    model, images = fastconv.models.LeNet(), torch.randn(4, 1, 32, 32)
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "lenet.pt2"))
        torch.save((images, model(images)), tmp_path / "tensors.pt")
    code = """if True:
    import torch, fastconv
    images, expected = torch.load("tensors.pt")
    torch.testing.assert_close(torch._inductor.aoti_load_package("lenet.pt2")(images), expected)
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


# --- torch.jit.trace ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", ["fashion_cnn", "functional"])
@pytest.mark.parametrize("change", ["convert", "optimize"])
def test_trace(name, change, gradients, tmp_path):
    """A traced model, traced with gradients or without, has gradients, after it was saved and loaded too."""
    model, images = make(name)
    model = getattr(fastconv, change)(model).eval()
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, images)
    assert "fastconv::" in str(traced.inlined_graph)
    traced.save(tmp_path / "traced.pt")
    expected = step(model, images[:5])
    for each in (traced, torch.jit.load(tmp_path / "traced.pt")):
        for _ in range(3):  # TorchScript looks on, then compiles
            torch.testing.assert_close(step(each, images[:5]), expected, rtol=1e-4, atol=1e-5)


# --- torch.compile(backend="fastconv") ----------------------------------------------------------------------


@each_network
@each_mode
def test_backend(name, training):
    """By the error rule, as in test_optimize.py."""
    model, images = make(name)
    model.train(training)
    exact, theirs = copy.deepcopy(model).double(), copy.deepcopy(model)
    ours, eager = compiled(model, images)
    assert {"conv", "linear", "chain", "batch_norm_relu_max_pool"}.intersection(eager.calls)
    assert not {"conv2d", "max_pool2d"}.intersection(eager.calls)
    found = [[], [], []]
    for seed in range(10):
        images = torch.randn_like(images)
        for side, results in zip((ours, theirs, exact), found, strict=True):
            results.append(named(step(side, images.double() if side is exact else images, seed)))
    grads = [key for key in found[0][0] if key.startswith("grad ")]
    check_rule(*found, [key for key in found[0][0] if key not in grads])
    check_rule(*found, grads, pick=statistics.median)


@pytest.mark.parametrize("name", ["lenet", "fashion_cnn"])
@each_mode
def test_backend_is_found_by_name(name, training):
    model, images = make(name)
    expected = step(copy.deepcopy(model).train(training), images)
    model = torch.compile(model.train(training), fullgraph=True, backend="fastconv", options=LIKE_EAGER)
    torch.testing.assert_close(named(step(model, images)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", networks.CHAINS)
def test_straight_networks_are_one_call(name):
    model, images = make(name)
    assert [call for call in compiled(model.eval(), images)[1].calls if call != "flatten"] == ["chain"]


def test_training_commutes_pool_and_relu():
    model, images = make("fashion_cnn")
    calls = compiled(model, images)[1].calls
    assert calls.count("batch_norm_relu_max_pool") == 2 and calls[-1] == "chain"


@pytest.mark.parametrize("name", ["lenet", "fashion_cnn", "functional"])
@each_mode
def test_backend_with_dynamic_shapes(name, training):
    """One graph for every size of the batch, with the same steps."""
    model, images = make(name)
    expected = copy.deepcopy(model).train(training)
    fixed = compiled(copy.deepcopy(model).train(training), images)[1]
    model, eager = compiled(model.train(training), images, dynamic=True)
    assert eager.calls == fixed.calls
    before = eager.count
    for count in (2, 5):
        x = images[:count]
        torch.testing.assert_close(named(step(model, x)), step(expected, x), rtol=1e-3, atol=1e-4)
    assert eager.count == before


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_backend_in_every_dtype_and_layout(dtype, layout):
    model, images = make("fashion_cnn")
    model, images = (each.to(dtype=dtype, memory_format=layout) for each in (model.eval(), images))
    exact, theirs = copy.deepcopy(model).double(), copy.deepcopy(model)
    ours, eager = compiled(model, images)
    assert eager.calls == ["chain"]
    found = [step(each, images) for each in (ours, theirs)] + [step(exact, images.double())]
    found = [[named(each)] for each in found]
    if dtype is torch.float64:
        torch.testing.assert_close(found[0], found[2], rtol=1e-9, atol=1e-12)
    else:
        check_rule(*found, ["outputs"])


def test_backend_leaves_what_it_has_no_kernel_for():
    def forward(x, weight):
        return F.relu(F.linear(x, weight))

    x, weight = torch.arange(6).reshape(2, 3), torch.ones(4, 3, dtype=torch.int64)
    found, eager = compiled(forward, x, weight)
    assert eager.calls == ["linear", "relu"]
    assert torch.equal(found(x, weight), forward(x, weight))


@pytest.mark.parametrize("switch", ["no_grad", "autocast"])
def test_backend_keeps_within_gradients_and_autocast(switch):
    """Layers on both sides of where gradients or autocast are switched don't become one step."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(x):
        with torch.no_grad() if switch == "no_grad" else torch.autocast("cpu", torch.bfloat16):
            x = model[2](model[1](model[0](x)))
        return model[4](model[3](x.float()))

    x = torch.randn(3, 8)
    ours, eager = compiled(forward, x)
    assert eager.calls.count("chain") == 1
    expected, found = forward(x), ours(x)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert found.dtype is expected.dtype
    grads = [torch.autograd.grad(y.sum(), model.parameters(), allow_unused=True) for y in (found, expected)]
    torch.testing.assert_close(*[[g for g in each if g is not None] for each in grads], rtol=1e-2, atol=1e-2)
    assert [g is None for g in grads[0]] == [g is None for g in grads[1]]


def test_what_is_written_into_is_not_kept():
    """Backward must not need an output that the model writes into, where torch's does not."""

    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
            self.one, self.two = nn.Linear(36, 8), nn.Linear(8, 36)

        def forward(self, x):
            x = F.max_pool2d(F.relu(self.conv(x)), 2)
            y = self.two(self.one(x.flatten(1) * 1)).view_as(x)
            y += 1
            x.view(-1)[0].mul_(2)
            return y * x

    images = torch.randn(2, 1, 8, 8)
    model = Written()
    model(images).sum().backward()
    expected = [p.grad for p in model.parameters()]
    for make_ours in (lambda m: compiled(m, images)[0], fastconv.optimize):
        ours = make_ours(copy.deepcopy(model))
        ours.zero_grad()
        torch.testing.assert_close(ours(images), model(images))
        ours(images).sum().backward()
        torch.testing.assert_close([p.grad for p in ours.parameters()], expected)


def test_backend_without_an_installed_package(tmp_path):
    """A plain import makes it known in a tree that isn't installed, and costs nothing where it is."""
    code = """if True:
    import importlib.metadata, pathlib, sys
    find = importlib.metadata.distribution
    def distribution(name):
        if name != "fastconv":
            return find(name)
        if sys.argv[1] == "absent":
            raise importlib.metadata.PackageNotFoundError(name)
        return Found(pathlib.Path())
    class Found(importlib.metadata.PathDistribution):
        entry = importlib.metadata.EntryPoint("fastconv", "x:y", "torch_dynamo_backends")
        entry_points = importlib.metadata.EntryPoints([entry])
    importlib.metadata.distribution = distribution
    import fastconv
    loaded = "torch._dynamo" in sys.modules
    assert loaded == (sys.argv[1] == "absent")
    if loaded:
        from torch._dynamo.backends import registry
        assert registry.lookup_backend("fastconv") is fastconv._optimize.backend.backend
    """
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(fastconv.__file__).parents[1])}
    for case in ("absent", "there"):
        subprocess.run([sys.executable, "-c", code, case], check=True, env=environment, cwd=tmp_path)
