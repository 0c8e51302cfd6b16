# SPDX-License-Identifier: MIT
"""torch.func's transforms and forward mode on whole networks, fused ones too."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import fastconv
from fastconv import models

pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")
NETWORKS = {
    "lenet": lambda: models.LeNet(),
    "fused lenet": lambda: models.LeNet(fused=True),
    "mlp": lambda: models.MLP(),
    "optimized": lambda: fastconv.optimize(models.LeNet(nn)),
    "average": lambda: nn.Sequential(
        fastconv.Conv2d(1, 4, 3, stride=2, groups=1),
        nn.ReLU(),
        fastconv.AvgPool2d(3),
        nn.Flatten(),
        fastconv.Linear(100, 10),
    ),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def make(name, count=1):
    """Networks of one kind in float64, and images."""
    torch.manual_seed(0)
    side = 28 if name == "mlp" else 32
    found = [NETWORKS[name]().double() for _ in range(count)]
    return found, torch.randn(3, 1, side, side, dtype=torch.float64)


@each_network
def test_ensembles(name):
    """Several networks as one call: each sees all images, and each its own."""
    networks, images = make(name, 3)
    params, buffers = stack_module_state(networks)
    base = copy.deepcopy(networks[0]).to("meta")

    def call(params, buffers, x):
        return functional_call(base, (params, buffers), (x,))

    expected = torch.stack([network(images) for network in networks])
    torch.testing.assert_close(vmap(call, (0, 0, None))(params, buffers, images), expected)
    expected = torch.stack([network(x[None]) for network, x in zip(networks, images, strict=True)])
    torch.testing.assert_close(vmap(call)(params, buffers, images[:, None]), expected)


@each_network
def test_gradients_of_each_sample(name):
    (network,), images = make(name)
    labels = torch.arange(3)
    params = {key: value.detach() for key, value in network.named_parameters()}

    def loss(params, x, label):
        return F.cross_entropy(functional_call(network, params, (x[None],)), label[None])

    found = vmap(grad(loss), (None, 0, 0))(params, images, labels)
    for i in range(3):
        network.zero_grad()
        F.cross_entropy(network(images[i : i + 1]), labels[i : i + 1]).backward()
        for key, parameter in network.named_parameters():
            torch.testing.assert_close(found[key][i], parameter.grad)


@each_network
def test_forward_mode(name):
    """Along parameters and images at once: the product with the gradients of each output."""
    (network,), images = make(name)
    params = {key: value.detach() for key, value in network.named_parameters()}
    torch.manual_seed(1)
    along = {key: torch.randn_like(value) for key, value in params.items()}
    image_along = torch.randn_like(images)

    def call(params, x):
        return functional_call(network, params, (x,))

    output, found = jvp(call, (params, images), (along, image_along))
    torch.testing.assert_close(output, network(images))
    step = 1e-6
    ahead, behind = (
        call({key: value + s * along[key] for key, value in params.items()}, images + s * image_along)
        for s in (step, -step)
    )
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)


@each_network
def test_tangents_of_plain_calls(name):
    """Dual tensors, without torch.func: not lost without a gradient, nor in a chain."""
    (network,), images = make(name)
    along = torch.randn_like(images)
    _, expected = jvp(network, (images,), (along,))
    for context in (torch.enable_grad, torch.no_grad):
        with context(), forward_ad.dual_level():
            found = forward_ad.unpack_dual(network(forward_ad.make_dual(images, along))).tangent
            torch.testing.assert_close(found, expected)


@each_network
def test_batched_gradients(name):
    """torch.autograd.grad with is_grads_batched."""
    (network,), images = make(name)
    images.requires_grad_()
    output = network(images)
    grads = torch.randn(4, *output.shape, dtype=output.dtype)
    (found,) = torch.autograd.grad(output, images, grads, is_grads_batched=True, retain_graph=True)
    for i in range(4):
        (expected,) = torch.autograd.grad(output, images, grads[i], retain_graph=True)
        torch.testing.assert_close(found[i], expected)


def test_tangents_of_raw_operators():
    """Not lost: computed, or refused."""
    x, along, weight = torch.randn(3, 4), torch.randn(3, 4), torch.randn(2, 4)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, along)
        output = torch.ops.fastconv.linear_act(dual, weight, None, "none")
        torch.testing.assert_close(forward_ad.unpack_dual(output).tangent, along @ weight.T)
        with pytest.raises(RuntimeError, match="raw operator without a gradient"):
            torch.ops.fastconv.linear_act_backward(output, output, dual, weight, "relu", [True] * 3)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd, torch.func.hessian])
def test_raw_operators_refuse_transforms(transform):
    x, weight = torch.randn(3, 4), torch.randn(2, 4)
    call = transform(lambda w: torch.ops.fastconv.linear_act(x, w, None, "none").square().sum())
    with pytest.raises(NotImplementedError, match="fastconv::linear_act: torch.func has no rule.*functional"):
        call(weight)
