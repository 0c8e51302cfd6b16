# SPDX-License-Identifier: MIT
"""What known networks get on a GPU: tensor cores where there are such, and nowhere a naive row.

A choice is a pure function of the sizes, so that it needs no GPU and no images: networks run on torch's meta
device, at their own widths.
"""

import subprocess
import sys

import networks
import pytest
import torch
from problems import in_tf32
from torch import nn

from fastconv import functional as G
from fastconv import kernels, models


class Bottleneck(nn.Module):
    """Of He et al., "Deep residual learning for image recognition", 2016, with the stride in the 3x3."""

    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(c) for c in (width, width, 4 * width))
        self.beside = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)

    def forward(self, x):
        y = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return self.norm3(self.conv3(y)) + self.beside(x)


def resnet50():
    layers, channels = [nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.MaxPool2d(3, 2, 1)], 64
    for width, blocks, stride in [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)]:
        for i in range(blocks):
            layers.append(Bottleneck(channels, width, stride if i == 0 else 1))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def mobilenet_v2():
    """Of `networks.MobileNetV2`'s blocks, as many and as wide as in the paper."""
    layers, channels = [nn.Conv2d(3, 32, 3, 2, 1, bias=False)], 32
    table = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2)]
    for expand, out, count, stride in [*table, (6, 320, 1, 1)]:
        for i in range(count):
            layers.append(networks.InvertedResidual(channels, out, stride if i == 0 else 1, expand))
            channels = out
    layers += [nn.Conv2d(320, 1280, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(1280, 1000))


def convnext_tiny():
    """Liu et al., "A ConvNet for the 2020s", 2022, without its norms."""
    layers, channels = [nn.Conv2d(3, 96, 4, 4)], 96
    for width, blocks in [(96, 3), (192, 3), (384, 9), (768, 3)]:
        if width != channels:
            layers.append(nn.Conv2d(channels, width, 2, 2))
        for _ in range(blocks):
            layers += [nn.Conv2d(width, width, 7, padding=3, groups=width)]
            layers += [nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(768, 1000))


NETWORKS = {
    "lenet": (lambda: models.LeNet(nn), (1, 32, 32)),
    "fashion_cnn": (lambda: models.FashionCNN(nn), (1, 28, 28)),
    "cifar_net": (lambda: models.CifarNet(nn), (3, 32, 32)),
    "vgg16": (lambda: networks.vgg16(width=64, num_classes=1000), (3, 224, 224)),
    "resnet18": (lambda: networks.ResNet18(width=64, num_classes=1000), (3, 224, 224)),
    "resnet50": (resnet50, (3, 224, 224)),
    "mobilenet_v2": (mobilenet_v2, (3, 224, 224)),
    "convnext_tiny": (convnext_tiny, (3, 224, 224)),
}


def _question(layer, size):
    """What `explain` is asked of a layer that is given `size`; None of one that is torch's own."""
    if isinstance(layer, nn.Conv2d):
        more = dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups)
        return dict(op="conv2d", input=size, weight=tuple(layer.weight.shape), **more)
    if isinstance(layer, nn.Linear):
        return dict(op="linear", input=size, weight=tuple(layer.weight.shape))
    if isinstance(layer, nn.MaxPool2d):
        window = dict(kernel_size=layer.kernel_size, stride=layer.stride, padding=layer.padding)
        return dict(op="max_pool2d", input=size, **window)
    if isinstance(layer, nn.BatchNorm2d):
        return dict(op="batch_norm_relu_max_pool2d", input=size)
    return None


def _questions(network, images):
    """One of each different layer, in the order of the network; the first is given the images."""
    found = {}

    def before(layer, inputs):
        question = _question(layer, tuple(inputs[0].shape))
        found.setdefault(str(question), question)

    for layer in network.modules():
        if not list(layer.children()):
            layer.register_forward_pre_hook(before)
    network(images)
    found.pop("None", None)
    return list(found.values())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_layer_meets_a_naive_row(name, layout):
    make, size = NETWORKS[name]
    with torch.device("meta"):
        network = make()
        asked = {batch: _questions(network, torch.empty(batch, *size)) for batch in (1, 32)}
    naive = []
    for dtype in ("float32", "float16", "bfloat16"):
        for question in (each for questions in asked.values() for each in questions):
            is_first = question["input"][1:] == size
            for each in kernels.explain(**question, device="cuda", dtype=dtype, layout=layout):
                unneeded = is_first and each["pass_"] == "dgrad"
                if each["chosen"].endswith("_naive") and not unneeded:
                    naive.append((dtype, each["chosen"], question))
    assert not naive


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["vgg16", "resnet50", "mobilenet_v2"])
def test_convolutions_run_on_tensor_cores(name, dtype, layout):
    """From sm_80 on, but for depthwise ones. An older GPU has other rows than the naive ones for them."""
    make, size = NETWORKS[name]
    with torch.device("meta"):
        asked = _questions(make(), torch.empty(16, *size))
    for layer in asked:
        if layer["op"] != "conv2d" or layer["groups"] > 1:
            continue
        layer |= dict(dtype=dtype, layout=layout, device="cuda")
        old, *new = (
            [each["chosen"] for each in kernels.explain(**layer, capability=capability)]
            for capability in ((7, 5), (8, 0), (9, 0))
        )
        for chosen in new:
            if dtype == "float32" and layer["input"][1] <= 32:
                # three products of a tile are more than a few by plain units
                assert not any(row.endswith("_naive") for row in chosen), (layer, chosen)
            else:
                assert all("_mma_" in row for row in chosen), (layer, chosen)
        assert not any(row.endswith("_naive") for row in old), (layer, old)


