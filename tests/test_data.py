# SPDX-License-Identifier: MIT
import contextlib
import gzip
import hashlib
import itertools
import os
import struct
import subprocess
import sys
import tracemalloc
import types
import warnings
from pathlib import Path

import pytest
import torch

from fastconv import data
from fastconv.data import DataError, FashionMNIST, batches

SPLITS = {True: "train", False: "t10k"}
COUNTS = {"full": {True: 60000, False: 10000}, "subset": {True: 1000, False: 500}}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("FASTCONV_DATA", raising=False)


@pytest.fixture
def bare_system(monkeypatch, tmp_path):
    """A machine without the system package."""
    monkeypatch.setattr(FashionMNIST, "_system_folder", tmp_path / "not-installed")


@pytest.fixture
def tiny_published(monkeypatch):
    """Has the tiny set of 3 images (seed 0) stand for the published one."""
    md5 = {
        f"{split}-{name}-ubyte": hashlib.md5(content).hexdigest()
        for name, content in tiny().items()
        for split in SPLITS.values()
    }
    monkeypatch.setattr(FashionMNIST, "_md5", md5)


@pytest.fixture
def full_folder():
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("the full Fashion-MNIST is not installed (Debian package dataset-fashion-mnist)")
    return folder


def idx(tensor):
    """The bytes of a uint8 idx file."""
    return struct.pack(f">{1 + tensor.ndim}I", 0x800 + tensor.ndim, *tensor.shape) + bytes(
        tensor.flatten().tolist()
    )


