# SPDX-License-Identifier: MIT
"""LeNet as a whole: inference and training steps. Checked against float64 before it is timed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import peers
import pytest
import torch

import fastconv
from fastconv import _accuracy, validate
from fastconv.models import LeNet

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SIDES = {
    "torch": functools.partial(LeNet, torch.nn),
    "fastconv": functools.partial(LeNet, fastconv),
    "fastconv fused": functools.partial(LeNet, fastconv, fused=True),
}
COMPILED = "torch.compile contiguous"
FORMS = [*(f"{side} {layout}" for layout in LAYOUTS for side in SIDES), COMPILED]

pytestmark = pytest.mark.benchmark(max_time=0.3, min_rounds=3, warmup=True, warmup_iterations=3)


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("--full")
    cases = [
        pytest.param(batch_size, training, form, id=f"{batch_size}-{_direction(training)}-{form}")
        for batch_size in ([1, 8, 64, 256, 1024, 4096] if full else [1, 64, 256])
        for training in (False, True)
        for form in ([*FORMS] if training else [*FORMS, *peers.INSTALLED])
    ]
    metafunc.parametrize("batch_size, training, form", cases)


def _direction(training: bool) -> str:
    return "training step" if training else "inference"


def test_lenet(measure, device, batch_size, training, form):
    if form in peers.INSTALLED and device.type != "cpu":
        pytest.skip("other runtimes are measured on the CPU alone")
    layout = form.split()[-1] if form.endswith(tuple(LAYOUTS)) else "contiguous"
    found = _check(min(batch_size, 64), device, layout)
    assert found["passed"], found["failures"]
    assert found["fused"] <= found["worst"]["outputs"]["allowed"]
    contenders = _contenders(batch_size, device, training)
    extra = {} if training else {"largest_error": _error(contenders[form](), batch_size)}
    measure(
        f"lenet batch {batch_size} {_direction(training)}",
        contenders,
        form,
        batch_size=batch_size,
        layout=layout,
        dtype="float32",
        errors=found["worst"],
        **extra,
    )


def _models(device: torch.device, layout: str) -> dict[str, torch.nn.Module]:
    """LeNet in each form, with equal parameters."""
    models = {}
    for side, make in SIDES.items():
        torch.manual_seed(0)
        models[side] = make().to(device, memory_format=LAYOUTS[layout])
    return models


def _batch(size: int, device: torch.device, layout: str) -> _accuracy.Batch:
    """Random images and labels; the same in every layout."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(size, 1, 32, 32, generator=generator)
    labels = torch.randint(10, (size,), generator=generator)
    return images.to(device, memory_format=LAYOUTS[layout]), labels.to(device)


@functools.cache
def _check(batch_size: int, device: torch.device, layout: str) -> dict:
    """The error rule of fastconv._accuracy for one forward and backward pass; "fused" is the error of the
    fused form's outputs."""
    models = _models(device, layout)
    batch = _batch(batch_size, device, layout)
    guide = copy.deepcopy(models["torch"])
    fused = _error(models["fastconv fused"](batch[0]), batch_size)
    pair = {"torch.nn": models["torch"], "fastconv": models["fastconv"]}
    return {**_accuracy.check(pair, guide, lambda *_: None, [batch]), "fused": fused}


def _error(logits: torch.Tensor, batch_size: int) -> float:
    """The largest difference from float64."""
    cpu = torch.device("cpu")
    model = _models(cpu, "contiguous")["torch"].double()
    images, _ = _batch(batch_size, cpu, "contiguous")
    with torch.no_grad():
        return (logits.cpu().double() - model(images.double())).abs().max().item()


@functools.lru_cache(maxsize=1)
def _contenders(batch_size: int, device: torch.device, training: bool) -> dict[str, Callable]:
    contenders = {}
    for layout in LAYOUTS:
        for side, model in _models(device, layout).items():
            batch = _batch(batch_size, device, layout)
            contenders[f"{side} {layout}"] = _contender(model, batch, training)
    model = _models(device, "contiguous")["torch"]
    batch = _batch(batch_size, device, "contiguous")
    contenders[COMPILED] = _contender(torch.compile(model), batch, training)
    if not training and device.type == "cpu":
        contenders |= peers.openable(model.eval(), batch[0])
    return contenders


def _contender(model: torch.nn.Module, batch: _accuracy.Batch, training: bool) -> Callable:
    if training:  # at a learning rate of zero the work stays the same
        return functools.partial(validate.Trainer(model, 0.0, 1).step, *batch)
    return torch.no_grad()(functools.partial(model, batch[0]))
