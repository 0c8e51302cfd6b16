# SPDX-License-Identifier: MIT
"""The command line: validate on a few images, its check against broken layers, and the other commands."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import fastconv
from fastconv import _accuracy, _files, _training, bench, validate
from fastconv.__main__ import main

SUBSET = str(fastconv.data.FashionMNIST.subset_folder)
QUICK = [
    "validate",
    "--data",
    SUBSET,
    "--limit",
    "40",
    "--batch-size",
    "8",
    "--epochs",
    "1",
    "--seconds",
    "0.01",
]


pytestmark = pytest.mark.filterwarnings("ignore:Fashion-MNIST:UserWarning")  # the subset is meant here


@pytest.fixture(autouse=True)
def one_thread():
    """Passes over a few images are faster without a team of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shorter(monkeypatch):
    """Leaves out the comparison of speed, and most of the steps that the error rule is applied to."""
    monkeypatch.setattr(validate, "STEPS", 3)
    monkeypatch.setattr(bench, "speed", lambda *_: {"kind": "inference", "batch": 8, "contenders": {}})


# The whole command


def test_validate_says_and_saves_everything(tmp_path, capsys):
    saved, drawn = tmp_path / "report.json", tmp_path / "curves.png"
    plot = ["--plot", str(drawn)] if _has_matplotlib() else []
    assert main([*QUICK, "--save", str(saved), *plot]) == 0
    out = capsys.readouterr().out
    said = [
        "bit for bit",
        "grad conv1.weight [6,1,5,5]",
        "float64",
        "loss to epoch",
        "test accuracy",
        "training step",
    ]
    assert [words for words in said if words not in out] == []
    assert "NOT the full set" in out and "1000 of the 60000" in out

    report = json.loads(saved.read_text())
    assert report["passed"] is True and report["same_start"] is True and report["data"]["full"] is False
    assert (report["data"]["train"], report["data"]["test"]) == (40, 40)
    assert report["check"]["steps"] == validate.STEPS
    assert len(report["first_step"]["tensors"]) == 12
    assert [len(report["training"][side]["accuracy"]) for side in validate.LAYERS] == [1, 1]
    assert report["training"]["fastconv"]["loss"][-1][0] == 1.0
    assert [group["kind"] for group in report["speed"]] == ["training step", "inference"]
    for group in report["speed"]:
        assert group["batch"] == 8 and list(group["contenders"]) == list(validate.LAYERS)
    if plot:
        assert drawn.read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path)) == (["curves.png"] if plot else []) + ["report.json"]


def _has_matplotlib():
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_validate_in_other_dtypes(dtype, shorter, capsys):
    assert main([*QUICK, "--dtype", dtype]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("model", ["fashion_cnn", "fashion_dnn", "mlp"])
def test_validate_other_networks(model, shorter, tmp_path, capsys):
    saved = tmp_path / "report.json"
    assert main([*QUICK, "--model", model, "--save", str(saved)]) == 0, capsys.readouterr().out
    report = json.loads(saved.read_text())
    assert report["settings"]["model"] == model and report["passed"]
    theirs, ours = (report["training"][side]["loss"] for side in validate.LAYERS)
    # the same dropout on both sides: with other masks the losses would differ in the first digits
    assert all(abs(a - b) < 0.02 * a for (_, a), (_, b) in zip(theirs[:2], ours[:2], strict=True))


def test_validate_on_color_images(shorter, tmp_path, monkeypatch, capsys):
    md5 = {}
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        pixels = torch.randint(0, 256, (10, 3072), dtype=torch.uint8)
        content = b"".join(bytes([i]) + bytes(row) for i, row in enumerate(pixels.tolist()))
        (tmp_path / name).write_bytes(content)
        md5[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(fastconv.data.CIFAR10, "_md5", md5)
    arguments = [*QUICK, "--model", "cifarnet", "--data", str(tmp_path)]
    assert main(arguments) == 0, capsys.readouterr().out
    assert main([*arguments, "--model", "fashion_cnn", "--dataset", "cifar10"]) == 2
    assert "takes images of 28x28" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["fashion_cnn", "fashion_dnn"])
def test_first_step_leaves_models_and_compares_equal_dropout(model):
    sides = {}
    for side, layers in validate.LAYERS.items():
        torch.manual_seed(0)
        sides[side] = fastconv.models.build(model, layers)
    step = _accuracy.first_step(sides, _batch(16))
    for name, row in step["tensors"].items():
        assert row["difference"] <= 1e-4 * row["largest"], name


def test_dropout_masks_follow_the_images():
    x, rows = torch.rand(6, 50), torch.randperm(6)
    mask = _accuracy._mask(0.25, x, 3, None)
    assert torch.equal(_accuracy._mask(0.25, x, 3, rows), mask[rows])
    assert torch.equal(_accuracy._mask(0.25, x.double(), 3, None) > 0, mask > 0)
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()}
    assert 0.6 < (mask > 0).float().mean() < 0.9
    assert not torch.equal(_accuracy._mask(0.25, x, 4, None), mask)


