# SPDX-License-Identifier: MIT
"""Image data sets held in memory, and seeded batches of them.

train = fastconv.data.FashionMNIST()
for x, y in fastconv.data.batches(train, 64, epoch=0): ...
"""

import gzip
import hashlib
import math
import operator
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

__all__ = ["DataError", "FashionMNIST", "batches"]

_CHUNK = 1 << 20  # bytes read at a time


class DataError(RuntimeError):
    """A data file is truncated, corrupted or not the published one; the message begins with its path."""


def _read_idx(path: Path, item_shape: tuple[int, ...]) -> tuple[torch.Tensor, str]:
    """Read a uint8 idx file, gzip-compressed or not (its first bytes tell).

    Returns the uint8 tensor [N, *item_shape] with N >= 1, and the MD5 of the uncompressed file.
    Raises DataError if the file is anything else.
    """
    ndim = 1 + len(item_shape)
    with open(path, "rb") as raw:
        try:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = gzip.GzipFile(fileobj=raw) if zipped else raw
            header = stream.read(4 + 4 * ndim)
            if len(header) < 4 + 4 * ndim:
                raise DataError(f"{path}: truncated: {len(header)} bytes of a {4 + 4 * ndim}-byte idx header")
            magic, *shape = struct.unpack(f">{1 + ndim}I", header)
            if magic != 0x800 + ndim:
                raise DataError(f"{path}: idx magic number is {magic:#010x}, expected {0x800 + ndim:#010x}")
            if shape[0] == 0 or tuple(shape[1:]) != item_shape:
                expected = ", ".join(["N >= 1", *map(str, item_shape)])
                raise DataError(f"{path}: idx header gives the shape {shape}, expected [{expected}]")
            size = math.prod(shape)
            data = bytearray()  # grows with the bytes that come: a false header takes no memory
            while len(data) <= size and (chunk := stream.read(min(_CHUNK, size + 1 - len(data)))):
                data += chunk
            if len(data) != size:
                found = len(data) if len(data) < size else "more"
                raise DataError(f"{path}: shape {shape} needs {size} bytes, the file has {found}")
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path}: truncated or corrupted: {error}") from error
    md5 = hashlib.md5(header, usedforsecurity=False)
    md5.update(data)
    return torch.frombuffer(data, dtype=torch.uint8).view(shape), md5.hexdigest()


def _locate(folder: Path, names: list[str]) -> list[Path] | None:
    """The path of each of `names` in `folder`, uncompressed before .gz; None unless all are there."""
    found = [next(filter(Path.is_file, (folder / name, folder / f"{name}.gz")), None) for name in names]
    return found if all(found) else None


