# SPDX-License-Identifier: MIT
"""Bad arguments: torch's exception class, a message that names the argument and its value, never a crash."""

import pytest
import torch
import torch.nn.functional as F

from fastconv import functional as G
from fastconv import ops

X, W, B = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4)
A, V = torch.randn(5, 4), torch.randn(3, 4)
HUGE = 2**62

# What we refuse, what our message says of it. Arguments of conv2d, max_pool2d, avg_pool2d or linear.
CONV = {
    "input of rank 2": ((X[0, 0], W), {}, r"input must have 3 .* or 4 .* got size \[8, 8\]"),
    "input of rank 5": ((X[None], W), {}, r"input must have .* got size \[1, 1, 3, 8, 8\]"),
    "weight of rank 3": ((X, W[0]), {}, r"weight must have 4 dimensions, got size \[3, 3, 3\]"),
    "channels": ((X[:, :2], W), {}, r"weight.size\(1\) must equal input.size\(1\)/groups = 2, got 3"),
    "unbatched channels": ((X[0, :2], W), {}, r"input.size\(1\)/groups = 2, got 3"),
    "groups that do not divide": (
        (X, W),
        dict(groups=3),
        "weight.size.0. must be divisible by groups = 3, got 4",
    ),
    "groups and channels": ((X, W), dict(groups=2), r"weight.size\(1\) must equal .* groups = 2"),
    "groups 0": ((X, W), dict(groups=0), "groups must be at least 1, got 0"),
    "groups negative": ((X, W), dict(groups=-1), "groups must be at least 1, got -1"),
    "groups huge": ((X, W), dict(groups=HUGE), f"groups = {HUGE}, got 4"),
    "groups as float": ((X, W), dict(groups=1.0), "'groups' must be an int, got 1.0"),
    "stride 0": ((X, W), dict(stride=0), r"stride must be at least 1 .* got \[0, 0\]"),
    "stride negative": ((X, W), dict(stride=(1, -2)), r"stride must be at least 1 .* got \[1, -2\]"),
    "stride as float": ((X, W), dict(stride=1.5), "'stride' must be an int or a tuple of ints, got 1.5"),
    "stride of three": ((X, W), dict(stride=(1, 2, 3)), r"stride must be an int or 2 ints, got \(1, 2, 3\)"),
    "stride of floats": ((X, W), dict(stride=(1, 2.0)), r"'stride' must be .* got \(1, 2.0\)"),
    "stride as text": ((X, W), dict(stride="1"), "'stride' must be .* got '1'"),
    "stride None": ((X, W), dict(stride=None), "'stride' must be .* got None"),
    "stride beyond 64 bits": ((X, W), dict(stride=2**64), "Overflow"),
    "padding negative": ((X, W), dict(padding=-1), r"padding must be at least 0 .* got \[-1, -1"),
    "padding unknown": ((X, W), dict(padding="full"), "padding must be ints, 'same' or 'valid', got 'full'"),
    "padding same, strided": ((X, W), dict(padding="same", stride=2), r"'same' needs stride 1, got \(2, 2\)"),
    "padding huge": ((X, W), dict(padding=HUGE), f"padding must be .* got .{HUGE}"),
    "padding over all memory": ((X, W), dict(padding=2**22), "allocate|memory"),
    "padding of three": (
        (X, W),
        dict(padding=(1, 2, 3)),
        r"padding must be an int or 2 ints, got \(1, 2, 3\)",
    ),
    "dilation 0": ((X, W), dict(dilation=0), r"dilation must be at least 1 .* got \[0, 0\]"),
    "dilation negative": ((X, W), dict(dilation=-1), r"dilation must be at least 1 .* got \[-1, -1\]"),
    "dilation over the input": ((X, W), dict(dilation=9), "kernel spans 19, the padded input has 8"),
    "kernel of height 0": (
        (X, W[:, :, :0]),
        {},
        r"kernel size must be at least 1, got weight of size \[4, 3, 0, 3\]",
    ),
    "kernel over the input": ((X, torch.randn(4, 3, 9, 9)), {}, "kernel spans 9, the padded input has 8"),
    "input of height 0": ((X[:, :, :0], W), dict(padding=3), r"got input of size \[1, 3, 0, 8\]"),
    "no filters": ((X, W[:0]), {}, r"weight.size\(0\) must be at least groups = 1, got 0"),
    "bias of 3": ((X, W, B[:3]), {}, r"bias must have size \[4\], got \[3\]"),
    "bias of rank 2": ((X, W, B[None]), {}, r"bias must have size \[4\], got \[1, 4\]"),
    "bias of rank 0": ((X, W, B[0]), {}, r"bias must have size \[4\], got \[\]"),
    "weight of another dtype": (
        (X, W.double()),
        {},
        "weight must have the dtype of input, Float, got Double",
    ),
    "bias of another dtype": ((X, W, B.double()), {}, "bias must have the dtype of input, Float, got Double"),
    "integer input": ((X.long(), W), {}, "weight must have the dtype of input, Long, got Float"),
    "list": (([1], W), {}, "'input' must be a Tensor, got list"),
    "weight None": ((X, None), {}, "'weight' must be a Tensor, got NoneType"),
    "bias as number": ((X, W, 1.0), {}, "'bias' must be a Tensor, got float"),
    "bool": ((X.bool(), W.bool()), {}, "input must be float32, .* got Bool"),
}

