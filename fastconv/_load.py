# SPDX-License-Identifier: MIT
"""Loads fastconv._C, after checking that it was built for the torch that runs.

PyTorch's C++ interface changes with each minor version, and a library built for another one ends in an
undefined symbol or a crash. So the version is read out of the library's bytes before the library is loaded.
"""

import importlib
import json
import re
import struct
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType

_MARKER = re.compile(rb"fastconv-built-with-torch=([^;\0]+);")


def torch_tag(torch: ModuleType) -> str:
    """Release and GPU toolkit of a torch, "2.14.1+cu130" or "2.13.0+cpu"; its version may lack the latter."""
    if torch.version.cuda:
        variant = "cu" + torch.version.cuda.replace(".", "")
    elif torch.version.hip:
        variant = "rocm" + torch.version.hip
    else:
        variant = "cpu"
    return f"{torch.__version__.split('+')[0]}+{variant}"


def built_tag(library: Path) -> str | None:
    """The `torch_tag` that a compiled fastconv._C carries, without loading it; None without one."""
    content = library.read_bytes()
    # An ELF file ends with its table of sections. Loading one that is cut short would kill the process.
    if len(content) < 64 or not content.startswith(b"\x7fELF"):
        return None
    (table,) = struct.unpack_from("=Q", content, 40)
    entry_size, entries = struct.unpack_from("=HH", content, 58)
    if len(content) < table + entry_size * entries:
        return None
    found = _MARKER.search(content)
    return found[1].decode() if found else None


def _series(tag: str) -> tuple[list[str], str]:
    release, _, variant = tag.partition("+")
    return release.split(".")[:2], variant


def _install_command(package: Path) -> str:
    """The pip command that builds fastconv anew for the running interpreter and torch."""
    source, editable = "fastconv", False
    if (package.parent / "setup.py").exists():
        source, editable = str(package.parent), True
    else:
        try:
            origin = json.loads(distribution("fastconv").read_text("direct_url.json") or "{}")
            source = origin.get("url", source).removeprefix("file://")
        except PackageNotFoundError:
            pass
    flags = "--force-reinstall --no-deps --no-cache-dir" + (" -e" if editable else "")
    return f"{sys.executable} -m pip install {flags} {source}"


def check(package: Path, running: str) -> Path:
    """The library fastconv._C of `package`, if it fits the running torch.

    Args:
        package: The folder of the installed package.
        running: `torch_tag` of the running torch.

    Raises:
        ImportError: There is no library for this Python, or it was built for another torch.
    """
    advice = f"Build it for this torch with\n    {_install_command(package)}"
    library = next((p for p in (package / f"_C{s}" for s in EXTENSION_SUFFIXES) if p.exists()), None)
    if library is None:
        raise ImportError(
            f"fastconv in {package} has no compiled library _C{EXTENSION_SUFFIXES[0]} for this Python; "
            f"torch {running} is running. {advice}",
            name="fastconv._C",
        )
    built = built_tag(library)
    if built is None or _series(built) != _series(running):
        raise ImportError(
            f"fastconv was built for torch {built or '(unknown)'}, but torch {running} is running. {advice}",
            name="fastconv._C",
            path=str(library),
        )
    return library


def _package_with_library() -> Path:
    """This package; or, where Python runs in a source tree without a library, the one that is installed."""
    own = Path(__file__).parent
    for package in (own, *(Path(folder, own.name) for folder in sys.path)):
        if any((package / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
            return package
    return own


def load() -> ModuleType:
    """Checks, then imports fastconv._C."""
    import torch  # its libraries must be there before ours

    package = _package_with_library()
    running = torch_tag(torch)
    library = check(package, running)
    if package != Path(__file__).parent:
        sys.modules[__package__].__path__.append(str(package))
    try:
        return importlib.import_module("fastconv._C")
    except ImportError as error:
        raise ImportError(
            f"fastconv, built for torch {built_tag(library)}, does not load with torch {running}: {error}. "
            f"Build it for this torch with\n    {_install_command(package)}",
            name="fastconv._C",
            path=str(library),
        ) from error