class FashionMNIST(torch.utils.data.Dataset):
    """Fashion-MNIST (60,000 training, 10,000 test images of 28x28, ten classes), held in memory.

    The files are looked for in `root`, or, if it is None, in the folder that the environment variable
    FASTCONV_DATA names. Both take torchvision's layout: `FashionMNIST/raw/train-images-idx3-ubyte` and so
    on, uncompressed or .gz; the files may also lie in the folder itself. With neither given, the full set
    of Debian's package dataset-fashion-mnist (/usr/share/datasets/fashion-mnist) is read where it is
    installed, and otherwise a bundled subset: 1,000 real training and 500 real test images. Whenever the
    subset is read, a UserWarning says so.

    Args:
        root: folder with the files.
        train: the training set; otherwise the test set.
        transform: called on each image that indexing returns, a tensor (so there is nothing for
            torchvision's ToTensor to do).
        target_transform: called on each label that indexing returns.
        check_md5: refuse files which are not the published ones. If False, any images of 28x28 with
            labels 0 to 9 are taken.

    Attributes:
        images: uint8 tensor [N, 28, 28]; `data` is torchvision's name for it.
        labels: int64 tensor [N], values 0 to 9; `targets` is torchvision's name for it.
        classes: the ten class names, by label.
        full: True if this is the whole published set, byte for byte.
        source: a sentence: how many images of what, and where they were read.
        subset_folder: the bundled subset's folder; as `root` it chooses the subset.

    `dataset[i]` is a pair: the image, a float32 tensor [1, 28, 28] in [0, 1], and its label, an int.

    Raises:
        FileNotFoundError: `root` or FASTCONV_DATA is given and holds no such files.
        DataError: a file is truncated, corrupted, or differs from the published one (a RuntimeError).
    """

    classes = [
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ]
    subset_folder = Path(__file__).parent / "_data" / "fashion-mnist-subset"
    _layout = "FashionMNIST/raw"
    _system_folder = Path("/usr/share/datasets/fashion-mnist")
    # MD5 of the uncompressed images and labels
    _full_md5 = {
        "train": ["f4a8712d7a061bf5bd6d2ca38dc4d50a", "9018921c3c673c538a1fc5bad174d6f9"],
        "t10k": ["8181f5470baa50b63fa0f6fddb340f0a", "15d484375f8d13e6eb1aabb0c3f46965"],
    }
    _subset_md5 = {
        "train": ["a1491581188a65d18f42db68d3795498", "ba780d79f78b3291cffeaf00abf2c9a2"],
        "t10k": ["11dd45a03b42d5ec35028c55043cb759", "5a0a86476c6e811c477bdf994db101cc"],
    }

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        train: bool = True,
        transform: Callable[[torch.Tensor], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        *,
        check_md5: bool = True,
    ) -> None:
        self.train = train
        self.transform = transform
        self.target_transform = target_transform
        split = "train" if train else "t10k"
        files = self._find(root, [f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"])

        self.images, images_md5 = _read_idx(files[0], (28, 28))
        labels, labels_md5 = _read_idx(files[1], ())
        self.labels = labels.to(torch.int64)
        if len(self.images) != len(labels):
            raise DataError(
                f"{files[1]}: {len(labels)} labels for the {len(self.images)} images of {files[0]}"
            )
        if labels.max() >= len(self.classes):
            raise DataError(f"{files[1]}: label {labels.max()}, expected 0 to {len(self.classes) - 1}")

        md5 = [images_md5, labels_md5]
        full, subset = self._full_md5[split], self._subset_md5[split]
        self.full = md5 == full
        kind = "training" if train else "test"
        if self.full:
            what = f"Fashion-MNIST, all {len(self)} {kind} images"
        elif md5 == subset:
            published = 60000 if train else 10000
            what = f"Fashion-MNIST, a subset of only {len(self)} of the {published} {kind} images"
        elif not check_md5:
            what = f"{len(self)} {kind} images that are not the published Fashion-MNIST"
        else:
            i = 0 if images_md5 not in (full[0], subset[0]) else 1
            raise DataError(
                f"{files[i]}: MD5 of the uncompressed file is {md5[i]}, but Fashion-MNIST's is {full[i]}"
                f" (its bundled subset's {subset[i]}); pass check_md5=False to read other images of this form"
            )
        self.source = f"{what}, read from {files[0].parent}."
        if md5 == subset:
            warnings.warn(
                f"{self.source} For the full set run `apt-get install dataset-fashion-mnist` (Debian),"
                " or pass the folder that holds it as root.",
                UserWarning,
                stacklevel=2,
            )

    def _find(self, root: str | os.PathLike | None, names: list[str]) -> list[Path]:
        origin = "root"
        if root is None:
            origin, root = "FASTCONV_DATA", os.environ.get("FASTCONV_DATA") or None
        if root is None:
            origin, folders = "default folders", [self._system_folder, self.subset_folder]
        else:
            folder = Path(root).expanduser()
            origin, folders = f"{origin}={os.fspath(root)!r}", [folder / self._layout, folder]
        for folder in folders:
            if files := _locate(folder, names):
                return files
        looked_at = ", ".join(f"{folder / name}[.gz]" for folder in folders for name in names)
        raise FileNotFoundError(f"{type(self).__name__}: no data in {origin}; looked for {looked_at}")

    @property
    def data(self) -> torch.Tensor:
        return self.images

    @property
    def targets(self) -> torch.Tensor:
        return self.labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        index = operator.index(index)
        image = self.images[index].unsqueeze(0).to(torch.float32).div_(255)
        label = int(self.labels[index])
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            label = self.target_transform(label)
        return image, label

    def __repr__(self) -> str:
        return f"{type(self).__name__}(train={self.train}, full={self.full}, source={self.source!r})"


def batches(
    dataset: FashionMNIST,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch of `dataset` in batches: pairs of images [B, 1, H, W] in [0, 1] and labels int64 [B].

    The order depends on `seed` and `epoch` alone, not on the device, and leaves torch's random state as it
    is. The last batch holds what remains. The whole set is kept on `device` as uint8 during the epoch
    (47 MB for Fashion-MNIST), and there are no worker processes. In float32 the values are those of
    `dataset[i]`, bit for bit, on every device.

    Args:
        dataset: anything with `images`, uint8 [N, H, W], and `labels`, int64 [N].
        batch_size: images a batch, at least 1.
        seed, epoch: integers; each pair gives another order.
        shuffle: if False, the order is the data set's own.
        device: where the batches lie (default: where the images are).
        dtype: floating-point type of the images.

    Raises:
        ValueError: batch_size < 1, unequal numbers of images and labels, or a transform: it would go unused.
        TypeError: a data set without images and labels, a non-integer number, or a dtype that isn't floating.
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
            yield images[rows].unsqueeze(1).to(dtype).div_(white), labels[rows]

    return epoch_batches()
