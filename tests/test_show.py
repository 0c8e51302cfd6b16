# SPDX-License-Identifier: MIT
"""`fastconv show`: the pictures are there, and show the numbers that they should."""

import importlib.util
import json
import struct

import pytest
import torch
from torch import nn

import fastconv
from fastconv import _report, _training, models, show
from fastconv.__main__ import main

SUBSET = str(fastconv.data.FashionMNIST.subset_folder)
DATA = ["--data", SUBSET]
PICTURES = ["confusion.png", "filters.png", "layers.png"]

pytestmark = pytest.mark.filterwarnings("ignore:Fashion-MNIST:UserWarning")  # the subset is meant here


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Passes over a few images are faster without a team of threads."""
    threads(1)


def shown(axes):
    """The array that an axes with one picture shows, without what is masked."""
    return torch.from_numpy(axes.images[0].get_array().filled(0))


def size(path):
    """Width and height of a PNG."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_trained(tmp_path, capsys):
    run, out, again = (tmp_path / name for name in ("run", "out", "again"))
    assert main(["train", *DATA, "--limit", "64", "--epochs", "2", "--out", str(run)]) == 0
    weights = ["--weights", str(run / "model.pt"), *DATA]
    assert main(["show", *weights, "--image", "3", "--out", str(out)]) == 0
    assert files(out) == sorted([*PICTURES, "curves.png"])
    assert size(out / "filters.png")[0] == size(out / "layers.png")[0] == size(out / "curves.png")[0] == 1200
    assert size(out / "curves.png")[1] == 480 and size(out / "confusion.png") == (960, 840)
    assert main(["show", *weights, "--image", "3", "--out", str(again)]) == 0
    assert all((out / name).read_bytes() == (again / name).read_bytes() for name in files(out))
    assert "curves.png" in capsys.readouterr().out


def test_confusion_and_curves_are_those_of_the_run(tmp_path, monkeypatch):
    """Of the whole test set, train's matrix comes again; the curves are of its report."""
    figures = {}
    monkeypatch.setattr("fastconv._report.write", lambda figure, path: figures.update({path.name: figure}))
    load = _training.load
    monkeypatch.setattr(_training, "load", lambda dataset, root, *_: load(dataset, root, 50))
    assert main(["train", *DATA, "--epochs", "2", "--batch-size", "10", "--out", str(tmp_path)]) == 0
    figures.clear()
    weights = str(tmp_path / "model.pt")
    assert main(["show", *DATA, "--weights", weights, "--image", "3", "--out", str(tmp_path / "out")]) == 0
    images = load("fashion-mnist", SUBSET)[1]
    assert torch.equal(shown(figures["layers.png"].axes[0]), images[3][0][0])
    assert figures["layers.png"].get_suptitle() == f"Test image 3: {images.classes[images[3][1]]}"
    report = json.loads((tmp_path / "report.json").read_text())
    (matrix,) = figures["confusion.png"].axes
    assert shown(matrix).tolist() == report["confusion"]
    loss, accuracy = figures["curves.png"].axes
    assert loss.lines[0].get_ydata().tolist() == report["loss"] and len(report["loss"]) == 10
    assert loss.lines[0].get_xdata()[[4, 9]].tolist() == [1, 2]
    assert accuracy.lines[0].get_ydata().tolist() == [100 * share for share in report["accuracy"]]


@pytest.mark.parametrize("name", ["fashion_cnn", "fashion_dnn", "mlp"])
def test_untrained(name, tmp_path):
    assert main(["show", "--model", name, *DATA, "--out", str(tmp_path)]) == 0
    assert files(tmp_path) == PICTURES


def test_mosaic():
    tiles = torch.arange(1.0, 13).view(3, 2, 2)
    expected = [[1, 2, 0, 5, 6], [3, 4, 0, 7, 8], [0] * 5, [9, 10, 0, 0, 0], [11, 12, 0, 0, 0]]
    assert show.mosaic(tiles, 2).nan_to_num(0).tolist() == expected
    assert show.mosaic(tiles, 2).isnan().sum() == 25 - 12
    colours = torch.rand(2, 3, 4, 5)
    whole = show.mosaic(colours, 2, 1.0)
    assert whole.shape == (4, 11, 3) and torch.equal(whole[:, 6:], colours[1].movedim(0, -1))


