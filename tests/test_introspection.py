# SPDX-License-Identifier: MIT
"""fastconv.kernels: what the tables hold, what they choose, and forcing a row."""

import itertools
import re

import pytest
import torch
from problems import DTYPES, PROBLEMS, ROWS

import fastconv
from fastconv import functional as G
from fastconv import kernels

CONV = dict(input=(64, 1, 32, 32), weight=(6, 1, 5, 5))
STAGES = G.conv_stage(act="relu", pool_kernel_size=2) + G.linear_stage()
QUESTIONS = {
    "chain": (
        dict(input=(64, 1, 8, 8), plan=STAGES, params=[(6, 1, 5, 5), (6,), (10, 24), (10,)]),
        ["forward", "backward"],
    ),
    "conv2d": (CONV, ["fprop", "dgrad", "wgrad"]),
    "conv2d_relu_max_pool2d": (dict(CONV, pool_kernel_size=2), ["forward", "backward"]),
    "max_pool2d": (dict(input=(64, 6, 28, 28), kernel_size=2), ["forward", "backward"]),
    "avg_pool2d": (dict(input=(64, 6, 28, 28), kernel_size=2), ["forward", "backward"]),
    "batch_norm_relu_max_pool2d": (
        dict(input=(64, 32, 28, 28), pool_kernel_size=2),
        ["forward", "backward"],
    ),
    "linear": (dict(input=(64, 400), weight=(120, 400)), ["fprop", "dgrad", "wgrad", "backward"]),
    "conv1d": (dict(input=(64, 3, 100), weight=(6, 3, 5), padding=2), ["fprop", "dgrad", "wgrad"]),
    "conv3d": (dict(input=(2, 3, 8, 9, 10), weight=(6, 3, 3, 3, 3)), ["fprop", "dgrad", "wgrad"]),
    "max_pool1d": (dict(input=(64, 6, 100), kernel_size=2), ["forward", "backward"]),
    "max_pool3d": (dict(input=(2, 6, 8, 8, 8), kernel_size=(1, 2, 2)), ["forward", "backward"]),
    "avg_pool1d": (dict(input=(64, 6, 100), kernel_size=2), ["forward", "backward"]),
    "avg_pool3d": (dict(input=(2, 6, 8, 8, 8), kernel_size=2), ["forward", "backward"]),
}


def test_rows():
    names = [row["name"] for row in ROWS]
    assert len(set(names)) == len(names)
    for row in ROWS:
        assert set(row) == {
            "name",
            "file",
            "source_hash",
            "op",
            "pass_",
            "device",
            "dtypes",
            "layouts",
            "built",
            "emulated",
            "gpu",
        }
        assert re.fullmatch(r"(cpu|cuda)/[a-z0-9_]+", row["name"]) and row["name"].startswith(
            row["device"] + "/"
        )
        assert row["dtypes"] and set(row["dtypes"]) <= set(DTYPES)
        assert row["layouts"] and set(row["layouts"]) <= {"contiguous", "channels_last", "strided"}
    assert all(row["built"] for row in ROWS if row["device"] == "cpu")
    assert {row["built"] for row in ROWS if row["device"] == "cuda"} == {fastconv._C.build_info()["cuda"]}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("table", PROBLEMS, ids="_".join)
def test_the_last_row_takes_everything(table, device):
    rows = [row for row in ROWS if (row["op"], row["pass_"], row["device"]) == (*table, device)]
    assert re.search("_(naive|composed)$", rows[-1]["name"])
    assert rows[-1]["dtypes"] == list(DTYPES) and len(rows[-1]["layouts"]) == 3


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("op", QUESTIONS)
def test_explain(op, device, dtype, layout):
    """The cheapest row that rejects nothing is chosen; needs no GPU."""
    sizes, passes = QUESTIONS[op]
    if op.endswith("1d") and layout == "channels_last":
        with pytest.raises(ValueError, match=f"{op} has no layout channels_last"):
            kernels.explain(op, **sizes, layout=layout)
        return
    answer = kernels.explain(op, **sizes, device=device, dtype=dtype, layout=layout)
    assert [each["pass_"] for each in answer] == passes
    for each in answer:
        accepted = {row["name"]: row["cost_us"] for row in each["rows"] if row["reason"] is None}
        assert each["chosen"] == min(accepted, key=accepted.get)
        assert all(cost > 0 for cost in accepted.values())
        for row in each["rows"]:
            assert (row["cost_us"] is None) == (row["reason"] is not None)


