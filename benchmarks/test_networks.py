# SPDX-License-Identifier: MIT
"""LeNet as a whole: inference and training steps. Checked against float64 before it is timed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

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
FORMS = [f"{side} {layout}" for layout in LAYOUTS for side in SIDES]

pytestmark = pytest.mark.benchmark(max_time=0.3, min_rounds=3, warmup=True, warmup_iterations=3)


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("--full")
    metafunc.parametrize("form", FORMS)
    metafunc.parametrize("training", [False, True], ids=["inference", "training"])
    metafunc.parametrize("batch_size", [1, 8, 64, 256, 1024] if full else [1, 64, 256])


def test_lenet(measure, device, batch_size, training, form):
    layout = form.split()[-1]
    found = _check(min(batch_size, 64), device, layout)
    assert found["passed"], found["failures"]
    assert found["fused"] <= found["worst"]["outputs"]["allowed"]
    measure(
        f"lenet batch {batch_size} {'training step' if training else 'inference'}",
        _contenders(batch_size, device, training),
        form,
        batch_size=batch_size,
        layout=layout,
        dtype="float32",
        errors=found["worst"],
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
    exact = copy.deepcopy(guide).cpu().double()(batch[0].cpu().double())
    fused = (models["fastconv fused"](batch[0]).cpu().double() - exact).abs().max().item()
    pair = {"torch.nn": models["torch"], "fastconv": models["fastconv"]}
    return {**_accuracy.check(pair, guide, lambda *_: None, [batch]), "fused": fused}


@functools.lru_cache(maxsize=1)
def _contenders(batch_size: int, device: torch.device, training: bool) -> dict[str, Callable]:
    contenders = {}
    for layout in LAYOUTS:
        images, labels = _batch(batch_size, device, layout)
        for side, model in _models(device, layout).items():
            if training:  # at a learning rate of zero the work stays the same
                contender = functools.partial(validate.Trainer(model, 0.0, 1).step, images, labels)
            else:
                contender = torch.no_grad()(functools.partial(model, images))
            contenders[f"{side} {layout}"] = contender
    return contenders
