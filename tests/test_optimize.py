# SPDX-License-Identifier: MIT
"""fastconv.optimize: whole models give the same numbers, train alike and behave as torch.nn's do."""

import copy
import pickle

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastconv
from fastconv import models
from fastconv._accuracy import allowance

SIZE = (3, 32, 32)
NETWORKS = {
    **{
        name: (lambda name=name, size=size: models.build(name, nn, size), size)
        for name, size in {
            "lenet": (1, 28, 28),
            "fashion_cnn": (1, 28, 28),
            "fashion_dnn": (1, 28, 28),
            "mlp": (1, 28, 28),
            "cifarnet": SIZE,
        }.items()
    },
    "vgg11": (networks.vgg11, SIZE),
    "vgg16": (networks.vgg16, SIZE),
    "vgg11_bn": (lambda: networks.vgg11(batch_norm=True), SIZE),
    "resnet18": (networks.ResNet18, SIZE),
    "mobilenet_v2": (networks.MobileNetV2, SIZE),
    "functional": (networks.Functional, (3, 8, 8)),
}
# Those that are one chain in eval mode.
CHAINS = ["lenet", "fashion_cnn", "mlp", "cifarnet"]
each_network = pytest.mark.parametrize("name", NETWORKS)


def make(name, **more):
    """The network, with a batch-norm that has seen something, and images."""
    torch.manual_seed(0)
    build, size = NETWORKS[name]
    model = build()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
    return model, torch.randn(6, *size)


def steps(model, mode=None):
    """Names of the calls in the model's graph."""
    program = model._plan.by_mode()[model.training if mode is None else mode]
    return [
        getattr(node.target, "__name__", node.target) for node in program.graph.nodes if "call" in node.op
    ]


def step(model, images, seed=0):
    """Outputs, losses, gradients and the buffers behind them, of one pass forward and backward."""
    torch.manual_seed(seed)  # the same dropout
    model.zero_grad()
    outputs = model(images)
    losses = F.cross_entropy(outputs, torch.arange(len(images)) % 5, reduction="none")
    losses.mean().backward()
    grads = {f"grad {name}": p.grad for name, p in model.named_parameters()}
    return {"outputs": outputs.detach(), "losses": losses.detach(), **grads, **dict(model.named_buffers())}


def check_rule(ours, theirs, exact, unit=1.0):
    """The error rule for each tensor, by its largest error over the passes; `unit` scales those of `theirs`.

    A small tensor may have a small error by chance, but not in each of ten passes.
    """
    for name in exact[0]:
        if not exact[0][name].is_floating_point():
            assert all(torch.equal(a[name], b[name]) for a, b in zip(ours, exact, strict=True)), name
            continue
        largest = max(each[name].abs().max().item() for each in exact)
        error, torch_error = (
            max((a[name].double() - b[name]).abs().max().item() for a, b in zip(found, exact, strict=True))
            for found in (ours, theirs)
        )
        allowed = allowance(unit * torch_error, largest, ours[0][name].dtype)
        assert error <= allowed, (name, error, allowed)


@each_network
def test_inference(name):
    """In float32 by the error rule, in eval mode, and again after the parameters have changed."""
    model, images = make(name)
    fast = fastconv.optimize(model).eval()
    model.eval()
    with torch.no_grad():
        for _ in range(2):
            exact = copy.deepcopy(model).double()(images.double())
            check_rule([{"y": fast(images)}], [{"y": model(images)}], [{"y": exact}])
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
            for buffer in model.buffers():
                buffer.mul_(2)


@each_network
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_training(name, training):
    """Ten steps of Adam, all sides from the same parameters at each.

    In float64, where no ReLU and no maximum falls differently. Outputs, losses and buffers keep the error
    rule, torch's error being that of float32, scaled; the reference has such an error too, so what differs
    from it by three times the error may be off by two. Gradients agree to 9 digits.
    """
    model, images = make(name)
    single, exact = copy.deepcopy(model).train(training), model.double().train(training)
    fast = fastconv.optimize(copy.deepcopy(exact))
    optimizer = torch.optim.Adam(exact.parameters(), 1e-3)
    found = [[], [], []]
    for seed in range(10):
        for model, results in zip((fast, single, exact), found, strict=True):
            model.load_state_dict(exact.state_dict())
            inputs = images.to(next(model.parameters()).dtype)
            results.append({key: value.clone() for key, value in step(model, inputs, seed).items()})
        optimizer.step()
    scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    forward = [[{k: v for k, v in each.items() if "grad " not in k} for each in side] for side in found]
    check_rule(*forward, unit=1.5 * scale)
    torch.testing.assert_close(found[0], found[2], rtol=1e-9, atol=1e-12)


