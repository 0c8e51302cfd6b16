# SPDX-License-Identifier: MIT
"""The plots of benchmarks.report, each a function of its Results."""

from __future__ import annotations

import math
import os
from pathlib import Path

from matplotlib.figure import Figure

OURS, THEIRS, OTHERS = "#c0392b", "#7f8c8d", ["#2980b9", "#8e44ad", "#16a085", "#d68910", "#34495e"]


def _figure(width: float, height: float, rows: int = 1, columns: int = 1):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def layers(results):
    """Bars of how many times as fast as torch, contiguous, on a logarithmic axis with a line at one."""
    bars = []
    for group, found in results["layers"].items():
        ours, base = found.get("fastconv contiguous"), "torch contiguous"
        if ours and ours["dtype"] == "float32" and base in ours["times_as_fast_as"]:
            bars.append((group.replace(" float32", ""), ours["times_as_fast_as"][base]))
    bars.reverse()
    figure, (axes,) = _figure(9, 1 + 0.23 * len(bars))
    values = [bar["median"] for _, bar in bars]
    spread = [[b["median"] - b["low"] for _, b in bars], [b["high"] - b["median"] for _, b in bars]]
    colors = [OURS if value >= 1 else THEIRS for value in values]
    axes.barh(range(len(bars)), [v - 1 for v in values], left=1, color=colors, xerr=spread, ecolor="#444444")
    for y, (value, bar) in enumerate(zip(values, bars, strict=True)):
        place = max(value, bar[1]["high"]) if value >= 1 else max(1.0, bar[1]["high"])
        axes.text(place * 1.03, y, f"{value:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, *values) * 0.9, max(bar["high"] for _, bar in bars) * 1.5)
    ticks = [
        t for t in (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]
    ]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=1)
    axes.margins(y=0.01)
    axes.set_title(
        "Times as fast as torch, layer by layer (float32, contiguous)\n" + results.title, fontsize=10
    )
    return figure


def networks(results):
    """Images a second of every contender, a panel a group."""
    groups = results["networks"]
    columns = min(2, len(groups))
    figure, panels = _figure(
        11, 2.4 * math.ceil(len(groups) / columns), math.ceil(len(groups) / columns), columns
    )
    for axes, (group, found) in zip(panels, groups.items(), strict=False):
        names = list(found)[::-1]
        rates = [found[n]["batch_size"] / found[n]["seconds"]["median"] for n in names]
        axes.barh(
            range(len(names)), rates, color=[OURS if n.startswith("fastconv") else THEIRS for n in names]
        )
        for y, rate in enumerate(rates):
            axes.text(rate, y, f" {rate:,.0f}", va="center", fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_xlim(0, 1.2 * max(rates))
        axes.tick_params(axis="x", labelsize=7)
        axes.set_title(f"{group}: images a second", fontsize=9)
    for axes in panels[len(groups) :]:
        axes.remove()
    figure.suptitle(results.title, fontsize=10)
    return figure


def memory(results):
    """Peak memory of the training steps, as a share of torch's."""
    groups = {name: found for name, found in results["networks"].items() if name.endswith("training step")}
    names = [n for n in next(iter(groups.values())) if n.endswith(" contiguous")]
    figure, (axes,) = _figure(9, 3.6)
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        having = [(x, f) for x, f in enumerate(groups.values()) if name in f]
        shares = [f[name]["peak_bytes"] / f["torch contiguous"]["peak_bytes"] for _, f in having]
        places = [x + (i - (len(names) - 1) / 2) * width for x, _ in having]
        axes.bar(places, shares, width, label=name.removesuffix(" contiguous"), color=_color(name, i))
        for x, share in zip(places, shares, strict=True):
            axes.text(x, share, f"{share:.2f}", ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(groups)), [name.replace(" training step", "") for name in groups], fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.25)
    axes.legend(fontsize=8, ncols=len(names), loc="upper center")
    axes.set_title("Peak memory of a training step, as a share of torch's\n" + results.title, fontsize=10)
    return figure


def _color(name: str, i: int) -> str:
    return (
        THEIRS
        if name.startswith("torch ")
        else OURS
        if name.startswith("fastconv contiguous")
        else OTHERS[i % 5]
    )


def roofline(results):
    """FLOP/s over FLOPs a byte, below what a matrix product and a copy reach."""
    figure, (axes,) = _figure(9, 5.5)
    marks = {"conv2d": "o", "linear": "s", "max_pool2d": "^", "avg_pool2d": "v"}
    drawn, peaks = set(), None
    for found in results["layers"].values():
        for name, extra in found.items():
            op = extra["shape"]["op"]
            if not name.endswith(" contiguous") or extra["dtype"] != "float32":
                continue
            ours, peaks = name.startswith("fastconv"), extra["peaks"]
            label = f"{'fastconv' if ours else 'torch'} {op}"
            axes.plot(
                extra["flops"] / extra["bytes"],
                extra["gflop_per_s"],
                marks[op],
                color=OURS if ours else THEIRS,
                markerfacecolor=OURS if ours else "none",
                label=None if label in drawn else label,
                alpha=0.85,
            )
            drawn.add(label)
    flops, bytes = peaks["flops_per_s"] / 1e9, peaks["bytes_per_s"] / 1e9
    low, high = axes.get_xlim()
    xs = [max(low, 0.05), flops / bytes, max(high, 2 * flops / bytes)]
    axes.plot(xs, [min(flops, bytes * x) for x in xs], color="black", linewidth=1)
    axes.text(xs[1], flops * 1.1, f"matrix product, {flops:.0f} GFLOP/s", ha="center", fontsize=8)
    middle = math.sqrt(xs[0] * xs[1])
    axes.text(middle, bytes * middle * 1.2, f"copy, {bytes:.0f} GB/s", ha="right", fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs a byte that has to be moved")
    axes.set_ylabel("GFLOP/s")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(
        "Layers under the roofline (above it: what stays in caches, and Winograd)\n" + results.title,
        fontsize=10,
    )
    return figure


def scaling(results):
    """Time over size, a panel a series."""
    return _growth(results.title, results.series(), "ms", 1e3)


def memory_growth(results):
    """Peak memory over size, a panel a series."""
    return _growth(results.title, results.series("peak_bytes"), "MB at the peak", 1e-6)


def _growth(title, series, unit, scale):
    rows = math.ceil(len(series) / 2)
    figure, panels = _figure(11, 3 * rows + 0.3, rows, min(2, len(series)))
    for axes, (what, sides) in zip(panels, series.items(), strict=False):
        for name, (sizes, values) in sides.items():
            color = OURS if name.startswith("fastconv") else THEIRS
            label = f"{name.split()[0]}: exponent {exponent(sizes, values):.2f}"
            axes.plot(sizes, [scale * v for v in values], "o-", color=color, label=label, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=7)
        axes.minorticks_off()
        axes.set_ylabel(unit, fontsize=8)
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize=8)
        axes.set_title(what, fontsize=9)
    for axes in panels[len(series) :]:
        axes.remove()
    figure.suptitle(title, fontsize=10)
    return figure


DRAWINGS = {each.__name__: each for each in (layers, networks, memory, roofline, scaling, memory_growth)}


def exponent(sizes: list[float], times: list[float]) -> float:
    """The slope of the least-squares line through the upper half of the points, on logarithmic axes."""
    start = len(sizes) // 2 if len(sizes) > 3 else 0
    x, y = ([math.log(v) for v in values[start:]] for values in (sizes, times))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mx) ** 2 for a in x)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / spread if spread else 0.0


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=110)
    os.replace(temporary, path)