def test_first_step_agrees_to_1e_5():
    models = _models(fastconv)
    step = _accuracy.first_step(models, _batch(16))
    for name, row in step["tensors"].items():
        assert row["largest"] > 0
        assert row["difference"] <= 1e-5 * row["largest"], name


# The check must see what is wrong, and nothing else


def _models(layers):
    models = {}
    for side, namespace in (("torch.nn", torch.nn), ("fastconv", layers)):
        torch.manual_seed(0)
        models[side] = fastconv.models.LeNet(namespace, padding=2)
    return models


def _batch(size):
    train = fastconv.data.FashionMNIST(SUBSET)
    return next(fastconv.data.batches(train, size))


def _check(layers, steps=4):
    models = _models(layers)
    guide = _models(torch.nn)["torch.nn"]
    optimizer = torch.optim.SGD(guide.parameters(), 0.1)

    def advance(images, labels):
        optimizer.zero_grad()
        F.cross_entropy(guide(images), labels).backward()
        optimizer.step()

    train = fastconv.data.FashionMNIST(SUBSET)
    batches = [batch for batch, _ in zip(fastconv.data.batches(train, 32), range(steps), strict=False)]
    with _training.fp32_precision("ieee"):
        return _accuracy.check(models, guide, advance, batches)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def _rounded(tensor, bits):
    """`tensor` with its mantissa cut to `bits`, and the gradient of the identity."""
    cut = tensor.detach().view(torch.int32) & -(1 << (23 - bits))
    return tensor + (cut.view(torch.float32) - tensor).detach()


class _Conv(torch.nn.Conv2d):
    """torch.nn's, with a defect in each of the classes below."""

    def forward(self, x):
        return self._conv_forward(self.defective(x), self.weight, self.bias)


class _InexactGradient(_Conv):
    def defective(self, x):
        return _ScaledGradient.apply(x, 1 + 1e-5) if x.requires_grad else x


class _TF32(_Conv):
    def defective(self, x):
        return _rounded(x, 10)


class _NaNGradient(_Conv):
    def defective(self, x):
        return _ScaledGradient.apply(x, float("nan")) if x.requires_grad else x


class _UnfoldedConv(torch.nn.Conv2d):
    """A right convolution whose rounding is not torch.nn's."""

    def forward(self, x):
        patches = F.unfold(x, self.kernel_size, padding=self.padding)
        y = self.weight.flatten(1) @ patches + self.bias.view(1, -1, 1)
        h = x.shape[2] + 2 * self.padding[0] - self.kernel_size[0] + 1
        return y.view(len(x), -1, h, h)


class _WrongPool(torch.nn.MaxPool2d):
    """Its gradient misses the last row of windows."""

    def forward(self, x):
        y = super().forward(x)
        return torch.cat([y[:, :, :-1], y[:, :, -1:].detach()], dim=2)


def _namespace(conv=torch.nn.Conv2d, pool=torch.nn.MaxPool2d):
    return SimpleNamespace(Conv2d=conv, MaxPool2d=pool, Linear=torch.nn.Linear)


