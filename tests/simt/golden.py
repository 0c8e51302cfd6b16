# SPDX-License-Identifier: MIT
"""The kernels of golden/golden.cu on two back ends: the emulator, and a GPU.

A back end has `device`, where its tensors are, and `run(case, *tensors, numbers=(), keeps=False)`, which
launches a case on tensors of which the last is the output; RuntimeError with what was wrong. `keeps`: the
kernel need not write all of the output. `lacks(level)` is the reason why instructions of a level ("80" or
"90a") cannot run there, or None.
"""

import ctypes
import itertools
import os
import subprocess
import tempfile
from pathlib import Path

import torch

from . import build

SOURCE = build.SIMT / "golden" / "golden.cu"
_INPUT, _OUTPUT, _ACCUMULATOR = 0, 1, 3  # enum Access of memory.h


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    library.golden_run.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    library.golden_run.restype = library.golden_name.restype = ctypes.c_char_p
    return library


def names(library: ctypes.CDLL) -> list[str]:
    """Of all cases."""
    _declare(library)
    return [name.decode() for name in itertools.takewhile(bool, map(library.golden_name, itertools.count()))]


def _run(library, case, tensors, numbers, stream):
    pointers = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    wrong = library.golden_run(case.encode(), pointers, (ctypes.c_int64 * len(numbers))(*numbers), stream)
    if wrong:
        raise RuntimeError(f"{case}: {wrong.decode()}")


class Emulator:
    device = "cpu"

    def __init__(self):
        self.library = _declare(build.load("golden"))

    def lacks(self, level):
        return None

    def run(self, case, *tensors, numbers=(), keeps=False):
        self.library.simt_clear()
        for i, tensor in enumerate(tensors):
            last = _ACCUMULATOR if keeps else _OUTPUT
            access = last if i == len(tensors) - 1 else _INPUT
            one = ctypes.c_int64 * 1
            bytes_ = tensor.numel() * tensor.element_size()
            name = f"tensor {i}".encode()
            self.library.simt_register(tensor.data_ptr(), name, access, 1, 1, one(bytes_), one(1))
        _run(self.library, case, tensors, numbers, None)
        if unwritten := self.library.simt_unwritten_outputs():
            raise RuntimeError(f"{case}: {unwritten.decode()}")


class Gpu:
    """The current CUDA device. FileNotFoundError where there is no nvcc."""

    device = "cuda"

    def __init__(self):
        self.capability = "".join(map(str, torch.cuda.get_device_capability()))
        suffix = "a" if self.capability == "90" else ""
        self.library = _declare(ctypes.CDLL(str(compile_for_gpu(self.capability + suffix))))

    def lacks(self, level):
        if level == "90a" and self.capability != "90":
            return f"only GPUs of capability 9.0 have this instruction, here is {self.capability}"
        if int(level.rstrip("a")) > int(self.capability):
            return f"GPUs have this instruction from capability {level} on, here is {self.capability}"
        return None

    def run(self, case, *tensors, numbers=(), keeps=False):
        _run(self.library, case, tensors, numbers, torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()


def compile_for_gpu(architecture: str) -> Path:
    """Compiles the cases with the nvcc on PATH, warnings as errors.

    Returns:
        The path of a shared library, which is kept in the cache.

    Raises:
        FileNotFoundError: There is no nvcc.
        RuntimeError: It failed; the message holds its command and output.
    """
    version = subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout
    headers = sorted(path for kind in ("core/*.h", "cuda/*.cuh") for path in build.CSRC.glob(kind))
    flags = [
        "-std=c++17",
        "-O3",
        f"-arch=sm_{architecture}",
        f"-I{build.CSRC}",
        "-shared",
        "-Werror=all-warnings",
    ]
    flags += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
    parts = [version, repr(flags).encode(), *(path.read_bytes() for path in [SOURCE, *headers])]
    cache = build.cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"golden-{architecture}-{build.hash_of(*parts)}.so"
    if target.exists():
        os.utime(target)
    else:
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / target.name
            build.run(["nvcc", *flags, str(SOURCE), "-o", str(made)])
            os.replace(made, target)
    return target
