# SPDX-License-Identifier: MIT
"""Runs the planted bugs of tests/simt/mutants and says what noticed each: `python tests/simt/mutants.py`.

A bug is noticed where the checker finds something, where a result is wrong or, for a bug that only costs
time, where the passes over the shared-memory banks grow beyond those of the kernel without it.
"""

import ctypes
import re
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simt import build

ORDERS = 3


def _shared_passes(library) -> int:
    """Passes over the banks beyond the least possible, by all accesses since the last clear."""
    lines = re.findall(r"(\d+) passes, at least (\d+)", library.simt_statistics().decode())
    return sum(int(passes) - int(least) for passes, least in lines)


def cases(library, order: int, statistics: bool = False):
    """Runs the cases of a library: (name, what is expected, what was found) of each."""
    for name in ("name", "expected", "run"):
        getattr(library, f"simt_case_{name}").restype = ctypes.c_char_p
    for i in range(library.simt_case_count()):
        library.simt_clear()
        library.simt_configure(order, 1, statistics)
        called = (library.simt_case_name, library.simt_case_expected, library.simt_case_run)
        yield tuple((call(i) or b"").decode() for call in called)
    library.simt_configure(0, 1, False)


def notice_all() -> dict[str, str]:
    """What noticed each mutant: the first finding, "wrong result", "bank conflicts", or "".

    Raises:
        RuntimeError: Something was found in a kernel that has no bug.
    """
    library = build.load("mutants")
    findings, passes = {}, {}
    for order in range(ORDERS):
        for name, _, found in cases(library, order, statistics=order == 0):
            findings[name] = findings.get(name) or found
            if order == 0:
                passes[name] = _shared_passes(library)
    noticed = {}
    for name, found in findings.items():
        kernel, _, bug = name.partition(": ")
        if not bug and found:
            raise RuntimeError(f"{kernel} has no bug, but: {found}")
        if bug:
            by = "wrong result" if found.startswith("wrong: ") else found.split("\n")[0]
            more_passes = passes[name] > 2 * passes[kernel] + 100
            noticed[name] = by or ("bank conflicts" if more_passes else "")
    return noticed


if __name__ == "__main__":
    all_noticed = notice_all()
    for mutant, by in all_noticed.items():
        print(f"{mutant:55} {by or 'NOT NOTICED'}")
    sys.exit(not all(all_noticed.values()))
