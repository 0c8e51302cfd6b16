# SPDX-License-Identifier: MIT
"""Ratios to torch that must not fall: one file in benchmarks/baseline for each class of machine.

Absolute times say little from one machine to the next, and ratios of one pair of turns are noisy. So a ratio
is compared with that of the same class of machine, and has fallen only where REPEATS measurements out of
REPEATS lie below SHARE of it.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import cpuinfo
import torch

from fastconv import _C

BASELINES = Path(__file__).resolve().parent / "baseline"
SHARE = 2 / 3
REPEATS = 3


def machine_class(device: torch.device) -> str:
    """What machines have in common whose ratios are compared: the GPU, or the processor and the threads."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        found, isa = cpuinfo.get_cpu_info(), _C.build_info()["cpu_isa"]
        processor = (found.get(each, "unknown") for each in ("vendor_id_raw", "family", "model"))
        name = f"{' '.join(map(str, processor))} {isa} {torch.get_num_threads()} threads"
    return re.sub(r"[^\w.+]+", "-", name)


class Guard:
    """Holds ratios against a baseline, or collects them for one.

    path: The baseline to hold against; "" for that of this class of machine, None for no baseline.
    write: Collect ratios, for the file of this class of machine.
    """

    def __init__(self, path: str | None, write: bool):
        self._path, self._write, self._found = path, write, {}
        self._known: dict[str, float] | None = None

    def check(self, key: str, ratio: float, again: Callable[[], float], device: torch.device) -> None:
        """Fails where `ratio`, and that of further measurements by `again`, has fallen."""
        self._found[key] = ratio
        if self._path is None:
            return
        if self._known is None:
            self._known = self._read(device)
        least = SHARE * self._known.get(key, 0.0)
        found = [ratio]
        while found[-1] < least and len(found) < REPEATS:
            found.append(again())
        values = ", ".join(f"{each:.2f}" for each in found)
        assert found[-1] >= least, f"{key}: was {self._known[key]:.2f} times as fast as torch, now {values}"

    def _read(self, device: torch.device) -> dict[str, float]:
        path = Path(self._path) if self._path else BASELINES / f"{machine_class(device)}.json"
        if not self._path and not path.exists():
            warnings.warn(f"no baseline for this class of machine, {machine_class(device)}", stacklevel=1)
            return {}
        return json.loads(path.read_text())

    def write(self, device: torch.device) -> None:
        """Adds what was collected to the baseline of this class of machine."""
        if not self._write or not self._found:
            return
        path = BASELINES / f"{machine_class(device)}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        known |= {key: round(ratio, 3) for key, ratio in self._found.items()}
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
        os.replace(temporary, path)
