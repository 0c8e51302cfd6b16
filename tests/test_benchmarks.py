# SPDX-License-Identifier: MIT
"""The front door to the benchmarks opens, and its closing table names whom it compares."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_a_group_from_end_to_end(tmp_path):
    out = tmp_path / "results.json"
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # of xdist
    command = [sys.executable, "-c", "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))", BENCHMARKS]
    command += [
        "--benchmark-only",
        "-q",
        "-k",
        "lenet_fc3-float32-forward- or overhead and Linear-forward-",
        f"--benchmark-json={out}",
    ]
    command += ["-p", "no:cacheprovider"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=alone, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "of torch contiguous" in run.stdout
    results = {
        (b["group"].split()[0], b["extra_info"]["implementation"]): b
        for b in json.loads(out.read_text())["benchmarks"]
    }
    implementations = ("torch contiguous", "fastconv contiguous")
    assert set(results) == {(group, each) for group in ("lenet_fc3", "overhead") for each in implementations}
    ours = results["lenet_fc3", "fastconv contiguous"]["extra_info"]
    assert ours["times_as_fast_as"]["torch contiguous"]["median"] > 0
    assert ours["flops"] == 2 * 64 * 84 * 10
    assert ours["errors"]["output"]["largest_error"] <= ours["errors"]["output"]["allowed"]


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("fastconv channels_last", "torch channels_last"),
        ("fastconv fused contiguous", "torch contiguous"),
        ("torch.compile contiguous", "torch contiguous"),
        ("onnxruntime", "torch contiguous"),
        ("torch channels_last", "torch channels_last"),
    ],
)
def test_whom_a_contender_is_compared_with(name, base):
    spec = importlib.util.spec_from_file_location("benchmarks_conftest", BENCHMARKS / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    assert conftest.baseline(name, ["torch contiguous", "torch channels_last", name]) == base
