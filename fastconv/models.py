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

    Shapes: [N, in_channels, 32, 32] (28x28 with padding=2) -> [N, num_classes].
    """

    def __init__(self, layers=None, in_channels: int = 1, num_classes: int = 10, padding: int = 0):
        super().__init__()
        layers = modules if layers is None else layers
        self.conv1 = layers.Conv2d(in_channels, 6, 5, padding=padding)
        self.conv2 = layers.Conv2d(6, 16, 5)
        self.pool = layers.MaxPool2d(2)
        self.fc1 = layers.Linear(16 * 5 * 5, 120)
        self.fc2 = layers.Linear(120, 84)
        self.fc3 = layers.Linear(84, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)
