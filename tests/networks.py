# SPDX-License-Identifier: MIT
"""Networks as people write them, for the tests of `fastconv.optimize`: torchvision's shapes, narrower; and
how two implementations of one are compared.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import profile

from fastconv import models
from fastconv._accuracy import allowance


class VGG(nn.Module):
    """Simonyan and Zisserman, "Very deep convolutional networks", 2014; `layers` has widths, "M" pools."""

    def __init__(self, layers, width=8, batch_norm=False, num_classes=10):
        super().__init__()
        features, channels = [], 3
        for layer in layers:
            if layer == "M":
                features.append(nn.MaxPool2d(2, 2))
                continue
            features.append(nn.Conv2d(channels, layer * width, 3, padding=1))
            if batch_norm:
                features.append(nn.BatchNorm2d(layer * width))
            features.append(nn.ReLU(inplace=True))
            channels = layer * width
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.classifier = nn.Sequential(
            nn.Linear(channels, 32),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(32, 32),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(32, num_classes),
        )

    def forward(self, x):
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


def vgg11(**more):
    return VGG([1, "M", 2, "M", 4, 4, "M", 8, 8, "M", 8, 8, "M"], **more)


def vgg16(**more):
    return VGG([1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8, "M"], **more)


class BasicBlock(nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet18(nn.Module):
    """He et al., "Deep residual learning for image recognition", 2015."""

    def __init__(self, width=8, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for i in range(4):
            channels, out = width << max(i - 1, 0), width << i
            blocks = [BasicBlock(channels, out, 1 if i == 0 else 2), BasicBlock(out, out, 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * width, num_classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class InvertedResidual(nn.Module):
    def __init__(self, channels, out, stride, expand):
        super().__init__()
        hidden = channels * expand
        layers = []
        if expand != 1:
            layers += [nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(True)]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(True),
            nn.Conv2d(hidden, out, 1, bias=False),
            nn.BatchNorm2d(out),
        ]
        self.conv = nn.Sequential(*layers)
        self.shortcut = stride == 1 and channels == out

    def forward(self, x):
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks", 2018."""

    def __init__(self, width=4, num_classes=10):
        super().__init__()
        features = [nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6(True)]
        channels = width
        for expand, out, count, stride in [(1, 1, 1, 1), (6, 2, 2, 2), (6, 3, 2, 2), (6, 4, 2, 1)]:
            for i in range(count):
                features.append(InvertedResidual(channels, out * width, stride if i == 0 else 1, expand))
                channels = out * width
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(channels, num_classes))

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))


class Functional(nn.Module):
    """Layers called as functions and methods, a shared layer, tied weights and a branch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(5, 4 * 2 * 2) / 4)
        self.bn = nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        x = F.relu(F.max_pool2d(F.conv2d(x, self.conv.weight, self.conv.bias, padding=1), 2))
        x = self.shared(x).relu_() + self.shared(F.dropout(x, 0.5, self.training))
        y = self.pool(torch.relu(self.bn(self.shared(x))))
        y = y.view(y.size(0), -1)
        return F.linear(F.linear(y, self.weight).relu(), self.weight[:, :5])


class Attention(nn.Module):
    """A transformer's block in torch.nn's layers, classifying 16-pixel patches."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(48, 4, 64, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x.flatten(1).unflatten(1, (-1, 48))).mean(1)


SIZE = (3, 32, 32)
NETWORKS = {
    **{
        name: (lambda name=name, size=size: models.build(name, nn, size), size)
        for name, size in {
            "lenet": (1, 28, 28),
            "fashion_cnn": (1, 28, 28),
            "fashion_dnn": (1, 28, 28),
            "mlp": (1, 28, 28),
            "cifarnet": SIZE,
        }.items()
    },
    "vgg11": (vgg11, SIZE),
    "vgg16": (vgg16, SIZE),
    "vgg11_bn": (lambda: vgg11(batch_norm=True), SIZE),
    "resnet18": (ResNet18, SIZE),
    "mobilenet_v2": (MobileNetV2, SIZE),
    "functional": (Functional, (3, 8, 8)),
}
# Those that are one chain in eval mode.
CHAINS = ["lenet", "fashion_cnn", "mlp", "cifarnet"]


def make(name, **more):
    """The network, with a batch-norm that has seen something, and images."""
    torch.manual_seed(0)
    build, size = NETWORKS[name]
    model = build()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
    return model, torch.randn(6, *size)


def step(model, images, seed=0):
    """Outputs, losses, gradients and the buffers behind them, of one pass forward and backward."""
    torch.manual_seed(seed)  # the same dropout
    model.zero_grad()
    outputs = model(images)
    losses = F.cross_entropy(outputs, torch.arange(len(images)) % 5, reduction="none")
    losses.mean().backward()
    grads = {f"grad {name}": p.grad for name, p in model.named_parameters()}
    found = {"outputs": outputs.detach(), "losses": losses.detach(), **grads, **dict(model.named_buffers())}
    return {name: value.clone() for name, value in found.items()}


SCALE = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps  # of errors in float64 to float32's


def check_rule(ours, theirs, exact, names=None, unit=1.0, pick=max):
    """The error rule for tensors of several passes: `ours` and `theirs` against `exact`, lists of dicts.

    `pick` makes one error of those of all passes: a small tensor may have a small error by chance, but not in
    each of ten passes. `unit` scales the errors of `theirs`, as by SCALE where `ours` are float64.
    """
    assert ours[0].keys() == theirs[0].keys() == exact[0].keys()
    for name in exact[0] if names is None else names:
        if not exact[0][name].is_floating_point():
            assert all(torch.equal(a[name], b[name]) for a, b in zip(ours, exact, strict=True)), name
            continue
        largest = max((each[name].abs().max().item() for each in exact if each[name].numel()), default=0.0)
        error, torch_error = (
            pick([(a[name].double() - b[name]).abs().max().item() for a, b in zip(found, exact, strict=True)])
            for found in (ours, theirs)
        )
        allowed = allowance(unit * torch_error, largest, ours[0][name].dtype)
        assert error <= allowed, (name, error, allowed)


def allocated(step):
    """The bytes that are held after each allocation and release in a call of `step`, whose result is kept."""
    step()
    with profile(profile_memory=True) as recorded:
        result = step()
    del result
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = list(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    assert max(held) > 0
    return held
