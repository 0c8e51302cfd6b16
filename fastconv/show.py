# SPDX-License-Identifier: MIT
"""Pictures of what a network has learned, as textbooks show them: the work of `fastconv show`.

Needs matplotlib (`pip install 'fastconv[plot]'`), of which only `Figure` is used, which needs no display.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fastconv
from fastconv import _files, _report, _training, data, models, train

MOST_TILES = 64  # of a picture's filters, or a layer's feature maps
WIDTH = 10  # inches
FILTERS = (nn.Conv2d, nn.Linear)
LAYERS = (*FILTERS, nn.MaxPool2d, nn.AvgPool2d)


@dataclass
class Settings:
    """What `run` does.

    out: folder for the pictures.
    model: one of fastconv.models.NETWORKS.
    weights: model.pt, as `fastconv train` writes it; None for the network before its training.
    dataset: one of fastconv._training.DATASETS; None for the one that the model is meant for.
    data: folder of the data, see fastconv.data.
    image: which image of the test set goes through the network.
    """

    out: str
    model: str = "lenet"
    weights: str | None = None
    dataset: str | None = None
    data: str | None = None
    image: int = 0


def run(settings: Settings, say: Callable[[str], None] = print) -> list[Path]:
    """Writes filters.png, layers.png and confusion.png into `settings.out`, and curves.png where report.json
    lies beside the weights. Returns their paths.

    Raises:
        CheckpointError: The weights are damaged, or none of this network.
        IndexError: The test set has no such image.
        OSError: A file can't be read or written; it names the file.
    """
    dataset = settings.dataset or _training.dataset_of(settings.model)
    _, test, notes = _training.load(dataset, settings.data)
    if settings.image >= len(test):
        raise IndexError(f"--image {settings.image}: the test set has {len(test):,} images, from 0")
    torch.manual_seed(0)
    size = _training.image_size(test)
    model = models.build(settings.model, fastconv, size, len(test.classes)).eval()
    report = None
    if settings.weights is not None:
        _load(model, settings)
        report = Path(settings.weights).with_name("report.json")
    say("\n".join(notes or [test.source]))

    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    written = []

    def write(figure, name):
        _report.write(figure, out / name)
        written.append(out / name)

    write(filters(model, size), "filters.png")
    image, label = test[settings.image]
    title = f"Test image {settings.image}: {test.classes[label]}"
    write(layers(model, image, title, test.classes), "layers.png")
    counts = _training.confusion(model, data.batches(test, 1000, shuffle=False), len(test.classes))
    share = _training.accuracy(counts)
    write(_report.confusion_figure(test.classes, counts.tolist(), share), "confusion.png")
    if report is not None and report.exists():
        write(curves(json.loads(_files.read(report))), "curves.png")
    say(f"Test accuracy {share:.2%}; written into {out}: {', '.join(path.name for path in written)}")
    return written


def _load(model: nn.Module, settings: Settings) -> None:
    state = train.load(Path(settings.weights))
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        first = str(error).partition("\n")[0]
        message = f"{settings.weights}: not the parameters of {settings.model}: {first}"
        raise train.CheckpointError(message) from error


def filters(model: nn.Module, image_size: tuple[int, ...]):
    """The weights of the first layer, each as a picture of the part of the image that it looks at.

    Of one channel red is positive and blue negative; three channels are shown as colours.
    """
    name, layer = next((name, each) for name, each in model.named_modules() if isinstance(each, FILTERS))
    weight = layer.weight.detach()
    tiles = weight[:MOST_TILES].reshape(-1, *(weight.shape[1:] if weight.dim() == 4 else image_size))
    title = f"{name}: {_some(len(tiles), len(weight))} filters of {_size(tiles.shape[1:])}"
    columns = min(8, len(tiles))
    figure, (part,) = _figure(title, [_height(tiles, columns)])
    axes = _axes(part)
    if tiles.shape[1] == 3:
        low, high = tiles.aminmax()
        _draw(axes, mosaic((tiles - low) / (high - low), columns, 1.0))
    else:
        most = tiles.abs().max().item()
        shown = _draw(axes, mosaic(tiles, columns), cmap="RdBu_r", vmin=-most, vmax=most)
        part.colorbar(shown, ax=axes, shrink=0.8, label="weight")
    return figure


def layers(model: nn.Module, image: Tensor, title: str, classes: list[str]):
    """One image [C, H, W] on its way: what each layer makes of it, and the classes' probabilities.

    Convolutions are shown before their ReLU.
    """
    *between, (last, scores) = outputs(model, image)
    columns = [8 if len(values) <= 16 else 16 for _, values in between]
    heights = [
        _height(values[:MOST_TILES], count) if values.dim() == 3 else 0.3
        for (_, values), count in zip(between, columns, strict=True)
    ]
    figure, (top, *rest) = _figure(title, [2.5, *heights])
    seen, bars = top.subplots(1, 2, width_ratios=[1, 2])
    _draw(seen, image[0] if len(image) == 1 else image.movedim(0, -1), cmap="gray")
    seen.set_axis_off()
    shares = scores.softmax(0)
    bars.barh(range(len(classes)), shares.tolist(), tick_label=classes)
    bars.invert_yaxis()
    bars.set(xlim=(0, 1), title=f"{last}: taken for {classes[shares.argmax()]}, {shares.max():.0%}")
    for part, (name, values), count in zip(rest, between, columns, strict=True):
        axes = _axes(part)
        if values.dim() == 3:
            shown = values[:MOST_TILES]
            _draw(axes, mosaic(shown, count))
            axes.set_title(
                f"{name}: {_some(len(shown), len(values))} maps of {_size(values.shape[1:])}", loc="left"
            )
        else:
            _draw(axes, values[None], aspect="auto")
            axes.set_title(f"{name}: {len(values)}", loc="left")
    return figure


def outputs(model: nn.Module, image: Tensor) -> list[tuple[str, Tensor]]:
    """What each convolution, pooling and linear layer makes of an image [C, H, W], by name, in their order:
    [K, H, W] or [K]."""
    found = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output, name=name: found.append((name, output[0])))
        for name, layer in model.named_modules()
        if isinstance(layer, LAYERS)
    ]
    try:
        with torch.no_grad():
            model(image[None])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def curves(report: dict):
    """Loss of each training step and test accuracy after each epoch, of train's report."""
    losses, shares = ([math.nan if v is None else v for v in report[key]] for key in ("loss", "accuracy"))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    steps = len(losses) / max(len(shares), 1)  # an epoch
    loss.plot([(i + 1) / steps for i in range(len(losses))], losses, lw=0.8)
    loss.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy")
    epochs = range(1, len(shares) + 1)
    accuracy.plot(epochs, [100 * share for share in shares], marker="o")
    accuracy.set(title="Test accuracy", xlabel="epoch", ylabel="%")
    accuracy.xaxis.get_major_locator().set_params(integer=True)
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
    return figure


