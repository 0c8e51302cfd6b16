# SPDX-License-Identifier: MIT
"""Files that are there as a whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from fastconv import _files


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half(name):
    Path(name).write_bytes(b"ne")
    full()


def interrupted(name):
    Path(name).write_bytes(b"ne")
    raise KeyboardInterrupt


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("when", ["write", "fsync", "replace", "Ctrl-C"])
def test_what_was_there_stays(tmp_path, monkeypatch, when, there):
    path = tmp_path / "file"
    if there:
        path.write_bytes(b"old")
    write = {"write": half, "Ctrl-C": interrupted}.get(when, lambda name: Path(name).write_bytes(b"new"))
    if when in ("fsync", "replace"):
        monkeypatch.setattr(_files.os, when, full)
    with pytest.raises(KeyboardInterrupt if when == "Ctrl-C" else OSError) as error:
        _files.replace(path, write)
    if when != "Ctrl-C":
        assert error.value.errno == errno.ENOSPC and error.value.filename == str(path)
    assert os.listdir(tmp_path) == ["file"] * there
    assert not there or path.read_bytes() == b"old"


def test_the_new_one_takes_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (b"old", b"new"):
        _files.replace("file", lambda name, content=content: Path(name).write_bytes(content))
    assert os.listdir() == ["file"] and _files.read("file") == b"new" and _files.read("file", 2) == b"ne"


def test_only_what_a_kill_left_of_this_file_is_cleared(tmp_path, monkeypatch):
    folder = tmp_path / "a[b]*"
    folder.mkdir()
    monkeypatch.chdir(folder)
    stay = ["file", ".file", ".file2.1.tmp", "file.1.tmp"]
    for name in (*stay, ".file.1.tmp", ".file.23.tmp"):
        Path(name).touch()
    _files.clear("file")
    _files.clear(folder / "absent" / "file")
    assert sorted(os.listdir()) == sorted(stay)


@pytest.mark.parametrize("path", ["absent", ".", "/proc/self/mem"])
def test_an_error_of_reading_names_the_file(path, tmp_path, monkeypatch):
    """The last can be opened but not read."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError) as error:
        _files.read(path)
    assert error.value.filename == path
