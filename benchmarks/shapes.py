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


SHAPES = [
    # LeNet on 32x32 images
    Shape("lenet_conv1", "conv2d", (64, 1, 32, 32), (6, 1, 5, 5)),
    Shape("lenet_conv2", "conv2d", (64, 6, 14, 14), (16, 6, 5, 5)),
    Shape("lenet_pool1", "max_pool2d", (64, 6, 28, 28), kernel_size=2, stride=2),
    Shape("lenet_pool2", "max_pool2d", (64, 16, 10, 10), kernel_size=2, stride=2, full=True),
    Shape("lenet_fc1", "linear", (64, 400), (120, 400)),
    Shape("lenet_fc2", "linear", (64, 120), (84, 120), full=True),
    Shape("lenet_fc3", "linear", (64, 84), (10, 84)),
    Shape("lenet_conv1_one_image", "conv2d", (1, 1, 32, 32), (6, 1, 5, 5)),
    # A network of two 3x3 layers for Fashion-MNIST
    Shape("fashion_conv1", "conv2d", (64, 1, 28, 28), (32, 1, 3, 3), padding=1),
    Shape("fashion_conv2", "conv2d", (64, 32, 14, 14), (64, 32, 3, 3)),
    Shape("fashion_pool1", "max_pool2d", (64, 32, 28, 28), kernel_size=2, stride=2),
    Shape("fashion_avg_pool1", "avg_pool2d", (64, 32, 28, 28), kernel_size=2, stride=2),
    Shape("fashion_fc1", "linear", (64, 2304), (600, 2304)),
    # First layer of a network for CIFAR-10, and its overlapping windows
    Shape("cifar_conv1", "conv2d", (64, 3, 32, 32), (32, 3, 5, 5), padding=2),
    Shape("cifar_pool1", "max_pool2d", (64, 32, 32, 32), kernel_size=3, stride=2, full=True),
    # Layers of large networks
    Shape("vgg_3x3", "conv2d", (1, 128, 56, 56), (128, 128, 3, 3), padding=1),
    Shape("vgg_3x3_batch", "conv2d", (16, 256, 28, 28), (256, 256, 3, 3), padding=1, full=True),
    Shape("resnet_stem", "conv2d", (1, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3),
    Shape("resnet_pool", "max_pool2d", (1, 64, 112, 112), kernel_size=3, stride=2, padding=1),
    Shape("densenet_avg_pool", "avg_pool2d", (8, 128, 56, 56), kernel_size=2, stride=2, full=True),
    Shape("resnet_1x1", "conv2d", (1, 64, 56, 56), (256, 64, 1, 1)),
    Shape("resnet_1x1_stride2", "conv2d", (8, 256, 56, 56), (512, 256, 1, 1), stride=2, full=True),
    Shape("mobilenet_depthwise", "conv2d", (4, 64, 56, 56), (64, 1, 3, 3), padding=1, groups=64),
    Shape(
        "mobilenet_depthwise_stride2",
        "conv2d",
        (8, 128, 56, 56),
        (128, 1, 3, 3),
        stride=2,
        padding=1,
        groups=128,
        full=True,
    ),
    Shape("mlp_784_512", "linear", (64, 784), (512, 784)),
]