def test_explain_says_why_not():
    depthwise = kernels.explain("conv2d", **CONV, groups=1, device="cpu")
    reasons = {row["name"]: row["reason"] for each in depthwise for row in each["rows"] if row["reason"]}
    assert all(re.match("[a-z]", reason) for reason in reasons.values())
    assert kernels.explain("conv2d", **CONV, dtype=torch.float64)[0]["chosen"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(op="conv4d", input=(1,)), ValueError, "op must be one of conv1d, .*'conv4d'"),
        (
            dict(op="conv1d", input=(1, 1, 9), weight=(1, 1, 3), stride=(1, 2)),
            RuntimeError,
            r"conv1d: stride must be one int or 1, got \(1, 2\)",
        ),
        (dict(op="avg_pool1d", input=(1, 1, 9), kernel_size=(2, 2)), RuntimeError, "kernel_size must be one"),
        (dict(op="conv2d", input=(1, 1, 4, 4)), ValueError, "conv2d needs weight"),
        (dict(op="max_pool2d", input=(1, 1, 4, 4)), ValueError, "max_pool2d needs kernel_size"),
        (dict(op="avg_pool2d", input=(1, 1, 4, 4)), ValueError, "avg_pool2d needs kernel_size"),
        (dict(op="chain", input=(1, 1, 4, 4), plan=STAGES), ValueError, "chain needs params"),
        (dict(op="chain", input=(1, 4), plan=(1, 0, 0, 7), params=[(3, 4)]), RuntimeError, "kind of a stage"),
        (dict(op="conv2d", **CONV, device="tpu"), RuntimeError, "device is unknown: tpu"),
        (dict(op="conv2d", **CONV, dtype="int8"), RuntimeError, "dtype is unknown: int8"),
        (dict(op="conv2d", **CONV, layout="nchw"), RuntimeError, "layout is unknown: nchw"),
        (
            dict(op="conv2d", input=(1, 2, 4, 4), weight=(3, 1, 3, 3)),
            RuntimeError,
            "input.size.1./groups = 2, got 1",
        ),
        (
            dict(op="conv2d", input=(1, 4, 4), weight=(3, 1, 3, 3)),
            RuntimeError,
            r"got input of size \[1, 4, 4\]",
        ),
        (dict(op="conv2d", input=(), weight=()), RuntimeError, "input of size"),
        (dict(op="linear", input=(), weight=(3, 4)), RuntimeError, "input must have at least 1 dimension"),
        (dict(op="linear", input=(3, 5), weight=(3, 4)), RuntimeError, "got 5"),
        (dict(op="max_pool2d", input=(1, 1, 4, 4), kernel_size=9), RuntimeError, "window is larger"),
    ],
)
def test_explain_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        kernels.explain(**arguments)


def test_what_is_explained_is_what_runs():
    """A forced choice changes nothing, bit for bit."""
    x, w = torch.randn(8, 3, 20, 20), torch.randn(6, 3, 3, 3)
    chosen = kernels.explain("conv2d", input=x.shape, weight=w.shape)[0]["chosen"]
    free = G.conv2d(x, w)
    with kernels.force(chosen):
        assert torch.equal(G.conv2d(x, w), free)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_axis_and_1x1_reach_the_rows_of_two(device):
    """The same row at the same predicted cost as for an image of one row; none of them the naive one."""

    def choices(op, **sizes):
        return [(each["chosen"], each["rows"]) for each in kernels.explain(op, **sizes, device=device)]

    pairs = [
        (
            choices("conv1d", input=(n, c, 256), weight=(k, c, s), padding=s // 2),
            choices("conv2d", input=(n, c, 1, 256), weight=(k, c, 1, s), padding=(0, s // 2)),
        )
        for n, c, k, s in itertools.product((64, 256), (8, 16), (6, 32), (1, 5))
    ]
    for kind in ("max_pool", "avg_pool"):
        one = choices(f"{kind}1d", input=(64, 16, 256), kernel_size=2)
        pairs.append((one, choices(f"{kind}2d", input=(64, 16, 1, 256), kernel_size=(1, 2))))
    pairs.append((choices("conv2d", input=(64, 16, 14, 14), weight=(32, 16, 1, 1)), None))  # 1x1
    for one, two in pairs:
        assert two is None or one == two
        assert not [name for name, _ in one if name.endswith("_naive")]


def test_force_holds_for_backward_too():
    x = torch.randn(1, 3, 4, 129).requires_grad_()
    with kernels.force("cpu/max_pool_backward_rows_portable"):
        output = G.max_pool2d(x, (1, 129))
    with pytest.raises(
        RuntimeError, match="kernel cpu/max_pool_backward_rows_portable cannot take this call: it .*128 cells"
    ):
        output.sum().backward()


def test_force_nests_and_ends():
    naive = "cpu/conv_fprop_naive"
    with kernels.force(naive):
        assert kernels.forced() == naive
        with kernels.force("cpu/linear_fprop_naive", "cpu/max_pool_naive"):
            assert kernels.forced() == "cpu/linear_fprop_naive,cpu/max_pool_naive"
        assert kernels.forced() == naive
    assert kernels.forced() == ""
    with pytest.raises(ZeroDivisionError), kernels.force(naive):
        raise ZeroDivisionError
    assert kernels.forced() == ""


def test_force_refuses_unknown_names():
    with (
        pytest.raises(ValueError, match="no row is named 'cpu/conv_fprop_naiv'"),
        kernels.force("cpu/conv_fprop_naiv"),
    ):
        pass


@pytest.mark.skipif(fastconv._C.build_info()["cuda"], reason="this build has CUDA kernels")
def test_rows_that_are_not_built():
    row = next(row for row in ROWS if row["device"] == "cuda")
    assert not row["built"]