@pytest.mark.parametrize("layers", [fastconv, _namespace(_UnfoldedConv)], ids=["fastconv", "unfold"])
def test_check_accepts_other_rounding(layers):
    found = _check(layers)
    assert found["passed"], found["failures"]
    assert any(found["gradients"]["fastconv"]), "some rounding error is bound to be there"


@pytest.mark.parametrize(
    "layers, tensor",
    [
        (_namespace(_InexactGradient), "grad conv1.weight"),
        (_namespace(_TF32), "outputs"),
        (_namespace(_NaNGradient), "grad conv1.bias"),
        (_namespace(pool=_WrongPool), "grad conv2.weight"),
    ],
    ids=["inexact gradient", "tf32", "nan", "pool"],
)
def test_check_finds_defects(layers, tensor):
    found = _check(layers)
    assert not found["passed"]
    assert tensor in {record["tensor"] for record in found["failures"]}


class _WrongBiasGradient(torch.nn.Conv2d):
    """Adds to the bias's gradient what is much beside rounding, but little beside the weight's gradient."""

    def forward(self, x):
        return super().forward(x) + _Extra.apply(self.bias)


class _Extra(torch.autograd.Function):
    """Zero, with a gradient of 1e-5."""

    @staticmethod
    def forward(ctx, bias):
        return bias.new_zeros(1, len(bias), 1, 1)

    @staticmethod
    def backward(ctx, grad):
        return torch.full((grad.shape[1],), 1e-5)


def test_check_finds_a_wrong_gradient_of_zero():
    """The bias before a batch-norm has a gradient of zero, which no relative error can be taken of."""
    sides = {}
    for side, layers in (("torch.nn", torch.nn), ("fastconv", _namespace(_WrongBiasGradient))):
        torch.manual_seed(0)
        sides[side] = fastconv.models.build("fashion_cnn", layers)
    guide = fastconv.models.build("fashion_cnn", torch.nn)
    found = _accuracy.check(sides, guide, lambda *_: None, [_batch(8)])
    assert {record["tensor"] for record in found["failures"]} == {"grad layer1.0.bias", "grad layer2.0.bias"}


def test_disagreement_exits_with_1_and_is_reported(monkeypatch, shorter, tmp_path, capsys):
    monkeypatch.setitem(validate.LAYERS, "fastconv", _namespace(_NaNGradient))
    saved = tmp_path / "report.json"
    assert main([*QUICK, "--save", str(saved)]) == 1
    assert "BROKEN" in capsys.readouterr().out
    report = json.loads(saved.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert report["passed"] is False
    assert report["check"]["failures"][0]["fastconv"] is None


def test_another_initialisation_is_a_disagreement(monkeypatch, shorter, capsys):
    class Shifted(torch.nn.Linear):
        def reset_parameters(self):
            super().reset_parameters()
            with torch.no_grad():
                self.bias[0] += 1e-3

    layers = SimpleNamespace(Conv2d=torch.nn.Conv2d, MaxPool2d=torch.nn.MaxPool2d, Linear=Shifted)
    monkeypatch.setitem(validate.LAYERS, "fastconv", layers)
    assert main(QUICK) == 1
    assert "Initial parameters: DIFFERENT" in capsys.readouterr().out


def test_gradients_are_taken_at_the_given_activations():
    """Where float64 finds 2**-24 > 0 and float32 rounds to zero, ReLU passes nothing on, on both sides."""
    x, w, b = 1 + 2.0**-12, 1 + 2.0**-12, -(1 + 2.0**-11)
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU(), torch.nn.Linear(1, 2)).double()
    with torch.no_grad():
        model[0].weight.fill_(w)
        model[0].bias.fill_(b)
    image, label = torch.tensor([[x]], dtype=torch.float64), torch.tensor([0])
    plain = _accuracy._Pass(model, image, label)
    assert plain.activations[0].item() == 2.0**-24
    assert plain.values["grad 0.weight"].item() != 0
    rounded = [torch.zeros(1, 1).double(), torch.zeros(1, 1).double(), plain.activations[2]]
    pinned = _accuracy._Pass(model, image, label, rounded)
    assert pinned.values["grad 0.weight"].item() == 0
    assert torch.equal(pinned.values["losses"], plain.values["losses"])
    assert [int((a != b).sum()) for a, b in zip(plain.branches, pinned.branches, strict=True)] == [1, 1]


