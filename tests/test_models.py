# SPDX-License-Identifier: MIT
"""The networks: their layers, sizes and parameters, the same numbers on torch.nn and on fastconv."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fastconv
from fastconv import models

SIZES = {
    "lenet": (1, 28, 28),
    "fashion_cnn": (1, 28, 28),
    "fashion_dnn": (1, 28, 28),
    "mlp": (1, 28, 28),
    "cifarnet": (3, 32, 32),
}
PARAMETERS = {
    "lenet": 6 * 25 + 6 + 16 * 150 + 16 + 400 * 120 + 120 + 120 * 84 + 84 + 84 * 10 + 10,
    "fashion_cnn": 320 + 64 + 18496 + 128 + 2304 * 600 + 600 + 600 * 120 + 120 + 1210,
    "fashion_dnn": 784 * 256 + 256 + 256 * 128 + 128 + 1290,
    "mlp": 784 * 512 + 512 + 512 * 512 + 512 + 5130,
    "cifarnet": 448 + 4640 + 18496 + 1024 * 128 + 128 + 1290,
}
each_network = pytest.mark.parametrize("name", models.NETWORKS)


def pair(name):
    """The network on torch.nn and on fastconv, from the same seed."""
    made = []
    for layers in (torch.nn, fastconv):
        torch.manual_seed(1)
        made.append(models.build(name, layers, SIZES[name]))
    return made


@each_network
def test_same_start_and_same_step(name):
    theirs, ours = pair(name)
    assert sum(p.numel() for p in ours.parameters()) == PARAMETERS[name]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    x, y = torch.rand(6, *SIZES[name]), torch.arange(6)
    outputs, gradients, buffers = [], [], []
    for model in (theirs, ours):
        torch.manual_seed(2)  # the same dropout
        outputs.append(model(x))
        F.cross_entropy(outputs[-1], y).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        buffers.append(dict(model.named_buffers()))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*buffers)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@each_network
def test_layers_are_of_the_namespace(name):
    theirs, ours = pair(name)
    kinds = {
        type(module).__module__ for module in ours.modules() if type(module).__name__ in fastconv.__all__
    }
    assert kinds == {"fastconv.modules"}
    classes = [type(module) for module in theirs.modules()]
    assert [type(module) for module in fastconv.restore(copy.deepcopy(ours)).modules()] == classes
    assert models.build(name, image_size=SIZES[name]).state_dict().keys() == ours.state_dict().keys()


def test_hidden_sizes_of_the_mlp():
    model = models.MLP(fastconv, hidden=(1024, 512))
    sizes = [tuple(p.shape) for p in model.parameters() if p.dim() == 2]
    assert sizes == [(1024, 784), (512, 1024), (10, 512)]
    assert models.MLP(torch.nn, hidden=(), in_features=4, num_classes=2)(torch.ones(3, 4)).shape == (3, 2)


def test_dropout_is_for_training_alone():
    for name in ("fashion_cnn", "fashion_dnn"):
        model, x = models.build(name), torch.rand(4, 1, 28, 28)
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


def test_other_images_and_classes():
    assert models.CifarNet(fastconv, num_classes=2)(torch.rand(2, 3, 32, 32)).shape == (2, 2)
    assert models.build("lenet", fastconv, (3, 32, 32), 7)(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert models.build("mlp", fastconv, (3, 32, 32))(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match=r"fashion_cnn takes images of 28x28, got image_size \(3, 32, 32\)"):
        models.build("fashion_cnn", fastconv, (3, 32, 32))
    with pytest.raises(ValueError, match="lenet takes images of 28x28 or 32x32"):
        models.build("lenet", fastconv, (1, 28, 32))
    with pytest.raises(ValueError, match="name must be one of lenet, .* got 'resnet'"):
        models.build("resnet")
