# SPDX-License-Identifier: MIT
"""benchmarks.gpu_check as a dry run: every stage, what it writes, and that it goes on where it stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["build", "tests", "sanitizer", "ceilings", "rows", "networks", "profile"]


def command(*arguments):
    return [sys.executable, "-m", "benchmarks.gpu_check", "--dry-run", *map(str, arguments)]


def run(*arguments):
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def stage(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def results(folder):
    """The JSON and the Markdown file."""
    return tuple(next(folder.glob(f"*-dry.{kind}")) for kind in ("json", "md"))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu_check")
    run("--out", folder)
    return folder


def test_every_stage(whole_run):
    assert {name: stage(whole_run, name)["state"] for name in STAGES} == dict.fromkeys(STAGES, "done")

    report, table = results(whole_run)
    found = json.loads(report.read_text())
    keys = {"implementation", "device", "threads", "torch", "fastconv", "seconds", "errors"}
    assert found["benchmarks"] and found["ceilings"] and found["profile"] and found["machine_info"]["dry"]
    for each in found["benchmarks"]:
        assert each["extra_info"].keys() >= keys
        assert each["extra_info"]["dry"] and each["extra_info"]["device"] == "no GPU"
        assert each["stats"]["min"] <= each["stats"]["median"] <= each["stats"]["max"]
    for row in [row for row in found["benchmarks"] if row["extra_info"]["implementation"].startswith("cpu/")]:
        errors = row["extra_info"]["errors"]
        assert errors["largest_error"] <= errors["allowed"], row["name"]

    text = table.read_text()
    assert "Dry run" in text and "tiny_conv float32 wgrad" in text
    assert "lenet batch 2 training step" in text and "fashion_cnn batch 2 training step" in text
    assert not re.search(r"\d\.\d", text.split("| call |")[1]), "a figure"


def test_what_is_done_is_not_done_again(whole_run):
    before = {path: path.read_text() for path in whole_run.iterdir()}
    run("--resume", whole_run)
    assert before == {path: path.read_text() for path in whole_run.iterdir()}


def test_resume_after_a_kill(tmp_path):
    """What was done before the kill is not done again."""
    process = subprocess.Popen(
        command("--out", tmp_path, "--stages", "ceilings,rows"), cwd=ROOT, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 100
    while not (tmp_path / "rows.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    begun, ceilings = stage(tmp_path, "rows"), stage(tmp_path, "ceilings")
    assert begun["state"] == "cut" and begun["items"] and ceilings["state"] == "done"

    run("--resume", tmp_path, "--stages", "ceilings,rows")
    rows = stage(tmp_path, "rows")
    assert rows["state"] == "done" and stage(tmp_path, "ceilings") == ceilings
    assert rows["items"].items() >= begun["items"].items() and len(rows["items"]) > len(begun["items"])


def test_a_stage_without_time_is_cut_and_says_so(tmp_path):
    run("--out", tmp_path, "--stages", "rows", "--minutes", "1e-5")
    rows = stage(tmp_path, "rows")
    assert rows["state"] == "cut" and rows["note"] == "13 of 13 items left for --resume"
    assert "13 of 13 items left" in results(tmp_path)[1].read_text()


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    import benchmarks.gpu_check

    return benchmarks.gpu_check


def test_a_stage_that_does_not_stop_is_ended(gpu_check, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "GRACE", 0.1)
    monkeypatch.setattr(gpu_check, "build", lambda run: time.sleep(100))
    start = time.monotonic()
    result = gpu_check.perform("build", gpu_check.Run(tmp_path, True, tmp_path), 0.1)
    assert time.monotonic() - start < 30
    assert result["state"] == "cut" and "ended" in result["note"]


def test_an_item_that_fails_is_tried_again(gpu_check, tmp_path):
    made = gpu_check.Run(tmp_path, True, tmp_path, deadline=time.time() + 100)
    made.work("rows", {"a": lambda: {"value": 1}, "b": lambda: 1 / 0})
    assert stage(tmp_path, "rows")["state"] == "failed"
    made.work("rows", {"a": lambda: {"value": 2}, "b": lambda: {"value": 3}})
    done = stage(tmp_path, "rows")
    assert done["state"] == "done" and [done["items"][key]["value"] for key in "ab"] == [1, 3]


def test_what_was_measured_longest_ago_comes_first(whole_run, tmp_path):
    """One row was never measured; all others were."""
    found = json.loads(results(whole_run)[0].read_text())
    rows = {each["extra_info"]["implementation"] for each in found["benchmarks"]} - {"cpu/linear_wgrad_naive"}
    entries = [{"extra_info": {"implementation": row}} for row in sorted(rows)]
    report = {"datetime": "2030-01-01T00:00:00+00:00", "benchmarks": entries}
    (tmp_path / "history.json").write_text(json.dumps(report))
    run("--out", tmp_path / "out", "--stages", "rows", "--history", tmp_path)
    assert next(iter(stage(tmp_path / "out", "rows")["items"])) == "tiny_linear float32 wgrad"


def test_a_dry_run_makes_the_calls_of_every_shape(gpu_check):
    from benchmarks import passes

    assert {shape.op for shape in passes.SHAPES} == {shape.op for shape in passes.TINY}


def test_results_of_two_runs_are_not_mixed(gpu_check, tmp_path):
    machine = {"gpu": "a", "torch": "1", "source": "x", "dry": True}
    options = gpu_check._options(["--out", str(tmp_path)])
    gpu_check._begin(options, machine)
    with pytest.raises(SystemExit, match="--resume"):
        gpu_check._begin(options, machine)
    options = gpu_check._options(["--resume", str(tmp_path)])
    with pytest.raises(SystemExit, match="source: x, not y"):
        gpu_check._begin(options, {**machine, "source": "y"})