def mosaic(tiles: Tensor, columns: int, gap: float = math.nan) -> Tensor:
    """Pictures [N, H, W], [N, 1, H, W] or [N, 3, H, W] side by side, row by row, a pixel between them: one
    picture [rows, cells] or [rows, cells, 3]. `gap` fills what no picture covers."""
    tiles = tiles[:, None] if tiles.dim() == 3 else tiles
    count, channels, height, width = tiles.shape
    rows = math.ceil(count / columns)
    whole = tiles.new_full((channels, rows * (height + 1) - 1, columns * (width + 1) - 1), gap)
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        whole[:, top : top + height, left : left + width] = tile
    return whole[0] if channels == 1 else whole.movedim(0, -1)


def _figure(title, heights):
    """A figure and its parts, one below the other, with room for pictures of these heights in inches."""
    from matplotlib.figure import Figure

    heights = [height + 0.45 for height in heights]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]


def _axes(part):
    axes = part.subplots()
    axes.set_axis_off()
    return axes


def _draw(axes, picture: Tensor, **more):
    return axes.imshow(picture.numpy(), interpolation="nearest", **more)


def _height(tiles, columns) -> float:
    """Inches of a mosaic that fills the width."""
    height, width = tiles.shape[-2:]
    return WIDTH * math.ceil(len(tiles) / columns) * height / (columns * width)


def _some(shown: int, all: int) -> str:
    return f"{shown}" if shown == all else f"{shown} of {all}"


def _size(shape) -> str:
    return " x ".join(map(str, shape))
