# SPDX-License-Identifier: MIT
"""Tables and plots of benchmark results.

    python -m benchmarks.report [RESULTS.json ...]

reads what `pytest benchmarks/ --benchmark-json RESULTS.json` wrote, by default all of benchmarks/results, and
writes README's table between its markers, docs/benchmarks.md and the plots of docs/benchmarks/. Each file is
of one machine and has a section of its own; README shows the first CPU. The tables depend on the files alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from benchmarks import plots

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
MARKED = re.compile(r"(?<=<!-- benchmarks -->\n).*?(?=<!-- /benchmarks -->)", re.DOTALL)
NETWORKS = {"lenet": "LeNet", "fashion_cnn": "FashionCNN"}
# What README says of a network, and the contender that it speaks of.
COLUMNS = {
    "torch.nn": "torch contiguous",
    "channels_last": "torch channels_last",
    "torch.compile": "torch.compile contiguous",
    "ONNX Runtime": "onnxruntime",
    "OpenVINO": "openvino",
    "`convert`": "fastconv contiguous",
    "`optimize`": "fastconv optimized contiguous",
}


@dataclass
class Results:
    """One file: the machine, and {group: {contender: extra_info}} of each suite of benchmarks."""

    stem: str
    machine: dict
    suites: dict[str, dict[str, dict[str, dict]]]

    @classmethod
    def read(cls, path: Path) -> Results:
        report = json.loads(path.read_text())
        suites = defaultdict(lambda: defaultdict(dict))
        for each in report["benchmarks"]:
            extra = each["extra_info"]
            group, name = each["group"] or extra.get("sweep"), extra.get("implementation", "")
            suites[extra["suite"]][group][name] = extra
        return cls(path.stem, report["machine_info"], suites)

    def __getitem__(self, suite: str) -> dict[str, dict[str, dict]]:
        return self.suites.get(suite, {})

    @property
    def title(self) -> str:
        name = self.machine["device"]
        if name == "cpu":  # some tell no more than a brand that several generations share
            cpu = self.machine["cpu"]
            name = "{brand_raw} (family {family}, model {model})".format_map(defaultdict(lambda: "?", cpu))
            name += " without AVX-512" if "-avx2-" in self.machine["class"] else ""
        threads = self.machine["threads"]
        return f"{name}, {threads} thread{'s' * (threads != 1)}, torch {self.machine['torch']}"

    def series(self, of: str = "seconds") -> dict[str, dict[str, tuple[list[float], list[float]]]]:
        """{what grows: {contender: (sizes, median seconds)}}, or peak_bytes of those that have them."""
        found = defaultdict(lambda: defaultdict(list))
        for contenders in self["scaling"].values():
            for name, extra in contenders.items():
                if of in extra:
                    value = extra[of]["median"] if of == "seconds" else extra[of]
                    found[extra["what"]][name].append((extra["size"], value))
        return {
            what: {
                name: tuple(map(list, zip(*sorted(points), strict=True))) for name, points in sides.items()
            }
            for what, sides in found.items()
        }


# --- tables -------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def duration(seconds: float) -> str:
    """With three digits."""
    scale, unit = (1e6, "us") if seconds < 1e-3 else (1e3, "ms")
    value = seconds * scale
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f} {unit}"


def ratio(extra: dict, base: str, quartiles: bool = False) -> str:
    found = extra["times_as_fast_as"].get(base)
    if found is None:
        return ""
    spread = f" ({found['low']:.2f}-{found['high']:.2f})" if quartiles else ""
    return f"{found['median']:.2f}{spread}"


def network_table(results: Results) -> str:
    """README's: a line a network, batch and direction, a column a contender; the fastest in bold."""
    rows = []
    for found in results["networks"].values():
        shown = {column: found.get(name) for column, name in COLUMNS.items()}
        first = found["torch contiguous"]
        best = min((e["seconds"]["median"] for e in shown.values() if e), default=0.0)
        cells = []
        for extra in shown.values():
            time = extra and extra["seconds"]["median"]
            cells.append("" if not extra else f"**{duration(time)}**" if time == best else duration(time))
        name = f"{NETWORKS[first['network']]} {first['direction']}, batch {first['batch_size']}"
        ours = shown["`optimize`"]
        rows.append([name, *cells, ratio(ours, "torch contiguous", quartiles=True) if ours else ""])
    return table(["", *COLUMNS, "times as fast as torch.nn"], rows)


def contender_table(results: Results) -> str:
    """Every form of every network: time, ratio, memory, error."""
    rows = []
    for group, found in results["networks"].items():
        for name, extra in found.items():
            rows.append(
                [
                    group,
                    name,
                    duration(extra["seconds"]["median"]),
                    f"{extra['batch_size'] / extra['seconds']['median']:,.0f}",
                    ratio(
                        extra, "torch contiguous" if "torch contiguous" in found else "torch", quartiles=True
                    ),
                    f"{extra['peak_bytes'] / 1e6:.2f}" if "peak_bytes" in extra else "",
                    f"{extra['largest_error']:.1e}" if "largest_error" in extra else "",
                ]
            )
    head = ["network", "by", "time", "images/s", "times as fast as torch", "peak MB", "largest error"]
    return table(head, rows)


