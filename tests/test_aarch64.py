# SPDX-License-Identifier: MIT
"""The door to the CPU rows on aarch64, through which test_kernels.py goes."""

import problems
import pytest
import torch
from problems import Backend, Numbers, attempt
from simt.backend import _Call, rows
from test_kernels import SMALL

pytestmark = pytest.mark.aarch64

CONV = (1, 1), (0, 0, 0, 0), (1, 1), 1


def test_its_rows_are_those_of_portable_code(aarch64):
    found = [row["name"] for row in problems.ROWS if Backend("aarch64").runs(row)]
    assert list(rows(aarch64.library)) == found and len(found) > 30
    assert not any("avx" in name for name in found)


def call(aarch64, x, size):
    """A call that writes an output of this size, whatever that of `x` asks for."""
    call = _Call(aarch64, "cpu/conv_fprop_naive")
    x_, w_ = call.input("input", x), call.input("weight", torch.ones(1, 1, 1, 1))
    y = call.output("output", torch.empty(size, device="meta"))
    aarch64._conv(call, call.args, x_, w_, y, x_, *CONV)
    return call


def test_a_stray_write_is_found(aarch64):
    x = torch.ones(1, 1, 3, 3)
    call(aarch64, x, (1, 1, 3, 3)).run()
    with pytest.raises(RuntimeError, match="12 bytes beside its outputs are changed"):
        call(aarch64, x, (1, 1, 2, 3)).run()


def test_a_crash_is_an_exception_and_the_next_call_works(aarch64):
    made = call(aarch64, torch.ones(1, 1, 3, 3), (1, 1, 3, 3))
    made.args.x.data = 8
    with pytest.raises(RuntimeError, match="qemu-aarch64 ends with -11"):
        made.run()
    case, numbers = SMALL["conv"], Numbers("whole")
    problem = problems.PROBLEMS["conv", "fprop"](case, numbers)
    assert not list(problem.wrong(attempt("cpu/conv_fprop_igemm_portable", problem), numbers))
