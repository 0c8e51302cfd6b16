# SPDX-License-Identifier: MIT
"""What a build has to decide: which torch, CUDA or not, which GPU architectures. Imports no torch."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

MIN_TORCH = (2, 11)
TORCH_REQUIREMENT = "torch>=2.11"

# Binaries for these compute capabilities, and PTX of the last that nvcc knows for every GPU that comes after.
DEFAULT_CAPABILITIES = ("7.5", "8.0", "9.0", "10.0")


class BuildError(SystemExit):
    """Ends a build with one sentence instead of a traceback."""

    def __init__(self, message: str):
        super().__init__(f"fastconv: {message}")


class Nvcc(NamedTuple):
    """A CUDA toolkit: its root folder, version and virtual architectures ("compute_80")."""

    home: Path
    version: tuple[int, int]
    architectures: tuple[str, ...]


class Cuda(NamedTuple):
    """Whether CUDA kernels are built, why, and the toolkit that builds them (None where they are not)."""

    enabled: bool
    reason: str
    nvcc: Nvcc | None = None


def check_platform(platform: str = sys.platform) -> None:
    if platform != "linux":
        raise BuildError(f"only Linux is supported, this is {platform!r}")


def host_flags(environ=os.environ) -> list[str]:
    """What every C++ source is compiled with. None names a processor: kernels for newer ones do so."""
    return [
        f"-O{environ.get('FASTCONV_OPTIMIZE', '3')}",
        "-g0",
        "-fopenmp",
        "-ffp-contract=fast",
        "-fno-predictive-commoning",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        *["-Werror"] * (environ.get("FASTCONV_WERROR") == "1"),
    ]


# --- torch --------------------------------------------------------------------------------------------------


class Environment(NamedTuple):
    """Where an interpreter finds its modules, and the version (major, minor) of its torch."""

    path: list[str]
    torch: tuple[int, int]


def torch_version(folder: str | Path) -> tuple[int, int] | None:
    """Version (major, minor) of an installed torch, read without importing it; `folder` is the package's."""
    try:
        text = Path(folder, "version.py").read_text()
    except OSError:
        return None
    found = re.search(r"""__version__ = ['"](\d+)\.(\d+)""", text)
    return (int(found[1]), int(found[2])) if found else None


def ask_interpreter(python: str) -> Environment | None:
    """The environment of another interpreter, if it has a torch and this interpreter's Python version."""
    # The variables by which pip hides an environment from a build inside it.
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    question = (
        "import importlib.util, json, sys; torch = importlib.util.find_spec('torch');"
        "print(json.dumps([torch and torch.origin, sys.version_info[:2], sys.path[1:]]))"
    )
    try:
        answer = subprocess.run([python, "-c", question], env=environ, capture_output=True, check=True).stdout
        origin, version, path = json.loads(answer)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None
    torch = torch_version(Path(origin).parent) if origin else None
    return Environment(path, torch) if torch and tuple(version) == sys.version_info[:2] else None


def interpreters(environ=os.environ) -> list[str]:
    """Interpreters of the environment that may have asked for the build, most likely first.

    pip hides the installed packages from an isolated build but runs it with the environment's interpreter.
    Other front ends make a new environment; an activated one then still shows in the variables.
    """
    found = [sys.executable]
    if "pip-build-env" not in environ.get("PYTHONPATH", ""):
        prefixes = (environ.get("VIRTUAL_ENV"), environ.get("CONDA_PREFIX"))
        found += [str(Path(prefix, "bin", "python")) for prefix in prefixes if prefix]
    return found


def find_environment(pythons: list[str]) -> Environment | None:
    """The first environment with a torch that this project can be built against."""
    return next((e for e in map(ask_interpreter, pythons) if e and e.torch >= MIN_TORCH), None)


# --- CUDA ---------------------------------------------------------------------------------------------------


def parse_nvcc(version_text: str, dryrun_text: str, list_text: str) -> Nvcc | None:
    """What `nvcc --version`, `nvcc --dryrun` and `nvcc --list-gpu-arch` print; None where they make no sense.

    The root folder comes from nvcc itself (TOP=), since the `nvcc` on PATH may be a wrapper script or a link.
    """
    version = re.search(r"release (\d+)\.(\d+)", version_text)
    top = re.search(r"^#\$ TOP=(.+)$", dryrun_text, re.MULTILINE)
    if not version or not top:
        return None
    architectures = tuple(re.findall(r"^compute_\d+$", list_text, re.MULTILINE))
    return Nvcc(Path(top[1].strip()).resolve(), (int(version[1]), int(version[2])), architectures)


