# SPDX-License-Identifier: MIT
"""The operators of `fastconv.ops`, run by rows of the CPU tables on aarch64, under qemu.

csrc/core and csrc/cpu see no torch, so a cross compiler makes a program of them, with the flags of setup.py
(aarch64.cpp is its other half). Tensors and arguments lie in memory that both processes see at one address.
"""

import ctypes
import functools
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from simt import build
from simt.backend import INPUT, ORDERS, Emulator
from sources import sources
from toolchain import host_flags

TESTS = Path(__file__).resolve().parent
COMPILER = "aarch64-linux-gnu-g++"
QEMU = ["qemu-aarch64", "-cpu", "cortex-a53"]  # of the first with 64 bits: ARMv8.0
_ADDRESS, _SIZE = 1 << 45, 1 << 32  # of the memory, far from what a process has by itself
_SHARED, _READ_WRITE, _FIXED_NOREPLACE = 0x1, 0x3, 0x100000  # flags of mmap
_ALIGN = 512


def lacks() -> str | None:
    """What is missing here, as a sentence."""
    missing = [name for name in (COMPILER, QEMU[0]) if not shutil.which(name)]
    return f"tests on aarch64 need {' and '.join(missing)}" if missing else None


def _link(target: Path, objects: list[Path]) -> None:
    build.run([COMPILER, "-static", "-o", str(target), *map(str, objects)])


def compile_program() -> Path:
    """Builds the program, or takes it from the cache. Raises RuntimeError where it fails, or warns."""
    flags = ["-std=c++17", *host_flags({**os.environ, "FASTCONV_WERROR": "1"})]
    flags += [f"-I{build.CSRC}", f"-I{TESTS}"]
    files = [(Path(file), []) for file in sources(build.CSRC, "core/*.cpp", "cpu/*.cpp")]
    files += [(TESTS / "aarch64.cpp", ["-Wno-nonnull"])]  # g++ 12 is wrong about std::vector's operator=
    headers = [*build.CSRC.glob("c*/*.h"), *build.CSRC.glob("cpu/*.inl"), build.SIMT / "rows.cpp"]
    return build.cached("aarch64-*.elf", COMPILER, flags, files, headers, _link)


class Program:
    """The functions of simt/rows.cpp in a process of its own, which begins anew after a crash.

    memory: What both processes see, as bytes.

    Raises:
        OSError: The memory cannot be had.
        RuntimeError: A call has ended the process.
    """

    def __init__(self):
        self._path, self._process = compile_program(), None
        self._shared = os.memfd_create("fastconv")
        os.truncate(self._shared, _SIZE)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        place = libc.mmap(_ADDRESS, _SIZE, _READ_WRITE, _SHARED | _FIXED_NOREPLACE, self._shared, 0)
        if place != _ADDRESS:
            raise OSError(ctypes.get_errno(), "mmap")
        self.memory = torch.frombuffer((ctypes.c_uint8 * _SIZE).from_address(place), dtype=torch.uint8)

    def _start(self):
        arguments = [str(each) for each in (self._path, self._shared, _ADDRESS, _SIZE)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return subprocess.Popen([*QEMU, *arguments], pass_fds=[self._shared], **pipes)

    def _call(self, *words):
        self._process = self._process or self._start()
        words = (word if isinstance(word, bytes) else str(word or 0).encode() for word in words)
        try:
            self._process.stdin.write(b" ".join(words) + b"\n")
            self._process.stdin.flush()
            size = int(self._process.stdout.readline())
        except (BrokenPipeError, ValueError):
            ended, self._process = self._process.wait(), None
            raise RuntimeError(f"{QEMU[0]} ends with {ended}") from None
        return self._process.stdout.read(size) if size >= 0 else None

    def __getattr__(self, function):
        return functools.partial(self._call, function.encode())


@functools.cache
def program() -> Program:
    """The one of this process."""
    return Program()


@dataclass
class Aarch64(Emulator):
    """`fastconv.ops` on aarch64. Calls that name no kernel stay here.

    order: In which the pieces of parallel work are done, one after the other.
    """

    level: int = 0
    device = 0

    @property
    def library(self):
        return program()

    def clear(self):
        self._used, self._written = 0, []

    def memory(self, size):
        start, self._used = self._used, self._used + (size + _ALIGN - 1) // _ALIGN * _ALIGN
        return self.library.memory[start : start + size].fill_(0xFF)

    def register(self, name, tensor, access):
        if access != INPUT:
            self._written.append(tensor)

    def launch(self, name, args, workspace):
        memory = self.library.memory[: self._used]
        expected = memory.clone()
        self.library.simt_configure(ORDERS.index(self.order), self.seed)
        if report := self.library.simt_run(name, args, workspace):
            return report
        for tensor in self._written:
            view = expected.view(tensor.dtype), tensor.shape, tensor.stride(), tensor.storage_offset()
            torch.as_strided(*view).copy_(tensor)
        stray = (expected != memory).sum()
        return f"{stray} bytes beside its outputs are changed".encode() if stray else None