def work_table(found: dict[str, dict[str, dict]]) -> str:
    """Layers or passes: fastconv beside torch in the same layout."""
    rows = []
    for group, contenders in found.items():
        for name, extra in contenders.items():
            base = contenders.get(f"torch {extra['layout']}")
            if name.startswith("torch") or base is None:
                continue
            rows.append(
                [
                    group,
                    name.removeprefix("fastconv "),
                    duration(base["seconds"]["median"]),
                    duration(extra["seconds"]["median"]),
                    ratio(extra, base["implementation"], quartiles=True),
                    f"{extra['gflop_per_s']:.1f}",
                    f"{extra['gbyte_per_s']:.1f}",
                    f"{extra['share_of_peak']:.0%}",
                    f"{_share_of_allowed(extra['errors']):.2f}",
                ]
            )
    head = [
        "",
        "layout or kernel",
        "torch",
        "fastconv",
        "times as fast",
        "GFLOP/s",
        "GB/s",
        "of peak",
        "error",
    ]
    return table(head, rows)


def _share_of_allowed(errors: dict) -> float:
    """The largest error, as a share of what the error rule allows."""
    each = [errors] if "allowed" in errors else errors.values()
    return max(e["largest_error"] / e["allowed"] if e["allowed"] else 0.0 for e in each)


def scaling_table(results: Results) -> str:
    """The exponents p of time ~ size^p and memory ~ size^p over the upper half of the sizes."""
    rows, memory = [], results.series("peak_bytes")
    for what, sides in results.series().items():
        for side, (sizes, times) in sides.items():
            row = [what, side, str(sizes[0]), str(sizes[-1]), f"{plots.exponent(sizes, times):.2f}"]
            sizes, peaks = memory.get(what, {}).get(side, ([], []))
            rows.append([*row, f"{plots.exponent(sizes, peaks):.2f}" if sizes else ""])
    return table(["what grows", "by", "from", "to", "exponent of time", "of memory"], rows)


def cliff_table(results: Results) -> str:
    rows = []
    for sweep, found in results["cliffs"].items():
        for extra in found.values():
            cliffs = [f"{c['size']} ({c['seconds'] / c['expected']:.1f}x)" for c in extra["cliffs"]]
            rows.append([sweep, str(len(extra["seconds"])), ", ".join(cliffs) or "none"])
    return table(["what grows", "sizes", "cliffs"], rows)


# --- text ---------------------------------------------------------------------------------------------------

SECTIONS = {  # suite: title, plots, table
    "networks": ("Networks", ("networks", "memory"), contender_table),
    "layers": ("Layers", ("layers", "roofline"), lambda results: work_table(results["layers"])),
    "passes": ("Single passes", (), lambda results: work_table(results["passes"])),
    "scaling": ("Scaling", ("scaling", "memory_growth"), scaling_table),
    "cliffs": ("Cliffs: sizes that take over twice their neighbours' time", (), cliff_table),
}
INTRODUCTION = """# Benchmarks

`python -m benchmarks.report` writes this from `benchmarks/results`, where
`pytest benchmarks/ --benchmark-only --full --benchmark-json FILE` writes.

- Contenders of a group take turns, and ratios are taken turn by turn: the median, and quartiles in brackets.
- Everything is checked against float64 before it is timed. *Error* is the largest error as a share of what
  the error rule allows: twice torch's own and 2 ulp.
- *Of peak* holds a time against the nearer of two limits that were measured in the same run, a large float32
  matrix product and a large copy. Work that stays in a cache can be above the second, and Winograd's, whose
  FLOPs are counted as a direct convolution's, above the first.
"""


def plots_of(results: Results, suite: str) -> list[str]:
    """Those that there are figures for."""
    measured = {key for found in results[suite].values() for extra in found.values() for key in extra}
    _, names, _ = SECTIONS[suite]
    return [name for name in names if "memory" not in name or "peak_bytes" in measured]


def picture(results: Results, plot: str, title: str, folder: str) -> str:
    return f"![{title}]({folder}{results.stem}-{plot}.png)\n"


def readme(all_results: list[Results]) -> str:
    """What stands between README's markers: the first CPU."""
    results = next(each for each in all_results if each.machine["device"] == "cpu")
    text = f"{results.title}: the median time of a call, all contenders of a line in turns.\n\n"
    text += network_table(results) + "\n"
    if results["layers"]:
        text += (
            picture(results, "layers", "Times as fast as torch, layer by layer", "docs/benchmarks/") + "\n"
        )
    return text + "[docs/benchmarks.md](docs/benchmarks.md) has every layer, errors, memory and scaling.\n"


def document(all_results: list[Results]) -> str:
    """docs/benchmarks.md."""
    text = INTRODUCTION
    for results in all_results:
        text += f"\n## {results.title}\n"
        for suite, (title, _, body) in SECTIONS.items():
            if results[suite]:
                shown = [picture(results, plot, title, "benchmarks/") for plot in plots_of(results, suite)]
                text += "\n".join([f"\n### {title}\n", *shown, ""])
                text += body(results)
    return text


# --- the command --------------------------------------------------------------------------------------------


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="*", type=Path, help="default: all of benchmarks/results")
    paths = parser.parse_args(arguments).results or sorted(RESULTS.glob("*.json"))
    all_results = [Results.read(path) for path in paths]
    _replace(DOCUMENT, document(all_results))
    _replace(README, MARKED.sub(lambda _: readme(all_results), README.read_text()))
    for results in all_results:
        for suite in SECTIONS:
            for plot in plots_of(results, suite) if results[suite] else ():
                plots.save(
                    plots.DRAWINGS[plot](results), DOCUMENT.with_suffix("") / f"{results.stem}-{plot}.png"
                )


if __name__ == "__main__":
    main()
