# SPDX-License-Identifier: MIT
"""CIFAR-10, in its binary form or in Python's."""

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch

from fastconv import _files
from fastconv.data import download
from fastconv.data.images import DataError, ImageSet

_PIXELS = 3 * 32 * 32
_MOST = 64 << 20  # bytes of a file; the published ones have 31 million


class CIFAR10(ImageSet):
    __doc__ = f"""CIFAR-10: 50,000 training, 10,000 test images of 32x32 in color, ten classes.

    `images` is [N, 3, 32, 32], where torchvision's `data` is [N, 32, 32, 3].

    Both published forms are read: `cifar-10-batches-bin/data_batch_1.bin` and so on, and
    `cifar-10-batches-py/data_batch_1`, which are pickles: they are read only after their MD5 has been
    checked, and by an unpickler that knows nothing but arrays of bytes.

    {ImageSet.__doc__}"""

    classes = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    _name = "CIFAR-10"
    _layouts = ("cifar-10-batches-bin", "cifar-10-batches-py")
    _counts = {True: 50000, False: 10000}
    _mirrors = ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",)
    _md5 = {
        "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
        "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
        "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
        "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
        "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
        "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    }

    def _names(self, layout: str) -> list[str]:
        names = [f"data_batch_{i}" for i in range(1, 6)] if self.train else ["test_batch"]
        return [f"{name}.bin" for name in names] if layout.endswith("bin") else names

    def _read(self, files: list[Path], check_md5: bool) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        images, labels, md5 = [], [], []
        for path in files:
            content = _files.read(path, _MOST + 1)
            if len(content) > _MOST:
                raise DataError(f"{path}: over {_MOST} bytes, a batch of CIFAR-10 has 31 million")
            md5.append(hashlib.md5(content, usedforsecurity=False).hexdigest())
            if check_md5:
                self._check(path, md5[-1])
            read = _read_binary if path.suffix == ".bin" else _read_pickle
            pixels, classes = read(path, content)
            if classes.max() >= len(self.classes):
                raise DataError(f"{path}: label {classes.max()}, expected 0 to {len(self.classes) - 1}")
            images.append(pixels)
            labels.append(classes)
        return torch.cat(images).view(-1, 3, 32, 32), torch.cat(labels).to(torch.int64), md5

    def _download(self, root: Path) -> None:
        folder = root / self._layouts[0]
        binary = {name: md5 for name, md5 in self._md5.items() if name.endswith(".bin")}
        missing = {name: md5 for name, md5 in binary.items() if not (folder / name).exists()}
        download.tarred(self._mirrors, folder, missing)


def _read_binary(path: Path, content: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    """Records of a label and the pixels, a byte each."""
    if not content or len(content) % (1 + _PIXELS):
        raise DataError(
            f"{path}: truncated or corrupted: {len(content)} bytes, expected N >= 1 records of {1 + _PIXELS}"
        )
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 1 + _PIXELS)
    return records[:, 1:], records[:, 0]


def _read_pickle(path: Path, content: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        pixels = batch[b"data"].pixels()
        labels = batch[b"labels"]
        if not (isinstance(labels, list) and len(labels) == len(pixels) and all(map(_is_label, labels))):
            raise ValueError(f"labels must be {len(pixels)} integers from 0 to 255")
    # whatever a damaged or hostile pickle does, it is the file's fault
    except Exception as error:
        what = f"{type(error).__name__}: {error}"[:200]
        raise DataError(f"{path}: truncated or corrupted: {what}") from error
    return pixels, torch.tensor(labels)


def _is_label(value: object) -> bool:
    return type(value) is int and 0 <= value <= 255


class _Array:
    """Stands for numpy's array in a pickle: only the bytes are of interest."""

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.column_major, self.bytes = state

    def pixels(self) -> torch.Tensor:
        count = len(self.bytes) // _PIXELS
        rows = type(self.bytes) is bytes and count >= 1 and self.shape == (count, _PIXELS)
        if not rows or self.dtype.name != b"u1" or self.column_major:
            raise ValueError(f"data must be uint8 [N >= 1, {_PIXELS}], row by row")
        return torch.frombuffer(bytearray(self.bytes), dtype=torch.uint8).view(count, _PIXELS)


class _Dtype:
    """Stands for numpy's dtype in a pickle."""

    def __init__(self, name: str | bytes, *_: Any) -> None:
        self.name = name.encode() if isinstance(name, str) else name

    def __setstate__(self, state: Any) -> None:
        pass


class _Unpickler(pickle._Unpickler):
    """Knows the few names that a pickled numpy array needs, each as a harmless stand-in.

    The one written in Python, since the other's memory grows with a number in the file.
    """

    _KNOWN = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
        ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no batch of images needs")
        return self._KNOWN[module, name]
