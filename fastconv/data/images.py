# SPDX-License-Identifier: MIT
"""What the data sets share: where their files are looked for, how they are checked, items and attributes."""

import operator
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

CHUNK = 1 << 20  # bytes read at a time


class DataError(RuntimeError):
    """A data file is truncated, corrupted or not the published one; the message begins with its path."""


class ImageSet(torch.utils.data.Dataset[tuple[Any, Any]]):
    """A published set of images with labels, held in memory.

    The files are looked for in `root`, or, if it is None, in the folder that the environment variable
    FASTCONV_DATA names. Both take torchvision's layout; the files may also lie in the folder itself.

    Args:
        root: folder with the files.
        train: the training set; otherwise the test set.
        transform: called on each image that indexing returns, a tensor (so there is nothing for
            torchvision's ToTensor to do).
        target_transform: called on each label that indexing returns.
        download: fetch files that are not there from the published mirrors, into `root` or FASTCONV_DATA in
            torchvision's layout. A download that was cut off goes on where it was. Files that are there are
            never overwritten.
        check_md5: refuse files which are not the published ones. If False, any images of the set's size with
            labels 0 to 9 are taken.

    Attributes:
        images: uint8 tensor [N, H, W] or [N, C, H, W]; `data` is torchvision's name for it.
        labels: int64 tensor [N], values 0 to 9; `targets` is torchvision's name for it.
        classes: the ten class names, by label.
        full: True if this is the whole published set, byte for byte.
        source: a sentence: how many images of what, and where they were read.

    `dataset[i]` is a pair: the image, a float32 tensor [C, H, W] in [0, 1], and its label, an int.

    Raises:
        FileNotFoundError: there are no such files.
        DataError: a file is truncated, corrupted, or differs from the published one, or no mirror could
            deliver it (a RuntimeError).
        OSError: a file can't be read or written; it names the file.
    """

    # Of each subclass:
    classes: list[str]
    _name: str
    _layouts: tuple[str, ...]  # folders in torchvision's layout, the first one taken first
    _endings: tuple[str, ...] = ("",)  # of the files' names
    _md5: dict[str, str]  # of each published file, uncompressed
    _subset_md5: dict[str, str] = {}  # of files that are a known part
    _counts = {True: 60000, False: 10000}

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        train: bool = True,
        transform: Callable[[torch.Tensor], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        *,
        download: bool = False,
        check_md5: bool = True,
    ) -> None:
        self.train = train
        self.transform = transform
        self.target_transform = target_transform
        files = self._find(root, download)
        self.images, self.labels, md5 = self._read(files, check_md5)

        published = [self._published(path) for path in files]
        self.full = md5 == [full for full, _ in published]
        subset = not self.full and md5 == [part for _, part in published]
        kind = "training" if train else "test"
        if self.full:
            what = f"{self._name}, all {len(self)} {kind} images"
        elif subset:
            what = f"{self._name}, a subset of only {len(self)} of the {self._counts[train]} {kind} images"
        else:
            what = f"{len(self)} {kind} images that are not the published {self._name}"
        self.source = f"{what}, read from {files[0].parent}."
        if subset:
            warnings.warn(
                f"{self.source} For the full set run `apt-get install dataset-fashion-mnist` (Debian),"
                " or pass the folder that holds it as root.",
                UserWarning,
                stacklevel=2,
            )

    def _names(self, layout: str) -> list[str]:
        """The names of the files in this layout, images before labels."""
        raise NotImplementedError

    def _read(self, files: list[Path], check_md5: bool) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Images, labels, and the MD5 of each file, which `_check` has seen if check_md5."""
        raise NotImplementedError

    def _download(self, root: Path) -> None:
        raise NotImplementedError

    def _published(self, path: Path) -> tuple[str | None, str | None]:
        """MD5 of the file of this name in the published set, and in a known part of it."""
        name = path.name.removesuffix(".gz")
        return self._md5.get(name), self._subset_md5.get(name)

    def _check(self, path: Path, md5: str) -> None:
        """Raises DataError unless `md5` is that of the published file."""
        full, part = self._published(path)
        if md5 not in (full, part):
            known = f"{full} (its bundled subset's {part})" if part else full
            raise DataError(
                f"{path}: MD5 of the uncompressed file is {md5}, but {self._name}'s is {known}"
                "; pass check_md5=False to read other images of this form"
            )

    def _default_folders(self) -> list[Path]:
        """Where to look where neither root nor FASTCONV_DATA is given."""
        return []

    def _find(self, root: str | os.PathLike[str] | None, download: bool) -> list[Path]:
        origin = "root"
        if root is None:
            origin, root = "FASTCONV_DATA", os.environ.get("FASTCONV_DATA") or None
        if root is None and download:
            raise FileNotFoundError(
                f"{type(self).__name__}: download=True needs a folder: pass root or set FASTCONV_DATA"
            )
        if root is None:
            origin = "default folders"
            places = [(folder, layout) for layout in self._layouts for folder in self._default_folders()]
        else:
            folder = Path(root).expanduser()
            origin = f"{origin}={os.fspath(root)!r}"
            places = [(place, layout) for layout in self._layouts for place in (folder / layout, folder)]
        if files := self._locate(places):
            return files
        if download:
            self._download(folder)
            if files := self._locate(places):
                return files
        ending = "[.gz]" if ".gz" in self._endings else ""
        looked_at = ", ".join(f"{place / name}{ending}" for place, at in places for name in self._names(at))
        hint = f"looked for {looked_at}" if looked_at else "pass root or set FASTCONV_DATA"
        raise FileNotFoundError(f"{type(self).__name__}: no data in {origin}; {hint}")

    def _locate(self, places: list[tuple[Path, str]]) -> list[Path] | None:
        """The files of the first place that has them all; each with the first of the endings."""
        for folder, layout in places:
            files = [
                next(filter(Path.is_file, (folder / f"{name}{ending}" for ending in self._endings)), None)
                for name in self._names(layout)
            ]
            if None not in files:
                return cast(list[Path], files)
        return None

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
        image = self.images[index]
        image = (image if image.dim() == 3 else image.unsqueeze(0)).to(torch.float32).div_(255)
        label = int(self.labels[index])
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            label = self.target_transform(label)
        return image, label

    def __repr__(self) -> str:
        return f"{type(self).__name__}(train={self.train}, full={self.full}, source={self.source!r})"
