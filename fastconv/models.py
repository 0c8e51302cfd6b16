# SPDX-License-Identifier: MIT
"""Networks, each defined once over a namespace of layers: `layers=torch.nn` or `layers=fastconv`.

Batch-norm, dropout and ReLU are torch.nn's own in both.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastconv import modules

__all__ = ["NETWORKS", "CifarNet", "FashionCNN", "FashionDNN", "LeNet", "MLP", "SizeError", "build"]


_FLATTEN = nn.Flatten()


class LeNet(nn.Module):
    """LeNet-5 (LeCun et al., "Gradient-based learning applied to document recognition", 1998), with ReLU
    and max-pool.

    Conv2d(in_channels, 6, 5) -> ReLU -> MaxPool 2 -> Conv2d(6, 16, 5) -> ReLU -> MaxPool 2 -> Linear 400 ->
    120 -> ReLU -> 84 -> ReLU -> num_classes.

    Args:
        layers: A namespace with Conv2d, MaxPool2d and Linear; None is fastconv's.
        in_channels: Channels of the images.
        num_classes: Size of the output.
        padding: Of the first layer: 0 for 32x32 images, 2 for 28x28.
        fused: Whether the network is one operator (as `Chain`, layer by layer where a hook waits for a
            call). `layers` needs ConvReLUPool2d and LinearReLU then. The parameters and the state_dict are
            the same.

    Shapes: [N, in_channels, 32, 32] (28x28 with padding=2) -> [N, num_classes].

    >>> LeNet()(torch.randn(2, 1, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        layers: Any = None,
        in_channels: int = 1,
        num_classes: int = 10,
        padding: int = 0,
        fused: bool = False,
    ) -> None:
        super().__init__()
        layers = modules if layers is None else layers
        self.fused = fused
        conv, linear = layers.Conv2d, layers.Linear
        if fused:
            conv, linear = layers.ConvReLUPool2d, layers.LinearReLU
        else:
            self.pool = layers.MaxPool2d(2)
        self.conv1 = conv(in_channels, 6, 5, padding=padding)
        self.conv2 = conv(6, 16, 5)
        self.fc1 = linear(16 * 5 * 5, 120)
        self.fc2 = linear(120, 84)
        self.fc3 = layers.Linear(84, num_classes)
        self._run = modules.Run(self._layers()) if fused else None

    def _layers(self) -> tuple[nn.Module, ...]:
        of: dict[str, Any] = self._modules  # attributes of a module that are modules take a slow way
        return of["conv1"], of["conv2"], _FLATTEN, of["fc1"], of["fc2"], of["fc3"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._run is not None:
            return self._run(self._layers(), x)
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class FashionCNN(nn.Module):
    """Two convolutions with batch-norm and three linear layers for Fashion-MNIST.

    Conv2d(in_channels, 32, 3, padding=1) -> BatchNorm -> ReLU -> MaxPool 2 -> Conv2d(32, 64, 3) -> BatchNorm
    -> ReLU -> MaxPool 2 -> Linear 2304 -> 600 -> Dropout 0.25 -> 120 -> num_classes.

    Args:
        layers: A namespace with Conv2d, MaxPool2d and Linear; None is fastconv's.
        in_channels: Channels of the images.
        num_classes: Size of the output.

    Shapes: [N, in_channels, 28, 28] -> [N, num_classes].

    >>> FashionCNN()(torch.randn(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, layers: Any = None, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        layers = modules if layers is None else layers
        self.layer1 = nn.Sequential(
            layers.Conv2d(in_channels, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            layers.MaxPool2d(2, 2),
        )
        self.layer2 = nn.Sequential(
            layers.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), layers.MaxPool2d(2)
        )
        self.fc1 = layers.Linear(64 * 6 * 6, 600)
        self.drop = nn.Dropout(0.25)
        self.fc2 = layers.Linear(600, 120)
        self.fc3 = layers.Linear(120, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.flatten(self.layer2(self.layer1(x)), 1)
        return self.fc3(self.fc2(self.drop(self.fc1(x))))


class FashionDNN(nn.Module):
    """Linear in_features -> 256 -> 128 -> num_classes, ReLU and dropout 0.25 between.

    Args:
        layers: A namespace with Linear; None is fastconv's.
        in_features: Values of an image.
        num_classes: Size of the output.

    Shapes: [N, ...], in_features values an image -> [N, num_classes].

    >>> FashionDNN()(torch.randn(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, layers: Any = None, in_features: int = 28 * 28, num_classes: int = 10) -> None:
        super().__init__()
        layers = modules if layers is None else layers
        self.fc1 = layers.Linear(in_features, 256)
        self.fc2 = layers.Linear(256, 128)
        self.fc3 = layers.Linear(128, num_classes)
        self.drop = nn.Dropout(0.25)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(F.relu(self.fc1(torch.flatten(x, 1))))
        x = self.drop(F.relu(self.fc2(x)))
        return self.fc3(x)


class MLP(nn.Module):
    """Linear layers with ReLU between: in_features -> each of `hidden` -> num_classes.

    Args:
        layers: A namespace with Linear; None is fastconv's.
        hidden: Sizes of the hidden layers, (512, 512) or (1024, 512), say.
        in_features: Values of an image.
        num_classes: Size of the output.

    Shapes: [N, ...], in_features values an image -> [N, num_classes].

    >>> MLP()(torch.randn(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        layers: Any = None,
        hidden: Sequence[int] = (512, 512),
        in_features: int = 28 * 28,
        num_classes: int = 10,
    ):
        super().__init__()
        layers = modules if layers is None else layers
        sizes = [in_features, *hidden]
        stack = [
            layer
            for before, after in zip(sizes[:-1], sizes[1:], strict=True)
            for layer in (layers.Linear(before, after), nn.ReLU())
        ]
        self.flatten = nn.Flatten()
        self.linear_relu_stack = nn.Sequential(*stack, layers.Linear(sizes[-1], num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_relu_stack(self.flatten(x))


class CifarNet(nn.Module):
    """Three convolutions and two linear layers for CIFAR-10; num_classes=2 tells airplanes from birds.

    Conv2d(in_channels, 16, 3) -> ReLU -> MaxPool 2 -> Conv2d(16, 32, 3) -> ReLU -> MaxPool 2
    -> Conv2d(32, 64, 3) -> ReLU -> MaxPool 2 -> Linear 1024 -> 128 -> ReLU -> num_classes,
    each convolution with padding 1.

    Args:
        layers: A namespace with Conv2d, MaxPool2d and Linear; None is fastconv's.
        in_channels: Channels of the images.
        num_classes: Size of the output.

    Shapes: [N, in_channels, 32, 32] -> [N, num_classes].

    >>> CifarNet()(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, layers: Any = None, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        layers = modules if layers is None else layers
        self.conv1 = layers.Conv2d(in_channels, 16, 3, padding=1)
        self.conv2 = layers.Conv2d(16, 32, 3, padding=1)
        self.conv3 = layers.Conv2d(32, 64, 3, padding=1)
        self.pool = layers.MaxPool2d(2)
        self.fc1 = layers.Linear(64 * 4 * 4, 128)
        self.fc2 = layers.Linear(128, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in (self.conv1, self.conv2, self.conv3):
            x = self.pool(F.relu(conv(x)))
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


NETWORKS = {
    "lenet": LeNet,
    "fashion_cnn": FashionCNN,
    "fashion_dnn": FashionDNN,
    "mlp": MLP,
    "cifarnet": CifarNet,
}


class SizeError(ValueError):
    """A network doesn't take images of this size."""


def build(
    name: str, layers: Any = None, image_size: Sequence[int] = (1, 28, 28), num_classes: int = 10
) -> nn.Module:
    """The network of that name in NETWORKS, for images of `image_size` [channels, height, width].

    Raises:
        ValueError: There is no such network.
        SizeError: It doesn't take such images (a ValueError).
    """
    if name not in NETWORKS:
        raise ValueError(f"models.build: name must be one of {', '.join(NETWORKS)}, got {name!r}")
    channels, *size = image_size
    network = NETWORKS[name]
    if network in (MLP, FashionDNN):
        return network(layers, in_features=math.prod(image_size), num_classes=num_classes)
    paddings = {LeNet: {28: 2, 32: 0}, FashionCNN: {28: 1}, CifarNet: {32: 1}}[network]
    if size[0] != size[1] or size[0] not in paddings:
        taken = " or ".join(f"{extent}x{extent}" for extent in paddings)
        raise SizeError(f"models.build: {name} takes images of {taken}, got image_size {tuple(image_size)}")
    more = {"padding": paddings[size[0]]} if network is LeNet else {}
    return network(layers, in_channels=channels, num_classes=num_classes, **more)