@each_network
def test_ten_steps_on_its_own(name):
    """Ten steps of Adam in float64 end with the parameters and buffers that torch's end with."""
    model, images = make(name)
    sides = [model.double(), fastconv.optimize(copy.deepcopy(model))]
    for each in sides:
        optimizer = torch.optim.Adam(each.parameters(), 1e-3)
        for seed in range(10):
            step(each, images.double(), seed)
            optimizer.step()
    torch.testing.assert_close(*[each.state_dict() for each in sides], rtol=1e-8, atol=1e-10)


@each_network
def test_float32_step(name):
    model, images = make(name)
    ours, theirs = step(fastconv.optimize(copy.deepcopy(model)), images), step(model, images)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@each_network
def test_same_modules_and_state(name):
    model, images = make(name)
    fast = fastconv.optimize(model)
    assert isinstance(fast, type(model)) and fast is not model
    assert list(fast.state_dict()) == list(model.state_dict())
    parameters = dict(model.named_parameters())
    assert all(parameter is parameters[name] for name, parameter in fast.named_parameters())
    assert model.training and fast.training
    other, _ = make(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    fast.load_state_dict(other.state_dict())
    other.load_state_dict(fast.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fast.eval()(images), other.eval()(images))


@each_network
def test_copies(name):
    model, images = make(name)
    fast = fastconv.optimize(model).eval()
    with torch.no_grad():
        expected = fast(images)
        for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert type(twin) is type(fast) and steps(twin) == steps(fast)
            assert torch.equal(twin(images), expected)
            for parameter in twin.parameters():
                parameter.zero_()
            assert not torch.equal(twin(images), expected)
        assert torch.equal(fast(images), expected)


@pytest.mark.parametrize("name", CHAINS)
def test_straight_networks_are_one_call(name):
    model, images = make(name)
    fast = fastconv.optimize(model).eval()
    calls = steps(fast)
    assert calls == ["flatten", "chain"] if name == "mlp" else ["chain"]
    assert fast(images).grad_fn.name() == "ChainBackward"


def test_every_average_pool_is_taken():
    class Pools(nn.Module):
        def __init__(self, axes):
            super().__init__()
            self.pool = getattr(nn, f"AvgPool{axes}d")(2)
            self.function = getattr(F, f"avg_pool{axes}d")

        def forward(self, x):
            return self.function(self.pool(x), 3, 1, padding=1)

    for axes in (1, 2, 3):
        model, images = Pools(axes), torch.randn(2, 3, *[8] * axes)
        fast = fastconv.optimize(model)
        assert steps(fast) == [f"avg_pool{axes}d"] * 2
        torch.testing.assert_close(fast(images), model(images))
        assert fast(images.requires_grad_()).grad_fn.name() == f"AvgPool{axes}dBackward"


def test_hooks_and_parametrizations_stay(capsys):
    calls = []
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3)),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    )
    model[2].register_forward_hook(lambda *_: calls.append("hook"))
    fast = fastconv.optimize(model, verbose=True)
    assert steps(fast) == ["0", "1", "2", "3", "conv"]
    told = capsys.readouterr().out
    assert "is parametrized" in told and "has hooks" in told
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(fast(images), model(images))
    assert calls == ["hook"] * 2
    model[4].register_forward_hook(lambda *_: calls.append("later"))
    fast(images)
    assert calls[2:] == ["hook", "later"]


def test_a_replaced_layer_is_seen():
    fast = fastconv.optimize(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()))
    fast[1] = nn.Identity()
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(fast(images), F.conv2d(images, fast[0].weight, fast[0].bias))


def test_what_cannot_be_traced_is_optimized_part_by_part(capsys):
    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
            self.classifier = nn.Linear(4 * 3 * 3, 2)

        def forward(self, x):
            if x.sum() > 0:
                x = 2 * x
            return self.classifier(self.features(x).flatten(1))

    model, images = Flow(), torch.randn(2, 1, 8, 8)
    fast = fastconv.optimize(model, verbose=True)
    assert "can't be traced as a whole" in capsys.readouterr().out
    assert steps(fast.features) == ["conv"] and type(fast.classifier) is fastconv.Linear
    assert type(model.features) is nn.Sequential and type(model.classifier) is nn.Linear
    for x in (images, -images):
        torch.testing.assert_close(fast(x), model(x))


def test_nothing_to_gain(capsys):
    model = nn.Sequential(nn.LayerNorm(8), nn.GELU())
    assert fastconv.optimize(model, verbose=True) is model
    assert "nothing to gain" in capsys.readouterr().out
    with pytest.raises(TypeError, match="'model' must be an nn.Module, got int"):
        fastconv.optimize(3)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["lenet", "fashion_cnn"])
def test_compile(name, training):
    model, images = make(name)
    fast = fastconv.optimize(model).train(training)
    expected = copy.deepcopy(fast)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)  # the same dropout
    found = compiled(images)
    torch.manual_seed(0)
    wanted = expected(images)
    torch.testing.assert_close(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    for ours, theirs in zip(fast.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
