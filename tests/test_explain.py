# SPDX-License-Identifier: MIT
"""fastconv.explain: what has run, on which kernels, at what cost; and that the model stays as it is."""

import copy

import pytest
import torch
from networks import NETWORKS, make
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastconv
from fastconv import _peaks, kernels
from fastconv.__main__ import main
from fastconv.models import FashionCNN, LeNet

IMAGES = torch.randn(4, 1, 32, 32)
CONV1 = 2 * 4 * 6 * 28 * 28 * 25  # FLOPs of LeNet's layers, forward
CONV2 = 2 * 4 * 16 * 10 * 10 * 6 * 25
FC = [2 * 4 * 400 * 120, 2 * 4 * 120 * 84, 2 * 4 * 84 * 10]
FORWARD = CONV1 + CONV2 + sum(FC)
BACKWARD = CONV1 + 2 * (CONV2 + sum(FC))  # the first layer wants no gradient of its input


@pytest.fixture(autouse=True)
def quick(monkeypatch, threads):
    threads(1)  # of few images each operator is faster without a team
    monkeypatch.setattr(_peaks, "measure", lambda *_: _peaks.Peaks(1e11, 1e10))


def rows(found):
    return [(layer.name, layer.operator) for layer in found.layers]


def test_layer_by_layer():
    found = fastconv.explain(LeNet(), IMAGES)
    assert rows(found) == [
        ("conv1", "conv2d"),
        ("pool", "max_pool2d"),
        ("conv2", "conv2d"),
        ("pool", "max_pool2d"),
        ("fc1", "linear"),
        ("fc2", "linear"),
        ("fc3", "linear"),
        ("others", "torch's relu x4"),
    ]
    conv1, pool, conv2, _, *linear, others = found.layers
    assert [layer.flops for layer in (conv1, pool, conv2, *linear)] == [CONV1, 0, CONV2, *FC]
    assert conv1.sizes == ((4, 1, 32, 32), (6, 1, 5, 5), (6,)) and conv1.dtype == torch.float32
    assert conv1.bytes == 4 * (4 * 32 * 32 + 6 * 25 + 6 + 4 * 6 * 28 * 28)
    assert pool.bytes == 4 * (4 * 6 * 28 * 28 + 4 * 6 * 14 * 14)
    assert all(layer.seconds > 0 for layer in found.layers)
    assert conv1.share == pytest.approx(max(CONV1 / 1e11, conv1.bytes / 1e10) / conv1.seconds)
    assert others.kernel == "" and others.flops is others.bytes is others.share is None


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_kernel_is_that_of_kernels_explain(layout):
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = LeNet().to(memory_format=memory_format)
    images = torch.randn(4, 6, 14, 14).to(memory_format=memory_format)
    layer = fastconv.explain(model.conv2, images).layers[0]
    expected = kernels.explain("conv2d", input=(4, 6, 14, 14), weight=(16, 6, 5, 5), layout=layout)[0]
    assert (layer.kernel, list(layer.rows)) == (expected["chosen"], expected["rows"])


def test_kernel_is_the_one_that_runs():
    """And not the cheapest, where one is forced."""
    with kernels.force("cpu/conv_fprop_naive"):
        layer = fastconv.explain(LeNet(), IMAGES).layers[0]
    assert layer.kernel == "cpu/conv_fprop_naive"
    assert min(layer.rows, key=lambda row: row["cost_us"] or 1e9)["name"] != layer.kernel


def test_fused():
    (layer,) = fastconv.explain(LeNet(fused=True), IMAGES).layers
    assert (layer.name, layer.operator, layer.flops) == ("LeNet", "chain of 5 stages", FORWARD)
    assert layer.kernel.startswith("cpu/chain_")
    block = fastconv.ConvReLUPool2d(1, 6, 5)
    (layer,) = fastconv.explain(nn.Sequential(block), IMAGES).layers
    assert (layer.name, layer.operator, layer.flops) == ("0", "conv2d + relu + max_pool", CONV1)
    (layer,) = fastconv.explain(nn.Sequential(fastconv.LinearReLU(32, 7)), IMAGES).layers
    assert (layer.name, layer.operator, layer.flops) == ("0", "linear + relu", 2 * 4 * 32 * 32 * 7)


def test_optimized():
    model = fastconv.optimize(FashionCNN(nn).eval())
    images = torch.randn(4, 1, 28, 28)
    assert rows(fastconv.explain(model, images)) == [("layer1.0 to fc3", "chain of 5 stages")]
    found = rows(fastconv.explain(nn.Sequential(model.train()), images))
    assert found[:6] == [
        ("0.layer1.0", "conv2d"),
        ("0.layer1.1", "batch_norm + relu + max_pool"),
        ("0.layer2.0", "conv2d"),
        ("0.layer2.1", "batch_norm + relu + max_pool"),
        ("0.fc1", "linear"),
        ("0.fc2 to fc3", "chain of 2 stages"),
    ]
    assert found[6][0] == "others" and "bernoulli x1" in found[6][1]


