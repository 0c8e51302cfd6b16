# SPDX-License-Identifier: MIT
"""Files that are there as a whole or not at all."""

import contextlib
import os
from collections.abc import Callable


def replace(path: str | os.PathLike, write: Callable[[str], object]) -> None:
    """Has `write` fill a temporary file beside `path`, which then takes its place.

    Whatever ends this before its end, a kill or a full disk, leaves at `path` what was there.

    Raises:
        OSError: It could not be written; names `path`, which is as it was, and no temporary file is left.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
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


def _to_disk(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
