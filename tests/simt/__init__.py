# SPDX-License-Identifier: MIT
"""The CUDA kernels on a CPU: see README.md."""
