# SPDX-License-Identifier: MIT
"""fastconv.optimize: whole models give the same numbers, train alike and behave as torch.nn's do."""

import copy
import pathlib
import pickle
import statistics
import subprocess
import sys

import networks
import pytest
import torch
import torch.nn.functional as F
from networks import SCALE, allocated, check_rule, make, step
from torch import nn
from torch.nn.utils import prune

import fastconv
from fastconv._optimize.steps import BatchNormReLU

each_network = pytest.mark.parametrize("name", networks.NETWORKS)


def steps(model, mode=None):
    """Names of the calls in the model's graph."""
    program = model._plan.by_mode()[model.training if mode is None else mode]
    return [
        getattr(node.target, "__name__", node.target) for node in program.graph.nodes if "call" in node.op
    ]


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

    In float32 by the error rule: outputs, losses and buffers in the largest error of the steps. A value
    within rounding of zero may pass a ReLU on one side alone, and two within rounding of each other may both
    be a maximum; then a few gradients change by a thousandth, not by a millionth. So gradients keep the rule
    in the median of the steps. In float64 nothing falls differently, and gradients agree to 9 digits at each
    step. All else keeps the rule there too, torch's error being that of float32, scaled; for want of a finer
    one the reference has such an error as well, so what is off by two errors may differ from it by three.
    """
    model, images = make(name)
    theirs, exact = copy.deepcopy(model).train(training), model.double().train(training)
    ours = [fastconv.optimize(copy.deepcopy(each)) for each in (theirs, exact)]
    optimizer = torch.optim.Adam(exact.parameters(), 1e-3)
    found = [[], [], [], []]
    for seed in range(10):
        for model, results in zip((*ours, theirs, exact), found, strict=True):
            model.load_state_dict(exact.state_dict())
            results.append(step(model, images.to(next(model.parameters()).dtype), seed))
        optimizer.step()
    single, double, theirs, exact = found
    torch.testing.assert_close(double, exact, rtol=1e-9, atol=1e-12)
    grads = [key for key in exact[0] if key.startswith("grad ")]
    rest = [key for key in exact[0] if key not in grads]
    check_rule(double, theirs, exact, rest, unit=1.5 * SCALE)
    check_rule(single, theirs, exact, rest)
    check_rule(single, theirs, exact, grads, pick=statistics.median)


@each_network
def test_ten_steps_on_its_own(name):
    """Ten steps of Adam in float64 end with the parameters and buffers that torch's end with, to 8 digits:
    each step amplifies the rounding of those before."""
    model, images = make(name)
    sides = [model.double(), fastconv.optimize(copy.deepcopy(model))]
    for each in sides:
        optimizer = torch.optim.Adam(each.parameters(), 1e-3)
        for seed in range(10):
            step(each, images.double(), seed)
            optimizer.step()
    torch.testing.assert_close(*[each.state_dict() for each in sides], rtol=1e-8, atol=1e-10)


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


@pytest.mark.parametrize("name", networks.CHAINS)
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


def randomized(model):
    """The model in eval mode, with batch-norms that have seen something."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def test_batch_norm_behind_a_linear_layer_is_folded():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 8, bias=False), nn.BatchNorm1d(8),
        nn.ReLU(), nn.Linear(8, 6), nn.BatchNorm1d(6)
    )  # fmt: skip
    model, batches = randomized(model), torch.randn(10, 5, 1, 8, 8)
    exact, fast = copy.deepcopy(model).double(), fastconv.optimize(copy.deepcopy(model))
    assert steps(fast) == ["chain"]
    found = [[step(each, x) for x in batches] for each in (fast, model)]
    check_rule(*found, [step(exact, x.double()) for x in batches])
    assert steps(fast.train()) == ["chain", "4", "5", "linear", "7"]


@pytest.mark.parametrize("size", [(4, 6), (2, 4, 6), (2, 3, 4, 6)])
def test_batch_norm_whose_channels_are_not_the_layers(size):
    """Of unbatched images, and of rows in more dimensions: not folded, with torch's values or error."""
    norm = nn.BatchNorm1d(6 if len(size) == 2 else 4)
    layers = [nn.Linear(6, 6), nn.Linear(6, 6)] if len(size) != 2 else [nn.Conv1d(4, 5, 3, padding=1)]
    model, x = randomized(nn.Sequential(*layers, norm, nn.ReLU())), torch.randn(size)
    fast = fastconv.optimize(model)
    assert len(steps(fast)) < 3
    if len(size) < 4:
        torch.testing.assert_close(fast(x), model(x))
        return
    for each in (fast, model):
        with pytest.raises(ValueError, match="expected 2D? or 3D input"):
            each(x)


