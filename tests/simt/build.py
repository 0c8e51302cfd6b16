# SPDX-License-Identifier: MIT
"""Builds the emulator with g++ and loads it.

A library is the runtime and what it runs: "product" (all of csrc/cuda), "selftest", "mutants" or "golden".
With "_portable" behind its name it switches fibers as on processors other than x86-64. Object files and
libraries are kept in the user's cache folder under the hash of all that they depend on, so that each is
compiled once, by whichever process comes first.

Environment variables:
    CXX                  the compiler (g++); it must know -fsanitize=thread
    FASTCONV_SIMT_CACHE  the folder (default: fastconv-simt in $XDG_CACHE_HOME or ~/.cache)
"""

import concurrent.futures
import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

SIMT = Path(__file__).resolve().parent
CSRC = SIMT.parents[1] / "csrc"
RUNTIME = ["barrier", "block", "bulk", "c_api", "check", "cluster", "cp_async", "fiber", "memory", "report"]
RUNTIME += ["statistics", "tensor_core", "warp", "warpgroup"]
MAX_JOBS = 2

COMMON = [
    "-std=c++17",
    "-O2",
    "-g1",  # the lines, of inlined calls too
    "-fPIC",
    "-fvisibility=hidden",
    "-DFASTCONV_SIMT",
    "-DFASTCONV_WITH_CUDA=1",
]
COMMON += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{SIMT}", f"-I{CSRC}"]
# What the checker listens to (check.h), for kernel files. Return addresses name places, so no call is a jump.
CHECKED = ["-fsanitize=thread,undefined", "-fno-sanitize=vptr", "--param=tsan-instrument-func-entry-exit=0"]
CHECKED += ["-fno-optimize-sibling-calls", "-fno-omit-frame-pointer"]


def kernel_files(library: str) -> list[Path]:
    """The checked sources of a library: every kernel of the product, or those of the tests."""
    folder = CSRC / "cuda" if library == "product" else SIMT / library.removesuffix("_portable")
    return sorted(folder.glob("*.cu"))


def host_files(library: str) -> list[Path]:
    """The other sources of a library."""
    files = [SIMT / f"{name}.cpp" for name in RUNTIME]
    if library != "product":
        return [*files, SIMT / "cases.cpp"]
    return [*files, *sorted((CSRC / "core").glob("*.cpp")), CSRC / "cuda" / "table.cpp", SIMT / "rows.cpp"]


def compiler() -> str:
    """The C++ compiler, or FileNotFoundError."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if not found:
        raise FileNotFoundError("the emulator needs g++ (or a compiler named by CXX)")
    return found


def cache_folder() -> Path:
    """Where libraries are kept."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastconv-simt"
    return Path(os.environ.get("FASTCONV_SIMT_CACHE") or default)


def _version(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout


def hash_of(*parts: bytes) -> str:
    """A short name for what these bytes are."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def run(command: list[str]) -> None:
    """Runs a compiler. Raises RuntimeError with its command and output."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def compile_file(source: Path, flags: list[str], target: Path) -> None:
    """Makes an object file of the emulator."""
    _compile(compiler(), source, [*COMMON, *flags], target)


def _compile(compiler: str, source: Path, flags: list[str], target: Path) -> None:
    run([compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(target)])


def _prune(folder: Path, pattern: str, keep: int) -> None:
    """Deletes all but the files used last."""
    for old in sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)[:-keep]:
        old.unlink(missing_ok=True)


def _sources(library: str) -> list[tuple[Path, list[str]]]:
    """The sources of a library, each with its flags."""
    flags = ["-DFASTCONV_SIMT_UCONTEXT"] if library.endswith("_portable") else []
    checked = [(source, [*flags, *CHECKED, *_fma()]) for source in kernel_files(library)]
    return checked + [(source, flags) for source in host_files(library)]


def _fma() -> list[str]:
    """GPUs contract a * b + c; so does g++ where this processor can."""
    try:
        return ["-mfma"] if " fma " in Path("/proc/cpuinfo").read_text() else []
    except OSError:
        return []


def build(library: str) -> Path:
    """Compiles a library, or the part of it that has changed.

    Returns:
        The path of the shared library.

    Raises:
        FileNotFoundError: There is no compiler.
        RuntimeError: It failed; the message holds its command and output.
    """
    folders = (SIMT, CSRC / "core", CSRC / "cuda")
    headers = [path for folder in folders for kind in ("*.h", "*.cuh") for path in folder.rglob(kind)]
    return cached(f"{library}-*.so", compiler(), COMMON, _sources(library), headers, link)


def cached(
    name: str,
    compiler: str,
    flags: list[str],
    sources: list[tuple[Path, list[str]]],
    headers: list[Path],
    link: Callable[[Path, list[Path]], None],
) -> Path:
    """What a compiler makes of sources, or its copy in the cache.

    Args:
        name: Of the file; "*" stands for its hash.
        flags: Of every source.
        sources: Each with its further flags.
        headers: What the sources include.
        link: Makes the file of object files.

    Raises:
        RuntimeError: Compiler or linker failed; the message holds the command and its output.
    """
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    contents = (path.read_bytes() for path in sorted(headers))
    common = [_version(compiler), repr(flags).encode(), *contents]

    def object_of(source: Path, more: list[str]) -> Path:
        return cache / f"{source.stem}-{hash_of(*common, repr(more).encode(), source.read_bytes())}.o"

    objects = [object_of(*source) for source in sources]
    target = cache / name.replace("*", hash_of(*(path.name.encode() for path in objects)))
    if target.exists():
        os.utime(target)
        return target

    with open(cache / "lock", "w") as lock, tempfile.TemporaryDirectory(dir=cache) as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)  # others wait for the first to finish

        def compile_missing(job: tuple[tuple[Path, list[str]], Path]) -> None:
            (source, more), path = job
            if path.exists():
                os.utime(path)
                return
            _compile(compiler, source, [*flags, *more], Path(scratch) / path.name)
            os.replace(Path(scratch) / path.name, path)

        with concurrent.futures.ThreadPoolExecutor(MAX_JOBS) as pool:
            list(pool.map(compile_missing, zip(sources, objects, strict=True)))
        link(Path(scratch) / target.name, objects)
        os.replace(Path(scratch) / target.name, target)
        _prune(cache, f"*{target.suffix}", 16)
        _prune(cache, "*.o", 200)
    return target


def link(target: Path, objects: list[Path], flags: tuple[str, ...] = ()) -> None:
    """Links object files. A library's own functions come first, since some have the names of libtsan's."""
    options = ["-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", *flags]
    run([compiler(), *options, "-o", str(target), *map(str, objects), "-ldl"])


@functools.cache
def load(library: str) -> ctypes.CDLL:
    """Builds and loads a library, and declares what every one of them exports."""
    loaded = ctypes.CDLL(str(build(library)))
    text, number, numbers = ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_int64)
    loaded.simt_register.argtypes = [ctypes.c_void_p, text, number, ctypes.c_size_t, number, numbers, numbers]
    loaded.simt_configure.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_bool]
    loaded.simt_statistics.restype = loaded.simt_unwritten_outputs.restype = text
    return loaded


if __name__ == "__main__":
    for name in ("product", "selftest", "mutants"):
        print(build(name))
