# SPDX-License-Identifier: MIT
"""The wrappers of csrc/cuda/ptx.cuh do what the PTX manual says: on the emulator, and on a GPU.

Moves must agree in every bit. Matrix products of small whole numbers are exact in any order of the sums, and
must agree in every bit, too; those of random numbers within the bound of their sums.
"""

import ctypes
import itertools
import math
import os
import re
import shutil

import pytest
import torch
from simt import build, golden

needs_gxx = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")),
    reason="the emulator needs g++ (or a compiler named by CXX)",
)
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc on PATH")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(golden.Emulator, id="emulator", marks=needs_gxx),
        pytest.param(golden.Gpu, id="gpu", marks=[pytest.mark.gpu, needs_nvcc]),
    ],
)
def backend(request):
    return request.param()


@pytest.fixture
def run(backend, request):
    """Launches the case of the test: run(*inputs, out=..., numbers=...) returns the output on the CPU."""
    case = request.getfixturevalue("case")
    if reason := backend.lacks(LEVELS[case]):
        pytest.skip(reason)

    def launch(*inputs, out, numbers=(), keeps=False):
        """`out`: a tensor to be overwritten, or (sizes, dtype) of one that is filled with 0xff."""
        if isinstance(out, tuple):
            sizes, dtype = out
            out = (
                torch.full((math.prod(sizes) * dtype.itemsize,), 0xFF, dtype=torch.uint8)
                .view(dtype)
                .view(sizes)
            )
        tensors = [t.contiguous().to(backend.device) for t in (*inputs, out.clone())]
        backend.run(case, *tensors, numbers=numbers, keeps=keeps)
        return tensors[-1].cpu()

    return launch


def random_bytes(*sizes):
    return torch.randint(0, 256, sizes, dtype=torch.uint8)


# --- cp.async -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["cp_async16", "cp_async4"])
def test_cp_async(case, run):
    """What lies beyond src_bytes is filled with zeros."""
    width = int(case.removeprefix("cp_async"))
    x = random_bytes(64, width)
    counts = torch.arange(64, dtype=torch.int32) * 7 % (width + 1)
    y = run(x, counts, out=((64, width), torch.uint8))
    assert torch.equal(y, x * (torch.arange(width) < counts[:, None]))


# --- matrix instructions of a warp --------------------------------------------------------------------------

LANE = torch.arange(32)
GROUP, IN_GROUP = LANE // 4, LANE % 4


@pytest.mark.parametrize("case", ["ldmatrix", "ldmatrix_trans"])
def test_ldmatrix(case, run):
    """Register m of a lane: element (group, 2 * in_group) of matrix m, or of its transpose, and the next."""
    x = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16)
    r = run(x, out=((32, 4, 2), torch.int16))
    matrices = x.mT if case == "ldmatrix_trans" else x
    pairs = matrices.reshape(4, 8, 4, 2)  # rows, pairs of columns
    assert torch.equal(r, pairs[:, GROUP, IN_GROUP].transpose(0, 1))


TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}


def operand(kind, dtype_name, *sizes):
    """A matrix of numbers that the type holds."""
    if kind == "whole":
        return torch.randint(-4, 5, sizes).to(TYPES[dtype_name])
    x = torch.randn(*sizes).to(TYPES[dtype_name])
    return (x.view(torch.int32) & -(2**13)).view(torch.float32) if dtype_name == "tf32" else x


def start(kind, *sizes):
    return torch.randint(-99, 100, sizes).float() if kind == "whole" else torch.randn(*sizes)


def check_product(kind, d, a, b, c):
    """d = a @ b.T + c. Products of two such numbers are exact in float32. Each of the K additions loses at
    most two units in the last place of the largest partial sum: hardware may cut off instead of rounding."""
    a, b, c = (x.double() for x in (a, b, c))
    bound = (a.abs() @ b.abs().T + c.abs()) * (2 * a.shape[1] * 2.0**-23) * (kind != "whole")
    error = (d.double() - (a @ b.T + c)).abs()
    assert (error <= bound).all(), f"{int((error > bound).sum())} wrong, by up to {error.max()}"