POOL = {
    "input of rank 2": ((X[0, 0], 2), {}, r"input must have 3 .* or 4 .* got size \[8, 8\]"),
    "input of rank 5": ((X[None], 2), {}, r"input must have .* got size \[1, 1, 3, 8, 8\]"),
    "kernel 0": ((X, 0), {}, r"kernel_size must be at least 1 .* got \[0, 0\]"),
    "kernel negative": ((X, (2, -1)), {}, r"kernel_size must be at least 1 .* got \[2, -1\]"),
    "kernel as float": ((X, 2.5), {}, "'kernel_size' must be .* got 2.5"),
    "kernel of three": ((X, (2, 2, 2)), {}, r"kernel_size must be an int or 2 ints, got \(2, 2, 2\)"),
    "kernel over the input": ((X, 9), {}, "spans 9, the padded input has 8"),
    "kernel huge": ((X, HUGE), {}, f"kernel_size must be .* got .{HUGE}"),
    "stride 0": ((X, 2, 0), {}, r"stride must be at least 1 .* got \[0, 0\]"),
    "stride negative": ((X, 2, -1), {}, r"stride must be at least 1 .* got \[-1, -1\]"),
    "stride huge": ((X, 2, HUGE), {}, f"stride must be .* got .{HUGE}"),
    "padding negative": ((X, 2, 2, -1), {}, r"padding must be at least 0 .* got \[-1, -1\]"),
    "padding over half": (
        (X, 3, 2, 2),
        {},
        r"padding must be at most half of the kernel's span 3, got \[2, 2\]",
    ),
    "padding huge": ((X, 2, 2, HUGE), {}, f"padding must be .* got .{HUGE}"),
    "dilation 0": ((X, 2, 2, 0, 0), {}, r"dilation must be at least 1 .* got \[0, 0\]"),
    "dilation huge": ((X, 2, 1, 0, HUGE), {}, f"dilation must be .* got .{HUGE}"),
    "no channels": ((X[:, :0], 2), {}, r"only the batch may be empty, got input of size \[1, 0, 8, 8\]"),
    "input of height 0": ((X[:, :, :0], 2), {}, r"got input of size \[1, 3, 0, 8\]"),
    "bool": ((X.bool(), 2), {}, "input must be float32, .* got Bool"),
    "complex": ((X.cfloat(), 2), {}, "input must be float32, .* got ComplexFloat"),
    "list": (([1.0], 2), {}, "'input' must be a Tensor, got list"),
}

AVERAGE = {
    "input of rank 5": ((X[None], 2), {}, r"input must have .* got size \[1, 1, 3, 8, 8\]"),
    "kernel 0": ((X, 0), {}, r"kernel_size must be at least 1 .* got \[0, 0\]"),
    "kernel as float": ((X, 2.5), {}, "'kernel_size' must be .* got 2.5"),
    "kernel over the input": ((X, 9), {}, "spans 9, the padded input has 8"),
    "stride 0": ((X, 2, 0), {}, r"stride must be at least 1 .* got \[0, 0\]"),
    "stride of three": ((X, 2, (1, 2, 3)), {}, r"stride must be an int or 2 ints, got \(1, 2, 3\)"),
    "padding negative": ((X, 2, 2, -1), {}, r"padding must be at least 0 .* got \[-1, -1\]"),
    "padding over half": (
        (X, 3, 2, 2),
        {},
        r"padding must be at most half of the kernel's span 3, got \[2, 2\]",
    ),
    "padding huge": ((X, 2, 2, HUGE), {}, f"padding must be .* got .{HUGE}"),
    "divisor 0": ((X, 2), dict(divisor_override=0), "divisor_override must not be 0, got 0"),
    "divisor as float": ((X, 2), dict(divisor_override=2.0), "'divisor_override' must be an int .* got 2.0"),
    "no channels": ((X[:, :0], 2), {}, r"only the batch may be empty, got input of size \[1, 0, 8, 8\]"),
    "bool": ((X.bool(), 2), {}, "input must be float32, .* got Bool"),
    "list": (([1.0], 2), {}, "'input' must be a Tensor, got list"),
}

LINEAR = {
    "features": ((A[:, :3], V), {}, r"input.size\(-1\) must equal weight.size\(1\) = 4, got 3"),
    "number": ((A[0, 0], V), {}, r"input must have at least 1 dimension, got input of size \[\]"),
    "weight of rank 3": (
        (A, V[None]),
        {},
        r"weight must have 2 dimensions .* got weight of size \[1, 3, 4\]",
    ),
    "bias of 2": ((A, V, torch.randn(2)), {}, r"bias must have size \[3\], got \[2\]"),
    "weight of another dtype": (
        (A, V.double()),
        {},
        "weight must have the dtype of input, Float, got Double",
    ),
    "bias of another dtype": (
        (A, V, torch.randn(3).double()),
        {},
        "bias must have the dtype of input, Float, got Double",
    ),
    "list": (([1.0], V), {}, "'input' must be a Tensor, got list"),
    "weight None": ((A, None), {}, "'weight' must be a Tensor, got NoneType"),
}

SIGNAL, VOLUME = torch.randn(1, 3, 8), torch.randn(1, 3, 4, 4, 4)
TAPS, BLOCKS = torch.randn(4, 3, 3), torch.randn(4, 3, 3, 3, 3)
CONV1 = {
    "input of rank 1": ((SIGNAL[0, 0], TAPS), {}, r"input must have 2 .* or 3 .* got size \[8\]"),
    "input of rank 4": ((SIGNAL[None], TAPS), {}, r"input must have 2 .* got size \[1, 1, 3, 8\]"),
    "weight of rank 2": ((SIGNAL, TAPS[0]), {}, r"weight must have 3 dimensions, got size \[3, 3\]"),
    "channels": ((SIGNAL[:, :2], TAPS), {}, r"weight.size\(1\) must equal .* = 2, got 3"),
    "stride of two": (
        (SIGNAL, TAPS),
        dict(stride=(1, 2)),
        r"stride must be an int or 1 int in a tuple, got \(1, 2\)",
    ),
    "stride 0": ((SIGNAL, TAPS), dict(stride=0), r"stride must be at least 1 .* got \[0\]"),
    "padding same, strided": ((SIGNAL, TAPS), dict(padding="same", stride=2), r"stride 1, got \(2,\)"),
    "kernel over the input": ((SIGNAL, TAPS), dict(dilation=4), "kernel spans 9, the padded input has 8"),
    "bias of 3": ((SIGNAL, TAPS, B[:3]), {}, r"bias must have size \[4\], got \[3\]"),
    "weight of another dtype": ((SIGNAL, TAPS.double()), {}, "weight must have the dtype of input, Float"),
}
CONV3 = {
    "input of rank 3": ((VOLUME[0, 0], BLOCKS), {}, r"input must have 4 .* or 5 .* got size \[4, 4, 4\]"),
    "input of rank 6": ((VOLUME[None], BLOCKS), {}, r"input must have 4 .* got size \[1, 1, 3, 4, 4, 4\]"),
    "weight of rank 4": ((VOLUME, BLOCKS[0]), {}, r"weight must have 5 dimensions, got size"),
    "stride of two": (
        (VOLUME, BLOCKS),
        dict(stride=(1, 2)),
        r"stride must be an int or 3 ints, got \(1, 2\)",
    ),
    "padding negative": ((VOLUME, BLOCKS), dict(padding=(0, 0, -1)), r"padding must be at least 0 .* -1"),
    "dilation over the input": ((VOLUME, BLOCKS), dict(dilation=2), "kernel spans 5, the padded input has 4"),
}
POOL1 = {
    "input of rank 1": ((SIGNAL[0, 0], 2), {}, r"input must have 2 .* or 3 .* got size \[8\]"),
    "kernel of two": ((SIGNAL, (2, 2)), {}, r"kernel_size must be an int or 1 int in a tuple, got \(2, 2\)"),
    "kernel over the input": ((SIGNAL, 9), {}, "spans 9, the padded input has 8"),
    "kernel as float": ((SIGNAL, 2.5), {}, "'kernel_size' must be .* got 2.5"),
    "padding over half": ((SIGNAL, 3, 2, 2), {}, r"at most half of the kernel's span 3, got \[2\]"),
    "input of width 0": ((SIGNAL[:, :, :0], 2), {}, r"got input of size \[1, 3, 0\]"),
    "complex": ((SIGNAL.cfloat(), 2), {}, "input must be float32, .* got ComplexFloat"),
}
POOL3 = {
    "input of rank 3": ((VOLUME[0, 0], 2), {}, r"input must have 4 .* or 5 .* got size \[4, 4, 4\]"),
    "kernel of two": ((VOLUME, (2, 2)), {}, r"kernel_size must be an int or 3 ints, got \(2, 2\)"),
    "stride negative": ((VOLUME, 2, (1, 1, -1)), {}, r"stride must be at least 1 .* got \[1, 1, -1\]"),
}

AVERAGE1 = {
    "input of rank 1": ((SIGNAL[0, 0], 2), {}, r"input must have 2 .* or 3 .* got size \[8\]"),
    "kernel of two": ((SIGNAL, (2, 2)), {}, r"kernel_size must be an int or 1 int in a tuple, got \(2, 2\)"),
    "kernel over the input": ((SIGNAL, 9), {}, "spans 9, the padded input has 8"),
    "padding over half": ((SIGNAL, 3, 2, 2), {}, r"at most half of the kernel's span 3, got \[2\]"),
}
AVERAGE3 = {
    "input of rank 3": ((VOLUME[0, 0], 2), {}, r"input must have 4 .* or 5 .* got size \[4, 4, 4\]"),
    "kernel of two": ((VOLUME, (2, 2)), {}, r"kernel_size must be an int or 3 ints, got \(2, 2\)"),
    "divisor 0": ((VOLUME, 2), dict(divisor_override=0), "divisor_override must not be 0, got 0"),
}

PYTORCH_S_OWN = ("allocate|memory", "Overflow")  # messages that come from below us, as for torch
FUNCTIONS = {
    "conv1d": CONV1,
    "conv2d": CONV,
    "conv3d": CONV3,
    "max_pool1d": POOL1,
    "max_pool2d": POOL,
    "max_pool3d": POOL3,
    "avg_pool1d": AVERAGE1,
    "avg_pool2d": AVERAGE,
    "avg_pool3d": AVERAGE3,
    "linear": LINEAR,
}


def raised(call, *arguments, **keywords):
    with pytest.raises(Exception) as caught:
        call(*arguments, **keywords)
    return caught.value


@pytest.mark.parametrize(
    ("function", "name"),
    [pytest.param(f, n, id=f"{f}: {n}") for f, names in FUNCTIONS.items() for n in names],
)
def test_as_torch(function, name):
    arguments, keywords, message = FUNCTIONS[function][name]
    ours = raised(getattr(G, function), *arguments, **keywords)
    theirs = raised(getattr(F, function), *arguments, **keywords)
    assert type(ours) is type(theirs), f"{ours!r} against {theirs!r}"
    with pytest.raises(type(ours), match=message):
        raise ours
    assert str(ours).startswith(function) or message in PYTORCH_S_OWN