def test_allowance():
    ulp = 2.0**-23  # of float32 numbers from 1 to 2
    assert _accuracy.allowance(0.0, 1.5, torch.float32) == 2 * ulp
    assert _accuracy.allowance(3e-7, 4.0, torch.float32) == 2 * 3e-7 + 8 * ulp
    assert _accuracy.allowance(0.25, 0.0, torch.bfloat16) == 0.5
    assert not _accuracy.allowance(float("nan"), 1.0, torch.float32) >= 0.0


# Settings


def test_fp32_precision_is_restored():
    def flags():
        b = torch.backends
        return [
            x.fp32_precision
            for x in (b.cudnn.conv, b.cudnn.rnn, b.cuda.matmul, b.mkldnn.conv, b.mkldnn.matmul)
        ]

    before = flags()
    with pytest.raises(KeyError), _training.fp32_precision("ieee"):
        assert flags() == ["ieee"] * 5
        assert torch.backends.cudnn.allow_tf32 is False  # reading it fails where it disagrees
        raise KeyError
    assert flags() == before
    with _training.fp32_precision("tf32"):
        assert flags() == ["tf32", "tf32", "tf32", "ieee", "ieee"]
        assert torch.backends.cudnn.allow_tf32 is True
    assert flags() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_keep_small_updates(dtype):
    """An update below half an ulp of the parameter adds up over the steps."""
    model = torch.nn.Linear(1, 2, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.fill_(1.0)
    trainer = _training.Trainer(model, 2e-4, 1000)
    for _ in range(200):
        trainer.step(torch.ones(4, 1, dtype=dtype), torch.zeros(4, dtype=torch.int64))
    assert model.weight[0].item() > 1.02 and model.weight[1].item() < 0.98


# Files and interruption


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")

    def half(name):
        with open(name, "w") as file:
            file.write("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _files.replace(str(path), half)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_ctrl_c_ends_with_130_and_writes_nothing(tmp_path):
    saved = tmp_path / "report.json"
    command = [sys.executable, "-u", "-m", "fastconv", "validate", "--data", SUBSET, "--epochs", "1000"]
    with subprocess.Popen(
        [*command, "--save", str(saved)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background job ignores it
    ) as process:
        process.stdout.readline()  # it has begun
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors and "Traceback" not in errors
    assert os.listdir(tmp_path) == []


def test_plot_without_matplotlib_is_refused_at_once(monkeypatch, capsys):
    monkeypatch.setattr("fastconv.__main__.importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit:
        main([*QUICK, "--plot", "curves.png"])
    assert exit.value.code == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_missing_data_is_named(tmp_path, capsys):
    assert main(["validate", "--data", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["validate", "--epochs", "0"], "'0'"),
        (["validate", "--batch-size", "1.5"], "'1.5'"),
        (["validate", "--lr", "-1"], "'-1'"),
        (["validate", "--lr", "inf"], "'inf'"),
        (["validate", "--seed", "x"], "'x'"),
        (["validate", "--dtype", "int8"], "'int8'"),
        (["validate", "--device", "tpu"], "'tpu'"),
        (["validate", "--device", "meta"], "'meta'"),
        (["validate", "--device", "cuda:999"], "cuda:999"),
        (["validate", "--save", "/no/such/folder/report.json"], "'/no/such/folder/report.json'"),
        (["bench", "--seconds", "0"], "'0'"),
        (["bench", "--device", "cuda:999"], "cuda:999"),
        (["bench", "--model", "alexnet"], "'alexnet'"),
        (["explain", "conv2d", "--input", "64,x", "--weight", "6,1,5,5"], "'64,x'"),
        (
            ["explain", "conv2d", "--input", "1,1,8,8", "--weight", "6,1,5,5", "--stride", "1,2,3"],
            "(1, 2, 3)",
        ),
        (["explain", "conv2d", "--input", "1,3,8,8", "--weight", "6,7,5,5"], "7"),
        (["explain", "conv2d", "--input", "1,3,8,8", "--weight", f"{2**64},3,5,5"], str(2**64)),
        (["explain", "linear", "--input", "1,3"], "--weight"),
        (["explain", "softmax"], "'softmax'"),
        (["frobnicate"], "'frobnicate'"),
        ([], "COMMAND"),
    ],
)
def test_bad_arguments_exit_with_2(arguments, named, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert named in capsys.readouterr().err


# The other commands


def test_kernels_lists_every_row(capsys):
    assert main(["kernels"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [row["name"] for row in fastconv.kernels.list()]
    assert names and [line.split()[0] for line in lines[1:]] == names
    assert main(["kernels", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == names
    assert {"op", "pass_", "device", "dtypes", "layouts", "built"} <= rows[0].keys()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "op, arguments, shape",
    [
        (
            "conv2d",
            ["--input", "64,6,14,14", "--weight", "16,6,5,5", "--padding", "2,1", "--stride", "2"],
            {"input": (64, 6, 14, 14), "weight": (16, 6, 5, 5), "padding": (2, 1), "stride": 2},
        ),
        (
            "max_pool2d",
            ["--input", "64,6,28,28", "--kernel-size", "2", "--ceil-mode"],
            {"input": (64, 6, 28, 28), "kernel_size": 2, "ceil_mode": True},
        ),
        (
            "conv2d_relu_max_pool2d",
            ["--input", "64,1,32,32", "--weight", "6,1,5,5", "--pool-kernel-size", "2"],
            {"input": (64, 1, 32, 32), "weight": (6, 1, 5, 5), "pool_kernel_size": 2},
        ),
    ],
    ids=["conv2d", "max_pool2d", "conv2d_relu_max_pool2d"],
)
def test_explain_marks_the_chosen_row(op, arguments, shape, layout, capsys):
    assert main(["explain", op, *arguments, "--layout", layout, "--dtype", "float64"]) == 0
    out = capsys.readouterr().out
    passes = [
        each
        for device in ("cpu", "cuda")
        for each in fastconv.kernels.explain(op, device=device, layout=layout, dtype=torch.float64, **shape)
    ]
    assert passes
    marked = [line.split()[1] for line in out.splitlines() if line.startswith("  *")]
    assert marked == [each["chosen"] for each in passes]
    for row in (row for each in passes for row in each["rows"]):
        assert row["name"] in out
        assert row["reason"] is None or row["reason"] in out


def test_explain_linear(capsys):
    assert main(["explain", "linear", "--input", "64,400", "--weight", "120,400"]) == 0
    out = capsys.readouterr().out
    assert "linear fprop: cpu/" in out and "linear fprop: cuda/" in out


def test_explain_shows_reasons_and_missing_rows(monkeypatch, capsys):
    rows = [
        {"name": "cuda/fancy", "reason": "stride is 2, wants 1", "cost_us": None, "built": False},
        {"name": "cuda/plain", "reason": None, "cost_us": 12.345, "built": True},
    ]
    found = [{"pass_": "fprop", "chosen": "cuda/plain", "rows": rows}]
    monkeypatch.setattr("fastconv.kernels.explain", lambda op, **_: found)
    assert main(["explain", "linear", "--input", "64,400", "--weight", "120,400", "--device", "cuda"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        "    cuda/fancy  stride is 2, wants 1 (not in this build)",
        "  * cuda/plain  12.3 us",
    ]


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and fastconv.__version__ in out
    assert str(fastconv._C.build_info()["cuda_reason"]) in out


def test_output_may_be_cut_short():
    """As `fastconv kernels | head -1` does."""
    with subprocess.Popen(
        [sys.executable, "-m", "fastconv", "kernels", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert errors == ""
