# SPDX-License-Identifier: MIT
"""Sets in the idx format: Fashion-MNIST and MNIST."""

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path

import torch

from fastconv.data import download, images
from fastconv.data.images import DataError, ImageSet

_MOST = 1 << 30  # bytes of images; the published ones have 47 million


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
            end = min(size, _MOST)
            while len(data) <= end and (chunk := stream.read(min(images.CHUNK, end + 1 - len(data)))):
                data += chunk
            if len(data) != size:
                found = len(data) if len(data) <= end else "more" if end == size else f"over {_MOST}"
                raise DataError(f"{path}: shape {shape} needs {size} bytes, the file has {found}")
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path}: truncated or corrupted: {error}") from error
    md5 = hashlib.md5(header, usedforsecurity=False)
    md5.update(data)
    return torch.frombuffer(data, dtype=torch.uint8).view(shape), md5.hexdigest()


class _IdxSet(ImageSet):
    _endings = ("", ".gz")
    _mirrors: tuple[str, ...]

    def _names(self, layout: str) -> list[str]:
        split = "train" if self.train else "t10k"
        return [f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"]

    def _read(self, files: list[Path], check_md5: bool) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        pixels, pixels_md5 = _read_idx(files[0], (28, 28))
        labels, labels_md5 = _read_idx(files[1], ())
        if len(pixels) != len(labels):
            raise DataError(f"{files[1]}: {len(labels)} labels for the {len(pixels)} images of {files[0]}")
        if labels.max() >= len(self.classes):
            raise DataError(f"{files[1]}: label {labels.max()}, expected 0 to {len(self.classes) - 1}")
        md5 = [pixels_md5, labels_md5]
        if check_md5:
            for path, found in zip(files, md5, strict=True):
                self._check(path, found)
            known = [self._published(path) for path in files]
            if md5 not in ([full for full, _ in known], [part for _, part in known]):
                raise DataError(f"{files[1]}: these labels do not belong to the images of {files[0]}")
        return pixels, labels.to(torch.int64), md5

    def _download(self, root: Path) -> None:
        folder = root / self._layouts[0]
        for name in self._names(self._layouts[0]):
            if not any((folder / f"{name}{ending}").is_file() for ending in self._endings):
                urls = [f"{mirror}{name}.gz" for mirror in self._mirrors]
                download.gzipped(urls, folder / name, self._md5[name])


class FashionMNIST(_IdxSet):
    __doc__ = f"""Fashion-MNIST: 60,000 training, 10,000 test images of 28x28, ten classes of clothes.

    With neither root nor FASTCONV_DATA given, the full set of Debian's package dataset-fashion-mnist
    (/usr/share/datasets/fashion-mnist) is read where it is installed, and otherwise a bundled subset: 1,000
    real training and 500 real test images. Its folder, `subset_folder`, chooses it as `root`. Whenever
    it is read, a UserWarning says so.

    {ImageSet.__doc__}"""

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
    subset_folder = Path(__file__).parents[1] / "_data" / "fashion-mnist-subset"
    _name = "Fashion-MNIST"
    _layouts = ("FashionMNIST/raw",)
    _system_folder = Path("/usr/share/datasets/fashion-mnist")
    _mirrors = ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",)
    _md5 = {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    }
    _subset_md5 = {
        "train-images-idx3-ubyte": "a1491581188a65d18f42db68d3795498",
        "train-labels-idx1-ubyte": "ba780d79f78b3291cffeaf00abf2c9a2",
        "t10k-images-idx3-ubyte": "11dd45a03b42d5ec35028c55043cb759",
        "t10k-labels-idx1-ubyte": "5a0a86476c6e811c477bdf994db101cc",
    }

    def _default_folders(self) -> list[Path]:
        return [self._system_folder, self.subset_folder]


class MNIST(_IdxSet):
    __doc__ = f"""MNIST: 60,000 training, 10,000 test images of 28x28, handwritten digits.

    {ImageSet.__doc__}"""

    classes = [
        "0 - zero",
        "1 - one",
        "2 - two",
        "3 - three",
        "4 - four",
        "5 - five",
        "6 - six",
        "7 - seven",
        "8 - eight",
        "9 - nine",
    ]
    _name = "MNIST"
    _layouts = ("MNIST/raw",)
    _mirrors = (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "http://yann.lecun.com/exdb/mnist/",
    )
    _md5 = {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }
