# SPDX-License-Identifier: MIT
"""The tutorial runs, and is stored as it came out: `pytest --record` stores it anew."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "tutorial.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_every_cell_runs(notebook, tmp_path, monkeypatch, request):
    for folder in ("JUPYTER_DATA_DIR", "IPYTHONDIR"):  # nothing of the user's
        monkeypatch.setenv(folder, str(tmp_path))
    run = nbclient.NotebookClient(notebook, timeout=300, record_timing=False, coalesce_streams=True)
    run.execute(cwd=str(tmp_path))  # raises CellExecutionError where a cell does
    if request.config.option.record:
        notebook.metadata.language_info = {"name": "python"}
        nbformat.write(notebook, NOTEBOOK)


def test_stored_as_it_came_out(notebook):
    """Run from top to bottom without an error or a warning, and of no particular machine."""
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) >= 6
    assert all(set(cell.metadata) == set() for cell in notebook.cells)
    assert notebook.metadata.language_info == {"name": "python"}
    text = NOTEBOOK.read_text()
    assert not re.findall(r"(?<![\w.])/(?:home|root|work|tmp|opt|usr|Users|var)/", text)
    assert len(text) < 300_000
