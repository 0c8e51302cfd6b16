# SPDX-License-Identifier: MIT
"""CIFAR-10 in both its forms, and MNIST: where the files are looked for, checks, hostile pickles."""

import gzip
import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fastconv import data
from fastconv.data import CIFAR10, MNIST, DataError, batches

FORMS = {"binary": "cifar-10-batches-bin", "pickle": "cifar-10-batches-py"}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("FASTCONV_DATA", raising=False)


def records(n=3, seed=0):
    """Pixels [n, 3072] and labels [n]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3072), dtype=torch.uint8, generator=generator), [
        i % 10 for i in range(n)
    ]


def binary(pixels, labels):
    return torch.cat([torch.tensor(labels, dtype=torch.uint8)[:, None], pixels], 1).numpy().tobytes()


def pickled(pixels, labels, **more):
    batch = {b"data": pixels.numpy(), b"labels": labels, b"batch_label": b"training batch", **more}
    return pickle.dumps(batch, protocol=2)


def batch(form, seed=0, n=3):
    return (binary if form == "binary" else pickled)(*records(n, seed))


def write(folder, form, contents=None):
    """Writes the six files; returns the paths, the test batch last."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    paths = []
    for i, name in enumerate(names):
        paths.append(folder / (f"{name}.bin" if form == "binary" else name))
        paths[-1].write_bytes(batch(form, i) if contents is None else contents)
    return paths


@pytest.fixture
def tiny_published(monkeypatch):
    """Has the tiny sets of `write` stand for the published ones."""
    md5 = {}
    for form in FORMS:
        for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
            key = f"{name}.bin" if form == "binary" else name
            md5[key] = hashlib.md5(batch(form, i)).hexdigest()
    monkeypatch.setattr(CIFAR10, "_md5", md5)


each_form = pytest.mark.parametrize("form", FORMS)


@each_form
@pytest.mark.parametrize("in_layout", [True, False])
def test_both_forms_and_both_sets(tmp_path, tiny_published, form, in_layout):
    write(tmp_path / FORMS[form] if in_layout else tmp_path, form)
    train, test = CIFAR10(tmp_path), CIFAR10(tmp_path, train=False)
    assert (len(train), len(test)) == (15, 3) and train.full and test.full
    assert train.images.shape == (15, 3, 32, 32) and train.images.dtype == torch.uint8
    assert torch.equal(train.images[3:6].flatten(1), records(seed=1)[0])
    assert train.labels.tolist() == [0, 1, 2] * 5 and train.labels.dtype == torch.int64
    assert torch.equal(test.images.flatten(1), records(seed=5)[0])
    image, label = train[4]
    assert image.shape == (3, 32, 32) and image.max() <= 1 and label == 1
    x, y = next(batches(train, 4, shuffle=False))
    assert x.shape == (4, 3, 32, 32) and torch.equal(x[2], train[2][0]) and y.tolist() == [0, 1, 2, 0]
    assert "CIFAR-10, all 15 training images" in train.source and len(train.classes) == 10


