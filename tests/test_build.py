# SPDX-License-Identifier: MIT
"""The build's decisions, what is packaged, and what happens when the library does not fit."""

import json
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import venv
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
import toolchain
import torch

import fastconv
from fastconv import _load

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(fastconv.__file__).parent
LIBRARY = Path(fastconv._C.__file__)


def run(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# --- The library and the running torch ----------------------------------------------------------------------


def fake_torch(version, cuda=None, hip=None):
    return SimpleNamespace(__version__=version, version=SimpleNamespace(cuda=cuda, hip=hip))


@pytest.mark.parametrize(
    ("torch_module", "tag"),
    [
        (fake_torch("2.13.0+cpu"), "2.13.0+cpu"),
        (fake_torch("2.14.1+cu130", cuda="13.0"), "2.14.1+cu130"),
        (fake_torch("2.14.1", cuda="12.9"), "2.14.1+cu129"),
        (fake_torch("2.12.0a0+git1234abc"), "2.12.0a0+cpu"),
        (fake_torch("2.13.0+rocm6.4", hip="6.4"), "2.13.0+rocm6.4"),
    ],
)
def test_torch_tag(torch_module, tag):
    assert _load.torch_tag(torch_module) == tag


def test_the_library_carries_the_torch_it_was_built_for():
    assert _load.built_tag(LIBRARY) == _load.torch_tag(torch)


def elf(tag):
    """The header of an ELF file, the marker, and a table of one section at the end."""
    header = b"\x7fELF".ljust(40, b"\0") + struct.pack("=Q", 128) + bytes(10) + struct.pack("=HHH", 8, 1, 0)
    return (header + f"fastconv-built-with-torch={tag};".encode()).ljust(128, b"\0") + bytes(8)


def fake_package(folder, content):
    package = folder / "fastconv"
    package.mkdir()
    if content is not None:
        (package / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(content)
    return package


@pytest.mark.parametrize("running", ["2.13.0+cpu", "2.13.1+cpu"])
def test_patch_releases_share_a_library(tmp_path, running):
    package = fake_package(tmp_path, elf("2.13.0+cpu"))
    assert _load.check(package, running).parent == package


@pytest.mark.parametrize(
    ("content", "running", "built"),
    [
        (elf("2.13.0+cpu"), "2.14.0+cpu", "2.13.0+cpu"),
        (elf("2.13.0+cpu"), "2.13.0+cu130", "2.13.0+cpu"),
        (elf("2.1.0+cu130"), "2.13.0+cu130", "2.1.0+cu130"),
        (elf("2.13.0+cpu").replace(b";", b""), "2.13.0+cpu", "(unknown)"),
        (elf("2.13.0+cpu")[:-1], "2.13.0+cpu", "(unknown)"),
        (None, "2.13.0+cpu", "no compiled library"),
    ],
)
def test_a_library_that_does_not_fit_is_refused(tmp_path, content, running, built):
    with pytest.raises(ImportError) as caught:
        _load.check(fake_package(tmp_path, content), running)
    message = str(caught.value)
    assert built in message and running in message
    assert f"{sys.executable} -m pip install" in message


def test_a_source_tree_without_a_library_uses_the_installed_one(tmp_path):
    """So that `python -m fastconv` works in a clone after `pip install .`."""
    installed = Path(fastconv.__file__).parent
    shutil.copytree(installed, tmp_path / "fastconv", ignore=shutil.ignore_patterns("*.so", "_data"))
    code = "import fastconv; print(fastconv.__file__, fastconv._C.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed.parent)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert found == [str(tmp_path / "fastconv" / "__init__.py"), fastconv._C.__file__]


@pytest.mark.parametrize("damage", ["other torch", "truncated", "undefined symbol"])
def test_import_ends_in_one_error_and_no_crash(tmp_path, damage):
    package = shutil.copytree(PACKAGE, tmp_path / "fastconv")
    library = package / LIBRARY.name
    content = library.read_bytes()
    marker = f"fastconv-built-with-torch={_load.torch_tag(torch)};".encode()
    assert content.count(marker) == 1
    if damage == "other torch":
        library.write_bytes(content.replace(marker, marker.replace(b"torch=2.", b"torch=1.")))
    elif damage == "truncated":
        library.write_bytes(content[: len(content) // 2])
    else:
        symbol = re.search(rb"\0_ZN5torch7LibraryC1E\w+", content)[0]
        library.write_bytes(content.replace(symbol, symbol[:-1] + b"_"))
    done = subprocess.run(
        [sys.executable, "-c", "import fastconv"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    error = done.stderr[done.stderr.rindex("ImportError") :]
    assert str(torch.__version__) in error and "pip install" in error
    assert damage != "other torch" or _load.torch_tag(torch).replace("2.", "1.", 1) in error


# --- Which torch --------------------------------------------------------------------------------------------


def test_the_running_interpreter_has_the_torch_to_build_against():
    environment = toolchain.find_environment([sys.executable])
    assert environment.torch == tuple(int(n) for n in torch.__version__.split(".")[:2])
    assert str(Path(torch.__file__).parents[1]) in environment.path


@pytest.fixture
def environment_with_torch(tmp_path):
    """Makes a virtual environment that holds nothing but a torch of the given version."""

    def make(version):
        folder = tmp_path / f"torch-{version}"
        venv.create(folder, with_pip=False)
        site_packages = next(folder.glob("lib/python*/site-packages"))
        (site_packages / "torch").mkdir()
        (site_packages / "torch" / "__init__.py").write_text("raise RuntimeError('not to be imported')")
        (site_packages / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
        return folder

    return make


def test_a_torch_is_found_without_importing_it(environment_with_torch):
    old, new = environment_with_torch("2.10.1+cpu"), environment_with_torch("2.11.0")
    pythons = [str(folder / "bin" / "python") for folder in (old, new)]
    assert toolchain.find_environment(["/nonexistent/python", *pythons]).torch == (2, 11)
    assert toolchain.find_environment(pythons[:1]) is None


def test_the_activated_environment_is_asked_unless_pip_builds(tmp_path):
    activated = {"VIRTUAL_ENV": "/a", "CONDA_PREFIX": "/b"}
    assert toolchain.interpreters(activated) == [sys.executable, "/a/bin/python", "/b/bin/python"]
    assert toolchain.interpreters(activated | {"PYTHONPATH": "/tmp/pip-build-env-x/site"}) == [sys.executable]
    assert toolchain.interpreters({}) == [sys.executable]


# --- CUDA or not --------------------------------------------------------------------------------------------

VERSION = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.88\n"
DRYRUN = "#$ _HERE_=/opt/cuda/bin\n#$ TOP=/opt/cuda/bin/..\n#$ gcc -E\n"
ARCHITECTURES = "compute_75\ncompute_80\ncompute_90\ncompute_100\ncompute_103\ncompute_120\n"
NVCC = toolchain.parse_nvcc(VERSION, DRYRUN, ARCHITECTURES)
NVCC_12 = NVCC._replace(version=(12, 6), architectures=("compute_75", "compute_80", "compute_90"))


def test_parse_nvcc():
    assert Path("/opt/cuda") == NVCC.home
    assert NVCC.version == (13, 0)
    assert NVCC.architectures == (
        "compute_75",
        "compute_80",
        "compute_90",
        "compute_100",
        "compute_103",
        "compute_120",
    )
    assert toolchain.parse_nvcc("sh: nvcc: not found", "", "") is None


def test_nvcc_behind_a_wrapper_script(tmp_path):
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(
        f"#!/bin/sh\ncase $1 in\n--version) echo '{VERSION}';;\n--dryrun) echo '{DRYRUN}' >&2;;\n"
        f"--list-gpu-arch) echo '{ARCHITECTURES}';;\nesac\n"
    )
    wrapper.chmod(0o755)
    assert toolchain.query_nvcc(wrapper) == NVCC
    assert toolchain.query_nvcc(tmp_path / "nvcc") is None


def test_where_nvcc_is_looked_for(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.touch(0o755)
    on_path = toolchain.nvcc_paths("13.0", Path("/site"), {"PATH": str(tmp_path)})
    assert on_path[0] == nvcc
    assert Path("/usr/local/cuda-13.0/bin/nvcc") in on_path and Path("/site/nvidia/cu13/bin/nvcc") in on_path
    assert toolchain.nvcc_paths("13.0", Path("/site"), {"CUDA_HOME": "/x", "PATH": str(tmp_path)}) == [
        Path("/x/bin/nvcc")
    ]


@pytest.mark.parametrize(
    ("setting", "torch_cuda", "toolkits", "enabled", "reason"),
    [
        ("auto", "13.0", [NVCC_12, NVCC], True, "torch 2.14.1 and nvcc 13.0"),
        ("1", "12.9", [NVCC, NVCC_12], True, "torch 2.14.1 and nvcc 12.6"),
        ("auto", "13.0", [NVCC_12], False, "torch 2.14.1 needs an nvcc of CUDA 13, found 12.6"),
        ("auto", "13.0", [], False, "torch 2.14.1 needs an nvcc of CUDA 13, found none"),
        ("auto", None, [NVCC], False, "torch 2.14.1 is built without CUDA"),
        ("0", "13.0", [NVCC], False, "FASTCONV_CUDA=0"),
    ],
)
def test_choose_cuda(setting, torch_cuda, toolkits, enabled, reason):
    choice = toolchain.choose_cuda(setting, "2.14.1", torch_cuda, toolkits)
    assert (choice.enabled, choice.reason) == (enabled, reason)
    assert (choice.nvcc is not None) == enabled


@pytest.mark.parametrize(
    ("setting", "torch_cuda", "message"),
    [
        ("1", None, "FASTCONV_CUDA=1, but torch 2.13.0 is built without CUDA"),
        ("1", "12.9", "FASTCONV_CUDA=1, but torch 2.13.0 needs an nvcc of CUDA 12, found 13.0"),
        ("yes", "13.0", "FASTCONV_CUDA must be auto, 0 or 1, got 'yes'"),
    ],
)
def test_choose_cuda_refuses(setting, torch_cuda, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        toolchain.choose_cuda(setting, "2.13.0", torch_cuda, [NVCC])


@pytest.mark.parametrize(
    ("wanted", "nvcc", "architectures"),
    [
        ("", NVCC, ["sm_75", "sm_80", "sm_90a", "sm_100", "compute_100"]),
        ("", NVCC_12, ["sm_75", "sm_80", "sm_90a", "compute_90"]),
        ("9.0", NVCC, ["sm_90a"]),
        ("9.0a", NVCC, ["sm_90a"]),
        ("8.0;9.0+PTX", NVCC, ["sm_80", "sm_90a", "compute_90"]),
        ("7.5 12.0+PTX ", NVCC, ["sm_75", "sm_120", "compute_120"]),
        ("10.0a 10.3f", NVCC, ["sm_100a", "sm_103f"]),
    ],
)
def test_cuda_architectures(wanted, nvcc, architectures):
    assert toolchain.cuda_architectures(wanted, nvcc) == architectures


@pytest.mark.parametrize("wanted", ["Hopper", "9", "10.0", "8.0 sm_90", "native"])
def test_cuda_architectures_refuses(wanted):
    with pytest.raises(SystemExit, match=f"TORCH_CUDA_ARCH_LIST: '{wanted.split()[-1]}'"):
        toolchain.cuda_architectures(wanted, NVCC_12)


def test_gencode():
    assert toolchain.gencode(["sm_90a", "compute_100"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=compute_100",
    ]


def test_only_linux():
    with pytest.raises(SystemExit, match="only Linux is supported, this is 'darwin'"):
        toolchain.check_platform("darwin")


@pytest.mark.cuda_build
@pytest.mark.skipif(not fastconv._C.build_info()["cuda"], reason="this build has no CUDA kernels")
def test_build_info_of_a_cuda_build():
    info = fastconv._C.build_info()
    assert info["cuda"] is True
    assert info["cuda_reason"].startswith(f"torch {torch.__version__} and nvcc ")
    assert re.fullmatch(r"((sm_\d+[af]?|compute_\d+) ?)+", info["cuda_archs"])


# --- The machine code ---------------------------------------------------------------------------------------


def instructions_by_function(library):
    """Yields (mangled function name, lines of the disassembly)."""
    text = run("objdump", "-d", "--no-addresses", "--insn-width=15", library)
    for block in text.split("\n\n"):
        heading, _, body = block.strip().partition(":\n")
        if heading.startswith("<"):
            yield heading.strip("<>"), body.splitlines()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are x86-64's")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")
def test_only_the_isa_namespaces_hold_avx_code():
    # In 64-bit code the bytes C4, C5 (VEX) and 62 (EVEX) begin an AVX instruction and nothing else.
    avx = re.compile(r"^\s*(?:(?:2e|36|3e|26|64|65|67) )*(?:c4|c5|62) ")
    allowed = re.compile(r"_ZZ*NK?8fastconv3cpu(?:12_GLOBAL__N_1)?(4avx2|6avx512)")
    functions = {
        name: sum(map(bool, map(avx.match, body))) for name, body in instructions_by_function(LIBRARY)
    }
    leaks = [name for name, count in functions.items() if count and not allowed.match(name)]
    assert not leaks
    seen = {allowed.match(name)[1] for name, count in functions.items() if count}
    assert seen == {"4avx2", "6avx512"}


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_kernels_are_warning_free_cpp17_without_torch():
    files = [
        path for folder in ("core", "cpu", "cuda") for path in sorted((ROOT / "csrc" / folder).glob("*.cpp"))
    ]
    assert files
    flags = ("-std=c++17", "-fsyntax-only", "-fopenmp", "-Wall", "-Wextra", "-Werror")
    run("g++", *flags, "-I", ROOT / "csrc", *files)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)],
)
def test_a_training_step_runs_on_this_processor(dtype, tolerance):
    ours = fastconv.models.LeNet(padding=2).to(dtype)
    theirs = fastconv.models.LeNet(layers=torch.nn, padding=2).double()
    theirs.load_state_dict(ours.state_dict())
    images, labels = torch.randn(3, 1, 28, 28, dtype=dtype), torch.tensor([1, 0, 7])
    outputs, expected = ours(images), theirs(images.double())
    torch.nn.functional.cross_entropy(outputs, labels).backward()
    torch.nn.functional.cross_entropy(expected, labels).backward()
    torch.testing.assert_close(outputs.double(), expected, rtol=tolerance, atol=tolerance)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=tolerance, atol=tolerance)


# --- Packages -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the source tree without anything built."""
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__")
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("tree") / "fastconv", ignore=ignore)


def test_source_distribution_is_complete_and_needs_no_torch(tree, tmp_path):
    (tree / "fastconv" / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    code = (
        "import sys; sys.modules['torch'] = None; sys.path.insert(0, 'buildtools');"
        f"import fastconv_backend; fastconv_backend.build_sdist({str(tmp_path)!r})"
    )
    run(sys.executable, "-c", code, cwd=tree)
    (archive,) = tmp_path.glob("fastconv-*.tar.gz")
    with tarfile.open(archive) as file:
        members = {name.partition("/")[2] for name in file.getnames()}
    folders = ("csrc", "buildtools", "fastconv", "tests", "benchmarks", "docs")
    wanted = {
        str(path.relative_to(ROOT)) for f in folders for path in (ROOT / f).rglob("*") if path.is_file()
    }
    wanted = {path for path in wanted if not re.search(r"__pycache__|\.so$|/\.", path)}
    assert wanted | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= members
    assert not [name for name in members if name.endswith((".so", ".pyc", ".o"))]
    (tree / "fastconv" / f"_C{EXTENSION_SUFFIXES[0]}").unlink()


@pytest.fixture(scope="module")
def new_environment(tmp_path_factory):
    """A virtual environment that also sees the packages of the running one, but not its fastconv."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    run(folder / "bin" / "pip", "install", "-q", "-U", "setuptools", "ninja")
    others = folder / "others"
    others.mkdir()
    for package in Path(torch.__file__).parents[1].iterdir():
        if "fastconv" not in package.name and package.suffix != ".pth":
            (others / package.name).symlink_to(package)
    site_packages = next(folder.glob("lib/python*/site-packages"))
    (site_packages / "running.pth").write_text(str(others))
    return folder


@pytest.fixture(scope="module", params=["bundled", "newest"])
def environment(request, new_environment):
    """The same with the pip that comes with Python, then with the newest."""
    if request.param == "newest":
        run(new_environment / "bin" / "pip", "install", "-q", "-U", "pip")
    return new_environment


def installed_info(environment):
    code = "import fastconv, json; print(json.dumps([fastconv.__file__, fastconv._C.build_info()]))"
    file, info = json.loads(run(environment / "bin" / "python", "-c", code, cwd="/"))
    assert run(environment / "bin" / "fastconv", "info", cwd="/")
    return Path(file), info


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--no-build-isolation", "--no-deps", "--no-index")])
def test_pip_install(tree, environment, options):
    run(environment / "bin" / "pip", "install", "--force-reinstall", "--no-deps", *options, tree)
    file, info = installed_info(environment)
    assert environment in file.parents
    assert (file.parent / "py.typed").is_file()
    assert info["cuda_reason"] == fastconv._C.build_info()["cuda_reason"]


@pytest.mark.slow
def test_pip_install_editable(tree, environment):
    run(environment / "bin" / "pip", "install", "--no-deps", "-e", tree)
    file, _ = installed_info(environment)
    assert file.parent == tree / "fastconv"


@pytest.mark.slow
def test_pip_install_where_there_is_no_torch(tree, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    (tmp_path / "constraints").write_text(f"torch=={metadata.version('torch')}\n")
    constraints = {name: str(tmp_path / "constraints") for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")}
    run(tmp_path / "env" / "bin" / "pip", "install", tree, env=os.environ | constraints)
    file, _ = installed_info(tmp_path / "env")
    assert tmp_path / "env" in file.parents