# torch computes these, or takes them in other than the documented form.
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: G.conv2d(X.long(), W.long()), NotImplementedError, "input must be float32, .* got Long"),
        (lambda: G.conv2d(X.cfloat(), W.cfloat()), NotImplementedError, "got ComplexFloat"),
        (
            lambda: G.max_pool2d(X.int(), 2),
            NotImplementedError,
            "max_pool2d: input must be float32, .* got Int",
        ),
        (lambda: G.avg_pool2d(X.long(), 2), NotImplementedError, "avg_pool2d: input must be .* got Long"),
        (lambda: G.avg_pool2d(X[0, 0], 2), RuntimeError, r"input must have 3 .* got size \[8, 8\]"),
        (lambda: G.avg_pool2d(X.to_sparse(), 2), NotImplementedError, "Sparse"),
        (
            lambda: G.linear(A.int(), V.int()),
            NotImplementedError,
            "linear: input must be float32, .* got Int",
        ),
        (lambda: G.linear(A, V[0]), RuntimeError, r"weight must have 2 dimensions .* \[4\]"),
        (lambda: G.linear(A, V, torch.randn(1)), RuntimeError, r"bias must have size \[3\], got \[1\]"),
        (
            lambda: G.conv2d(X, W.to("meta")),
            RuntimeError,
            "weight must be on the device of input, cpu, got meta",
        ),
        (
            lambda: G.conv2d(X, W, B.to("meta")),
            RuntimeError,
            "bias must be on the device of input, cpu, got meta",
        ),
        (
            lambda: G.linear(A, V.to("meta")),
            RuntimeError,
            "weight must be on the device of input, cpu, got meta",
        ),
        (lambda: G.conv2d(X, W, dilation=HUGE), RuntimeError, f"dilation must be .* got .{HUGE}"),
        (
            lambda: G.conv2d(X, W, stride=2**63 - 1),
            RuntimeError,
            "stride must be .* got .9223372036854775807",
        ),
        (lambda: G.conv2d(X.to_sparse(), W), NotImplementedError, "Sparse"),
        (lambda: G.conv2d(X, W.to_sparse()), NotImplementedError, "Sparse"),
        (lambda: G.max_pool2d(X.to_sparse(), 2), NotImplementedError, "Sparse"),
        (lambda: G.linear(A.to_sparse(), V), NotImplementedError, "Sparse"),
        (lambda: G.max_pool2d(X, 2**16, 1, 2**15), RuntimeError, "window has more than 2147483647 cells"),
        (
            lambda: G.conv2d_relu_max_pool2d(
                X, W, padding=2**31 - 1, pool_kernel_size=40000, pool_stride=2**31 - 1
            ),
            RuntimeError,
            "overflows 64 bits",
        ),
        (
            lambda: G.conv2d_relu_max_pool2d(X, W, padding=2**26, pool_kernel_size=2, pool_stride=2**31 - 1),
            RuntimeError,
            "allocate|memory",
        ),
        (
            lambda: G.conv2d_relu_max_pool2d(X, W, pool_kernel_size=9),
            RuntimeError,
            "spans 9, the padded input has 6",
        ),
        (
            lambda: G.conv2d_relu_max_pool2d(X, W, pool_kernel_size=2, pool_padding=2),
            RuntimeError,
            "at most half",
        ),
        (
            lambda: G.conv2d_relu_max_pool2d(X, W, pool_kernel_size="2"),
            TypeError,
            "'pool_kernel_size' must be",
        ),
    ],
)
def test_refused(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert caught.type is error


@pytest.mark.gpu
@pytest.mark.parametrize("wrong", ["weight", "bias"])
def test_mixed_devices(wrong):
    tensors = {"input": X, "weight": W, "bias": B}
    tensors = {name: t.cuda() if name == wrong else t for name, t in tensors.items()}
    with pytest.raises(RuntimeError, match=f"{wrong} must be on the device of input, cpu, got cuda:0"):
        G.conv2d(*tensors.values())


# --- raw operators ------------------------------------------------------------------------------------------

CONV_ARGS = ((1, 1), (0, 0, 0, 0), (1, 1), 1)
POOL_ARGS = ((2, 2), (2, 2), (0, 0))
WINDOW = (*POOL_ARGS, (1, 1), False)


def raw_calls():
    y = ops.conv_fprop(X, W, B, *CONV_ARGS, "")
    pooled, offsets = ops.max_pool(X, *WINDOW, True, "")
    fused, fused_offsets = ops.conv_act_pool(X, W, B, *CONV_ARGS, "relu", *POOL_ARGS, True, "")
    none = offsets.new_empty(0)

    def fused_backward(gy=fused, y=fused, offsets=fused_offsets):
        mask = [True, True, True]
        return ops.conv_act_pool_backward(gy, y, offsets, X, W, *CONV_ARGS, "relu", *POOL_ARGS, mask, "")

    def pool_backward(gy=pooled, offsets=offsets, size=X.shape):
        return ops.max_pool_backward(gy, offsets, size, *WINDOW, "")

    def average_backward(gy=pooled, size=X.shape, divisor=None):
        return ops.avg_pool_backward(gy, size, *POOL_ARGS, False, True, divisor, False, "")

    def linear_backward(gy, y):
        return ops.linear_act_backward(gy, y, A, V, "relu", [True, True, True], "")

    rows = ops.linear_act(A, V, None, "relu", "")
    one = r"\[1, 1, 1, 1\]"
    small = torch.ones(1, 1, 1, 1)
    yield lambda: ops.conv_fprop(X, W, B, (1,), (0, 0), (1,), 1, ""), "input must have 3 dimensions"
    yield lambda: ops.conv_fprop(X, W, B, (), (), (), 1, ""), "stride must have 1 to 3 values"
    yield (
        lambda: ops.conv_fprop(X, W, B, (1, 1), (0, 0), (1, 1), 1, ""),
        r"padding must have 4 values, got \[0, 0\]",
    )
    yield (
        lambda: ops.conv_dgrad(small, W, X.shape, *CONV_ARGS, ""),
        f"grad_output must have size .* got {one}",
    )
    yield (
        lambda: ops.conv_dgrad(y, W, (1, 3, 8), *CONV_ARGS, ""),
        r"input must have 4 dimensions .* \[1, 3, 8\]",
    )
    yield lambda: ops.conv_dgrad(y, W, (-1, 3, 8, 8), *CONV_ARGS, ""), "grad_output must have size"
    yield lambda: ops.conv_wgrad(y, X, (4, 3, 5, 5), *CONV_ARGS, True, ""), "grad_output must have size"
    yield lambda: ops.conv_wgrad(y, X, (4, 3, 3), *CONV_ARGS, True, ""), "weight must have 4 dimensions"
    yield (
        lambda: ops.conv_act_pool(X, W, B, *CONV_ARGS, "gelu", *POOL_ARGS, True, ""),
        "act must be .* got 'gelu'",
    )
    yield (
        lambda: ops.conv_act_pool(X, W, B, *CONV_ARGS, "relu", (2, 2), (2,), (0,), True, ""),
        "stride must have 2",
    )
    yield lambda: fused_backward(gy=small), f"grad_output must have size .* got {one}"
    yield lambda: fused_backward(y=small), f"output must have size .* got {one}"
    yield lambda: fused_backward(y=fused.double()), "output must have the dtype"
    yield lambda: fused_backward(offsets=none), r"offsets must have size .* got \[0\]"
    yield lambda: fused_backward(offsets=fused_offsets.int()), "offsets must be Byte on cpu, got Int on cpu"
    yield lambda: ops.max_pool(X, (), (), (), (), False, True, ""), "kernel_size must have 1 to 3 values"
    yield lambda: pool_backward(gy=small), f"grad_output must have size .* got {one}"
    yield lambda: pool_backward(offsets=none), r"offsets must have size .* got \[0\]"
    yield lambda: pool_backward(offsets=offsets.long()), "offsets must be Byte"
    yield lambda: pool_backward(offsets=offsets.to("meta")), "offsets must be Byte on cpu, got Byte on meta"
    yield lambda: pool_backward(size=(1, 3, 4, 4)), "grad_output must have size"
    yield lambda: ops.max_pool_gather(X[:, :2], offsets, *WINDOW, ""), "offsets must have size"
    yield lambda: ops.max_pool_indices(offsets, (1, 3, 2, 2), *WINDOW, ""), "offsets must have size"
    yield lambda: average_backward(gy=small), f"grad_output must have size .* got {one}"
    yield lambda: average_backward(size=(1, 3, 4, 4)), "grad_output must have size"
    yield lambda: average_backward(divisor=0), "divisor_override must not be 0"
    yield lambda: ops.avg_pool(X, (2, 2), (2,), (0,), False, True, None, ""), "stride must have 2"
    yield lambda: ops.linear_dgrad(A, V, ""), r"grad_output.size\(-1\) must equal weight.size\(0\)"
    yield lambda: ops.linear_wgrad(rows[:2], A, True, ""), "must agree in all but the last dimension"
    yield lambda: linear_backward(rows[:2], rows), "grad_output must have size"
    yield lambda: linear_backward(rows, rows[:2]), "output must have size"
    yield lambda: ops.linear_act(A, V, None, "tanh", ""), "act must be .* got 'tanh'"
    linear = G.linear_stage(act="relu", bias=False)
    output, saved = ops.chain(A, [V], linear, True, "")

    def chain_backward(gy=output, y=output, saved=saved, mask=3):
        return ops.chain_backward(gy, y, A, [V], saved, linear, mask, "")

    conv = G.conv_stage(pool_kernel_size=2)
    yield lambda: ops.chain(A, [V], (), False, ""), "plan must have 1 to 16 stages, got 0"
    yield lambda: ops.chain(A, [V] * 17, linear * 17, False, ""), "plan must have 1 to 16 stages, got 17"
    yield lambda: ops.chain(A, [V], (2, 0, 0), False, ""), "kind of a stage must be .* got 2"
    yield lambda: ops.chain(A, [V], (1, 0), False, ""), "plan ends within a stage"
    yield lambda: ops.chain(X, [W], conv, False, ""), "plan needs 2 parameters, got 1"
    yield (
        lambda: ops.chain(A, [V, W, B], linear + conv, False, ""),
        "convolution cannot follow a linear layer",
    )
    yield (
        lambda: ops.chain(A, [W, B], conv, False, ""),
        r"needs an input of 4 dimensions .* got size \[5, 4\]",
    )
    yield lambda: ops.chain(X, [V], linear, False, ""), "needs an input of 2 dimensions"
    yield lambda: ops.chain(X, [W, V[0, :2]], conv, False, ""), r"bias must have size \[4\], got \[2\]"
    yield lambda: ops.chain(X, [W, B, V], conv + linear, False, ""), r"weight.size\(1\) = 4, got 36"
    yield lambda: ops.chain(A, [V.double()], linear, False, ""), "each of params must have the dtype of input"
    yield lambda: chain_backward(gy=output[:2]), "grad_output must have size"
    yield lambda: chain_backward(y=output[:2]), "output must have size"
    yield (
        lambda: chain_backward(saved=torch.empty(7, dtype=torch.uint8)),
        r"saved must have size \[0\], got \[7\]",
    )
    yield lambda: chain_backward(saved=saved.int()), "saved must be uint8 on cpu, got Int"
    yield lambda: chain_backward(mask=4), "mask must have a bit for input and 1 parameters, got 4"


@pytest.mark.parametrize(("call", "message"), list(raw_calls()))
def test_raw_operators(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_offsets_that_point_nowhere():
    """Offsets are data: any value is safe, in every row."""
    offsets = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    gy = torch.ones(1, 3, 4, 4)
    assert ops.max_pool_backward(gy, offsets, X.shape, *WINDOW, "").isfinite().all()
    assert ops.max_pool_gather(X, offsets, *WINDOW, "").isfinite().all()
    ops.max_pool_indices(offsets, X.shape, *WINDOW, "")
