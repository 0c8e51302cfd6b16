# SPDX-License-Identifier: MIT
"""download=True against a server on this machine: whole, cut off, resumed, corrupted, a full disk."""

import errno
import gzip
import hashlib
import http.server
import io
import os
import resource
import struct
import tarfile
import threading
import tracemalloc

import pytest
import torch

from fastconv.data import CIFAR10, MNIST, DataError, download

PIXELS = torch.randint(0, 256, (40, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
IDX = {
    "t10k-images-idx3-ubyte": struct.pack(">4I", 0x803, 40, 28, 28) + PIXELS.numpy().tobytes(),
    "t10k-labels-idx1-ubyte": struct.pack(">2I", 0x801, 40) + bytes(i % 10 for i in range(40)),
}
IMAGES, LABELS = IDX
BATCHES = {
    f"{name}.bin": bytes([i]) + bytes([i * 7 % 256]) * 3072
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"])
}


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `cut` ends the connection after so many bytes of a body, `ranges` allows resuming."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cut, self.ranges, self.asked = {}, None, True, []
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.asked.append((self.path, wanted))
        content = server.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
            return
        start = int(wanted[6:-1]) if wanted and server.ranges else 0
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        end = len(content) if server.cut is None else start + server.cut
        self.wfile.write(content[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("FASTCONV_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as made:
        made.files = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in IDX.items()}
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for name, content in {**BATCHES, "../evil.bin": b"evil", "readme.html": b"hello"}.items():
                member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        made.files["cifar-10-binary.tar.gz"] = packed.getvalue()
        monkeypatch.setattr(MNIST, "_mirrors", (made.url,))
        monkeypatch.setattr(MNIST, "_md5", {name: hashlib.md5(c).hexdigest() for name, c in IDX.items()})
        monkeypatch.setattr(CIFAR10, "_mirrors", (f"{made.url}cifar-10-binary.tar.gz",))
        md5 = {name: hashlib.md5(content).hexdigest() for name, content in BATCHES.items()}
        monkeypatch.setattr(CIFAR10, "_md5", md5)
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        made.shutdown()


def get(root):
    return MNIST(root, train=False, download=True)


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_mnist(server, tmp_path):
    dataset = get(tmp_path)
    assert dataset.full and torch.equal(dataset.images, PIXELS)
    assert files(tmp_path) == [f"MNIST/raw/{IMAGES}", f"MNIST/raw/{LABELS}"]
    asked = len(server.asked)
    assert get(tmp_path).full and len(server.asked) == asked  # what is there is not fetched again


def test_only_what_is_missing_is_fetched(server, tmp_path):
    get(tmp_path)
    (tmp_path / "MNIST/raw" / LABELS).unlink()
    server.asked.clear()
    assert get(tmp_path).full
    assert server.asked == [(f"/{LABELS}.gz", None)]


def test_cifar10(server, tmp_path):
    train = CIFAR10(tmp_path, download=True)
    assert train.full and train.labels.tolist() == [0, 1, 2, 3, 4]
    assert CIFAR10(tmp_path, train=False).full
    assert files(tmp_path) == sorted(f"cifar-10-batches-bin/{name}" for name in BATCHES)
    assert len(server.asked) == 1


def test_what_is_there_is_not_overwritten(server, tmp_path):
    mine = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    mine.parent.mkdir()
    mine.write_bytes(bytes(3073))
    assert CIFAR10(tmp_path, download=True).full
    assert mine.read_bytes() == bytes(3073)


def test_a_root_is_needed(server, tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match="download=True needs a folder: pass root or set FASTCONV_DATA"
    ):
        get(None)
    monkeypatch.setenv("FASTCONV_DATA", str(tmp_path))
    assert get(None).full


@pytest.mark.parametrize("ranges", [True, False])
def test_cut_off_and_gone_on_with(server, tmp_path, ranges):
    server.cut, server.ranges = 1000, ranges
    part = tmp_path / f"MNIST/raw/.{IMAGES}.gz.part"
    size = len(server.files[f"{IMAGES}.gz"])
    with pytest.raises(
        DataError, match=f"^{part}: .*{server.url}{IMAGES}.gz: cut off after 1000 of {size} bytes"
    ):
        get(tmp_path)
    assert files(tmp_path) == [str(part.relative_to(tmp_path))]
    assert part.read_bytes() == server.files[f"{IMAGES}.gz"][:1000]
    server.cut = None
    server.asked.clear()
    assert get(tmp_path).full
    assert server.asked[0] == (f"/{IMAGES}.gz", "bytes=1000-")
    assert files(tmp_path) == [f"MNIST/raw/{IMAGES}", f"MNIST/raw/{LABELS}"]


def test_killed_between_the_last_byte_and_the_name(server, tmp_path):
    part = tmp_path / f"MNIST/raw/.{IMAGES}.gz.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(server.files[f"{IMAGES}.gz"])
    assert get(tmp_path).full and not part.exists()


def test_the_next_mirror_is_asked(server, tmp_path, monkeypatch):
    monkeypatch.setattr(MNIST, "_mirrors", (f"{server.url}gone/", "http://127.0.0.1:1/", server.url))
    assert get(tmp_path).full


def test_no_mirror_answers(server, tmp_path, monkeypatch):
    monkeypatch.setattr(MNIST, "_mirrors", (f"{server.url}gone/", "http://127.0.0.1:1/"))
    with pytest.raises(
        DataError, match="not downloaded: .*gone/.*404.*; http://127.0.0.1:1/.*refused"
    ) as error:
        get(tmp_path)
    assert "kept" not in str(error.value) and files(tmp_path) == []


def corrupted(content):
    return content[:500] + bytes([content[500] ^ 1]) + content[501:]


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(corrupted(IDX[IMAGES])),
        corrupted(gzip.compress(IDX[IMAGES])),
        gzip.compress(IDX[IMAGES])[:-9],
        gzip.compress(IDX[IMAGES] + b"more"),
        b"<html>moved</html>",
        b"",
    ],
    ids=["other pixels", "damaged gzip", "truncated", "longer", "no gzip", "empty"],
)
def test_wrong_bytes_leave_nothing(server, tmp_path, content):
    good, server.files[f"{IMAGES}.gz"] = server.files[f"{IMAGES}.gz"], content
    with pytest.raises(DataError, match=str(tmp_path)):
        get(tmp_path)
    assert files(tmp_path) == []
    server.files[f"{IMAGES}.gz"] = good
    assert get(tmp_path).full


@pytest.mark.parametrize("content", ["damaged", "truncated", "without a batch"])
def test_wrong_archives_leave_no_wrong_file(server, tmp_path, content):
    name = "cifar-10-binary.tar.gz"
    good = server.files[name]
    if content == "without a batch":
        CIFAR10._md5["data_batch_9.bin"] = "0" * 32
    else:
        server.files[name] = good[:100] if content == "truncated" else good[:60] + b"????" + good[64:]
    with pytest.raises(DataError, match=str(tmp_path)):
        CIFAR10(tmp_path, download=True)
    for path in tmp_path.rglob("*.bin"):
        assert path.read_bytes() == BATCHES[path.name]
    assert not list(tmp_path.rglob(".*"))


def test_endless_files_are_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_MOST", 5000)
    for content in (gzip.compress(bytes(10**6)), os.urandom(6000)):  # much of little, and much
        server.files[f"{IMAGES}.gz"] = content
        with pytest.raises(DataError, match="more than 5000 bytes"):
            get(tmp_path)
        assert files(tmp_path) == []


def test_an_archive_with_a_header_of_no_end_is_refused(server, tmp_path, monkeypatch):
    """tarfile reads such a header as a whole."""
    monkeypatch.setattr(download, "_MOST", 10**6)
    header = tarfile.TarInfo("header")
    header.type, header.size = tarfile.XHDTYPE, 10**8
    server.files["cifar-10-binary.tar.gz"] = gzip.compress(header.tobuf() + bytes(10**8))
    tracemalloc.start()
    with pytest.raises(DataError, match=f"^{tmp_path}/.*: unpacks to more than 1000000 bytes"):
        CIFAR10(tmp_path, download=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**7 and files(tmp_path) == []


@pytest.mark.parametrize("where", ["download", "unpacked"])
def test_full_disk(server, tmp_path, monkeypatch, where):
    content = IDX[IMAGES] if where == "download" else IDX[IMAGES][:16] + bytes(40 * 784)
    monkeypatch.setitem(MNIST._md5, IMAGES, hashlib.md5(content).hexdigest())
    server.files[f"{IMAGES}.gz"] = gzip.compress(content)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, before[1]))
    try:
        with pytest.raises(OSError) as error:
            get(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    name = f".{IMAGES}.gz.part" if where == "download" else IMAGES
    assert error.value.errno == errno.EFBIG and error.value.filename == str(tmp_path / "MNIST/raw" / name)
    assert files(tmp_path) == []
    assert get(tmp_path).full


def test_killed_while_it_unpacked(server, tmp_path):
    left = tmp_path / f"MNIST/raw/.{IMAGES}.4711.tmp"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    assert get(tmp_path).full
    assert files(tmp_path) == [f"MNIST/raw/{IMAGES}", f"MNIST/raw/{LABELS}"]


@pytest.mark.parametrize("anew", [True, False])
def test_the_other_ends_between_open_and_lock(server, tmp_path, monkeypatch, anew):
    """Its part is gone then, or that of a third."""
    part, lock = tmp_path / f"MNIST/raw/.{IMAGES}.gz.part", download.fcntl.flock

    def late(*arguments):
        part.unlink()
        if anew:
            part.write_bytes(b"a third's")
        lock(*arguments)

    monkeypatch.setattr(download.fcntl, "flock", late)
    with pytest.raises(DataError, match=f"^{part}: another process is downloading it"):
        get(tmp_path)
    assert not server.asked and part.exists() == anew


def test_two_at_once(server, tmp_path):
    part = tmp_path / f"MNIST/raw/.{IMAGES}.gz.part"
    part.parent.mkdir(parents=True)
    with open(part, "wb") as held:
        download.fcntl.flock(held, download.fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process"):
            get(tmp_path)