def test_batch_norm_of_other_dimensions_stays():
    model = randomized(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm3d(2)))
    fast = fastconv.optimize(model)
    for each in (fast, model):
        with pytest.raises(ValueError, match="expected 5D input"):
            each(torch.randn(1, 1, 5, 5))


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


@pytest.mark.parametrize("switch", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_gradients_and_autocast_switched_inside(switch):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            with switch():
                x = self.body(x)
            return self.head(x.float())

    model, x = Frozen(), torch.randn(3, 8)
    fast = fastconv.optimize(model)
    assert steps(fast.body) == ["chain"]
    torch.testing.assert_close(fast(x), model(x), rtol=1e-2, atol=1e-2)
    fast(x).sum().backward()
    assert (fast.body[0].weight.grad is None) == (switch is torch.no_grad)


def test_nothing_to_gain(capsys):
    model = nn.Sequential(nn.LayerNorm(8), nn.GELU())
    assert fastconv.optimize(model, verbose=True) is model
    assert "nothing to gain" in capsys.readouterr().out
    with pytest.raises(TypeError, match="'model' must be an nn.Module, got int"):
        fastconv.optimize(3)


HALVES = [torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("name", ["lenet", "fashion_cnn"])
def test_memory(name):
    """Of a training step: the peak, and what backward needs of forward, are at most half of torch.nn's."""
    build, size = networks.NETWORKS[name]
    images, labels = torch.randn(1024, *size), torch.arange(1024) % 10
    model = build()
    both = (fastconv.optimize(model), model)
    losses = [lambda each=each: F.cross_entropy(each(images), labels) for each in both]
    ours, theirs = (max(allocated(lambda loss=loss: loss().backward())) for loss in losses)
    assert ours <= theirs / 2
    ours, theirs = (allocated(loss)[-1] for loss in losses)
    assert ours <= theirs / 2


class Norms(nn.Module):
    """A convolution's output into a batch-norm and ReLU, read once or twice, as it is or behind a ReLU."""

    def __init__(self, relu, twice):
        super().__init__()
        self.conv, self.norm, self.relu, self.twice = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), relu, twice

    def forward(self, x):
        x = self.conv(x)
        x = F.relu(x) if self.relu else x
        y = F.relu(self.norm(x))
        return x + y if self.twice else y


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_backward_over_what_nothing_else_reads(relu, twice):
    """Batch-norm's input, unless the convolution's own backward or another reader needs it."""
    model, images = Norms(relu, twice), torch.randn(3, 2, 6, 6)
    fast = fastconv.optimize(model)
    targets = [node.target for node in fast._plan.by_mode()[True].graph.nodes]
    (norm,) = [each for each in targets if isinstance(each, BatchNormReLU)]
    assert norm.owns_input == (not relu and not twice)
    grads = []
    for each in (fast, model):
        each(images).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
        model.zero_grad()
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("name", ["lenet", "fashion_cnn", "resnet18"])
def test_to_another_dtype_and_layout(name, dtype, layout):
    """After optimize, by the error rule."""
    model, images = make(name)
    fast = fastconv.optimize(model).eval()
    with torch.no_grad():
        fast(images)  # folds weights, which must be made again
        fast = fast.to(dtype=dtype, memory_format=layout)
        assert fast.state_dict().keys() == model.state_dict().keys()
        theirs = copy.deepcopy(model).eval()  # shares what `to` has changed in place
        assert next(theirs.parameters()).dtype is dtype
        exact, found = copy.deepcopy(theirs).double(), [[], [], []]
        for seed in range(10):
            torch.manual_seed(seed)
            x = torch.randn_like(images).to(dtype=dtype, memory_format=layout)
            for side, results in zip((fast, theirs, exact), found, strict=True):
                results.append({"outputs": side(x.double() if side is exact else x)})
        check_rule(*found)
        assert found[0][0]["outputs"].dtype is dtype


@pytest.mark.parametrize("dtype", HALVES)
def test_training_in_two_bytes(dtype):
    model, images = make("fashion_cnn")
    model, images = model.to(dtype), images.to(dtype)
    fast, exact = fastconv.optimize(copy.deepcopy(model)), copy.deepcopy(model).double()
    found = [[], [], []]
    for seed in range(10):
        torch.manual_seed(seed)
        x = torch.randn_like(images)
        for side, results in zip((fast, model, exact), found, strict=True):
            side.load_state_dict(exact.state_dict())
            results.append(step(side, x.double() if side is exact else x, seed))
    grads = [key for key in found[0][0] if key.startswith("grad ")]
    check_rule(*found, ["outputs", "losses"])
    check_rule(*found, grads, pick=statistics.median)


def prune_half(layer):
    return prune.random_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize(
    "change",
    [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, prune_half],
    ids=["weight_norm", "spectral_norm", "prune"],
)
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_parametrized_layers(change, late):
    """Before optimize or after it; they stay torch's, the rest is fused, and both sides train alike."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16, 5)
    ).double()  # fmt: skip
    images, sides = torch.randn(3, 1, 8, 8).double(), []
    for optimized in (True, False):
        torch.manual_seed(1)
        side = copy.deepcopy(model)
        if optimized and late:
            side = fastconv.optimize(side)
        change(side[2])
        if optimized and not late:
            side = fastconv.optimize(side)
        optimizer = torch.optim.SGD(side.parameters(), 0.1)
        for seed in range(3):
            found = step(side, images, seed)
            optimizer.step()
        sides.append({**found, **side.state_dict()})
        if optimized:
            assert steps(side)[0] == "conv" and "2" in steps(side)
    torch.testing.assert_close(*sides, rtol=1e-9, atol=1e-12)


def test_shared_and_tied_layers():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)
            self.norm = nn.BatchNorm2d(2)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, x):
            x = F.max_pool2d(self.norm(self.conv(x)).relu(), 2)
            x = F.max_pool2d(self.norm(self.conv(x)).relu(), 2)
            return self.second(self.first(x.flatten(1)).relu())

    torch.manual_seed(0)
    model, images = Shared().double(), torch.randn(3, 2, 8, 8).double()
    for training in (True, False):
        expected = step(copy.deepcopy(model).train(training), images)
        fast = fastconv.optimize(copy.deepcopy(model)).train(training)
        torch.testing.assert_close(step(fast, images), expected, rtol=1e-9, atol=1e-12)
        assert fast.first.weight is fast.second.weight
        assert steps(fast) == (
            ["chain"] if not training else [*["conv", "batch_norm_relu_max_pool"] * 2, "flatten", "chain"]
        )


# Two processes train an optimized model, each on half of the batch; the first writes the gradients.
RANKS = """
import os, sys
import torch
sys.path.insert(0, sys.argv[2])
torch.set_num_threads(1)
import fastconv
from networks import make
rank = 0 if os.fork() else 1
store = torch.distributed.FileStore(sys.argv[1] + "/store", 2)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
model, images = make(sys.argv[3])
model, images = model.double().eval(), images.double()
ddp = torch.nn.parallel.DistributedDataParallel(getattr(fastconv, sys.argv[4])(model))
for _ in range(2):
    ddp.zero_grad()
    ddp(images[rank::2]).square().mean().backward()
if rank == 0:
    torch.save({name: p.grad for name, p in ddp.module.named_parameters()}, sys.argv[1] + "/grads.pt")
torch.distributed.destroy_process_group()
os._exit(0) if rank else os.wait()
"""


@pytest.mark.parametrize(
    ("name", "form"), [("lenet", "convert"), ("lenet", "optimize"), ("fashion_cnn", "optimize")]
)
def test_distributed_data_parallel(name, form, tmp_path):
    """Two processes, each on half of every batch, have the gradients of one."""
    command = [sys.executable, "-c", RANKS, tmp_path, pathlib.Path(__file__).parent, name, form]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    model, images = make(name)
    model.double().eval()(images.double()).square().mean().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(torch.load(tmp_path / "grads.pt"), expected, rtol=1e-9, atol=1e-12)
