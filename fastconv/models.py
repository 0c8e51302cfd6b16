# SPDX-License-Identifier: MIT
"""Networks, each defined once over a namespace of layers: `layers=torch.nn` or `layers=fastconv`."""

import torch
from torch import nn
from torch.nn import functional as F

from fastconv import modules

__all__ = ["LeNet"]


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
        fused: Whether each layer does what follows it, ReLU and max-pool, in one operator. `layers` needs
            ConvReLUPool2d and LinearReLU then. The parameters and the state_dict are the same.

    Shapes: [N, in_channels, 32, 32] (28x28 with padding=2) -> [N, num_classes].
    """

    def __init__(
        self, layers=None, in_channels: int = 1, num_classes: int = 10, padding: int = 0, fused: bool = False
    ):
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fused:
            x = torch.flatten(self.conv2(self.conv1(x)), 1)
            return self.fc3(self.fc2(self.fc1(x)))
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)
