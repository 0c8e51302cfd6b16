# SPDX-License-Identifier: MIT
"""The CUDA kernels, executed on the CPU by the emulator in tests/simt, and the emulator's own tests."""

import os
import re
import shutil

import problems
import pytest
import torch
from problems import Backend, Conv, Numbers, Rejected, attempt
from simt import backend, build, counts, coverage, mutants, resources, tables
from test_introspection import QUESTIONS
from test_kernels import SMALL, check

from fastconv import kernels

ROWS = [row for row in problems.ROWS if row["device"] == "cuda"]
compiles = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")),
    reason="the emulator needs g++ (or a compiler named by CXX)",
)


# --- the door to the tables ---------------------------------------------------------------------------------


@compiles
def test_tables_are_the_same():
    assert list(backend.rows(backend.library())) == [row["name"] for row in ROWS]


@compiles
@pytest.mark.parametrize("level", [75, 80, 90, 100])
@pytest.mark.parametrize("op", QUESTIONS)
def test_choice_for_each_architecture(op, level):
    """A row for float16 is refused exactly below its least level, and one of the rest is chosen."""
    for_float16 = {row["name"] for row in ROWS if "float16" in row["dtypes"]}
    least = {name: row.min_level for name, row in backend.rows(backend.library()).items()}
    sizes, _ = QUESTIONS[op]
    for each in kernels.explain(op, **sizes, dtype="float16", device="cuda", capability=divmod(level, 10)):
        for row in (row for row in each["rows"] if row["name"] in for_float16):
            is_too_new = least[row["name"]] > level
            assert (row["reason"] == "needs a newer GPU than this one") == is_too_new, row
        assert least[each["chosen"]] <= level


@compiles
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_refuses_an_older_gpu(row, emulator):
    numbers = Numbers("whole", problems.DTYPES[row["dtypes"][0]])
    problem = problems.PROBLEMS[row["op"], row["pass_"]](SMALL[row["op"]], numbers)
    emulator.level = backend.rows(backend.library())[row["name"]].min_level - 1
    with pytest.raises(Rejected, match="needs a newer GPU than this one"):
        attempt(row["name"], problem)


@compiles
@pytest.mark.slow
def test_more_weights_than_blocks(emulator):
    """A block that sums for one weight and then for another."""
    row = next(row for row in ROWS if row["name"] == "cuda/conv_wgrad_naive")
    check(row, Backend("emulator", emulator), [(Conv(1, 257, 256, (1, 1), 1), Numbers("whole"), "forward")])


# --- what a wrong kernel looks like -------------------------------------------------------------------------


@compiles
def test_a_stray_read_is_an_exception(emulator):
    """The row is told of one input row more than there is. The process lives on, and so does the emulator."""
    x, w = torch.ones(1, 1, 5, 5), torch.ones(1, 1, 3, 3)
    conv = (1, 1), (1, 1, 1, 1), (1, 1), 1
    call = backend._Call(emulator, "cuda/conv_fprop_naive")
    x_, w_ = call.input("input", x), call.input("weight", w)
    y = call.output("output", torch.empty(1, 1, 5, 5, device="meta"))
    emulator._conv(call, call.args, x_, w_, y, y, *conv)
    call.args.shape.H += 1
    with pytest.raises(RuntimeError) as caught:
        call.run()
    access = r"thread \(20,0,0\) reads 4 bytes at byte 100 of 'input' \(100 bytes\), at naive\.h:\d+"
    kernel = r"kernel for_each_kernel.*conv_fprop<float>.*, block \(0,0,0\), thread \(20,0,0\)"
    assert re.search(rf"out of bounds: {access}.*\n +{kernel}", str(caught.value))
    y = emulator.conv_fprop(x, w, None, *conv, "cuda/conv_fprop_naive")
    assert torch.equal(y, torch.nn.functional.conv2d(x, w, padding=1))


@compiles
@pytest.mark.parametrize("library", ["selftest", pytest.param("selftest_portable", marks=pytest.mark.slow)])
@pytest.mark.parametrize("order", range(len(backend.ORDERS)), ids=backend.ORDERS)
def test_selftest(library, order):
    """Legal tricky code stays silent; its broken twin is found."""
    wrong = []
    for name, expected, found in mutants.cases(build.load(library), order):
        said = any(part in found for part in expected.split("|")) if expected else not found
        if not said:
            wrong.append(f"{name}: expected {expected or 'silence'}, found {found or 'nothing'}")
    assert not wrong, "\n".join(wrong)


@compiles
@pytest.mark.slow
def test_mutants():
    """Every planted bug is noticed, and the kernels without one are right."""
    noticed = mutants.notice_all()
    assert len(noticed) >= 30
    assert not [name for name, by in noticed.items() if not by]


# --- rules for kernel sources -------------------------------------------------------------------------------

SOURCES = [path for path in sorted((build.CSRC / "cuda").iterdir()) if path.suffix in {".h", ".cu", ".cuh"}]
NOT_EMULATED = re.compile(r"<<<|\basm\b|__shared__|__constant__|__CUDA_ARCH|cuda_runtime|FASTCONV_SIMT")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_only_two_files_know_the_platform(path):
    text = re.sub(r"//[^\n]*", "", path.read_text())
    assert bool(NOT_EMULATED.search(text)) == (path.name in ("platform.cuh", "ptx.cuh"))


@pytest.mark.parametrize("path", [*SOURCES, *build.SIMT.glob("*/*.cu")], ids=lambda path: path.name)
def test_tensor_maps_stay_in_place(path):
    """The copy engine reads a map where the launch has put it; a kernel must not copy its parameter."""
    text = re.sub(r"//[^\n]*", "", path.read_text())
    for kernel in re.findall(r"__global__[^{;]*", text):
        assert not re.search(r"(?<!const __grid_constant__ )\bTensorMap\b", kernel), kernel


# --- tables of numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["counts", "resources"])
def test_tables_are_of_these_sources(name):
    table = tables.read(build.SIMT / f"{name}.txt")
    assert table.hashes == tables.hashes(), f"run python tests/simt/{name}.py --write"


def test_no_kernel_spills():
    _, *lines = tables.read(resources.TABLE).lines
    assert {line.split()[6] for line in lines} == {path.name for path in build.kernel_files("product")}
    assert not [line for line in lines if line.split()[1] != "0"]
    assert not [line for line in lines if line.split()[4] == "-"], "counts.py does not launch every kernel"


@pytest.mark.slow
@pytest.mark.parametrize("measured", [counts, resources], ids=lambda module: module.__name__)
def test_table(measured):
    table, tool = tables.read(measured.TABLE), measured.tool()
    if tool != table.tool:
        pytest.skip(f"{measured.TABLE.name} is that of {table.tool}, here is {tool}")
    changed = tables.differences(table, measured.lines())
    assert not changed, f"run python {measured.__file__} --write\n" + "\n".join(changed)


@compiles
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcov"), reason="gcov is not installed")
def test_line_coverage(tmp_path):
    missed = {name: share for name, share, _ in coverage.measure(tmp_path) if share < coverage.LEAST}
    assert not missed
