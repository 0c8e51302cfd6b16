# SPDX-License-Identifier: MIT
"""The reports of fastconv.bench, validate and train: in words, as a JSON file, as pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path

from fastconv import _files

SIDES = ("torch.nn", "fastconv")
POINTS = 10  # points of the loss curve that are printed


def place(report: dict) -> list[str]:
    """Lines of what it ran on."""
    versions, device = report["versions"], report["device"]
    return [
        f"fastconv {versions['fastconv']}, torch {versions['torch']}",
        f"  device   {device['name']} ({device['reason']}), {device['threads']} CPU threads",
    ]


def header(report: dict) -> str:
    data, settings = report["data"], report["settings"]
    numbers = settings["dtype"]
    if numbers == "float32":
        numbers += ", TF32 on GPUs that have it" if settings["tf32"] else ", in full precision"
    return "\n".join(
        [
            *place(report),
            f"  dtype    {numbers}",
            f"  data     {'the full set' if data['full'] else 'NOT the full set'}: "
            f"{data['train']:,} training and {data['test']:,} test images",
            *(f"           {line}" for line in data["notes"] or [data["source"]]),
            f"  model    {settings['model']}",
            f"  training epochs {settings['epochs']}, batch size {settings['batch_size']}, "
            f"Adam with a learning rate of {settings['lr']:g} falling to 0, seed {settings['seed']}",
        ]
    )


def first_step(report: dict) -> str:
    step = report["first_step"]
    lines = [
        "",
        f"Initial parameters: {'equal, bit for bit' if report['same_start'] else 'DIFFERENT'}",
        "",
        f"First step, batch of {step['batch']}: largest difference (in units of the largest value)",
        f"  {'':36}{'torch.nn - fastconv':>20}{'torch.nn - float64':>22}{'fastconv - float64':>22}",
    ]
    for name, row in step["tensors"].items():
        cells = (_difference(row[key], row["largest"]) for key in ("difference", *SIDES))
        shape = ",".join(map(str, row["shape"]))
        lines.append(f"  {f'{name} [{shape}]':36}{next(cells):>20}{next(cells):>22}{next(cells):>22}")
    lines.append(
        "  ReLUs and pooling windows that decide otherwise than in float64: "
        + ", ".join(f"{side} {step['branches'][side]}" for side in SIDES)
    )
    return "\n".join(lines)


def _difference(value: float, largest: float) -> str:
    return f"{value:.1e} ({value / largest:.1e})" if largest > 0 else f"{value:.1e}"


def check(report: dict) -> str:
    found = report["check"]
    verdict = "kept" if found["passed"] else f"BROKEN {len(found['failures'])} times"
    lines = [
        "",
        f"Error rule over the first {found['steps']} steps, both sides from torch.nn's parameters: {verdict}",
        f"  {'':50}{'torch.nn':>12}{'fastconv':>12}{'allowed':>12}{'largest value':>16}",
    ]
    rows = [("worst", record) for record in found["worst"].values()]
    for title, record in rows + [("broken", record) for record in found["failures"][:20]]:
        cells = "".join(f"{record[key]:12.1e}" for key in (*SIDES, "allowed"))
        name = f"{title}: {record['tensor']}, step {record['step']}"
        lines.append(f"  {name:50}{cells}{record['largest']:16.1e}")
    return "\n".join(lines)


def training(report: dict) -> str:
    theirs, ours = (report["training"][side] for side in SIDES)
    lines = ["", f"{'Training':32}{'torch.nn':>10}{'fastconv':>10}"]
    points = list(zip(theirs["loss"], ours["loss"], strict=True))
    every = math.ceil(len(points) / POINTS)
    for i in sorted({*range(0, len(points), every), len(points) - 1}):
        (epoch, left), (_, right) = points[i]
        lines.append(f"  {f'loss to epoch {epoch:.2f}':30}{left:10.4f}{right:10.4f}")
    for epoch, (left, right) in enumerate(zip(theirs["accuracy"], ours["accuracy"], strict=True), 1):
        lines.append(f"  {f'test accuracy, epoch {epoch}':30}{left:10.2%}{right:10.2%}")
    return "\n".join(lines)


def speed(group: dict) -> str:
    """A table of what bench.speed returns, with errors where there are some: a line for each contender."""
    rows = group["contenders"]
    titles = f"{'time':>12}{'images/s':>12}  {'times as fast as torch.nn':26}"
    if errors := all("error" in row for row in rows.values()):
        titles += "  error"
    title = f"{group['kind']}, batch of {group['batch']}"
    lines = ["", f"{title:28}{titles}"]
    for name, row in rows.items():
        time, ratio = 1e6 * row["seconds"]["median"], row["ratio"]
        quartiles = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        line = f"  {name:26}{time:>9,.0f} us{row['images']['median']:>12,.0f}  {quartiles:26}"
        lines.append(line + (f"  {row['error']:.1e}" if errors else ""))
    return "\n".join(map(str.rstrip, lines))


def verdict(report: dict) -> str:
    if report["passed"]:
        return "\nfastconv agrees with torch.nn."
    return "\nfastconv DISAGREES with torch.nn."


def save(report: dict, path: str) -> None:
    """Writes the report as JSON; numbers that aren't finite become null."""
    text = json.dumps(_finite(report), indent=1, allow_nan=False) + "\n"
    _files.replace(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot(report: dict, path: str) -> None:
    """Draws loss, test accuracy and gradient errors of both sides into a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 4.5), layout="constrained")
    loss, accuracy, gradients = figure.subplots(1, 3)
    # torch.nn wide and pale, fastconv thin and dark on top: both show where they coincide
    for side, style in zip(
        SIDES, ({"color": "tab:orange", "lw": 4, "ms": 10, "alpha": 0.6}, {"color": "tab:blue"}), strict=True
    ):
        found = report["training"][side]
        loss.plot(*zip(*found["loss"], strict=True), label=side, **style)
        epochs = range(1, len(found["accuracy"]) + 1)
        accuracy.plot(epochs, [100 * value for value in found["accuracy"]], marker="o", label=side, **style)
        errors = report["check"]["gradients"][side]
        gradients.semilogy(range(1, len(errors) + 1), errors, label=side, **style)
    loss.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy")
    accuracy.set(title="Test accuracy", xlabel="epoch", ylabel="%", xticks=epochs)
    gradients.set_xticks(range(0, len(errors) + 1, 5))
    gradients.set(
        title="Largest relative error of a gradient, from float64",
        xlabel="step",
        ylabel="error / largest gradient",
    )
    for axes in (loss, accuracy, gradients):
        axes.grid(alpha=0.3)
        axes.legend()
    write(figure, path)


def write(figure, path: str | Path) -> None:
    """Writes a figure of matplotlib as a PNG."""
    _files.replace(path, lambda name: figure.savefig(name, format="png", dpi=120))


def confusion(report: dict) -> str:
    """The confusion matrix as a table: a row for each class, a column for what its images were taken for."""
    classes, counts = report["classes"], report["confusion"]
    width = max(len(f"{count}") for row in counts for count in row) + 2
    name = max(map(len, classes))
    lines = [
        "Test images by class (rows) and by what they were taken for (columns)",
        f"{'':{name}}" + "".join(f"{i:>{width}}" for i in range(len(classes))) + "   right",
    ]
    for i, (label, row) in enumerate(zip(classes, counts, strict=True)):
        share = f"{row[i] / sum(row):.1%}" if sum(row) else "-"
        lines.append(f"{label:{name}}" + "".join(f"{count:>{width}}" for count in row) + f"{share:>8}")
    return "\n".join(lines)


def plot_confusion(report: dict, path: str) -> bool:
    """Draws the confusion matrix into a PNG; False where there is no matplotlib."""
    try:
        figure = confusion_figure(report["classes"], report["confusion"], report["test_accuracy"])
    except ImportError:
        return False
    write(figure, path)
    return True


def confusion_figure(classes: list[str], counts: list[list[int]], accuracy: float):
    """The confusion matrix as a figure of matplotlib. Raises ImportError where there is none."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    axes.imshow(counts, cmap="Blues")
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set(title=f"Test accuracy {accuracy:.2%}", xlabel="taken for", ylabel="class")
    most = max(map(max, counts))
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            axes.text(j, i, count, ha="center", va="center", color="white" if 2 * count > most else "black")
    return figure
