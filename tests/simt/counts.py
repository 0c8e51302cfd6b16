# SPDX-License-Identifier: MIT
"""Shared-memory passes and global sectors of each CUDA row, and the dynamic shared memory of each kernel.

`python tests/simt/counts.py` runs every row in every dtype on the problems below, in forward order, and
compares with counts.txt; with --write it writes that table. Composed rows are left out: they call others. A
line has the passes over the banks of shared memory, the least possible, and the source line that wastes most;
the same for sectors of 32 bytes of global memory; row, dtype. Then comes each kernel, with the most dynamic
shared memory that any launch asked for, in bytes. g++ merges and splits plain accesses in its own way, so the
numbers are those of one version of it, named in the first line.
"""

import contextlib
import platform
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import problems
import torch
from problems import DTYPES, AvgPool, Chain, Conv, Linear, Norm, Numbers, Pool, Rejected, attempt

from simt import build, tables
from simt.backend import Emulator

TABLE = build.SIMT / "counts.txt"

# LeNet's convolutions and a linear layer of it; others that are summed in slices or have another filter, so
# that every kernel is launched.
_CONVS = [Conv(1, 6, 16, (14, 14), 5), Conv(1, 24, 24, (5, 5), 5, pool=None), Conv(2, 2, 3, (18, 18), 3)]
_CONVS += [Conv(1, 1, 6, (28, 28), 5, padding=2), Conv(1, 1, 6, (28, 28), 3, padding=1)]
# Depthwise rows have others, in both layouts: a kernel for each filter and stride, with and without vectors.
_DEPTHWISE = [
    Conv(1, 8, 8, (11, 9), taps, stride=stride, padding=taps // 2, groups=8, pool=None)
    for taps, stride in ((3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (7, 2))
]
_LINEARS = [Linear((32,), 84, 120), Linear((2,), 520, 520), Linear((520,), 9, 8)]
_POOL = {"pool": (2, 2, 0)}
CASES = {
    "chain": [Chain.of(2, 1, (28, 28), [(6, 5, {"padding": 2, **_POOL}), (16, 5, _POOL)], (120, 84, 10))],
    "conv": _CONVS,
    "conv_act_pool": _CONVS,
    "max_pool": [Pool(2, 6, (28, 28), 2)],
    "avg_pool": [AvgPool(2, 6, (28, 28), 2)],
    "norm_act_pool": [Norm(2, 6, (28, 28), None)],
    "linear": _LINEARS,
    "linear_act": _LINEARS,
}

_DYNAMIC = " dynamic  kernel"
_LAUNCH = re.compile(r"(?P<kernel>.+): (?P<bytes>\d+) bytes of dynamic shared memory")
_ACCESS = re.compile(
    r"(?P<place>.+) (?P<memory>shared|global) (?:read|write): \d+ requests, "
    r"(?P<done>\d+) (?:passes|sectors), at least (?P<least>\d+), worst conflict \d+"
)


def short(name: str) -> str:
    """A kernel's name without namespaces and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|fastconv::|cuda::|naive::", "", name)
    name = re.sub(r"&\(void ([^()]*)\([^()]*\)\)", r"\1", name)
    return name.removeprefix("void ").rsplit("(", 1)[0].replace("> >", ">>")


def tool() -> str:
    """The compiler and processor whose counts these are."""
    version = subprocess.run(
        [build.compiler(), "-dumpfullversion"], capture_output=True, text=True, check=True
    )
    return f"{Path(build.compiler()).name} {version.stdout.strip()} {platform.machine()}"


class Counts:
    """What the launches of a row have in sum."""

    def __init__(self, reports: list[str]):
        self.done, self.least, self.wasted, self.dynamic = Counter(), Counter(), Counter(), Counter()
        for line in "".join(reports).splitlines():
            if launch := _LAUNCH.fullmatch(line):
                self.dynamic[launch["kernel"]] = max(self.dynamic[launch["kernel"]], int(launch["bytes"]))
                continue
            access = _ACCESS.fullmatch(line)
            memory, done, least = access["memory"], int(access["done"]), int(access["least"])
            self.done[memory] += done
            self.least[memory] += least
            inlined = access["place"].split(" < ")
            place = next((each for each in inlined if ".cu" in each), inlined[0])
            self.wasted[memory, place] += done - least

    def worst(self, memory: str) -> str:
        """The source line with the most passes or sectors beyond the least; "-" where there is no such."""
        lines = sorted(
            (-more, place) for (kind, place), more in self.wasted.items() if kind == memory and more
        )
        return lines[0][1] if lines else "-"


def _problems(row, dtype):
    """(case, numbers) that a row is given."""
    layouts, cases = ["contiguous"], CASES[row["op"]]
    if "_depthwise" in row["name"]:
        layouts, cases = ["contiguous", "channels_last"], _DEPTHWISE
    return [(case, Numbers("whole", DTYPES[dtype], layout)) for layout in layouts for case in cases]


def measure() -> dict[tuple[str, str], Counts]:
    """Runs every CUDA row; by row and dtype."""
    emulator, found = Emulator(), {}
    ops, problems.ops = problems.ops, emulator
    try:
        for row in problems.ROWS:
            if row["device"] == "cpu" or row["name"].endswith("_composed"):
                continue
            for dtype in row["dtypes"]:
                emulator.statistics = []
                for case, numbers in _problems(row, dtype):
                    problem = problems.PROBLEMS[row["op"], row["pass_"]](case, numbers)
                    with contextlib.suppress(Rejected):
                        attempt(row["name"], problem)
                found[row["name"], dtype] = Counts(emulator.statistics)
    finally:
        problems.ops = ops
    return found


def lines() -> list[str]:
    """The table."""
    measured = measure()
    found = [("passes", "least", "at"), ("sectors", "least", "at")]
    result = ["  ".join(f"{a:>8} {b:>8}  {c:24}" for a, b, c in found) + "  row dtype"]
    for (row, dtype), counts in measured.items():
        cells = [
            f"{counts.done[memory]:8} {counts.least[memory]:8}  {counts.worst(memory):24}"
            for memory in ("shared", "global")
        ]
        result.append("  ".join(cells) + f"  {row} {dtype}")
    dynamic = sorted(
        (short(name), size) for counts in measured.values() for name, size in counts.dynamic.items()
    )
    result.append(_DYNAMIC)
    return result + [
        f"{size:8}  {name}" for name, size in dict(dynamic).items()
    ]  # of equal names, the largest


def dynamic_shared_memory() -> dict[str, int]:
    """The last part of the checked-in table: bytes, by the kernel's `short` name."""
    table = tables.read(TABLE).lines
    pairs = (line.split(maxsplit=1) for line in table[table.index(_DYNAMIC) + 1 :])
    return {name: int(size) for size, name in pairs}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(tables.main(TABLE, tool(), lines))
