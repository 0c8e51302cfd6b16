# SPDX-License-Identifier: MIT
"""`fastconv bench`: who takes part, what is checked before the clock runs, and what is said and saved."""

import copy
import json

import pytest
import torch

import fastconv
from fastconv import _report, bench, models
from fastconv.__main__ import main

EVERYONE = ["torch.nn", "torch.nn channels_last", "fastconv", "fastconv fused", "fastconv.optimize"]


@pytest.fixture(autouse=True)
def small(monkeypatch, threads):
    """A few images, and one turn for each contender."""
    threads(1)
    monkeypatch.setattr(bench, "GROUPS", [(bench.INFERENCE, 1), (bench.INFERENCE, 20), (bench.TRAINING, 20)])
    monkeypatch.setattr(bench, "MOST", 20)
    for name, value in {"SETTLE": 1e-6, "SAMPLE": 1e-6, "MIN_TURNS": 1}.items():
        monkeypatch.setattr(f"fastconv._timing.{name}", value)


def run(tmp_path, *arguments):
    """The command's exit code and its report."""
    saved = tmp_path / "report.json"
    code = main(["bench", "--seconds", "1e-6", *arguments, "--save", str(saved)])
    return code, json.loads(saved.read_text())


def test_bench_says_and_saves_everything(tmp_path, capsys, device):
    code, report = run(tmp_path, "--device", device, "--threads", "1")
    assert code == 0 and report["passed"] is True and report["wrong"] == []
    assert report["device"] == {"name": device, "reason": "asked for", "threads": 1}
    assert report["settings"] == {"model": "lenet", "device": device, "seconds": 1e-6}
    assert [(group["kind"], group["batch"]) for group in report["speed"]] == bench.GROUPS
    out = capsys.readouterr().out
    assert all(
        each in out for each in (torch.__version__, fastconv.__version__, f"{device} (asked for), 1 CPU")
    )
    for group in report["speed"]:
        assert f"{group['kind']}, batch of {group['batch']}" in out
        assert list(group["contenders"]) == EVERYONE
        for name, row in group["contenders"].items():
            assert set(row) == {"seconds", "images", "ratio", "error"} and name in out
            assert row["images"]["median"] * row["seconds"]["median"] == pytest.approx(group["batch"])
            assert f"{row['error']:.1e}" in out
        assert group["contenders"]["torch.nn"]["ratio"]["median"] == 1


@pytest.mark.parametrize("name", [name for name in models.NETWORKS if name != "lenet"])
def test_other_networks(name, tmp_path):
    """Those with dropout are checked without it, and timed with it."""
    code, report = run(tmp_path, "--model", name)
    assert code == 0, report["wrong"]
    assert list(report["speed"][0]["contenders"]) == [each for each in EVERYONE if each != "fastconv fused"]


class _Scaled(torch.autograd.Function):
    """Scales values, or gradients."""

    @staticmethod
    def forward(ctx, x, value, gradient):
        ctx.gradient = gradient
        return x * value

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.gradient, None, None


@pytest.mark.parametrize(
    "value, gradient, kinds",
    [
        (1 + 1e-5, 1, {"inference"}),
        (1, 1.05, {"training step"}),
        (float("nan"), 1, {"inference", "training step"}),
    ],
    ids=["outputs", "gradients", "nan"],
)
def test_a_wrong_contender_is_refused(value, gradient, kinds, monkeypatch, tmp_path, capsys):
    def wrong(model):
        fastconv.convert(model).register_forward_hook(lambda m, x, y: _Scaled.apply(y, value, gradient))
        return model

    monkeypatch.setitem(bench.CONTENDERS, "fastconv", wrong)
    monkeypatch.setattr(bench, "speed", lambda *_: pytest.fail("nothing is to be timed"))
    code, report = run(tmp_path)
    assert code == 1 and report["passed"] is False and report["speed"] == []
    refused = [kind for kind, _ in bench.GROUPS if kind in kinds]
    out = capsys.readouterr().out
    for sentence, kind in zip(report["wrong"], refused, strict=True):
        assert sentence.startswith(f"fastconv, {kind} of") and sentence in out


def test_contenders_are_what_their_names_say():
    model = models.build("lenet", torch.nn)
    made = bench._contenders(model, torch.device("cpu"))
    assert list(made) == EVERYONE
    assert type(made["torch.nn"].conv1) is torch.nn.Conv2d
    assert type(made["fastconv"].conv1) is fastconv.Conv2d
    assert made["fastconv fused"].fused and isinstance(made["fastconv.optimize"], models.LeNet)
    assert type(made["fastconv.optimize"]) is not models.LeNet
    assert made["torch.nn channels_last"].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    for each in made.values():
        for (name, ours), theirs in zip(each.state_dict().items(), model.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), name
    images = bench._part("torch.nn channels_last", (torch.rand(4, 3, 8, 8), torch.zeros(4)), 2, "cpu")[0]
    assert images.shape == (2, 3, 8, 8) and images.is_contiguous(memory_format=torch.channels_last)


def test_timing_leaves_the_models_as_they_are():
    contenders = {"torch.nn": models.build("fashion_cnn", torch.nn)}
    before = copy.deepcopy(contenders["torch.nn"])
    batches = {"torch.nn": (torch.rand(4, 1, 28, 28), torch.tensor([0, 1, 2, 3]))}
    for kind in (bench.INFERENCE, bench.TRAINING):
        group = bench.speed(contenders, batches, kind, 1e-6)
        assert "error" not in _report.speed(group)  # none was measured
    assert contenders["torch.nn"].training
    for name, value in contenders["torch.nn"].state_dict().items():
        assert torch.equal(value, before.state_dict()[name]), name
