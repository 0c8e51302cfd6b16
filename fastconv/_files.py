# SPDX-License-Identifier: MIT
"""Files that are there as a whole or not at all; errors that name the file."""

import contextlib
import glob
import os
from collections.abc import Callable


def read(path: str | os.PathLike[str], most: int = -1) -> bytes:
    """What a file holds, the first `most` bytes of it. An OSError names `path`, wherever it comes from."""
    try:
        with open(path, "rb") as file:
            return file.read(most)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def replace(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Has `write` fill a temporary file beside `path`, which then takes its place.

    Whatever ends this before its end, a kill or a full disk, leaves at `path` what was there.

    Raises:
        OSError: It could not be written; names `path`, which is as it was, and no temporary file is left.
    """
    folder = os.path.dirname(os.path.abspath(path))
    temporary = _temporary(path, os.getpid())
    try:
        write(temporary)
        _to_disk(temporary)  # before the name points to it
        os.replace(temporary, path)
        _to_disk(folder)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno and error.filename in (None, temporary):
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def clear(path: str | os.PathLike[str]) -> None:
    """Removes what `replace` left beside `path` where it was killed."""
    for left in glob.glob(_temporary(glob.escape(os.path.abspath(path)), "*")):
        os.unlink(left)


def _temporary(path: str | os.PathLike[str], mark: int | str) -> str:
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(folder, f".{name}.{mark}.tmp")


def _to_disk(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
