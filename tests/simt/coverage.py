# SPDX-License-Identifier: MIT
"""Which lines of the CUDA kernels the emulated tests execute: `python tests/simt/coverage.py`.

Compiles the kernel files with --coverage, without the checker, runs the emulator's test_row of
tests/test_kernels.py on them in two dtypes and asks gcov. Prints each file's share and its missed lines.
"""

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simt import build

TESTS = build.SIMT.parent
LEAST = 0.95  # of the lines of each file

_RUN = """
import pathlib, sys
import pytest
from simt import build
build.build = lambda library: pathlib.Path(sys.argv[1])
build.load("product").simt_watch(False)
chosen = "test_row and emulator and (float32 or bfloat16)"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", chosen, sys.argv[2]]))
"""


def executed(folder: Path) -> dict[str, dict[int, int]]:
    """Runs the tests on a library built in `folder`; for each file of csrc/cuda, how often its lines ran."""
    kernels = build.kernel_files("product")
    objects = []
    for source in [*kernels, *build.host_files("product")]:
        objects.append(folder / f"{source.parent.name}-{source.name}.o")
        build.compile_file(source, ["--coverage", "-O1"] if source in kernels else [], objects[-1])
    build.link(folder / "product.so", objects, ("--coverage",))
    command = [sys.executable, "-c", _RUN, str(folder / "product.so"), str(TESTS / "test_kernels.py")]
    subprocess.run(command, cwd=TESTS, check=True)

    counts = defaultdict(lambda: defaultdict(int))
    for notes in sorted(folder.glob("*.cu.gcno")):
        text = subprocess.run(
            ["gcov", "--json-format", "--stdout", notes], capture_output=True, check=True
        ).stdout
        for file in json.loads(text)["files"]:
            path = Path(file["file"])
            if path.parent == build.CSRC / "cuda":
                for line in file["lines"]:
                    counts[path.name][line["line_number"]] += line["count"]
    return counts


def measure(folder: Path) -> list[tuple[str, float, list[int]]]:
    """Of each file: its name, the share of its lines that ran, the lines that did not."""
    files = executed(folder)
    missed = {name: sorted(n for n, count in lines.items() if not count) for name, lines in files.items()}
    return [(name, 1 - len(missed[name]) / len(lines), missed[name]) for name, lines in sorted(files.items())]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for name, share, missed in measure(Path(scratch)):
            print(f"{name:30} {share:7.1%}", *(["missed:", *missed] if missed else []))