@pytest.mark.parametrize("n", [64, 1024])
def test_linear_layers_run_on_tensor_cores(n):
    for outputs, inputs in ((4096, 25088), (4096, 4096), (1000, 4096), (1000, 2048)):
        found = kernels.explain(
            "linear", input=(n, inputs), weight=(outputs, inputs), dtype="float16", device="cuda"
        )
        assert all("_mma_" in each["chosen"] for each in found[:3]), [each["chosen"] for each in found]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_depthwise_layers_get_depthwise_rows(kernel, stride, multiplier, dtype):
    for layout in ("contiguous", "channels_last"):
        for c, image in [(32, 112), (96, 56), (192, 28), (384, 14), (960, 7)]:
            answer = kernels.explain(
                "conv2d",
                input=(8, c, image, image),
                weight=(c * multiplier, 1, kernel, kernel),
                stride=stride,
                padding=kernel // 2,
                groups=c,
                device="cuda",
                dtype=dtype,
                layout=layout,
            )
            assert {each["chosen"].split("_")[2] for each in answer} == {"depthwise"}, (c, image, layout)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("k", [1, 6, 32])
@pytest.mark.parametrize("n", [1, 64, 1024])
def test_one_channel_meets_no_naive_row(n, k, dtype):
    """Neither dgrad of an image nor a convolution along one axis."""
    questions = [
        dict(op="conv2d", input=(n, 1, 28, 28), weight=(k, 1, r, r), padding=r // 2) for r in (3, 5, 7)
    ]
    questions += [
        dict(op="conv1d", input=(n, 1, 256), weight=(k, 1, s), padding=s // 2) for s in (1, 3, 5, 9)
    ]
    for question in questions:
        for each in kernels.explain(**question, device="cuda", dtype=dtype):
            assert not each["chosen"].endswith("_naive"), (question, each)


def test_depthwise_rows_say_why_not():
    answer = kernels.explain("conv2d", input=(1, 8, 9, 9), weight=(8, 2, 3, 3), groups=4, device="cuda")
    reasons = {row["name"]: row["reason"] for each in answer for row in each["rows"]}
    for pass_ in ("fprop", "dgrad", "wgrad"):
        assert reasons[f"cuda/conv_{pass_}_depthwise"] == "takes one input channel a group only"


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_strided_dgrad_multiplies_as_much_as_fprop(layout, stride):
    """It would multiply a stride squared times as much, mostly by zeros, as one GEMM over all taps."""
    layer = dict(op="conv2d", input=(64, 256, 90, 90), weight=(256, 256, 3, 3), stride=stride, padding=1)
    for dtype in ("float32", "bfloat16"):
        passes = kernels.explain(**layer, device="cuda", dtype=dtype, layout=layout)
        fprop, dgrad = (
            [row["cost_us"] for row in each["rows"] if "igemm" in row["name"]] for each in passes[:2]
        )
        for there, back in zip(fprop, dgrad, strict=True):
            assert (there is None) == (back is None)
            assert there is None or 0.5 * there < back < 1.6 * there


# --- TF32 ---------------------------------------------------------------------------------------------------

CONV = dict(op="conv2d", input=(32, 64, 56, 56), weight=(64, 64, 3, 3), padding=1)
LINEAR = dict(op="linear", input=(1024, 4096), weight=(4096, 4096))
CONV_FLAG, LINEAR_FLAG = torch.backends.cudnn.conv, torch.backends.cuda.matmul


def _chosen(question, **more):
    """The rows of fprop, dgrad and wgrad."""
    return [each["chosen"] for each in kernels.explain(**question, **{"device": "cuda", **more})[:3]]


def _any_in_tf32(rows):
    return any(map(in_tf32, rows))


@pytest.mark.parametrize(
    ("question", "flag", "other"),
    [(CONV, CONV_FLAG, LINEAR_FLAG), (LINEAR, LINEAR_FLAG, CONV_FLAG)],
    ids=["conv", "linear"],
)
def test_tf32_where_the_flag_of_the_operator_allows_it(question, flag, other):
    other.fp32_precision = "tf32"
    assert not _any_in_tf32(_chosen(question))
    flag.fp32_precision = "tf32"
    assert all(map(in_tf32, _chosen(question)))
    assert all(map(in_tf32, _chosen(question, capability=(8, 0))))
    assert not _any_in_tf32(_chosen(question, capability=(7, 5)))
    assert not _any_in_tf32(_chosen(question, device="cpu"))
    for dtype in ("float64", "float16", "bfloat16"):
        assert not _any_in_tf32(_chosen(question, dtype=dtype))


def test_older_flags_allow_tf32_too():
    try:
        for allowed in (True, False):
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
            assert _any_in_tf32(_chosen(CONV)) is _any_in_tf32(_chosen(LINEAR)) is allowed
        for precision, allowed in (("high", True), ("highest", False)):
            torch.set_float32_matmul_precision(precision)
            assert _any_in_tf32(_chosen(LINEAR)) is allowed and not _any_in_tf32(_chosen(CONV))
    finally:  # as torch has them at the start
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False


def test_a_new_process_computes_in_tf32_where_torch_does():
    """Convolutions, by torch's default."""
    code = f"from fastconv import kernels; print(*[p['chosen'] for q in ({CONV}, {LINEAR})"
    code += " for p in kernels.explain(**q, device='cuda')[:3]])"
    code += "; import torch; print(torch.backends.cudnn.conv.fp32_precision == 'tf32')"
    code += "; print(torch.backends.cuda.matmul.fp32_precision == 'tf32')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *rows, conv, linear = done.stdout.split()
    assert [str(in_tf32(row)) for row in rows] == [conv] * 3 + [linear] * 3


@pytest.mark.parametrize("name", ["vgg16", "resnet50"])
def test_layers_of_networks_run_in_tf32(name):
    """All that run on tensor cores otherwise, and perhaps more."""
    make, size = NETWORKS[name]
    with torch.device("meta"):
        asked = [each for each in _questions(make(), torch.empty(32, *size)) if "weight" in each]
    full = [_chosen(question) for question in asked]
    CONV_FLAG.fp32_precision = LINEAR_FLAG.fp32_precision = "tf32"
    for question, before in zip(asked, full, strict=True):
        for old, new in zip(before, _chosen(question), strict=True):
            assert not in_tf32(old)
            assert in_tf32(new) or "_mma_" not in old, (question, old, new)


def test_tf32_rows_say_why_not():
    rows = [
        row
        for question in (CONV, LINEAR)
        for each in kernels.explain(**question, device="cuda")
        for row in each["rows"]
    ]
    reasons = {row["reason"] for row in rows if in_tf32(row["name"])}
    assert reasons == {"multiplies in TF32, and full float32 is asked for"}


def test_composed_rows_hold_the_flags():
    """What they are made of is a choice by the same flags, so that it is predicted to take less time."""
    plan = G.conv_stage(act="relu", padding=1) + G.linear_stage(act="relu")
    chain = dict(
        op="chain",
        input=(64, 64, 28, 28),
        plan=plan,
        params=[(64, 64, 3, 3), (64,), (512, 64 * 28 * 28), (512,)],
    )
    fused = {**CONV, "op": "conv2d_relu_max_pool2d", "pool_kernel_size": 2}

    def costs(question):
        return [
            row["cost_us"]
            for each in kernels.explain(**question, device="cuda")
            for row in each["rows"]
            if row["name"].endswith("_composed")
        ]

    def faster(question, *flags):
        before = costs(question)
        for flag in flags:
            flag.fp32_precision = "tf32"
        after = costs(question)
        for flag in flags:
            flag.fp32_precision = "ieee"
        return before and [new < old for new, old in zip(after, before, strict=True)]

    assert faster(fused, CONV_FLAG) == [True, True] and faster(fused, LINEAR_FLAG) == [False, False]
    assert faster(chain, CONV_FLAG) == faster(chain, LINEAR_FLAG) == [True, True]
    assert faster(LINEAR, LINEAR_FLAG) == [True] and faster(LINEAR, CONV_FLAG) == [False]
