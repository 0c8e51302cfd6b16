# SPDX-License-Identifier: MIT
"""The CUDA kernels, executed on the CPU by the emulator in tests/simt, and the emulator's own tests."""

import os
import re
import shutil

import problems
import pytest
import torch
from problems import DTYPES, LAYOUTS, Conv, Linear, Numbers, Pool, Rejected, attempt
from simt import backend, build, mutants, resources
from test_kernels import CASES

ROWS = [row for row in problems.ROWS if row["device"] == "cuda"]
compiles = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")),
    reason="the emulator needs g++ (or a compiler named by CXX)",
)


@pytest.fixture
def emulator(monkeypatch):
    """What `problems` calls for ops: rows of the CUDA tables run on the emulator."""
    made = backend.Emulator()
    monkeypatch.setattr(problems, "ops", made)
    return made


# --- every row of every CUDA table --------------------------------------------------------------------------

# One small problem an op, for what is tried in all combinations.
SMALL = {
    "conv": Conv(2, 3, 5, (7, 6), 3, stride=(2, 1), padding=1),
    "conv_act_pool": Conv(2, 3, 5, (7, 6), 3, padding=1, pool=(3, 2, 1)),
    "max_pool": Pool(2, 3, (7, 6), 3, 2, 1),
    "linear": Linear((5,), 7, 19),
    "linear_act": Linear((5,), 7, 19),
}


def _work(case):
    """Multiply-adds of a case, as far as it has any."""
    if isinstance(case, Linear):
        return torch.Size(case.rows).numel() * case.n * case.k
    if isinstance(case, Conv):
        return torch.Size(case.output_size).numel() * torch.Size(case.weight_size[1:]).numel()
    return 0


def _cases(row):
    """The cases of a row. A large one only tells more where there are tiles, and takes its time."""
    most = 10**7 if "tiled" in row["name"] else 3 * 10**5
    return [case for case in CASES[row["op"]] if _work(case) <= most]


def _check(row, runs, emulator):
    """Runs (case, numbers, order) on a row, and fails with all that is wrong."""
    wrong, reasons, accepted = [], set(), 0
    for case, numbers, order in runs:
        emulator.order = order
        problem = problems.PROBLEMS[row["op"], row["pass_"]](case, numbers)
        try:
            outputs = attempt(row["name"], problem)
            accepted += 1
            found = list(problem.wrong(outputs, numbers))
        except Rejected as reason:
            reasons.add(str(reason))
            continue
        except RuntimeError as report:
            found = [str(report)]
        wrong += [f"{sentence}: {case}, {numbers}, {order} order" for sentence in found]
    assert not wrong, f"{len(wrong)} wrong\n" + "\n".join(wrong[:10])
    assert accepted, f"no case was accepted: {reasons}"


def _rows():
    return pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])


@compiles
@_rows()
def test_row(row, emulator):
    """Every case once, dtypes, layouts and orders in turn."""
    dtypes, layouts, orders = list(DTYPES.values()), list(LAYOUTS), backend.ORDERS
    runs = [
        (case, Numbers("whole", dtypes[i % 4], layouts[i % 5]), orders[i % 3])
        for i, case in enumerate(_cases(row))
    ]
    _check(row, runs, emulator)


@compiles
@_rows()
def test_row_in_all_layouts(row, emulator):
    """Every dtype in every layout, and by the error rule."""
    runs = [
        (SMALL[row["op"]], Numbers(kind, dtype, layout), backend.ORDERS[i % 3])
        for kind, layouts in {"whole": LAYOUTS, "normal": ("contiguous", "channels_last")}.items()
        for i, layout in enumerate(layouts)
        for dtype in DTYPES.values()
    ]
    _check(row, runs, emulator)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("order", backend.ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@_rows()
def test_row_in_full(row, dtype, order, emulator):
    runs = [
        (case, Numbers("whole", DTYPES[dtype], layout), order)
        for case in CASES[row["op"]]
        for layout in LAYOUTS
    ]
    _check(row, runs, emulator)


@compiles
@pytest.mark.slow
def test_more_weights_than_blocks(emulator):
    """A block that sums for one weight and then for another."""
    row = next(row for row in ROWS if row["name"] == "cuda/conv_wgrad_naive")
    _check(row, [(Conv(1, 257, 256, (1, 1), 1), Numbers("whole"), "forward")], emulator)


@compiles
def test_tables_are_the_same():
    assert list(backend.rows()) == [row["name"] for row in ROWS]


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


# --- resources ----------------------------------------------------------------------------------------------


def test_no_kernel_spills():
    _, table = resources.read()
    assert {file for _, file, _ in table} == {path.name for path in build.kernel_files("product")}
    assert not {kernel for kernel, (_, spilled, _, _) in table.items() if spilled}


@pytest.mark.slow
def test_resource_table():
    version, table = resources.read()
    if resources.nvcc_version() != version:
        pytest.skip(f"the resource table is that of nvcc {version}, here is {resources.nvcc_version()}")
    changed = resources.differences(table, resources.measure())
    assert not changed, "run python tests/simt/resources.py --write\n" + "\n".join(changed)
