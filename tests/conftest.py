# SPDX-License-Identifier: MIT
import pytest
import torch

import fastconv

_NO_GPU = "needs a GPU"


def _why_no_gpu():
    if not torch.cuda.is_available():
        return f"{_NO_GPU}: torch sees no CUDA device"
    build = fastconv._C.build_info()
    return None if build["cuda"] else f"this build has no CUDA kernels: {build['cuda_reason']}"


def pytest_collection_modifyitems(items):
    reason = _why_no_gpu()
    if reason:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(_NO_GPU in str(report.longrepr) for report in skipped)
    terminalreporter.write_line(f"tests skipped for want of a GPU: {count}")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def plain_start():
    """Every test draws the same random numbers, and torch computes float32 in float32."""
    torch.manual_seed(0)
    flags = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]
    before = [flag.fp32_precision for flag in flags]
    for flag in flags:
        flag.fp32_precision = "ieee"
    yield
    for flag, value in zip(flags, before, strict=True):
        flag.fp32_precision = value


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
