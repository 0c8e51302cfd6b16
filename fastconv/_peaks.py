# SPDX-License-Identifier: MIT
"""How fast a device multiplies and copies, as measured here and now: what a kernel's rates are shares of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastconv import _timing


@dataclass(frozen=True)
class Peaks:
    """flops_per_s: Of torch's matrix product, a multiply-add being two. bytes_per_s: Read and written by a
    copy between tensors that no cache holds; what stays in a cache can be faster."""

    flops_per_s: float
    bytes_per_s: float

    def least_seconds(self, flops: float, bytes: float) -> float:
        """What work takes at the nearer of the two peaks."""
        return max(flops / self.flops_per_s, bytes / self.bytes_per_s)


def measure(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Peaks:
    """The peaks of a device with torch's present number of threads and precision flags, in about a second."""
    is_gpu = torch.device(device).type == "cuda"
    sizes, count = ((8192,), 2**28) if is_gpu else ((512, 1024), 2**26)
    products = [_product(size, device, dtype) for size in sizes]
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _timing.alone(lambda: target.copy_(source), seconds=0.2, device=device)
    return Peaks(max(products), 2 * count / copy)


def _product(size, device, dtype) -> float:
    """FLOP/s of a product of square matrices."""
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    product = torch.empty_like(a)
    return 2 * size**3 / _timing.alone(lambda: torch.mm(a, b, out=product), seconds=0.2, device=device)
