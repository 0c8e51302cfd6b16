# SPDX-License-Identifier: MIT
"""The benchmarks open, name what they compare, notice what is slower or wrong; their tables are kept."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
GROUP = "lenet_fc3 float32 forward: fastconv contiguous"
# What is planted into fastconv.functional.linear.
SLOWER = "time.sleep(0.002); y = linear(*args)"
WRONG = "y = linear(*args) + 1e-3"


def load(name):
    """A file of benchmarks/, which is no package."""
    sys.path.append(str(ROOT))
    try:
        spec = importlib.util.spec_from_file_location(f"benchmarks.{name}", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ROOT))


def benchmark(folder, *options, planted=""):
    """Runs one group, with a fault in fastconv.functional.linear if there is one."""
    plugin = "import time\nfrom fastconv import functional\nlinear = functional.linear\n"
    if planted:
        plugin += f"def planted(*args):\n    {planted}\n    return y\nfunctional.linear = planted\n"
    (folder / "planted.py").write_text(plugin)
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # of xdist
    alone |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))", BENCHMARKS]
    command += ["--benchmark-only", "-q", "-k", "lenet_fc3-float32-forward-", "-p", "planted"]
    command += ["-p", "no:cacheprovider", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=alone, timeout=300)


def baseline(folder):
    """A ratio that is kept by far, and broken by far with milliseconds planted in a call of microseconds."""
    path = folder / "baseline.json"
    path.write_text(json.dumps({GROUP: 0.3}))
    return path


def test_a_group_from_end_to_end(tmp_path):
    out = tmp_path / "results.json"
    run = benchmark(tmp_path, f"--benchmark-json={out}", f"--guard={baseline(tmp_path)}")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "of torch contiguous" in run.stdout
    report = json.loads(out.read_text())
    assert "node" not in report["machine_info"]
    results = {b["extra_info"]["implementation"]: b for b in report["benchmarks"]}
    assert set(results) == {"torch contiguous", "fastconv contiguous"}
    ours = results["fastconv contiguous"]["extra_info"]
    assert ours["times_as_fast_as"]["torch contiguous"]["median"] > 0
    assert ours["flops"] == 2 * 64 * 84 * 10
    assert ours["bytes"] == 4 * (64 * 84 + 84 * 10 + 64 * 10)
    seconds, peaks = ours["seconds"]["median"], ours["peaks"]
    limit = max(ours["flops"] / peaks["flops_per_s"], ours["bytes"] / peaks["bytes_per_s"])
    assert ours["share_of_peak"] == pytest.approx(limit / seconds)
    assert ours["errors"]["output"]["largest_error"] <= ours["errors"]["output"]["allowed"]


def test_what_is_slower_is_noticed(tmp_path):
    run = benchmark(tmp_path, f"--guard={baseline(tmp_path)}", planted=SLOWER)
    assert run.returncode == 1, run.stdout + run.stderr
    assert f"{GROUP}: was 0.30 times as fast as torch, now 0.0" in run.stdout


def test_what_is_wrong_is_noticed(tmp_path):
    run = benchmark(tmp_path, planted=WRONG)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "lenet_fc3 contiguous output: {'largest_error': " in run.stdout


@pytest.mark.parametrize(
    ("found", "noticed"),
    [([0.7], False), ([0.6, 0.7], False), ([0.6, 0.6, 0.7], False), ([0.6, 0.6, 0.6], True)],
)
def test_a_ratio_has_fallen_where_all_repeats_say_so(tmp_path, found, noticed):
    path = tmp_path / "baseline.json"
    path.write_text('{"a": 1.0}')
    guard, repeats = load("guard").Guard(str(path), False), iter(found)
    if noticed:
        with pytest.raises(AssertionError, match="a: was 1.00 times as fast as torch, now 0.60, 0.60, 0.60"):
            guard.check("a", next(repeats), lambda: next(repeats), None)
    else:
        guard.check("a", next(repeats), lambda: next(repeats), None)
    assert next(repeats, None) is None


def test_a_baseline_is_added_to(tmp_path, monkeypatch):
    module = load("guard")
    monkeypatch.setattr(module, "BASELINES", tmp_path)
    monkeypatch.setattr(module, "machine_class", lambda device: "some")
    for key, ratio in (("a", 1.0), ("b", 2.0004), ("a", 3.0)):
        guard = module.Guard(None, True)
        guard.check(key, ratio, None, None)
        guard.write(None)
    assert json.loads((tmp_path / "some.json").read_text()) == {"a": 3.0, "b": 2.0}
    with pytest.warns(UserWarning, match="no baseline for this class of machine, other"):
        monkeypatch.setattr(module, "machine_class", lambda device: "other")
        module.Guard("", False).check("a", 0.01, None, None)


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
    conftest = load("conftest")
    assert conftest.baseline(name, ["torch contiguous", "torch channels_last", name]) == base


# --- the report ---------------------------------------------------------------------------------------------


def test_tables_are_those_of_the_results():
    """What `python -m benchmarks.report` writes stands in the tree."""
    report = load("report")
    results = [report.Results.read(path) for path in sorted(report.RESULTS.glob("*.json"))]
    assert report.MARKED.search(report.README.read_text())[0] == report.readme(results)
    assert report.DOCUMENT.read_text() == report.document(results)
    for path in report.MARKED.search(report.README.read_text())[0].split("](")[1:]:
        assert (ROOT / path.split(")")[0]).exists()


def test_every_plot_is_drawn(tmp_path):
    report = load("report")
    results = report.Results.read(sorted(report.RESULTS.glob("*.json"))[0])
    for suite in report.SECTIONS:
        for plot in report.plots_of(results, suite) if results[suite] else ():
            report.plots.save(report.plots.DRAWINGS[plot](results), tmp_path / f"{plot}.png")
            assert (tmp_path / f"{plot}.png").read_bytes()[:4] == b"\x89PNG"


def test_exponent():
    sizes = [1, 2, 4, 8, 16, 32]
    assert load("plots").exponent(sizes, [5 + n**2 if n < 8 else 3 * n**1.5 for n in sizes]) == pytest.approx(
        1.5
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.234e-6, "1.23 us"), (123.4e-6, "123 us"), (0.0123, "12.3 ms"), (2.5, "2500 ms")]
)
def test_duration(seconds, text):
    assert load("report").duration(seconds) == text
