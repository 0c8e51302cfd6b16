# SPDX-License-Identifier: MIT
import os
import shutil

import evidence
import problems
import pytest
import torch
from aarch64 import Aarch64, lacks, program
from simt.backend import Emulator

import fastconv
from fastconv._training import fp32_precision

_LEFT_OUT = pytest.StashKey()


def _why_no_gpu():
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    build = fastconv._C.build_info()
    return None if build["cuda"] else f"this build has no CUDA kernels: {build['cuda_reason']}"


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="write down what passed: rows, the tutorial")


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # of pytest-xdist: as many processes as cores
        torch.set_num_threads(1)
    if config.option.record:
        config.pluginmanager.register(evidence.Recorder())


def pytest_collection_modifyitems(config, items):
    """Leaves out what needs a GPU where there is none; skips it where it is asked for by name."""
    reason = _why_no_gpu()
    gpu = [item for item in items if item.get_closest_marker("gpu")] if reason else []
    if "gpu" in config.option.markexpr:
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))
    elif gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.stash[_LEFT_OUT] = f"tests left out for want of a GPU: {len(gpu)} ({reason})"


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(_LEFT_OUT, None)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """What a worker of pytest-xdist has left out, its master tells."""
    left_out = getattr(node, "workeroutput", {}).get("left_out")
    if left_out:
        node.config.stash[_LEFT_OUT] = left_out


def pytest_terminal_summary(terminalreporter, config):
    if _LEFT_OUT in config.stash:
        terminalreporter.write_line(config.stash[_LEFT_OUT])


@pytest.fixture
def emulator(monkeypatch):
    """What `problems` calls for ops: rows of the CUDA tables run on the emulator."""
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        pytest.skip(f"the emulator needs a compiler, {compiler} (CXX) is not there")
    made = Emulator()
    monkeypatch.setattr(problems, "ops", made)
    return made


@pytest.fixture
def aarch64(monkeypatch):
    """What `problems` calls for ops: rows of the CPU tables run on an emulated processor."""
    if reason := lacks():
        pytest.skip(reason)
    program()
    made = Aarch64()
    monkeypatch.setattr(problems, "ops", made)
    return made


@pytest.fixture(
    params=["cpu", "emulator", *(pytest.param(n, marks=getattr(pytest.mark, n)) for n in ("gpu", "aarch64"))]
)
def backend(request):
    """Where rows run; see problems.on_backends."""
    has_emulator = request.param in ("emulator", "aarch64")
    emulator = request.getfixturevalue(request.param) if has_emulator else None
    return problems.Backend(request.param, emulator)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def plain_start():
    """Every test draws the same random numbers, and torch computes float32 in float32."""
    torch.manual_seed(0)
    with fp32_precision("ieee"):
        yield


@pytest.fixture
def poisoned_memory():
    """New tensors, outputs and workspace alike, are filled with NaN (integers: the largest value)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def threads():
    """Sets the number of threads; the old one comes back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