def test_torchs_layers():
    found = fastconv.explain(LeNet(nn), IMAGES, backward=True)
    assert rows(found)[:7] == [
        ("conv1", "torch's convolution"),
        ("pool", "torch's max_pool2d_with_indices"),
        ("conv2", "torch's convolution"),
        ("pool", "torch's max_pool2d_with_indices"),
        ("fc1", "torch's addmm"),
        ("fc2", "torch's addmm"),
        ("fc3", "torch's addmm"),
    ]
    assert [row for row in rows(found) if "conv" in row[1]][2:] == [
        ("conv2", "torch's convolution_backward"),
        ("conv1", "torch's convolution_backward"),
    ]
    assert sum(layer.flops or 0 for layer in found.layers) == FORWARD + BACKWARD
    assert all(layer.kernel == "" and layer.rows == () for layer in found.layers)


def test_backward():
    found = fastconv.explain(LeNet(), IMAGES, backward=True)
    assert rows(found)[7:-1] == [
        ("fc3", "linear dgrad"),
        ("fc3", "linear wgrad"),
        ("fc2", "linear dgrad"),
        ("fc2", "linear wgrad"),
        ("fc1", "linear dgrad"),
        ("fc1", "linear wgrad"),
        ("pool", "max_pool2d backward"),
        ("conv2", "conv2d dgrad"),
        ("conv2", "conv2d wgrad"),
        ("pool", "max_pool2d backward"),
        ("conv1", "conv2d wgrad"),
    ]
    assert sum(layer.flops or 0 for layer in found.layers) == FORWARD + BACKWARD
    _, chain = fastconv.explain(LeNet(fused=True), IMAGES, backward=True).layers
    assert (chain.name, chain.operator) == ("LeNet", "chain of 5 stages backward")
    assert chain.flops == BACKWARD
    images = IMAGES.clone().requires_grad_()
    assert fastconv.explain(LeNet(fused=True), images, backward=True).layers[1].flops == 2 * FORWARD
    assert images.grad is None


# torch counts too many for the weight's gradient of a grouped convolution, which mobilenet_v2 has.
@pytest.mark.parametrize("name", ["chain", *(name for name in NETWORKS if name != "mobilenet_v2")])
def test_flops_are_torchs(name):
    """As torch counts them of its own layers, forward and backward."""
    model, images = make("lenet" if name == "chain" else name)
    ours = fastconv.optimize(model) if name == "chain" else fastconv.convert(copy.deepcopy(model))
    counts = []
    for each in (model, ours):
        with FlopCounterMode(display=False) as counter:
            each(images).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("kind", [fastconv.Conv2d, fastconv.ConvReLUPool2d])
def test_flops_of_groups(kind):
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    block = kind(4, 6, 3, stride=2, padding=1, groups=2)
    with FlopCounterMode(display=False) as counter:
        block(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 6 * 5 * 4) * (2 * 9)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("optimized", [False, True])
def test_the_model_stays_as_it_is(optimized, backward):
    model, images = make("fashion_cnn")
    model = fastconv.optimize(model) if optimized else model
    calls = []
    hook = model.drop.register_forward_hook(lambda *_: calls.append(1))
    model.fc1.weight.grad = grad = torch.ones_like(model.fc1.weight)
    held = dict(model.named_buffers())
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    call = nn.Module.__call__
    fastconv.explain(model, images, backward=backward)
    assert nn.Module.__call__ is call and model.training and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(buffer is held[name] for name, buffer in model.named_buffers())
    assert model.fc1.weight.grad is grad and grad.eq(1).all() and model.fc2.weight.grad is None
    assert calls and list(model.drop._forward_hooks) == [hook.id]


def test_a_shared_buffer_stays_shared():
    first, second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    second.running_mean = first.running_mean
    model = nn.Sequential(first, second)
    seen = []
    second.register_forward_hook(lambda *_: seen.append(second.running_mean is first.running_mean))
    fastconv.explain(model, torch.randn(5, 3))
    assert all(seen) and second.running_mean is first.running_mean


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript():
    model = torch.jit.script(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)))
    before = copy.deepcopy(model.state_dict())
    found = fastconv.explain(model, torch.randn(5, 3))
    assert found.layers[0].flops == 2 * 5 * 3 * 2
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_written_into_once():
    """Operators that write into their argument are timed on copies of it."""

    class Count(nn.Module):
        def forward(self, x):
            self.result = x.clone().add_(1)
            return self.result

    model = Count()
    fastconv.explain(model, torch.zeros(3))
    assert model.result.tolist() == [1, 1, 1]