def query_nvcc(nvcc: Path) -> Nvcc | None:
    def ask(*arguments: str) -> str:
        done = subprocess.run([str(nvcc), *arguments], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    try:
        return parse_nvcc(ask("--version"), ask("--dryrun", "-x", "cu", os.devnull), ask("--list-gpu-arch"))
    except OSError:
        return None


def nvcc_paths(torch_cuda: str, site_packages: Path, environ=os.environ) -> list[Path]:
    """Where nvcc may be. CUDA_HOME or CUDA_PATH, if set, is the only answer."""
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    if home:
        return [Path(home, "bin", "nvcc")]
    major = torch_cuda.split(".")[0]
    on_path = shutil.which("nvcc", path=environ.get("PATH"))
    folders = [f"/usr/local/cuda-{torch_cuda}", "/usr/local/cuda", site_packages / "nvidia" / f"cu{major}"]
    paths = [Path(on_path)] if on_path else []
    return paths + [Path(folder, "bin", "nvcc") for folder in folders]


def choose_cuda(setting: str, torch_release: str, torch_cuda: str | None, toolkits: list[Nvcc]) -> Cuda:
    """Decides on the CUDA kernels.

    Args:
        setting: FASTCONV_CUDA: "auto", "0" or "1".
        torch_release: torch's version, for the reason.
        torch_cuda: The CUDA version torch was built with, or None.
        toolkits: The toolkits found, in order of preference.

    A GPU is not asked for: a build machine often has none.
    """
    if setting not in ("auto", "0", "1"):
        raise BuildError(f"FASTCONV_CUDA must be auto, 0 or 1, got {setting!r}")
    if setting == "0":
        return Cuda(False, "FASTCONV_CUDA=0")
    if torch_cuda is None:
        choice = Cuda(False, f"torch {torch_release} is built without CUDA")
    else:
        major = int(torch_cuda.split(".")[0])
        fitting = next((t for t in toolkits if t.version[0] == major), None)
        if fitting:
            version = ".".join(map(str, fitting.version))
            choice = Cuda(True, f"torch {torch_release} and nvcc {version}", fitting)
        elif toolkits:
            seen = ", ".join(sorted({".".join(map(str, t.version)) for t in toolkits}))
            choice = Cuda(False, f"torch {torch_release} needs an nvcc of CUDA {major}, found {seen}")
        else:
            choice = Cuda(False, f"torch {torch_release} needs an nvcc of CUDA {major}, found none")
    if setting == "1" and not choice.enabled:
        raise BuildError(f"FASTCONV_CUDA=1, but {choice.reason}")
    return choice


def cuda_architectures(wanted: str, nvcc: Nvcc) -> list[str]:
    """The code to generate: "sm_80" is a binary, "compute_100" is PTX.

    Args:
        wanted: TORCH_CUDA_ARCH_LIST, e.g. "8.0 9.0a;10.0+PTX"; empty for the default.

    The one device family of capability 9.x always gets sm_90a, which adds Hopper's own instructions to sm_90.
    """
    if wanted:
        entries = re.split(r"[;,\s]+", wanted.strip("; ,\t"))
    else:
        known = [c for c in DEFAULT_CAPABILITIES if f"compute_{c.replace('.', '')}" in nvcc.architectures]
        entries = known[:-1] + [f"{c}+PTX" for c in known[-1:]]
    binaries, ptx = [], []
    for entry in entries:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not found or f"compute_{found[1]}{found[2]}" not in nvcc.architectures:
            version = ".".join(map(str, nvcc.version))
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: {entry!r} is no architecture of nvcc {version}")
        number = found[1] + found[2]
        suffix = "a" if number == "90" else found[3]
        binaries.append(f"sm_{number}{suffix}")
        if found[4]:
            ptx.append(f"compute_{number}")
    return list(dict.fromkeys(binaries + ptx))


def gencode(architectures: list[str]) -> list[str]:
    """nvcc's flags for `cuda_architectures`."""
    return [f"-gencode=arch=compute_{a.split('_')[1]},code={a}" for a in architectures]


def cuda_runtime(nvcc: Nvcc) -> Path:
    """The toolkit's libcudart.so.N, the very library torch loads: only its name is recorded."""
    name = f"libcudart.so.{nvcc.version[0]}"
    for folder in ("lib64", "lib"):
        if (nvcc.home / folder / name).exists():
            return nvcc.home / folder / name
    raise BuildError(f"{name} is missing in {nvcc.home}/lib64")