@pytest.mark.parametrize("kind", ["whole", "normal"])
@pytest.mark.parametrize("case", ["mma_f16", "mma_bf16", "mma_tf32"])
def test_mma(case, kind, run):
    """Registers of a lane hold neighbours along k: a at rows group and group + 8, first in the lower half of
    k and then in the upper; b at column group, in both halves of k; c at rows group and group + 8."""
    dtype = case.removeprefix("mma_")
    pack = 1 if dtype == "tf32" else 2
    K = 8 * pack
    a, b, c = operand(kind, dtype, 16, K), operand(kind, dtype, 8, K), start(kind, 16, 8)
    a_ = a.view(2, 8, 2, 4, pack)[:, GROUP, :, IN_GROUP]  # lane, row half, k half, pack
    b_ = b.view(8, 2, 4, pack)[GROUP, :, IN_GROUP]
    c_ = c.view(2, 8, 4, 2)[:, GROUP, IN_GROUP].transpose(0, 1)
    d_ = run(a_.transpose(1, 2), b_, c_, out=((32, 2, 2), torch.float32))
    d = torch.empty(2, 8, 4, 2)
    d[:, GROUP, IN_GROUP] = d_.transpose(0, 1)
    check_product(kind, d.view(16, 8), a, b, c)


@pytest.mark.parametrize("case", ["to_tf32"])
def test_to_tf32(case, run):
    """10 bits of mantissa, ties away from zero. What the 13 lower bits are is not said."""
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), dtype=torch.int64).to(torch.int32)
    bits = torch.cat([bits, bits & -(2**12), bits & -(2**13) | 0xFFF, bits & -(2**13)])
    x = bits.view(torch.float32)
    x = torch.where(x.isfinite(), x, 1.0)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, 1 + 2.0**-11, -1 - 2.0**-11])
    x = torch.cat([x, special, torch.zeros(-(len(x) + 8) % 32)])
    y = run(x, out=((len(x),), torch.int32), numbers=[len(x)])
    y = (y & -(2**13)).view(torch.float32)
    mantissa, exponent = torch.frexp(x.double().abs())
    scale = torch.ldexp(torch.ones_like(mantissa), 11 - exponent.clamp(min=-125))  # subnormals: fixed steps
    expected = torch.floor(x.double().abs() * scale + 0.5) / scale * torch.sign(x)
    expected = torch.where(x.isfinite(), expected.float(), x)
    assert torch.equal(y[x == x], expected[x == x])
    assert y[x.isnan()].isnan().all()
    assert torch.equal(y[x == 0].signbit(), x[x == 0].signbit())


# --- barriers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["bar", "mbar"])
@pytest.mark.parametrize("rows", [1, 2, 3, 200])
def test_barriers(case, rows, run):
    x = torch.randint(0, 2**31 - 1, (rows, 32), dtype=torch.int32)
    assert torch.equal(run(x, out=((rows, 32), torch.int32), numbers=[rows]), x.flip(1))


# --- the copy engine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["bulk_copy"])
@pytest.mark.parametrize("size", [16, 48, 4096])
def test_bulk_copy(case, size, run):
    x = random_bytes(size)
    assert torch.equal(run(x, out=((size,), torch.uint8), numbers=[size]), x)


@pytest.mark.parametrize("case", ["bulk_store"])
@pytest.mark.parametrize("size", [16, 48, 4096])
def test_bulk_store(case, size, run):
    x = random_bytes(2 * size)
    assert torch.equal(run(x, out=((2 * size,), torch.uint8), numbers=[size]), x)


SWIZZLE = {0: 0, 128: 1, 64: 2, 32: 3}  # enum Swizzle, by the bytes of a row
ITEMS = {4: 0, 8: 1, 2: 3}  # enum Dtype, by the bytes of an element


def swizzled(x, swizzle):
    """Bytes as they lie in shared memory: bits 4 and up of an address XORed with as many from bit 7 on."""
    at = torch.arange(x.numel())
    bits = {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]
    y = torch.empty_like(x)
    y[at ^ (at >> 7 & bits) << 4] = x
    return y


def box_of(sizes, strides, box, at):
    """For each element of a box, as it is copied: its index in memory, and whether it is in the tensor."""
    index, inside = torch.zeros(()).long(), torch.ones(()).bool()
    for size, stride, count, first in zip(sizes, strides, box, at, strict=True):
        i = first + torch.arange(count)
        shape = (count,) + (1,) * index.dim()  # a further dimension is outside of those so far
        index = i.view(shape) * stride + index
        inside = ((i >= 0) & (i < size)).view(shape) & inside
    return index.flatten(), inside.flatten()