def test_filters():
    model = models.LeNet(padding=2)
    axes, bar = show.filters(model, (1, 28, 28)).axes
    weight = model.conv1.weight.detach()
    assert torch.equal(shown(axes)[:, 12:17], weight[2, 0])
    assert axes.images[0].get_clim() == (-weight.abs().max(), weight.abs().max())
    assert bar.get_ylabel() == "weight"

    model = models.MLP()
    axes, _ = show.filters(model, (1, 28, 28)).axes
    weight = model.linear_relu_stack[0].weight.detach()
    assert torch.equal(shown(axes)[29:57, :28], weight[8].view(28, 28))
    assert shown(axes).shape == (8 * 29 - 1, 8 * 29 - 1)  # 64 of 512

    model = models.CifarNet()
    (axes,) = show.filters(model, (3, 32, 32)).axes
    weight = model.conv1.weight.detach()
    expected = (weight - weight.min()) / (weight.max() - weight.min())
    assert torch.equal(shown(axes)[:3, 4:7], expected[1].movedim(0, -1))


def test_layers():
    model, image = models.LeNet(padding=2).eval(), torch.rand(1, 28, 28)
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    figure = show.layers(model, image, "title", list("abcdefghij"))
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks
    seen, bars, conv1, pool1, conv2, pool2, fc1, fc2 = figure.axes
    titles = [axes.get_title(loc="left") for axes in figure.axes[2:]]
    assert titles == [
        "conv1: 6 maps of 28 x 28",
        "pool: 6 maps of 14 x 14",
        "conv2: 16 maps of 10 x 10",
        "pool: 16 maps of 5 x 5",
        "fc1: 120",
        "fc2: 84",
    ]
    assert torch.equal(shown(seen), image[0])
    with torch.no_grad():
        first, scores = model.conv1(image[None])[0], model(image[None])[0]
        assert torch.equal(shown(conv1)[:, 29 : 29 + 28], first[1])
        assert torch.equal(shown(pool1)[:, :14], nn.functional.max_pool2d(first.relu(), 2)[0])
    lengths = [bar.get_width() for bar in bars.patches]
    assert lengths == pytest.approx(scores.softmax(0).tolist())
    best = "abcdefghij"[scores.argmax()]
    assert bars.get_title() == f"fc3: taken for {best}, {max(lengths):.0%}"
    assert [label.get_text() for label in bars.get_yticklabels()] == list("abcdefghij")


def test_colours():
    model, image = models.CifarNet().eval(), torch.rand(3, 32, 32)
    figure = show.layers(model, image, "title", list("abcdefghij"))
    assert torch.equal(shown(figure.axes[0]), image.movedim(0, -1))
    assert figure.axes[6].get_title(loc="left") == "conv3: 64 maps of 8 x 8"


def test_nothing_is_cut_off(tmp_path):
    """All that is drawn lies inside its picture, to within half a pixel."""
    model = models.FashionCNN().eval()
    report = {"loss": [2.0, None, 1.0, 0.5], "accuracy": [0.5, 0.75]}
    for figure in (
        show.filters(model, (1, 28, 28)),
        show.layers(model, torch.rand(1, 28, 28), "title", fastconv.data.FashionMNIST.classes),
        show.curves(report),
        _report.confusion_figure(fastconv.data.FashionMNIST.classes, [[1000] * 10] * 10, 0.1),
    ):
        figure.savefig(tmp_path / "drawn.png", dpi=120)
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.5 / 120


def refused(capsys, *arguments):
    """What the command says as it ends with code 2."""
    try:
        code = main(["show", *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2
    return capsys.readouterr().err


def test_errors(tmp_path, capsys, monkeypatch):
    out = ["--out", str(tmp_path / "out"), *DATA]
    assert "--image 500: the test set has 500 images" in refused(capsys, *out, "--image", "500")
    missing = tmp_path / "missing.pt"
    assert str(missing) in refused(capsys, *out, "--weights", str(missing))
    damaged = tmp_path / "damaged.pt"
    torch.save(models.LeNet(padding=2).state_dict(), damaged)
    damaged.write_bytes(damaged.read_bytes()[:-50])
    assert f"{damaged}: truncated or corrupted" in refused(capsys, *out, "--weights", str(damaged))
    other = tmp_path / "other.pt"
    for state in (models.MLP().state_dict(), [1, 2]):
        torch.save(state, other)
        message = refused(capsys, *out, "--weights", str(other))
        assert f"{other}: not the parameters of lenet: " in message
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "show needs matplotlib: pip install" in refused(capsys, *out)
    assert not (tmp_path / "out").exists()
