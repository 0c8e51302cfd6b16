# SPDX-License-Identifier: MIT
"""Registers, spills, stack and static shared memory of each CUDA kernel, as ptxas reports them.

`python tests/simt/resources.py` compiles csrc/cuda with the nvcc on PATH and compares with resources.txt;
with --write it writes that table. The numbers are those of one version of nvcc, named in the first line.
"""

import concurrent.futures
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simt import build

TABLE = build.SIMT / "resources.txt"
ARCHITECTURES = ("75", "80", "90a", "100")
COLUMNS = ("registers", "spilled", "stack", "shared")  # bytes, but for the registers

_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>[^\n]+)' for.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)

Resources = dict[tuple[str, str, str], tuple[int, ...]]  # (architecture, file, kernel): COLUMNS


def nvcc_version() -> str | None:
    """Of the nvcc on PATH, as in "13.0.88"; None where there is none."""
    try:
        text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return re.search(r"V(\d+\.\d+\.\d+)", text)[1]


def short(name: str) -> str:
    """A kernel's name without namespaces and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|fastconv::|cuda::|naive::", "", name)
    name = re.sub(r"&\(void ([^()]*)\([^()]*\)\)", r"\1", name)
    return name.removeprefix("void ").rsplit("(", 1)[0].replace("> >", ">>")


def _measure(source: Path, architecture: str) -> Resources:
    flags = ["-O3", f"-I{build.CSRC}", f"-arch=sm_{architecture}", "-Xptxas=-v", "-cubin"]
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *flags, str(source), "-o", str(Path(folder) / "kernels")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    text = subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True, check=True).stdout
    found = {}
    for kernel in _KERNEL.finditer(text):
        spilled = int(kernel["stores"]) + int(kernel["loads"])
        numbers = (int(kernel["registers"]), spilled, int(kernel["stack"]), int(kernel["shared"] or 0))
        found[f"sm_{architecture}", source.name, short(kernel["name"])] = numbers
    return found


def measure() -> Resources:
    """Compiles every kernel file for every architecture."""
    jobs = [(source, each) for source in build.kernel_files("product") for each in ARCHITECTURES]
    with concurrent.futures.ThreadPoolExecutor(build.MAX_JOBS) as pool:
        found = [pool.submit(_measure, *job) for job in jobs]
        return {kernel: numbers for each in found for kernel, numbers in each.result().items()}


def read() -> tuple[str, Resources]:
    """The version of nvcc in the checked-in table, and its numbers."""
    first, _, *lines = TABLE.read_text().splitlines()
    rows = (line.split(maxsplit=6) for line in lines)
    table = {(arch, file, name): tuple(map(int, numbers)) for *numbers, arch, file, name in rows}
    return first.split()[-1], table


def write(resources: Resources) -> None:
    lines = [f"nvcc {nvcc_version()}", " ".join(f"{c:>9}" for c in COLUMNS) + "  architecture file kernel"]
    for (architecture, file, name), numbers in sorted(resources.items()):
        lines.append(" ".join(f"{n:9}" for n in numbers) + f"  {architecture} {file} {name}")
    new = TABLE.with_suffix(".new")
    new.write_text("\n".join(lines) + "\n")
    os.replace(new, TABLE)


def differences(table: Resources, resources: Resources) -> list[str]:
    """What has changed, one line a kernel."""
    return [
        f"{' '.join(kernel)}: {table.get(kernel, 'new')} -> {resources.get(kernel, 'gone')}"
        for kernel in sorted(table.keys() | resources.keys())
        if table.get(kernel) != resources.get(kernel)
    ]


if __name__ == "__main__":
    if "--write" in sys.argv:
        sys.exit(write(measure()))
    changed = differences(read()[1], measure())
    print(*COLUMNS)
    print(*changed, sep="\n")
    sys.exit(bool(changed))
