# SPDX-License-Identifier: MIT
"""The samples that PyTorch tests its own layers with (ModuleInfo), on fastconv's."""

import copy
import pickle

import pytest
import torch
from infos import module_db

import fastconv

NAMES = [f"{kind}{axes}d" for kind in ("Conv", "MaxPool", "AvgPool") for axes in (1, 2, 3)] + ["Linear"]
INFOS = {name: info for info in module_db for name in NAMES if info.name == f"nn.{name}"}
each_layer = pytest.mark.parametrize("name", NAMES)


def samples_of(name, dtype=torch.float64):
    info = INFOS[name]
    for training in (True, False):
        for sample in info.module_inputs_func(info, "cpu", dtype, True, training):
            if sample.forward_input is not None:
                yield sample, training


def build(name, sample, training, dtype=torch.float64):
    """torch.nn's layer and fastconv's, of the same parameters."""
    layers = []
    for made in (torch.nn, fastconv):
        torch.manual_seed(0)
        arguments = sample.constructor_input
        layers.append(getattr(made, name)(*arguments.args, **arguments.kwargs).to(dtype).train(training))
    return layers


def run(layer, sample):
    """Output and gradients."""
    call = copy.deepcopy(sample.forward_input)
    output = layer(*call.args, **call.kwargs)
    output = output[0] if isinstance(output, tuple) else output
    inputs = [
        t for t in (*call.args, *call.kwargs.values()) if isinstance(t, torch.Tensor) and t.requires_grad
    ]
    wanted = [*inputs, *layer.parameters()]
    return output, torch.autograd.grad(output.square().sum(), wanted)


@each_layer
def test_layers(name, tally):
    """The same initial parameters, output and gradients, also of a copy and of what pickle brings back."""

    def check(sample, training):
        theirs, ours = build(name, sample, training)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, its)
        expected = run(theirs, sample)
        for layer in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            torch.testing.assert_close(run(layer, sample), expected)
        assert repr(ours) == repr(theirs)

    for sample, training in samples_of(name):
        tally.run(check, sample, training)


@each_layer
def test_dtypes(name, tally):
    def check(sample, training):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            theirs, ours = build(name, sample, training, dtype)
            call = sample.forward_input
            (x,) = (t.detach().to(dtype) for t in (*call.args, *call.kwargs.values()))
            try:
                expected = theirs(x)
            except NotImplementedError:  # torch has no AvgPool3d of 16 bits on a CPU
                continue
            torch.testing.assert_close(ours(x), expected, rtol=2e-2, atol=1e-2)

    for sample, training in samples_of(name):
        tally.run(check, sample, training)


@pytest.mark.parametrize("name", [name for name in NAMES if INFOS[name].module_error_inputs_func])
def test_errors(name, tally):
    info = INFOS[name]

    def check(wrong):
        sample = wrong.module_error_input
        arguments, call = sample.constructor_input, sample.forward_input
        with pytest.raises(wrong.error_type):
            getattr(fastconv, name)(*arguments.args, **arguments.kwargs)(*call.args, **call.kwargs)

    for wrong in info.module_error_inputs_func(info, "cpu", torch.float64, True, True):
        tally.run(check, wrong)
