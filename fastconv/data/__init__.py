# SPDX-License-Identifier: MIT
"""Image data sets held in memory, and seeded batches of them.

train = fastconv.data.FashionMNIST()
for x, y in fastconv.data.batches(train, 64, epoch=0): ...
"""

from fastconv.data.batching import batches
from fastconv.data.cifar import CIFAR10
from fastconv.data.idx import MNIST, FashionMNIST
from fastconv.data.images import DataError

__all__ = ["CIFAR10", "MNIST", "DataError", "FashionMNIST", "batches"]
