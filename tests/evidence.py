# SPDX-License-Identifier: MIT
"""fastconv/kernels.json: which CUDA rows have passed their tests on the emulator, and on which GPU.

An entry, {row: {source_hash, emulated, gpu}}, speaks of one state of the sources, by the hash of
buildtools/sources.py. `pytest --record` writes the rows that a run has tested, and the README's table.
"""

import json
import os
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from sources import source_hash

from fastconv import kernels

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "fastconv" / "kernels.json"
README = ROOT / "README.md"
COMMAND = "pytest --record tests/test_kernels.py"
_TABLE = re.compile(r"(?<=<!-- kernels -->\n).*?(?=<!-- /kernels -->)", re.DOTALL)


def cuda_rows():
    """`kernels.list()` of the CUDA tables, with `tree_hash`: of the sources in the tree, as they stand."""
    return [
        {**row, "tree_hash": source_hash(row["file"], ROOT / "csrc")}
        for row in kernels.list()
        if row["device"] == "cuda"
    ]


def read():
    return json.loads(FILE.read_text())


def merged(entries, rows, passed, failed, gpu):
    """The entries after a test run.

    Args:
        entries: Those before it.
        rows: `cuda_rows`. The emulator compiles the tree, a GPU runs what was built.
        passed: {(row, back end): dtypes in which its test_row has passed}.
        failed: {(row, back end)} of any test that failed.
        gpu: The name of the device.
    """
    result = {}
    for row in rows:
        entry = entries.get(row["name"])
        for backend, key, value, tested in (
            ("emulator", "emulated", True, row["tree_hash"]),
            ("gpu", "gpu", gpu, row["source_hash"]),
        ):
            which = row["name"], backend
            if which not in passed and which not in failed:
                continue
            if entry is None or entry["source_hash"] != tested:
                entry = {"source_hash": tested, "emulated": False, "gpu": None}
            if which in failed:
                entry = {**entry, key: False if key == "emulated" else None}
            elif passed[which] >= set(row["dtypes"]):
                entry = {**entry, key: value}
        if entry:
            result[row["name"]] = entry
    return result


def table(rows, entries):
    """What the README says of each CUDA row."""
    lines = ["| kernel | file | dtypes | emulated | GPU |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        entry = entries.get(row["name"], {})
        if entry.get("source_hash") != row["tree_hash"]:
            entry = {"emulated": False, "gpu": None}
        emulated, gpu = "yes" if entry["emulated"] else "no", entry["gpu"] or "not yet"
        lines.append(f"| {row['name']} | {row['file']} | {', '.join(row['dtypes'])} | {emulated} | {gpu} |")
    return "\n".join(lines) + "\n"


def readme_table():
    """The table that stands in the README."""
    return _TABLE.search(README.read_text())[0]


def _replace(path, text):
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)


def write(entries):
    """Writes kernels.json and the README's table."""
    _replace(FILE, json.dumps(entries, indent=1) + "\n")
    _replace(README, _TABLE.sub(lambda _: table(cuda_rows(), entries), README.read_text()))


class Recorder:
    """A pytest plugin that collects what `merged` needs."""

    def __init__(self):
        self.passed, self.failed = defaultdict(set), set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item):
        report = yield
        params = item.callspec.params if hasattr(item, "callspec") else {}
        row = params.get("row")
        name = row["name"] if isinstance(row, dict) else row
        which = name, "gpu" if item.get_closest_marker("gpu") else "emulator"
        if report.failed:
            self.failed.add(which)
        elif report.when == "call" and report.passed and item.originalname == "test_row":
            self.passed[which].add(params["dtype"])
        return report

    def pytest_sessionfinish(self):
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        write(merged(read(), cuda_rows(), self.passed, self.failed, gpu))
