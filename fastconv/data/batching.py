# SPDX-License-Identifier: MIT
"""Seeded batches of a data set in memory."""

import hashlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset


def batches(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch of `dataset` in batches: pairs of images [B, C, H, W] in [0, 1] and labels int64 [B].

    The order depends on `seed` and `epoch` alone, not on the device, and leaves torch's random state as it
    is. The last batch holds what remains. The whole set is kept on `device` as uint8 during the epoch
    (47 MB for Fashion-MNIST), and there are no worker processes. In float32 the values are those of
    `dataset[i]`, bit for bit, on every device.

    Args:
        dataset: anything with `images`, uint8 [N, H, W] or [N, C, H, W], and `labels`, int64 [N].
        batch_size: images a batch, at least 1.
        seed, epoch: integers; each pair gives another order.
        shuffle: if False, the order is the data set's own.
        device: where the batches lie (default: where the images are).
        dtype: floating-point type of the images.

    Raises:
        ValueError: batch_size < 1, unequal numbers of images and labels, or a transform: it would go unused.
        TypeError: a data set without images and labels, a non-integer number, or a dtype that isn't floating.

    >>> from types import SimpleNamespace
    >>> images = SimpleNamespace(images=torch.zeros(5, 28, 28, dtype=torch.uint8), labels=torch.arange(5))
    >>> [x.shape[0] for x, y in batches(images, 2)]
    [2, 2, 1]
    """
    images, labels = getattr(dataset, "images", None), getattr(dataset, "labels", None)
    if not (isinstance(images, torch.Tensor) and isinstance(labels, torch.Tensor)):
        raise TypeError(
            f"batches: dataset must have the tensors images and labels, got {type(dataset).__name__}"
        )
    if len(images) != len(labels):
        raise ValueError(f"batches: dataset has {len(images)} images and {len(labels)} labels")
    for name in ("transform", "target_transform"):
        if getattr(dataset, name, None) is not None:
            raise ValueError(
                f"batches: dataset.{name} must be None (use torch.utils.data.DataLoader instead)"
            )
    batch_size = operator.index(batch_size)
    if batch_size < 1:
        raise ValueError(f"batches: batch_size must be at least 1, got {batch_size}")
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"batches: dtype must be a floating-point type, got {dtype}")

    device = images.device if device is None else torch.device(device)
    images, labels = images.to(device), labels.to(device)
    if images.dim() == 3:
        images = images.unsqueeze(1)
    order = torch.arange(len(images))
    if shuffle:
        key = f"{operator.index(seed)} {operator.index(epoch)}".encode()
        mixed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(mixed))
    order = order.to(device)
    # a tensor on the device: divided by a Python number, CUDA would multiply by a rounded 1/255
    white = torch.tensor(255, dtype=dtype, device=device)

    def epoch_batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            yield images[rows].to(dtype).div_(white), labels[rows]

    return epoch_batches()
