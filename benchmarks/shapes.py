# SPDX-License-Identifier: MIT
"""The layers that are measured. One list, for every benchmark."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A call of `op`: "conv2d", "max_pool2d", "avg_pool2d" or "linear".

    input: [N, C, H, W], or [N, features] for linear.
    weight: [K, C / groups, R, S], or [out, in] for linear; there is a bias with it.
    kernel_size, stride, padding, groups: as torch.nn.functional takes them; kernel_size is a pool's.
    full: measured with --full alone.
    """

    name: str
    op: str
    input: tuple[int, ...]
    weight: tuple[int, ...] = ()
    kernel_size: int = 0
    stride: int = 1
    padding: int = 0
    groups: int = 1
    full: bool = False

    @property
    def output(self) -> tuple[int, ...]:
        """[N, K, P, Q], or [N, out] for linear."""
        if self.op == "linear":
            return self.input[0], self.weight[0]
        window = self.weight[2:] or (self.kernel_size, self.kernel_size)
        extent = (
            (i + 2 * self.padding - k) // self.stride + 1 for i, k in zip(self.input[2:], window, strict=True)
        )
        return self.input[0], self.weight[0] if self.weight else self.input[1], *extent

    def flops(self, backward: bool) -> int:
        """Multiplications and additions of the forward pass, with the two of the backward pass if asked for.

        For pools: comparisons or additions, and nothing more for max_pool2d's backward pass.
        """
        if self.kernel_size:
            additions = math.prod(self.output) * (self.kernel_size**2 - 1)
            return additions * (2 if backward and self.op == "avg_pool2d" else 1)
        forward = 2 * math.prod(self.output) * math.prod(self.weight[1:])
        return 3 * forward if backward else forward

    def bytes(self, backward: bool, itemsize: int) -> int:
        """What has to be read and written at least: operands and results, once in each pass using them."""
        x, w, y = math.prod(self.input), math.prod(self.weight), math.prod(self.output)
        forward = x + w + y
        if self.kernel_size:
            return itemsize * (forward + (y + x if backward else 0))
        return itemsize * (forward + (y + w + x + y + x + w if backward else 0))  # dgrad and wgrad


def _conv(name, batch, channels, image, k, window, stride=1, groups=1, full=True) -> Shape:
    """A convolution with bias, padded so that stride one keeps the image's size."""
    return Shape(
        name,
        "conv2d",
        (batch, channels, image, image),
        (k, channels // groups, window, window),
        stride=stride,
        padding=window // 2,
        groups=groups,
        full=full,
    )


def _linear(name, batch, features, out, full=True) -> Shape:
    return Shape(name, "linear", (batch, features), (out, features), full=full)


SHAPES = [
    # LeNet on 32x32 images
    Shape("lenet_conv1", "conv2d", (64, 1, 32, 32), (6, 1, 5, 5)),
    Shape("lenet_conv2", "conv2d", (64, 6, 14, 14), (16, 6, 5, 5)),
    Shape("lenet_pool1", "max_pool2d", (64, 6, 28, 28), kernel_size=2, stride=2),
    Shape("lenet_pool2", "max_pool2d", (64, 16, 10, 10), kernel_size=2, stride=2, full=True),
    _linear("lenet_fc1", 64, 400, 120, full=False),
    _linear("lenet_fc2", 64, 120, 84),
    _linear("lenet_fc3", 64, 84, 10, full=False),
    Shape("lenet_conv1_one_image", "conv2d", (1, 1, 32, 32), (6, 1, 5, 5)),
    Shape("lenet_conv1_1024_images", "conv2d", (1024, 1, 32, 32), (6, 1, 5, 5), full=True),
    Shape("lenet_conv2_1024_images", "conv2d", (1024, 6, 14, 14), (16, 6, 5, 5), full=True),
    _linear("lenet_fc1_65536_images", 65536, 400, 120),
    # FashionCNN
    _conv("fashion_conv1", 64, 1, 28, 32, 3, full=False),
    Shape("fashion_conv2", "conv2d", (64, 32, 14, 14), (64, 32, 3, 3)),
    Shape("fashion_pool1", "max_pool2d", (64, 32, 28, 28), kernel_size=2, stride=2),
    Shape("fashion_avg_pool1", "avg_pool2d", (64, 32, 28, 28), kernel_size=2, stride=2),
    _linear("fashion_fc1", 64, 2304, 600, full=False),
    # CifarNet, and a first layer with larger and overlapping windows
    _conv("cifar_conv1", 64, 3, 32, 16, 3),
    _conv("cifar_conv1_5x5", 64, 3, 32, 32, 5, full=False),
    Shape("cifar_pool1", "max_pool2d", (64, 32, 32, 32), kernel_size=3, stride=2, full=True),
    # VGG-16
    _conv("vgg_first", 1, 3, 224, 64, 3),
    _conv("vgg_3x3", 1, 128, 56, 128, 3, full=False),
    _conv("vgg_3x3_256", 1, 256, 56, 256, 3),
    _conv("vgg_3x3_512", 1, 512, 28, 512, 3),
    _conv("vgg_3x3_batch", 16, 256, 28, 256, 3),
    # ResNet-18 and ResNet-50
    _conv("resnet_stem", 1, 3, 224, 64, 7, stride=2, full=False),
    Shape("resnet_pool", "max_pool2d", (1, 64, 112, 112), kernel_size=3, stride=2, padding=1),
    _conv("resnet_3x3_64", 8, 64, 56, 64, 3),
    _conv("resnet_3x3_stride2", 8, 64, 56, 128, 3, stride=2),
    _conv("resnet_3x3_512", 8, 512, 7, 512, 3),
    _conv("resnet_1x1", 1, 64, 56, 256, 1, full=False),
    _conv("resnet_1x1_stride2", 8, 256, 56, 512, 1, stride=2),
    _conv("resnet_1x1_2048", 8, 512, 7, 2048, 1),
    Shape("densenet_avg_pool", "avg_pool2d", (8, 128, 56, 56), kernel_size=2, stride=2, full=True),
    # MobileNetV2, and ConvNeXt's depthwise layer
    _conv("mobilenet_depthwise", 4, 64, 56, 64, 3, groups=64, full=False),
    _conv("mobilenet_depthwise_stride2", 8, 128, 56, 128, 3, stride=2, groups=128),
    _conv("mobilenet_expand", 4, 24, 56, 144, 1),
    _conv("mobilenet_project", 4, 144, 56, 24, 1),
    _conv("convnext_depthwise", 4, 96, 56, 96, 7, groups=96),
    # MLPs
    _linear("mlp_784_512", 64, 784, 512, full=False),
    _linear("mlp_784_512_one_image", 1, 784, 512),
    _linear("mlp_512_10_4096_images", 4096, 512, 10),
]
