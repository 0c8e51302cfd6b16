# SPDX-License-Identifier: MIT
"""What a device reaches at best: what measured times are held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastconv._timing import compare

_SIZES = {"cpu": 2048, "cuda": 8192}  # rows and columns of the matrices


@dataclass(frozen=True)
class Peaks:
    """flops_per_s: of torch's float32 matrix product. bytes_per_s: read and written by a copy."""

    flops_per_s: float
    bytes_per_s: float

    def least_seconds(self, flops: float, bytes: float) -> float:
        """The time that work needs at the nearer of the two peaks."""
        return max(flops / self.flops_per_s, bytes / self.bytes_per_s)


def measure(device: str | torch.device = "cpu", seconds: float = 0.5) -> Peaks:
    """Measures both for about `seconds` each, on as many threads as torch has."""
    n = _SIZES[torch.device(device).type]
    a, b, c = (torch.rand(n, n, device=device) for _ in range(3))

    def fastest(function) -> float:
        return min(compare({"peak": function}, seconds=seconds, device=device).samples["peak"])

    product = fastest(lambda: torch.mm(a, b, out=c))
    source, target = (torch.empty(4 * n * n, device=device) for _ in range(2))
    source.fill_(1.0)
    copy = fastest(lambda: target.copy_(source))
    return Peaks(2 * n**3 / product, 2 * source.nbytes / copy)
