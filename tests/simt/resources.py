# SPDX-License-Identifier: MIT
"""Registers, spills, stack and shared memory of each CUDA kernel for each architecture.

`python tests/simt/resources.py` compiles csrc/cuda with the nvcc on PATH and compares with resources.txt;
with --write it writes that table. With --log FILE it compares what a build with NVCC_APPEND_FLAGS=-Xptxas=-v
has printed instead, for the architectures there. The numbers are those of one version of nvcc, named in the
first line; but dynamic shared memory is what launches on the emulator ask for, by counts.txt; a file that
never takes any asks for none ("-": it does, but counts.py launches no such kernel).
"""

import concurrent.futures
import re
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from simt import build, counts, tables

TABLE = build.SIMT / "resources.txt"
ARCHITECTURES = ("75", "80", "90a", "100")
COLUMNS = ("registers", "spilled", "stack", "static", "dynamic")  # bytes, but for the registers

_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>[^\n]+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def tool() -> str | None:
    """The nvcc on PATH, as in "nvcc 13.0.88"; None where there is none."""
    try:
        text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return "nvcc " + re.search(r"V(\d+\.\d+\.\d+)", text)[1]


def _kernels(log: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """What `ptxas -v` says: architecture, kernel, and all columns but the last."""
    text = subprocess.run(["c++filt"], input=log, capture_output=True, text=True, check=True).stdout
    found = []
    for kernel in _KERNEL.finditer(text):
        spilled = int(kernel["stores"]) + int(kernel["loads"])
        numbers = (int(kernel["registers"]), spilled, int(kernel["stack"]), int(kernel["shared"] or 0))
        found.append((kernel["architecture"], counts.short(kernel["name"]), numbers))
    return found


def _measure(source: Path, architecture: str) -> dict[tuple[str, str, str], tuple[int, ...]]:
    """By architecture, file and kernel; all columns but the last."""
    flags = ["-O3", f"-I{build.CSRC}", f"-arch=sm_{architecture}", "-Xptxas=-v", "-cubin"]
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *flags, str(source), "-o", str(Path(folder) / "kernels")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return {(found, source.name, name): numbers for found, name, numbers in _kernels(done.stderr)}


def lines() -> list[str]:
    """The table: compiles every kernel file for every architecture."""
    dynamic = counts.dynamic_shared_memory()
    sources = {source.name: source for source in build.kernel_files("product")}
    unknown = {name: "-" if "FC_DYN_SMEM" in source.read_text() else 0 for name, source in sources.items()}
    jobs = [(source, each) for source in sources.values() for each in ARCHITECTURES]
    with concurrent.futures.ThreadPoolExecutor(build.MAX_JOBS) as pool:
        found = {}
        for each in pool.map(lambda job: _measure(*job), jobs):
            found |= each
    result = [" ".join(f"{c:>9}" for c in COLUMNS) + "  architecture file kernel"]
    for (architecture, file, name), numbers in sorted(found.items()):
        cells = (*numbers, dynamic.get(name, unknown[file]))
        result.append(" ".join(f"{cell:>9}" for cell in cells) + f"  {architecture} {file} {name}")
    return result


def compare_log(path: str) -> int:
    """Prints how the log of a build differs from the table; 1 if it does."""
    found = _kernels(Path(path).read_text())
    built = {architecture for architecture, _, _ in found}
    in_table = []
    for line in tables.read(TABLE).lines[1:]:
        *numbers, _, architecture, _, name = line.split(maxsplit=len(COLUMNS) + 2)
        if architecture in built:
            in_table.append((architecture, name, tuple(map(int, numbers))))
    print(len(found), "kernels of", *sorted(built))
    changed = set(found) ^ set(in_table)
    print(*sorted(changed), sep="\n")
    return bool(changed or not found)


if __name__ == "__main__":
    if "--log" in sys.argv:
        sys.exit(compare_log(sys.argv[sys.argv.index("--log") + 1]))
    sys.exit(tables.main(TABLE, tool(), lines))
