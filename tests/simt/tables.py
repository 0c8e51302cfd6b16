# SPDX-License-Identifier: MIT
"""The checked-in tables of measured numbers.

The first line names what measured them, then comes one line a source with its hash, then titles, then the
table. A table is renewed by its command, `python tests/simt/NAME.py --write`.
"""

import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import build

sys.path.insert(0, str(build.CSRC.parent / "buildtools"))
from sources import source_hash  # noqa: E402


class Table(NamedTuple):
    tool: str
    hashes: dict[str, str]
    lines: list[str]


def hashes() -> dict[str, str]:
    """Of each kernel file of the product."""
    files = [f"cuda/{path.name}" for path in build.kernel_files("product")]
    return {file: source_hash(file, build.CSRC) for file in files}


def read(path: Path) -> Table:
    tool, *lines = path.read_text().splitlines()
    count = next(i for i, line in enumerate(lines) if not line)
    return Table(tool, dict(line.split() for line in lines[:count]), lines[count + 1 :])


def write(path: Path, tool: str, lines: list[str]) -> None:
    text = [tool, *map(" ".join, hashes().items()), "", *lines]
    path.with_suffix(".new").write_text("\n".join(text) + "\n")
    os.replace(path.with_suffix(".new"), path)


def differences(table: Table, lines: list[str]) -> list[str]:
    """What has changed, in the form of diff."""
    changes = difflib.unified_diff(table.lines, lines, "checked in", "measured", n=0, lineterm="")
    return list(changes)


def main(path: Path, tool: str | None, measure: Callable[[], list[str]]) -> int:
    """The command of a table: compares, or writes with --write."""
    if "--write" in sys.argv:
        write(path, tool, measure())
        return 0
    changed = differences(read(path), measure())
    print(*changed, sep="\n")
    return bool(changed)
