# SPDX-License-Identifier: MIT
"""PEP 517 build backend: setuptools, compiling against the torch of the environment that asked for the build.

An extension runs with the torch it was compiled against and no other. A build in isolation sees none, and
a `torch` among the build requirements would be the newest one. So the backend finds the environment's torch,
and requires one only where there is none.
"""

import importlib.util
import sys

import setuptools
import toolchain
from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

if int(setuptools.__version__.split(".")[0]) < 77:  # seen only without build isolation
    raise toolchain.BuildError(f"building needs setuptools>=77, found {setuptools.__version__}")


def _environment():
    """The environment to borrow torch from; None where torch is importable already, or nowhere."""
    if importlib.util.find_spec("torch"):
        return None
    return toolchain.find_environment(toolchain.interpreters())


def get_requires_for_build_wheel(config_settings=None):
    toolchain.check_platform()
    return [] if importlib.util.find_spec("torch") or _environment() else [toolchain.TORCH_REQUIREMENT]


get_requires_for_build_editable = get_requires_for_build_wheel


def _borrow_torch():
    environment = _environment()
    if environment:
        # Last, so that the packages made for the build win.
        sys.path += [folder for folder in environment.path if folder not in sys.path]


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _borrow_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _borrow_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