def tiny(n=3, labels=None, size=(28, 28), seed=0):
    """Contents by the part of the name which tells images and labels apart."""
    pixels = torch.randint(
        0, 256, (n, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    labels = torch.arange(n) % 10 if labels is None else torch.tensor(labels)
    return {"images-idx3": idx(pixels), "labels-idx1": idx(labels.to(torch.uint8))}


def write(folder, contents, zipped=False, split="train"):
    """Writes the files; returns their paths, images first."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, content in contents.items():
        paths.append(folder / f"{split}-{name}-ubyte{'.gz' if zipped else ''}")
        paths[-1].write_bytes(gzip.compress(content, mtime=0) if zipped else content)
    return paths


def places(n):
    """Positions in a file of n bytes: all of its start and end, and some between."""
    return sorted({*range(min(n, 64)), *range(0, n, 13), *range(max(n - 32, 0), n)})


def quiet_subset(train=True):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return FashionMNIST(FashionMNIST.subset_folder, train)


# ---- where the files are looked for


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("layout", ["FashionMNIST/raw", "."])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("as_path", [str, Path])
def test_root_layouts(tmp_path, tiny_published, zipped, layout, train, as_path):
    write(tmp_path / layout, tiny(), zipped, SPLITS[train])
    dataset = FashionMNIST(as_path(tmp_path), train)
    assert dataset.full
    assert dataset.source == (
        f"Fashion-MNIST, all 3 {'training' if train else 'test'} images, read from {tmp_path / layout}."
    )
    assert idx(dataset.images) == tiny()["images-idx3"]
    assert dataset.labels.tolist() == [0, 1, 2]


def test_torchvision_layout_comes_before_the_folder_itself_and_plain_before_gz(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    for labels, folder, zipped in [
        ([3], tmp_path, True),
        ([4], tmp_path, False),
        ([5], raw, True),
        ([6], raw, False),
    ]:
        write(folder, tiny(1, labels), zipped)
        assert FashionMNIST(tmp_path, check_md5=False).labels.tolist() == labels


def test_one_file_plain_and_the_other_gz(tmp_path, tiny_published):
    images, _ = write(tmp_path, tiny())
    _, labels = write(tmp_path, tiny(), zipped=True)
    images.with_name(f"{images.name}.gz").unlink()
    labels.with_suffix("").unlink()
    assert FashionMNIST(tmp_path).full


def test_compression_is_told_by_content_not_by_name(tmp_path, tiny_published):
    for path in write(tmp_path, tiny()):
        path.rename(f"{path}.gz")
    assert FashionMNIST(tmp_path).full


def test_home_is_expanded(tmp_path, monkeypatch, tiny_published):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "sets", tiny())
    assert FashionMNIST("~/sets").full


@pytest.mark.parametrize(
    "state", ["absent", "empty", "a file", "folders", "other split", "labels missing", "images missing"]
)
def test_a_root_without_data_is_an_error_naming_the_paths(tmp_path, state):
    root = tmp_path / "root"
    if state == "a file":
        root.write_bytes(b"")
    elif state != "absent":
        root.mkdir()
    if state == "folders":
        for name in tiny():
            (root / f"train-{name}-ubyte").mkdir()
    if state == "other split":
        write(root, tiny(), split="t10k")
    if state.endswith("missing"):
        paths = write(root, tiny())
        paths[state == "labels missing"].unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FileNotFoundError) as error:
            FashionMNIST(root)
    for folder, name in itertools.product(
        [root / "FashionMNIST" / "raw", root], ["images-idx3", "labels-idx1"]
    ):
        assert f"{folder}/train-{name}-ubyte[.gz]" in str(error.value)
    assert f"root={str(root)!r}" in str(error.value)


def test_order_of_search(tmp_path, monkeypatch):
    folders = {name: tmp_path / name for name in ("subset", "system", "variable", "root")}
    for label, folder in enumerate(folders.values()):
        write(folder, tiny(1, [label]))
    monkeypatch.setattr(FashionMNIST, "subset_folder", folders["subset"])
    monkeypatch.setattr(FashionMNIST, "_system_folder", tmp_path / "not-installed")

    def label(root=None):
        return int(FashionMNIST(root, check_md5=False).labels)

    assert label() == 0
    monkeypatch.setattr(FashionMNIST, "_system_folder", folders["system"])
    assert label() == 1
    monkeypatch.setenv("FASTCONV_DATA", str(folders["variable"]))
    assert label() == 2
    assert label(folders["root"]) == 3
    monkeypatch.setenv("FASTCONV_DATA", "")
    assert label() == 1


def test_the_variable_without_data_is_an_error_naming_it(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCONV_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="FASTCONV_DATA='.*FashionMNIST/raw/t10k-images"):
        FashionMNIST(train=False)


# ---- the bundled subset and the full set


@pytest.mark.parametrize("train", [True, False])
def test_subset_is_announced_and_balanced(bare_system, train):
    count = COUNTS["subset"][train]
    with pytest.warns(UserWarning) as caught:
        dataset = FashionMNIST(train=train)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    message = str(caught[0].message)
    assert f"only {count} of the {COUNTS['full'][train]} " in message
    assert "apt-get install dataset-fashion-mnist" in message and "root" in message
    assert f"only {count} of the " in dataset.source
    assert not dataset.full
    assert len(dataset) == count
    assert dataset.labels.bincount().tolist() == [count // 10] * 10


def test_a_copy_of_the_subset_is_not_taken_for_the_full_set(tmp_path, monkeypatch):
    for path in FashionMNIST.subset_folder.glob("*.gz"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(FashionMNIST, "_system_folder", tmp_path)
    for root in (tmp_path, None):
        with pytest.warns(UserWarning, match="only 1000 of the 60000 training images"):
            assert not FashionMNIST(root).full


def test_subset_is_small_and_carries_its_licence():
    folder = FashionMNIST.subset_folder
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000
    licence = (folder / "LICENSE").read_text(encoding="utf-8")
    assert "MIT License" in licence and "2017 Zalando SE" in licence


@pytest.mark.parametrize("train", [True, False])
def test_full_set_is_read_without_a_warning(full_folder, train):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = FashionMNIST(train=train)
    assert dataset.full
    assert len(dataset) == COUNTS["full"][train]
    assert dataset.labels.bincount().tolist() == [len(dataset) // 10] * 10
    assert str(full_folder) in dataset.source


@pytest.mark.parametrize("train", [True, False])
def test_subset_is_the_front_of_each_class_of_the_full_set(full_folder, train):
    full, subset = FashionMNIST(full_folder, train), quiet_subset(train)
    per_class = COUNTS["subset"][train] // 10
    indices = torch.cat([(full.labels == c).nonzero()[:per_class, 0] for c in range(10)]).sort().values
    assert torch.equal(subset.images, full.images[indices])
    assert torch.equal(subset.labels, full.labels[indices])
    assert f"between 0 and {indices[-1]}" in (FashionMNIST.subset_folder / "README.md").read_text()


# ---- files that are not what they should be


def test_other_data_is_refused_by_md5_and_taken_on_request(tmp_path, tiny_published):
    published, other = tiny(), tiny(seed=1)
    for which, name in enumerate(published):
        contents = dict(published, **{name: other[name][:-1] + b"\x09"})
        paths = write(tmp_path, contents)
        with pytest.raises(DataError) as error:
            FashionMNIST(tmp_path)
        message = str(error.value)
        assert message.startswith(f"{paths[which]}: ")
        for content in (contents[name], published[name]):
            assert hashlib.md5(content).hexdigest() in message
        dataset = FashionMNIST(tmp_path, check_md5=False)
        assert not dataset.full
        assert "not the published" in dataset.source
        assert idx(dataset.images) == contents["images-idx3"]


def test_real_set_with_one_pixel_changed_is_refused(tmp_path):
    subset = quiet_subset()
    subset.images[700, 14, 14] ^= 1
    paths = write(
        tmp_path, {"images-idx3": idx(subset.images), "labels-idx1": idx(subset.labels.to(torch.uint8))}
    )
    with pytest.raises(DataError, match=f"^{paths[0]}: MD5 "):
        FashionMNIST(tmp_path)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    "contents, which, message",
    [
        (tiny(3, [0, 1]), 1, "2 labels for the 3 images"),
        (tiny(1, [0, 1, 2]), 1, "3 labels for the 1 images"),
        (tiny(2, [0, 10]), 1, "label 10, expected 0 to 9"),
        (tiny(2, size=(28, 29)), 0, r"shape \[2, 28, 29\], expected \[N >= 1, 28, 28\]"),
        (tiny(2, size=(14, 56)), 0, r"shape \[2, 14, 56\]"),
        (tiny(0), 0, r"shape \[0, 28, 28\]"),
        (
            dict(tiny(), **{"images-idx3": tiny()["labels-idx1"]}),
            0,
            "truncated: 11 bytes of a 16-byte idx header",
        ),
        (dict(tiny(), **{"images-idx3": b""}), 0, "truncated: 0 bytes"),
        (
            dict(tiny(), **{"labels-idx1": tiny()["images-idx3"]}),
            1,
            "magic number is 0x00000803, expected 0x00000801",
        ),
        (
            dict(tiny(), **{"images-idx3": b"\0\0\x0d" + tiny()["images-idx3"][3:]}),
            0,
            "magic number is 0x00000d03",
        ),
        (
            dict(tiny(), **{"images-idx3": tiny()["images-idx3"][:-1]}),
            0,
            "needs 2352 bytes, the file has 2351",
        ),
        (
            dict(tiny(), **{"images-idx3": tiny()["images-idx3"] + b"\0"}),
            0,
            "needs 2352 bytes, the file has more",
        ),
        # a header that claims more than any memory holds
        (
            dict(tiny(), **{"images-idx3": struct.pack(">4I", 0x803, 2**32 - 1, 28, 28) + bytes(784)}),
            0,
            "needs 3367254359280 bytes, the file has 784",
        ),
    ],
)
def test_wrong_contents(tmp_path, contents, which, message, zipped):
    paths = write(tmp_path, contents, zipped)
    with pytest.raises(DataError, match=f"^{paths[which]}: .*{message}"):
        FashionMNIST(tmp_path, check_md5=False)


@pytest.mark.parametrize("count", [100, 2**32 - 1])
def test_images_of_no_end_are_not_read(tmp_path, monkeypatch, count):
    """A header that claims much, and a small file that unpacks to much."""
    monkeypatch.setattr(data.idx, "_MOST", 10000)
    content = struct.pack(">4I", 0x803, count, 28, 28) + bytes(10**7)
    path = write(tmp_path, dict(tiny(), **{"images-idx3": content}), zipped=True)[0]
    tracemalloc.start()
    with pytest.raises(DataError, match=f"^{path}: .* needs {count * 784} bytes, the file has over 10000"):
        FashionMNIST(tmp_path, check_md5=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6


@pytest.mark.parametrize("kind", [FashionMNIST, data.CIFAR10])
def test_a_file_that_cannot_be_read_is_named(tmp_path, kind):
    """One that can be opened, as on a failing disk."""
    path = tmp_path / ("t10k-images-idx3-ubyte" if kind is FashionMNIST else "test_batch.bin")
    write(tmp_path, tiny(), split="t10k")
    path.unlink(missing_ok=True)
    path.symlink_to("/proc/self/mem")
    with pytest.raises((OSError, DataError), match=f"{path}.*Input/output error|Input/output.*{path}"):
        kind(tmp_path, train=False)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("zipped", [False, True])
def test_truncated_anywhere(tmp_path, tiny_published, zipped, which):
    path = write(tmp_path, tiny(), zipped)[which]
    content = path.read_bytes()
    for length in places(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=f"^{path}: "):
            FashionMNIST(tmp_path)
    path.write_bytes(content)
    assert FashionMNIST(tmp_path).full


@pytest.mark.parametrize("mask", [0x01, 0xFF])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("zipped", [False, True])
def test_corrupted_anywhere(tmp_path, tiny_published, zipped, which, mask):
    path = write(tmp_path, tiny(), zipped)[which]
    content = path.read_bytes()
    # gzip's header says a few things that don't touch the data: text flag, time, level, operating system
    free = range(3, 10) if zipped else ()
    for at in places(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :])
        if at in free:
            with contextlib.suppress(DataError):
                dataset = FashionMNIST(tmp_path)
                assert idx(dataset.images) == tiny()["images-idx3"]
                assert dataset.labels.tolist() == [0, 1, 2]
            continue
        with pytest.raises(DataError) as error:
            FashionMNIST(tmp_path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("chunk", [783, 784, 785])
def test_the_end_is_checked_whatever_the_size_of_a_read(tmp_path, tiny_published, monkeypatch, chunk):
    monkeypatch.setattr(data.images, "CHUNK", chunk)
    path = write(tmp_path, tiny(), zipped=True)[0]
    assert FashionMNIST(tmp_path).full
    path.write_bytes(path.read_bytes()[:-8])  # without checksum and length
    with pytest.raises(DataError, match=f"^{path}: truncated or corrupted: "):
        FashionMNIST(tmp_path)


def test_bytes_after_the_gzip_stream(tmp_path, tiny_published):
    path = write(tmp_path, tiny(), zipped=True)[0]
    path.write_bytes(path.read_bytes() + b"junk")
    with pytest.raises(DataError, match=f"^{path}: truncated or corrupted: "):
        FashionMNIST(tmp_path)


def test_several_gzip_members_are_one_file(tmp_path, tiny_published):
    path = write(tmp_path, tiny(), zipped=True)[0]
    content = tiny()["images-idx3"]
    path.write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]))
    assert FashionMNIST(tmp_path).full


def test_damaged_bundled_subset(bare_system, tmp_path, monkeypatch):
    for path in FashionMNIST.subset_folder.glob("*.gz"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-9])
    monkeypatch.setattr(FashionMNIST, "subset_folder", tmp_path)
    with pytest.raises(DataError, match=f"^{tmp_path}/train-images-idx3-ubyte.gz: truncated"):
        FashionMNIST()


def test_data_error_is_the_class_torchvision_raises():
    assert issubclass(DataError, RuntimeError)


# ---- the data set


def test_items():
    dataset = quiet_subset()
    image, label = dataset[3]
    assert image.shape == (1, 28, 28) and image.dtype == torch.float32
    assert type(label) is int and label == dataset.labels[3]
    expected = torch.tensor(
        [[p / 255 for p in row] for row in dataset.images[3].tolist()], dtype=torch.float32
    )
    assert torch.equal(image[0], expected)
    assert image.max() <= 1 and image.min() == 0
    assert torch.equal(dataset[-1][0], dataset[len(dataset) - 1][0])
    for index in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError):
            dataset[index]
    for index in (0.0, slice(2), "0"):
        with pytest.raises(TypeError):
            dataset[index]


def test_items_own_their_memory():
    dataset = quiet_subset()
    dataset[0][0].zero_()
    assert torch.equal(dataset.images, quiet_subset().images) and dataset.images[0].any()


def test_attributes():
    dataset = quiet_subset(False)
    assert dataset.images.shape == (500, 28, 28) and dataset.images.dtype == torch.uint8
    assert dataset.labels.shape == (500,) and dataset.labels.dtype == torch.int64
    assert dataset.data is dataset.images and dataset.targets is dataset.labels
    assert len(dataset.classes) == 10 and dataset.classes[9] == "Ankle boot"
    assert not dataset.train
    assert dataset.source in repr(dataset)


def test_transforms(tmp_path):
    write(tmp_path, tiny())
    plain = FashionMNIST(tmp_path, check_md5=False)
    dataset = FashionMNIST(tmp_path, True, lambda x: 1 - x, lambda y: y + 100, check_md5=False)
    assert torch.equal(dataset[1][0], 1 - plain[1][0])
    assert dataset[1][1] == plain[1][1] + 100


def test_data_loader_gives_the_same_batches():
    dataset = quiet_subset()
    loader = torch.utils.data.DataLoader(dataset, batch_size=64)
    for (x, y), (x2, y2) in zip(loader, batches(dataset, 64, shuffle=False), strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)


def test_torchvision_is_not_needed():
    code = (
        "import sys, warnings; sys.modules['torchvision'] = None; warnings.simplefilter('ignore');"
        "from fastconv.data import FashionMNIST, batches;"
        "x, y = next(batches(FashionMNIST(FashionMNIST.subset_folder), 5)); print(tuple(x.shape), len(y))"
    )
    root = Path(data.__file__).parents[2]
    environment = dict(os.environ, PYTHONPATH=f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "(5, 1, 28, 28) 5\n", done.stderr


# ---- batches


def numbered(n):
    """A data set whose labels are the positions."""
    images = (torch.arange(n * 6) % 256).to(torch.uint8).view(n, 2, 3)
    return types.SimpleNamespace(images=images, labels=torch.arange(n))


def order(n=100, batch_size=7, **arguments):
    return torch.cat([y for _, y in batches(numbered(n), batch_size, **arguments)]).tolist()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    "n, batch_size, sizes", [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 4, [3]), (0, 4, [])]
)
def test_every_item_once_and_the_last_batch_holds_the_rest(n, batch_size, sizes, shuffle):
    got = list(batches(numbered(n), batch_size, shuffle=shuffle))
    assert [len(y) for _, y in got] == sizes
    assert sorted(label for _, y in got for label in y.tolist()) == list(range(n))
    for x, y in got:
        assert x.shape == (len(y), 1, 2, 3) and x.dtype == torch.float32 and y.dtype == torch.int64
        assert torch.equal(x[:, 0], numbered(n).images[y].to(torch.float32) / 255)


def test_order_follows_from_seed_and_epoch_alone():
    first = order(seed=3, epoch=4)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert order(seed=3, epoch=4) == first
    assert order(seed=3, epoch=4, batch_size=100) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert order(shuffle=False) == list(range(100))


def test_each_seed_and_epoch_has_its_own_order():
    pairs = list(itertools.product([-1, 0, 1, 11, 2**32, 2**64], [0, 1, 11]))
    assert len({tuple(order(seed=seed, epoch=epoch)) for seed, epoch in pairs}) == len(pairs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_are_rounded_once(dtype):
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    one = types.SimpleNamespace(images=images, labels=torch.zeros(1, dtype=torch.int64))
    x, _ = next(batches(one, 1, dtype=dtype))
    assert x.dtype == dtype
    assert torch.equal(
        x.flatten(), torch.tensor([p / 255 for p in range(256)], dtype=torch.float64).to(dtype)
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_cuda_batches_have_the_bits_of_the_cpu_ones(dtype):
    dataset = quiet_subset()
    on_gpu = batches(dataset, 64, device="cuda", dtype=dtype)
    for (x, y), (x2, y2) in zip(batches(dataset, 64, dtype=dtype), on_gpu, strict=True):
        assert x2.is_cuda and y2.is_cuda
        assert torch.equal(x, x2.cpu()) and torch.equal(y, y2.cpu())


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": -3}, ValueError, "got -3"),
        ({"batch_size": 2.0}, TypeError, "float"),
        ({"seed": 0.5}, TypeError, "float"),
        ({"epoch": "1"}, TypeError, "str"),
        ({"dtype": torch.int64}, TypeError, "dtype must be a floating-point type, got torch.int64"),
        ({"dtype": "float32"}, TypeError, "dtype must be a floating-point type, got float32"),
        ({"dataset": [1, 2]}, TypeError, "dataset must have the tensors images and labels, got list"),
        (
            {"dataset": types.SimpleNamespace(images=torch.zeros(3, 2, 2), labels=torch.zeros(2))},
            ValueError,
            "3 images",
        ),
    ],
)
def test_batches_refuse_bad_arguments_before_the_first_batch(arguments, error, message):
    with pytest.raises(error, match=message):
        batches(**{"dataset": numbered(3), "batch_size": 1, **arguments})


@pytest.mark.parametrize("name", ["transform", "target_transform"])
def test_batches_refuse_a_transform(tmp_path, name):
    write(tmp_path, tiny())
    dataset = FashionMNIST(tmp_path, check_md5=False, **{name: lambda value: value})
    with pytest.raises(ValueError, match=f"dataset.{name} must be None"):
        batches(dataset, 1)
