# SPDX-License-Identifier: MIT
"""fastconv/kernels.json: that it speaks of these sources, and says nothing that was not run."""

import json
import re

import evidence
import pytest
from problems import ROWS

from fastconv import kernels

CUDA_ROWS = evidence.cuda_rows()


def test_every_cuda_row_has_passed_on_the_emulator():
    entries = evidence.read()
    assert set(entries) == {row["name"] for row in CUDA_ROWS}, f"run {evidence.COMMAND}"
    missing = [row["name"] for row in CUDA_ROWS if not _says(entries[row["name"]], row["tree_hash"])]
    assert not missing, f"changed since the emulator ran them; run {evidence.COMMAND}"


def _says(entry, source_hash):
    return entry["source_hash"] == source_hash and entry["emulated"]


def test_readme_table():
    expected = evidence.table(CUDA_ROWS, evidence.read())
    assert evidence.readme_table() == expected, f"run {evidence.COMMAND}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_a_row_names_the_file_of_its_kernel(row):
    """The file defines a function whose name begins the row's."""
    name = row["name"].partition("/")[2]
    functions = re.findall(r"^void (\w+)\(", (evidence.ROOT / "csrc" / row["file"]).read_text(), re.MULTILINE)
    assert any(name == each or name.startswith(each + "_") for each in functions)


def test_another_source_counts_as_nothing(monkeypatch, tmp_path):
    cpu, row, other = ROWS[0], *CUDA_ROWS[:2]
    entry = {"source_hash": row["source_hash"], "emulated": True, "gpu": "NVIDIA H200"}
    entries = {row["name"]: entry, other["name"]: {**entry, "source_hash": "0123456789abcdef"}}
    (tmp_path / "kernels.json").write_text(json.dumps(entries))
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "kernels.py"))
    listed = {each["name"]: (each["emulated"], each["gpu"]) for each in kernels.list()}
    assert listed[row["name"]] == (True, "NVIDIA H200")
    assert listed[other["name"]] == (False, None)
    assert listed[CUDA_ROWS[2]["name"]] == (False, None)
    assert listed[cpu["name"]] == (None, None)


ALL, SOME = {"float32", "float64"}, {"float32"}
OLD, NEW = {"source_hash": "old", "emulated": True, "gpu": "V100"}, "new"


@pytest.mark.parametrize(
    ("before", "backend", "passed", "failed", "after"),
    [
        (None, "emulator", ALL, False, (NEW, True, None)),
        (None, "emulator", SOME, False, (NEW, False, None)),
        (None, "gpu", ALL, False, (NEW, False, "H200")),
        (OLD, "emulator", ALL, False, (NEW, True, None)),  # the GPU ran another source
        (OLD, "emulator", None, False, ("old", True, "V100")),  # not tested
        ({**OLD, "source_hash": NEW}, "gpu", ALL, False, (NEW, True, "H200")),
        ({**OLD, "source_hash": NEW}, "gpu", SOME, False, (NEW, True, "V100")),
        ({**OLD, "source_hash": NEW}, "gpu", ALL, True, (NEW, True, None)),
        ({**OLD, "source_hash": NEW}, "emulator", ALL, True, (NEW, False, "V100")),
    ],
)
def test_what_is_recorded(before, backend, passed, failed, after):
    row = {"name": "row", "dtypes": sorted(ALL), "source_hash": NEW, "tree_hash": NEW}
    which = "row", backend
    merged = evidence.merged(
        {"row": before, "gone": OLD} if before else {},
        [row],
        {which: passed} if passed else {},
        {which} if failed else set(),
        "H200",
    )
    assert list(merged) == ["row"]
    assert tuple(merged["row"].values()) == after


PYTEST_FILE = """
import pytest

@pytest.mark.parametrize("row, dtype", [("good", "a"), ("good", "b"), ("bad", "a"), ("bad", "b")])
def test_row(row, dtype):
    assert (row, dtype) != ("bad", "b")

@pytest.mark.parametrize("row", ["worse"])
def test_other(row):
    assert False
"""


def test_the_recorder_sees_what_passes_and_fails(tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text(PYTEST_FILE)
    recorder = evidence.Recorder()
    monkeypatch.setattr(recorder, "pytest_sessionfinish", lambda: None)
    pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)], [recorder])
    assert recorder.passed == {("good", "emulator"): {"a", "b"}, ("bad", "emulator"): {"a"}}
    assert recorder.failed == {("bad", "emulator"), ("worse", "emulator")}