def test_absent_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as error:
        CIFAR10(tmp_path, train=False)
    for path in ("cifar-10-batches-bin/test_batch.bin", "cifar-10-batches-py/test_batch", "test_batch.bin"):
        assert str(tmp_path / path) in str(error.value)
    with pytest.raises(FileNotFoundError, match="pass root or set FASTCONV_DATA"):
        CIFAR10()
    monkeypatch.setenv("FASTCONV_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="FASTCONV_DATA="):
        MNIST()


@each_form
def test_other_bytes_are_refused_by_md5_and_taken_on_request(tmp_path, tiny_published, form):
    paths = write(tmp_path, form)
    paths[1].write_bytes(batch(form, seed=9))
    with pytest.raises(DataError, match=f"^{paths[1]}: MD5 of the uncompressed file is"):
        CIFAR10(tmp_path)
    dataset = CIFAR10(tmp_path, check_md5=False)
    assert not dataset.full and "not the published CIFAR-10" in dataset.source
    assert torch.equal(dataset.images[3:6].flatten(1), records(seed=9)[0])


def test_md5_is_checked_before_anything_is_unpickled(tmp_path, tiny_published, monkeypatch):
    write(tmp_path, "pickle", b"anything")
    monkeypatch.setattr(data.cifar, "_Unpickler", lambda *_, **__: pytest.fail("it was unpickled"))
    with pytest.raises(DataError, match="MD5"):
        CIFAR10(tmp_path)


@each_form
def test_truncated_or_corrupted_anywhere(tmp_path, form):
    """Without the MD5: an error that names the file, or images of the right form, but nothing else."""
    path = write(tmp_path, form)[-1]
    content = batch(form, n=2)
    ends = [*range(0, min(120, len(content))), *range(200, len(content), 997), len(content) - 1]
    for end in ends:
        path.write_bytes(content[:end])
        if form == "binary" and end and end % 3073 == 0:
            continue  # as good as one with fewer images
        with pytest.raises(DataError, match=f"^{path}: truncated or corrupted"):
            CIFAR10(tmp_path, False, check_md5=False)
    for at in ends[:-1]:
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        try:
            dataset = CIFAR10(tmp_path, False, check_md5=False)
        except DataError as error:
            assert str(error).startswith(f"{path}: ")
        else:
            assert dataset.images.shape == (2, 3, 32, 32)


def doubled(times):
    """A nested list of 2**times numbers that takes little memory."""
    nested = [0]
    for _ in range(times):
        nested = [nested, nested]
    return nested


class Evil:
    """Pickled, a call with arguments and a state."""

    def __init__(self, call, *arguments, state=None):
        self.reduced = (call, arguments) if state is None else (call, arguments, state)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Evil(__import__("os").system, "touch pwned"), 2),
        pickle.dumps({b"data": Evil(eval, "1"), b"labels": [0]}, 2),
        pickle.dumps(Evil(getattr, "", "join"), 2),
        b"cnumpy\nload\n.",
        b"cnumpy.core.multiarray\nscalar\n.",
        b"c_codecs\nencode.__globals__\n.",
        b"Nr\xff\xff\xff\x7f.",  # a memo of 2**31 entries
        # a label list, and a shape, of 2**60 numbers
        pickle.dumps({b"data": records(2)[0].numpy(), b"labels": doubled(60)}, 2),
        pickle.dumps(
            {b"data": Evil(data.cifar._Array, state=(1, doubled(60), 0, 0, b"")), b"labels": []}, 2
        ).replace(b"fastconv.data.cifar\n_Array", b"numpy\nndarray"),
        b"\x8a\xff" + b"0" * 255 + b".",
        b"(" * 100000,
        pickle.dumps([0], 2),
        pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [0, 0]}, 2),
        pickle.dumps({b"data": np.zeros((2, 3071), np.uint8), b"labels": [0, 0]}, 2),
        pickle.dumps({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, 2),
        pickle.dumps({b"data": np.zeros((2, 3072), object), b"labels": [0, 0]}, 2),
        pickled(records(2)[0], [0]),
        pickled(records(2)[0], [0, -1]),
        pickled(records(2)[0], [0, 10]),
        pickled(records(2)[0], [0.5, 1.0]),
        pickled(records(2)[0], "01"),
        b"",
    ],
    ids=range(22),
)
def test_hostile_pickles(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "pickle", content)[-1]
    with pytest.raises(DataError, match=f"^{path}: "):
        CIFAR10(tmp_path, False, check_md5=False)
    assert not Path("pwned").exists()


def test_a_batch_of_no_end_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(data.cifar, "_MOST", 10000)
    path = write(tmp_path, "binary", bytes(3073 * 4))[-1]
    with pytest.raises(DataError, match=f"^{path}: over 10000 bytes"):
        CIFAR10(tmp_path, False, check_md5=False)


def test_binary_label_over_nine(tmp_path):
    path = write(tmp_path, "binary", binary(records(1)[0], [11]))[-1]
    with pytest.raises(DataError, match=f"^{path}: label 11, expected 0 to 9"):
        CIFAR10(tmp_path, False, check_md5=False)


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist(tmp_path, zipped, monkeypatch):
    pixels = torch.randint(0, 256, (4, 28, 28), dtype=torch.uint8)
    contents = {
        "t10k-images-idx3-ubyte": struct.pack(">4I", 0x803, 4, 28, 28) + pixels.numpy().tobytes(),
        "t10k-labels-idx1-ubyte": struct.pack(">2I", 0x801, 4) + bytes([7, 2, 1, 0]),
    }
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / f"{name}.gz" if zipped else folder / name).write_bytes(
            gzip.compress(content) if zipped else content
        )
    with pytest.raises(DataError, match="MNIST's is 2646ac647ad5339dbf082846283269ea; pass check_md5=False"):
        MNIST(tmp_path, train=False)
    monkeypatch.setattr(MNIST, "_md5", {n: hashlib.md5(c).hexdigest() for n, c in contents.items()})
    dataset = MNIST(tmp_path, train=False)
    assert dataset.full and dataset.source.startswith("MNIST, all 4 test images")
    assert torch.equal(dataset.images, pixels) and dataset.labels.tolist() == [7, 2, 1, 0]
    assert dataset.classes[7] == "7 - seven"


def test_images_of_one_subset_with_the_labels_of_the_full_set(tmp_path, monkeypatch):
    """Each file may be known and yet not belong to the other."""
    folder = data.FashionMNIST.subset_folder
    for path in folder.glob("*.gz"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    known = gzip.decompress(labels.read_bytes())
    swapped = known[:8] + known[9:10] + known[8:9] + known[10:]
    assert swapped != known
    labels.write_bytes(gzip.compress(swapped))
    md5 = dict(data.FashionMNIST._md5, **{labels.stem: hashlib.md5(swapped).hexdigest()})
    monkeypatch.setattr(data.FashionMNIST, "_md5", md5)
    with pytest.raises(DataError, match=f"^{labels}: these labels do not belong to the images"):
        data.FashionMNIST(tmp_path, train=False)