# Bytes of an element, swizzle, sizes, strides, box and several places, innermost dimension first.
BOXES = {
    1: [(4, 0, [50], [1], [24], [[0], [-5], [37], [-40]])],
    2: [
        (2, 128, [72, 20], [1, 80], [64, 16], [[0, 0], [8, 4], [-3, -5], [40, 11], [0, -16]]),
        (2, 64, [40, 9], [1, 40], [32, 8], [[0, 0], [9, 3]]),
        (4, 32, [17, 40], [1, 20], [8, 32], [[0, 0], [12, 30]]),
        (4, 128, [64, 30], [1, 64], [32, 10], [[16, 7]]),
        (8, 64, [10, 6], [1, 10], [8, 8], [[0, 0], [3, -1]]),
    ],
    3: [(2, 64, [32, 7, 6], [1, 32, 256], [32, 3, 4], [[0, 0, 0], [0, -1, 3], [0, 5, -1]])],
    4: [
        (2, 128, [64, 5, 6, 2], [1, 64, 64 * 5, 64 * 5 * 6], [64, 5, 3, 1], [[0, -1, -1, 0], [0, 1, 4, 1]]),
        (4, 0, [4, 3, 3, 3], [1, 4, 16, 64], [4, 2, 2, 2], [[0, 1, 2, -1]]),
    ],
    5: [(4, 32, [8, 3, 3, 2, 3], [1, 8, 24, 72, 144], [8, 2, 3, 2, 2], [[0, 0, 0, 0, 0], [0, 2, -1, 1, 2]])],
}


def boxes(kind):
    """The cases of tensor_copy or tensor_store, each with its geometry."""
    return pytest.mark.parametrize(
        "case, item, swizzle, sizes, strides, box, at",
        [
            pytest.param(
                f"{kind}{dims}", *box, at, id=f"{kind}{dims}-{box[0]}-{box[1]}-{','.join(map(str, at))}"
            )
            for dims, of_dims in BOXES.items()
            for *box, places in of_dims
            for at in places
        ],
    )


def box_numbers(item, swizzle, sizes, strides, box, at):
    geometry = itertools.chain(*zip(sizes, strides, box, at, strict=True))
    return [ITEMS[item], SWIZZLE[swizzle], math.prod(box) * item, *geometry]


def memory_of(item, sizes, strides):
    count = 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    return random_bytes(count, item)


@boxes("tensor_copy")
def test_tensor_copy(case, item, swizzle, sizes, strides, box, at, run):
    """What lies outside of the tensor is zero."""
    x = memory_of(item, sizes, strides)
    index, inside = box_of(sizes, strides, box, at)
    expected = x[index.where(inside, 0)] * inside[:, None]
    y = run(
        x, out=((expected.numel(),), torch.uint8), numbers=box_numbers(item, swizzle, sizes, strides, box, at)
    )
    assert torch.equal(y, swizzled(expected.flatten(), swizzle))


@boxes("tensor_store")
def test_tensor_store(case, item, swizzle, sizes, strides, box, at, run):
    """What lies outside of the tensor is not written."""
    before = memory_of(item, sizes, strides)
    index, inside = box_of(sizes, strides, box, at)
    x = random_bytes(len(index), item)
    expected = before.clone()
    expected[index[inside]] = x[inside]
    numbers = box_numbers(item, swizzle, sizes, strides, box, at)
    assert torch.equal(run(swizzled(x.flatten(), swizzle), out=before, numbers=numbers, keeps=True), expected)


# --- clusters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["neighbour"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_neighbour(case, size, run):
    x = torch.randint(0, 2**31 - 1, (8, 32), dtype=torch.int32)
    rank, size_, value = run(x, out=((8, 32, 3), torch.int32), numbers=[size]).unbind(2)
    blocks = torch.arange(8)
    next_ = blocks // size * size + (blocks + 1) % size
    assert torch.equal(rank, (blocks % size).int()[:, None].expand(8, 32))
    assert (size_ == size).all()
    assert torch.equal(value, x[next_].flip(1))


@pytest.mark.parametrize("case", ["signal_neighbour"])
def test_signal_neighbour(case, run):
    y = run(out=((8, 32), torch.int32))
    before = (torch.arange(8) - 1) % 4
    assert torch.equal(y, (before[:, None] * 32 + 31 - torch.arange(32)).int())


@pytest.mark.parametrize("case", ["bulk_multicast", "tensor_multicast"])
@pytest.mark.parametrize("blocks", [0b0001, 0b1010, 0b1111])
def test_multicast(case, blocks, run):
    x, before = random_bytes(256), random_bytes(4, 256)
    y = run(x, out=before, numbers=[256, blocks], keeps=True)
    for rank in range(4):
        assert torch.equal(y[rank], x if blocks >> rank & 1 else before[rank])


# --- warpgroups ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["setmaxnreg"])
def test_setmaxnreg(case, run):
    x = torch.arange(384, dtype=torch.int32)
    assert torch.equal(run(x, out=((384,), torch.int32)), x + (x >= 128).int())


