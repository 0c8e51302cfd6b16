# SPDX-License-Identifier: MIT
# The extension module, csrc/bindings.cpp: fastconv/ops.py and fastconv/kernels.py have its typed faces.
from typing import Any

def __getattr__(name: str) -> Any: ...