def test_arguments():
    class Two(nn.Module):
        def forward(self, x, y):
            return nn.functional.linear(x, y)

    found = fastconv.explain(Two(), (torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4).double()))
    assert (found.layers[0].name, found.layers[0].dtype) == ("Two", torch.float64)


def test_no_images():
    layers = fastconv.explain(LeNet(), IMAGES[:0]).layers
    assert [layer.flops for layer in layers] == [0] * 7 + [None]


def test_errors():
    with pytest.raises(TypeError, match="argument 'model' must be an nn.Module, got function"):
        fastconv.explain(lambda x: x, IMAGES)
    with pytest.raises(RuntimeError, match="expected input.* to have 1 channels, but got 3"):
        fastconv.explain(LeNet(nn), torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match="nothing that the model returns has a gradient"):
        fastconv.explain(nn.Flatten(), IMAGES, backward=True)
    model, call = LeNet(), nn.Module.__call__
    model.fc3.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fastconv.explain(model, IMAGES)
    assert nn.Module.__call__ is call


def test_table():
    model = nn.Sequential()
    model.add_module("a_name_that_is_far_too_long_for_a_column" * 2, LeNet())
    lines = str(fastconv.explain(model, IMAGES, backward=True)).splitlines()
    assert max(map(len, lines)) <= 120
    assert " ".join(lines[0].split()) == "layer operator kernel MFLOP MB us GFLOP/s GB/s of peak"
    first = lines[1].split()
    assert first[0].startswith("...") and first[0].endswith(".conv1")
    assert first[1] == "conv2d" and first[3] == f"{CONV1 / 1e6:.2f}"
    assert lines[-2].startswith("others: torch's ") and "relu x4" in lines[-2]
    assert lines[-1].startswith("Sequential as a whole: ") and "100 GFLOP/s" in lines[-1]


def test_reasons():
    layer = fastconv.explain(LeNet().conv2, torch.randn(4, 6, 14, 14))
    lines = layer.reasons.splitlines()
    assert lines[0] == f"Conv2d: conv2d, 4x6x14x14 16x6x5x5 16: {layer.layers[0].kernel}"
    assert any("cpu/conv_fprop_depthwise" in line and "one input channel" in line for line in lines)
    assert [line for line in lines if line.startswith("  * ")][0].split()[1] == layer.layers[0].kernel


def test_parts():
    """A composed row names those that it runs."""
    block = nn.Sequential(fastconv.ConvReLUPool2d(1, 6, 5))
    with kernels.force("cpu/conv_act_pool_composed"):
        found = fastconv.explain(block, IMAGES)
    (layer,) = found.layers
    conv = kernels.explain("conv2d", input=IMAGES.shape, weight=(6, 1, 5, 5))[0]
    pool = kernels.explain("max_pool2d", input=(4, 6, 28, 28), kernel_size=2)[0]
    assert layer.kernel == "cpu/conv_act_pool_composed"
    assert [part["chosen"] for part in layer.parts] == [conv["chosen"], pool["chosen"]]
    families = [name.split("_", 2)[2] for name in (conv["chosen"], pool["chosen"])]
    assert " + ".join(families) in str(found)
    assert f"0, part of cpu/conv_act_pool_composed: {pool['chosen']}" in found.reasons.splitlines()

    with kernels.force("cpu/chain_composed"):  # the second time its choices are known
        found = [fastconv.explain(LeNet(fused=True), IMAGES, backward=True).layers for _ in range(2)][1]
    assert [layer.kernel for layer in found] == ["cpu/chain_composed", "cpu/chain_backward_composed"]
    forward, backward = ([part["chosen"] for part in layer.parts] for layer in found)
    assert len(forward) == 5 and forward[2].startswith("cpu/linear_fprop_")
    assert {name.rpartition("_wgrad_")[0] for name in backward} >= {"cpu/conv", "cpu/linear"}


def test_command(capsys):
    assert main(["explain", "--model", "lenet", "--fused", "--batch", "2", "--train", "--reasons"]) == 0
    text = capsys.readouterr().out
    assert "chain of 5 stages backward" in text and "* cpu/chain_" in text
    assert main(["explain", "--model", "mlp", "--optimize", "--batch", "2", "--device", "cpu"]) == 0
    assert "chain of 3 stages" in capsys.readouterr().out
    for wrong, message in [
        ([], "explain needs --model or the name of an OP"),
        (["--model", "mlp", "--fused"], "lenet has a fused form, got --model mlp"),
    ]:
        with pytest.raises(SystemExit):
            main(["explain", *wrong])
        assert message in capsys.readouterr().err


def test_peaks(monkeypatch):
    monkeypatch.undo()
    found = _peaks.measure("cpu")
    assert found.flops_per_s > 0 and found.bytes_per_s > 0
