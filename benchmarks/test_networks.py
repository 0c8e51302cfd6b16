# SPDX-License-Identifier: MIT
"""Whole networks: inference and training steps. Checked against float64 before they are timed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch

import fastconv
from benchmarks import peers
from benchmarks.device import captured, chosen
from benchmarks.memory import peak_bytes
from fastconv import _accuracy, models

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _optimized(network: type) -> Callable:
    return lambda: fastconv.optimize(network(torch.nn))


# What each network is built from, and the size of an image.
LENET = {
    "torch": functools.partial(models.LeNet, torch.nn),
    "fastconv": functools.partial(models.LeNet, fastconv),
    "fastconv fused": functools.partial(models.LeNet, fastconv, fused=True),
    "fastconv optimized": _optimized(models.LeNet),
}
FASHION_CNN = {
    "torch": functools.partial(models.FashionCNN, torch.nn),
    "fastconv": functools.partial(models.FashionCNN, fastconv),
    "fastconv optimized": _optimized(models.FashionCNN),
}
NETWORKS = {"lenet": (LENET, (1, 32, 32)), "fashion_cnn": (FASHION_CNN, (1, 28, 28))}
BATCHES = {"lenet": [1, 64, 256], "fashion_cnn": [64]}
MORE_BATCHES = {"lenet": [8, 1024, 4096], "fashion_cnn": [1, 256]}  # with --full
COMPILED = "torch.compile contiguous"
GRAPHS = ("torch graph contiguous", "fastconv optimized graph contiguous")  # on a GPU

pytestmark = pytest.mark.benchmark(max_time=0.3, min_rounds=3, warmup=True, warmup_iterations=3)


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("--full")
    cases = []
    for network in NETWORKS:
        for batch_size in BATCHES[network] + (MORE_BATCHES[network] if full else []):
            for training in (False, True):
                group = _group(network, batch_size, training)
                cases += [
                    pytest.param(network, batch_size, training, form, id=f"{group}-{form}")
                    for form in _forms(network, training, chosen(metafunc.config))
                ]
    metafunc.parametrize("network, batch_size, training, form", cases)


def _group(network: str, batch_size: int, training: bool) -> str:
    return f"{network} batch {batch_size} {'training step' if training else 'inference'}"


def _forms(network: str, training: bool, device: torch.device) -> list[str]:
    sides, _ = NETWORKS[network]
    forms = [f"{side} {layout}" for layout in LAYOUTS for side in sides] + [COMPILED]
    if device.type == "cuda":
        return [*forms, *GRAPHS]
    return forms if training else forms + peers.INSTALLED  # other runtimes are for inference on a CPU


def test_network(measure, device, network, batch_size, training, form):
    layout = form.split()[-1] if form.endswith(tuple(LAYOUTS)) else "contiguous"
    found = _check(network, min(batch_size, 64), device, layout)
    assert found["passed"], found["failures"]
    contenders = _contenders(network, batch_size, device, training)
    with torch.set_grad_enabled(training):
        extra = {} if training else {"largest_error": _error(network, contenders[form](), batch_size)}
        measure(
            _group(network, batch_size, training),
            contenders,
            form,
            network=network,
            direction="training step" if training else "inference",
            batch_size=batch_size,
            peak_bytes=peak_bytes(contenders[form], device),
            layout=layout,
            dtype="float32",
            errors=found["worst"],
            **extra,
        )


def _models(network: str, device: torch.device, layout: str) -> dict[str, torch.nn.Module]:
    """The network in each form, with equal parameters."""
    built = {}
    for side, make in NETWORKS[network][0].items():
        torch.manual_seed(0)
        built[side] = make().to(device, memory_format=LAYOUTS[layout])
    return built


def _batch(network: str, size: int, device: torch.device, layout: str) -> _accuracy.Batch:
    """Random images and labels; the same in every layout."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(size, *NETWORKS[network][1], generator=generator)
    labels = torch.randint(10, (size,), generator=generator)
    return images.to(device, memory_format=LAYOUTS[layout]), labels.to(device)


@functools.cache
def _check(network: str, batch_size: int, device: torch.device, layout: str) -> dict:
    """The error rule of fastconv._accuracy for one forward and backward pass, layer by layer. The outputs in
    eval mode of the fused and the optimized form, where there are such, keep it as well."""
    built = _models(network, device, layout)
    batch = _batch(network, batch_size, device, layout)
    pair = {"torch.nn": built["torch"], "fastconv": built["fastconv"]}
    found = _accuracy.check(pair, copy.deepcopy(built["torch"]), lambda *_: None, [batch])
    with torch.no_grad():
        outputs = {side: model.eval()(batch[0]) for side, model in _models(network, device, layout).items()}
    errors = {side: _error(network, each, batch_size) for side, each in outputs.items()}
    largest = outputs["torch"].abs().max().item()
    allowed = _accuracy.allowance(errors["torch"], largest, torch.float32)
    assert max(errors.values()) <= allowed, (errors, allowed)
    return found


def _error(network: str, logits: torch.Tensor, batch_size: int) -> float:
    """The largest difference from float64."""
    cpu = torch.device("cpu")
    model = _models(network, cpu, "contiguous")["torch"].double().eval()
    images, _ = _batch(network, batch_size, cpu, "contiguous")
    with torch.no_grad():
        return (logits.cpu().double() - model(images.double())).abs().max().item()


@functools.lru_cache(maxsize=1)
def _contenders(network: str, batch_size: int, device: torch.device, training: bool) -> dict[str, Callable]:
    contenders = {}
    for layout in LAYOUTS:
        batch = _batch(network, batch_size, device, layout)
        for side, model in _models(network, device, layout).items():
            contenders[f"{side} {layout}"] = _contender(model, batch, training)
    model = _models(network, device, "contiguous")["torch"]
    batch = _batch(network, batch_size, device, "contiguous")
    contenders[COMPILED] = _contender(torch.compile(model), batch, training)
    if device.type == "cuda":
        for name in GRAPHS:
            side = name.removesuffix(" graph contiguous")
            model = _models(network, device, "contiguous")[side]
            with torch.set_grad_enabled(training):
                contenders[name] = captured(_contender(model, batch, training))
    elif not training:
        contenders |= peers.openable(model.eval(), batch[0])
    return contenders


def _contender(model: torch.nn.Module, batch: _accuracy.Batch, training: bool) -> Callable:
    images, labels = batch
    if not training:
        return functools.partial(model.eval(), images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # the work stays the same

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step
