# SPDX-License-Identifier: MIT
"""Builds the extension fastconv._C. Everything else about the package is in pyproject.toml.

Environment variables:
    FASTCONV_CUDA         0, 1 or auto (default: if torch has CUDA and an nvcc of its major version is found)
    TORCH_CUDA_ARCH_LIST  builds for these GPUs only, e.g. "8.0 9.0"; the default is every supported one
    FASTCONV_WERROR=1     makes each compiler warning an error
    FASTCONV_OPTIMIZE=0   compiles host code faster, for tests of the packaging; the default is 3
    MAX_JOBS              parallel compilations
"""

import os
import runpy
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent / "buildtools"))
import toolchain  # noqa: E402
from sources import source_hash, sources  # noqa: E402

try:
    import torch
    from torch.utils import cpp_extension

    BuildExtension = cpp_extension.BuildExtension
    BUILD_FOLDER = Path("build", f"{sys.implementation.cache_tag}-torch{torch.__version__}")
except ImportError as error:  # enough for metadata and a source distribution
    torch, torch_error = None, error
    BuildExtension = build_ext
    BUILD_FOLDER = Path("build")


def write_source_hashes(folder):
    """Tells the library which sources it is built from; a header that says so already is not touched."""
    files = [path.removeprefix("csrc/") for path in sources(Path("csrc"), "c*/*.cpp", "c*/*.cu")]
    lines = [f'{{"{file}", "{source_hash(file, Path("csrc"))}"}},\n' for file in files]
    header, text = folder / "source_hashes.inc", "".join(lines)
    if not header.exists() or header.read_text() != text:
        folder.mkdir(parents=True, exist_ok=True)
        header.with_suffix(".new").write_text(text)
        os.replace(header.with_suffix(".new"), header)


def configure(extension):
    """Fills in sources and flags for the torch and the CUDA toolkit at hand."""
    site_packages = Path(torch.__file__).parents[1]
    paths = toolchain.nvcc_paths(torch.version.cuda, site_packages) if torch.version.cuda else []
    cuda = toolchain.choose_cuda(
        os.environ.get("FASTCONV_CUDA", "auto"),
        str(torch.__version__),
        torch.version.cuda,
        [nvcc for nvcc in map(toolchain.query_nvcc, paths) if nvcc],
    )
    architectures = []
    if cuda.enabled:
        architectures = toolchain.cuda_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), cuda.nvcc)
    state = "on" if cuda.enabled else "off"
    print(f"fastconv: CUDA kernels {state}: {cuda.reason}", *architectures, flush=True)

    built_torch = runpy.run_path("fastconv/_load.py")["torch_tag"](torch)
    # Headers of torch and CUDA are system headers, and only C++ sources see torch's: kernels stay free of it.
    cxx = toolchain.host_flags()
    cxx += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    cxx += [
        f'-DFASTCONV_BUILT_TORCH="{built_torch}"',
        f'-DFASTCONV_CUDA_REASON="{cuda.reason}"',
        f'-DFASTCONV_CUDA_ARCHS="{" ".join(architectures)}"',
    ]
    nvcc = []
    libraries = ["c10", "torch_cpu", "torch_python"]
    objects = []
    patterns = ("bindings.cpp", "core/*.cpp", "cpu/*.cpp", "cuda/*.cpp", "glue/*.cpp")
    extension.sources = sources(Path("csrc"), *patterns)
    if cuda.enabled:
        cpp_extension.CUDA_HOME = str(cuda.nvcc.home)
        # The slowest files first, so that none is left for the end.
        extension.sources = sources(Path("csrc"), "cuda/*.cu") + extension.sources
        extension.define_macros += [("FASTCONV_WITH_CUDA", "1")]
        cxx += [f"-isystem{cuda.nvcc.home / 'include'}"]
        nvcc = [cxx[0], "--threads=2", "-Xcompiler=-fvisibility=hidden,-Wall"]
        nvcc += toolchain.gencode(architectures)
        nvcc += ["-Werror=all-warnings"] * ("-Werror" in cxx)
        nvcc += ["--compress-mode=size"] * (cuda.nvcc.version >= (12, 8))
        # torch's own flags disable the arithmetic operators of the half types.
        for feature in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS"):
            nvcc += [f"-U__CUDA_NO_{feature}__"]
        libraries += ["c10_cuda"]
        objects += [str(toolchain.cuda_runtime(cuda.nvcc))]
    generated = (BUILD_FOLDER / "generated").resolve()
    write_source_hashes(generated)
    extension.include_dirs = [str(Path("csrc").resolve()), str(generated)]
    extension.extra_compile_args = {"cxx": cxx, "nvcc": nvcc}
    extension.library_dirs = [str(Path(torch.__file__).parent / "lib")]
    extension.libraries = libraries
    extension.extra_link_args = ["-fopenmp", *objects]


class BuildCpp(BuildExtension):
    def finalize_options(self):
        super().finalize_options()
        self.build_temp = str(BUILD_FOLDER / "objects")  # kept between builds, editable ones too

    def run(self):
        toolchain.check_platform()
        needs = f"building needs {toolchain.TORCH_REQUIREMENT}"
        if torch is None:
            raise toolchain.BuildError(f"{needs}: {torch_error}")
        if toolchain.torch_version(Path(torch.__file__).parent) < toolchain.MIN_TORCH:
            raise toolchain.BuildError(f"{needs}, found {torch.__version__}")
        # ninja may be installed beside the interpreter without being on PATH.
        os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
        if not cpp_extension.is_ninja_available():
            raise toolchain.BuildError("building needs ninja: pip install ninja")
        for extension in self.extensions:
            configure(extension)
        super().run()


class BuildPython(build_py):
    def run(self):
        if not self.editable_mode:
            # A file that is gone from the tree must not live on in a wheel.
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    ext_modules=[Extension("fastconv._C", [], language="c++")],
    cmdclass={"build_ext": BuildCpp, "build_py": BuildPython},
    options={"build": {"build_base": str(BUILD_FOLDER)}},
    zip_safe=False,
)
