# SPDX-License-Identifier: MIT
"""Downloads that are whole and checked, or leave nothing but a part to go on from.

What has come lies in a file named `.NAME.part`. A file gets its name only once the MD5 of its uncompressed
bytes is the published one.
"""

import contextlib
import fcntl
import gzip
import hashlib
import http.client
import os
import sys
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from fastconv import _files
from fastconv.data.images import CHUNK, DataError

_MOST = 256 << 20  # bytes of a download, and of a file that comes of it
_TIMEOUT = 30  # seconds without a byte


class _CutOff(Exception):
    """A mirror could not deliver the rest."""


class _Unpacked:
    """What a gzip-compressed file holds, as a stream that ends in a DataError behind _MOST bytes."""

    def __init__(self, part: Path, stream: gzip.GzipFile) -> None:
        self._part, self._stream, self._left = part, stream, _MOST

    def read(self, size: int) -> bytes:
        content = self._stream.read(min(size, self._left + 1))
        self._left -= len(content)
        if self._left < 0:
            raise DataError(f"{self._part}: unpacks to more than {_MOST} bytes; removed")
        return content


def gzipped(urls: Sequence[str], path: Path, md5: str) -> None:
    """Fetches a gzip-compressed file from the first of `urls` that delivers it; `path` gets what it holds."""
    with _fetched(urls, path.with_name(f".{path.name}.gz.part")) as part, gzip.open(part) as stream:
        _store(_Unpacked(part, stream), path, md5)


def tarred(urls: Sequence[str], folder: Path, md5: Mapping[str, str]) -> None:
    """Fetches a tar archive, and stores of its files those that `md5` names, in `folder`."""
    part = folder.with_name(f".{folder.name}.tar.gz.part")
    with (
        _fetched(urls, part),
        gzip.open(part) as stream,
        tarfile.open(fileobj=_Unpacked(part, stream), mode="r|") as archive,
    ):
        missing = dict(md5)
        for member in archive:
            name = member.name.rsplit("/", 1)[-1]
            if member.isreg() and name in missing:
                _store(archive.extractfile(member), folder / name, missing.pop(name))
        if missing:
            raise DataError(f"{part}: the archive has no {', '.join(missing)}")


@contextlib.contextmanager
def _fetched(urls: Sequence[str], part: Path) -> Iterator[Path]:
    """Fetches into `part`; removes it afterwards, whether what the caller makes of it is right or wrong.

    Raises:
        DataError: No mirror delivered all of it (`part` stays: the next call goes on from there), or what
            came is not the published file.
        OSError: `part` could not be written, and is gone.
    """
    part.parent.mkdir(parents=True, exist_ok=True)
    # unbuffered: what a kill leaves is what has come
    with open(part, "ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):  # the other has it, or had it until now
            raise DataError(f"{part}: another process is downloading it") from None
        failures = []
        for url in urls:
            try:
                _append(url, file)
                break
            except _CutOff as error:
                failures.append(f"{url}: {error}")
            except DataError:
                part.unlink()
                raise
            except OSError as error:
                part.unlink()
                raise OSError(error.errno, error.strerror, os.fspath(part)) from error
        else:
            kept = f"; the {file.tell()} bytes that came are kept, a new attempt goes on from there"
            if not file.tell():
                part.unlink()
                kept = ""
            raise DataError(f"{part}: not downloaded: {'; '.join(failures)}{kept}")
        try:
            yield part
        except (EOFError, zlib.error, tarfile.TarError, gzip.BadGzipFile) as error:
            raise DataError(f"{part}: what {url} sent is corrupted: {error}; removed") from error
        finally:
            part.unlink()


def _append(url: str, file) -> None:
    """Downloads what `file` lacks of `url`."""
    have = file.tell()
    headers = {"User-Agent": "fastconv", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing lies behind what is there
            return
        raise _CutOff(error) from error
    except (OSError, http.client.HTTPException) as error:
        raise _CutOff(error) from error
    with response:
        ranges = response.headers.get("Content-Range", "")
        if have and not (response.status == 206 and ranges.startswith(f"bytes {have}-")):
            file.truncate(0)  # it sends the whole again
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length and length.isdecimal() else None
        with tqdm(
            desc=url.rsplit("/", 1)[-1],
            total=total,
            initial=have,
            unit="B",
            unit_scale=True,
            leave=False,
            disable=not sys.stderr.isatty(),
        ) as bar:
            for chunk in _chunks(response):
                have += len(chunk)
                if have > _MOST:
                    raise DataError(f"{file.name}: {url} sends more than {_MOST} bytes; removed")
                _write_all(file, chunk)
                bar.update(len(chunk))
    if total is not None and have != total:
        raise _CutOff(f"cut off after {have} of {total} bytes")


def _chunks(response) -> Iterator[bytes]:
    try:
        while chunk := response.read(CHUNK):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise _CutOff(error) from error


def _write_all(file, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def _store(stream, path: Path, md5: str) -> None:
    """Writes what `stream` holds to `path` if its MD5 is right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _files.clear(path)

    def write(temporary: str) -> None:
        found = hashlib.md5(usedforsecurity=False)
        with open(temporary, "wb") as file:
            while chunk := stream.read(CHUNK):
                found.update(chunk)
                file.write(chunk)
        if found.hexdigest() != md5:
            raise DataError(
                f"{path}: not stored: MD5 of the downloaded file is {found.hexdigest()}, expected {md5}"
            )

    _files.replace(path, write)