def image(x, layout):
    """A K-major operand of 64 bytes a row for two instructions, as it lies in shared memory, and the numbers
    that say how: bytes, leading, stride, step, swizzle."""
    rows = x.view(torch.uint8).view(len(x), 64)
    if layout in ("columns", "rows"):  # no swizzle: core matrices of 8 rows of 16 bytes
        cores = rows.view(-1, 8, 4, 16).transpose(1, 2)  # [row group][column][8][16]
        if layout == "rows":
            cores = cores.transpose(0, 1)
        leading, stride = (128, 512) if layout == "columns" else (16 * len(x), 128)
        return cores.reshape(-1), (cores.numel(), leading, stride, 2 * leading, 0)
    if layout == 32:  # a tile of its own for each instruction
        tiles = rows.view(-1, 2, 32).transpose(0, 1).reshape(-1)
        return swizzled(tiles, 32), (tiles.numel(), 0, 256, 32 * len(x), SWIZZLE[32])
    padded = torch.cat([rows, random_bytes(len(x), layout - 64)], 1).reshape(-1)
    return swizzled(padded, layout), (padded.numel(), 0, 8 * layout, 32, SWIZZLE[layout])


@pytest.mark.parametrize("kind", ["whole", "normal"])
@pytest.mark.parametrize(
    "layouts", [("columns", "rows"), ("rows", 64), (32, 32), (64, "columns"), (128, 128)]
)
@pytest.mark.parametrize("n", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("case", ["wgmma_f16", "wgmma_bf16", "wgmma_tf32"])
def test_wgmma(case, n, layouts, kind, run):
    dtype = case.removeprefix("wgmma_")
    K = 64 // TYPES[dtype].itemsize
    a, b, c = operand(kind, dtype, 64, K), operand(kind, dtype, n, K), start(kind, 64, n)
    (a_, a_layout), (b_, b_layout) = image(a, layouts[0]), image(b, layouts[1])
    adds = kind == "whole" or n % 16 == 0
    # [warp][row half][group][column group][in group][2]: thread and element of an accumulator
    c_ = c.view(4, 2, 8, n // 8, 4, 2).permute(0, 2, 4, 3, 1, 5)
    d_ = run(a_, b_, c_, out=(tuple(c_.shape), torch.float32), numbers=[n, adds, *a_layout, *b_layout])
    d = d_.permute(0, 4, 1, 3, 2, 5).reshape(64, n)
    check_product(kind, d, a, b, c if adds else torch.zeros_like(c))


# --- all of them --------------------------------------------------------------------------------------------

# The least GPU of each case.
LEVELS = {
    **dict.fromkeys(["bar", "ldmatrix", "ldmatrix_trans"], "75"),
    **dict.fromkeys(["cp_async16", "cp_async4", "mma_f16", "mma_bf16", "mma_tf32", "to_tf32"], "80"),
    **dict.fromkeys(["mbar", "bulk_copy", "bulk_store", "neighbour", "signal_neighbour"], "90"),
    **dict.fromkeys([f"tensor_{kind}{dims}" for kind in ("copy", "store") for dims in BOXES], "90"),
    **dict.fromkeys(["bulk_multicast", "tensor_multicast", "setmaxnreg"], "90a"),
    **dict.fromkeys(["wgmma_f16", "wgmma_bf16", "wgmma_tf32"], "90a"),
}


@needs_gxx
def test_every_case_is_tested():
    marks = [mark for test in list(globals().values()) for mark in getattr(test, "pytestmark", [])]
    cases = [mark.args[1] for mark in marks if mark.name == "parametrize" and mark.args[0].startswith("case")]
    tested = {getattr(each, "values", [each])[0] for each in itertools.chain(*cases)}
    assert tested == set(LEVELS) == set(golden.names(golden.Emulator().library))


def test_every_wrapper_is_tested():
    wrappers = (build.CSRC / "cuda" / "ptx.cuh").read_text()
    found = re.findall(r"__device__ __forceinline__ [\w ]+[ *](\w+)\(", wrappers)
    found += re.findall(r"^FC_(?:MMA|WGMMA_ALL)\((\w+)", wrappers, re.MULTILINE)
    names = set(found) - {"name", "shared_address"}  # a macro's parameter, a helper of the others
    assert len(names) > 30

    def missing(path, pattern):
        text = path.read_text()
        return {name for name in names if not re.search(pattern.format(name), text)}

    assert not missing(golden.SOURCE, r"\b{}(<.*>)?\(")
    assert not missing(build.SIMT / "ptx.h", r"\b{}\b")


@needs_nvcc
@pytest.mark.parametrize("architecture", ["75", "80", "90a", "100"])
def test_compiles(architecture):
    """Without a warning, also where instructions are missing; the library needs no GPU to be loaded."""
    library = ctypes.CDLL(str(golden.compile_for_gpu(architecture)))
    assert set(golden.names(library)) == set(LEVELS)
