# SPDX-License-Identifier: MIT
"""`fastconv train`: what it writes, and that a run that was stopped anywhere goes on to the same bits."""

import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastconv
from fastconv import _training, train
from fastconv.__main__ import main

SUBSET = str(fastconv.data.FashionMNIST.subset_folder)
LOAD = _training.load
TINY = ["--data", SUBSET, "--limit", "36", "--batch-size", "8", "--epochs", "2"]  # 5 steps an epoch

pytestmark = pytest.mark.filterwarnings("ignore:Fashion-MNIST:UserWarning")  # the subset is meant here


@pytest.fixture(autouse=True)
def one_thread():
    """Passes over a few images are faster without a team of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """No pictures, which take longer than the training; test_everything_is_written asks for them."""
    monkeypatch.setattr("fastconv._report.plot_confusion", lambda *_: False)


def command(out, model, *more):
    return main(["train", "--model", model, *TINY, "--out", str(out), *more])


def result(out):
    """All that must be equal, bit for bit."""
    report = json.loads((out / "report.json").read_text())
    weights = torch.load(out / "model.pt", weights_only=True)
    bits = {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in weights.items()}
    return bits, report["loss"], report["accuracy"], report["confusion"]


def stopped_at(monkeypatch, step):
    """Ctrl-C comes in this step; 0 for never."""
    monkeypatch.undo()
    monkeypatch.setattr("fastconv._report.plot_confusion", lambda *_: False)
    if step:
        make_step = train.Trainer.step

        def stop(self, *batch):
            if self.done == step:
                raise KeyboardInterrupt
            return make_step(self, *batch)

        monkeypatch.setattr(train.Trainer, "step", stop)


def test_everything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    out = tmp_path / "new" / "folder"
    assert command(out, "lenet", "--seed", "3") == 0
    said = capsys.readouterr().out
    assert "1000 of the 60000" in said and "epoch 2 of 2: mean loss" in said and "Ankle boot" in said
    report = json.loads((out / "report.json").read_text())
    assert len(report["loss"]) == 10 and len(report["accuracy"]) == 2
    counts = torch.tensor(report["confusion"])
    assert counts.sum() == 36 and report["test_accuracy"] == counts.diagonal().sum().item() / 36
    assert report["test_accuracy"] == report["accuracy"][-1] and f"{report['test_accuracy']:.2%}" in said
    assert (out / "confusion.txt").read_text().rstrip() in said
    drawn = out / "confusion.png"
    names = ["checkpoint.pt", "confusion.txt", "model.pt", "report.json"]
    if drawn.exists():
        assert drawn.read_bytes().startswith(b"\x89PNG")
        names.insert(1, "confusion.png")
    assert sorted(os.listdir(out)) == names
    model = fastconv.models.build("lenet")
    model.load_state_dict(torch.load(out / "model.pt", weights_only=True))
    test = fastconv.data.FashionMNIST(SUBSET, train=False)
    test.images, test.labels = test.images[:36], test.labels[:36]
    again = _training.confusion(model, fastconv.data.batches(test, 7, shuffle=False), 10)
    assert torch.equal(again, counts)


@pytest.mark.parametrize("model", ["fashion_cnn", "fashion_dnn"])
def test_stopped_and_resumed_is_the_same_as_not(tmp_path, monkeypatch, model):
    """Dropout's masks, batch-norm's averages, Adam's moments and the order of the images go on."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command(whole, model) == 0
    for step in (1, 3, 5, 8):  # before the first checkpoint, inside an epoch, at an end, in the last epoch
        stopped_at(monkeypatch, step)
        assert command(parts, model, "--save-every", "2", "--resume") == 130
    stopped_at(monkeypatch, 0)
    assert command(parts, model, "--save-every", "2", "--resume") == 0
    assert result(parts) == result(whole)
    assert command(parts, model, "--resume") == 0  # nothing is left to do
    assert result(parts) == result(whole)


KILLER = """
import itertools, os, pathlib, random, signal, sys, time
import torch
torch.set_num_threads(1)
from fastconv import _report
from fastconv.__main__ import main
_report.plot_confusion = lambda *_: False
out, arguments = sys.argv[1], sys.argv[2:]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def half(path, content):
    with open(path, "wb") as file:
        file.write(content[:len(content) // 2])
    die()

def start(folder, dies=None):  # in the write of a checkpoint, by half, or in the fsync of this number
    pid = os.fork()
    if pid == 0:
        calls = itertools.count()
        if dies == "half":
            pathlib.Path.write_bytes = half
        elif dies is not None:
            os.fsync = lambda _: next(calls) == dies and die()
        try:
            os._exit(main(["train", *arguments, "--out", folder, "--resume"]))
        finally:
            os._exit(99)
    return pid

def written():
    try:
        found = os.stat(out + "/parts/checkpoint.pt")
        return found.st_ino, found.st_mtime_ns
    except FileNotFoundError:
        return None

# here, not in a process of its own: what forks later finds all modules imported
assert main(["train", *arguments, "--out", out + "/whole"]) == 0
kills = 0
for dies in ("half", 0, 1, "half", 0):  # nothing has its name yet; the file; the folder; and over a good one
    assert os.WIFSIGNALED(os.waitpid(start(out + "/parts", dies), 0)[1])
    assert (written() is None) == (kills < 2)
    kills += 1
for _ in range(5):
    before, pid, ended = written(), start(out + "/parts"), (0, 0)
    while written() == before and ended[0] == 0:  # until it is under way
        time.sleep(0.001)
        ended = os.waitpid(pid, os.WNOHANG)
    if ended[0] == 0:
        time.sleep(random.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
assert os.waitpid(start(out + "/parts"), 0)[1] == 0
print("kills", kills)
"""


def test_killed_while_a_checkpoint_is_written_and_at_random_moments(tmp_path):
    arguments = ["--model", "fashion_dnn", *TINY, "--batch-size", "3", "--save-every", "1"]  # 24 steps
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 6
    assert result(tmp_path / "parts") == result(tmp_path / "whole")
    assert not list((tmp_path / "parts").glob(".*")), "what a kill left was not cleared"


def test_a_checkpoint_is_not_overwritten_unasked(tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes(b"precious")
    assert command(tmp_path, "lenet") == 2
    assert f"{tmp_path}/checkpoint.pt: there is a checkpoint already" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"precious"


def other_data(*arguments):
    train, test, notes = LOAD(*arguments)
    train.images[0] = 0
    return train, test, notes


def test_damaged_and_foreign_checkpoints(tmp_path, capsys, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    assert command(tmp_path, "fashion_dnn") == 0
    good = path.read_bytes()
    capsys.readouterr()

    def refused(*more, model="fashion_dnn"):
        before = path.read_bytes()
        assert command(tmp_path, model, "--resume", *more) == 2
        assert path.read_bytes() == before
        error = capsys.readouterr().err
        assert error.startswith(f"fastconv: {path}: ") and "Traceback" not in error
        return error

    assert "run with seed 0, this one has 1" in refused("--seed", "1")
    assert "run with epochs 2, this one has 5" in refused("--epochs", "5")
    assert "run with model fashion_dnn, this one has mlp" in refused(model="mlp")
    assert "run with limit 36, this one has 35" in refused("--limit", "35")
    with monkeypatch.context() as patch:
        patch.setattr(_training, "load", other_data)
        assert "run with data " in refused()
    for content in (b"", good[:10], good[: len(good) // 2], good[:-30], b"\x80\x02c__builtin__\neval\n."):
        path.write_bytes(content)
        assert "truncated or corrupted" in refused()
    torch.save({"weight": torch.ones(2)}, path)
    assert "not a checkpoint of this version" in refused()
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    torch.save({**torch.load(io.BytesIO(good), weights_only=True), "trainer": state}, path)
    assert "not a checkpoint of this network" in refused()
    path.write_bytes(good)
    assert command(tmp_path, "fashion_dnn", "--resume") == 0


def leaves(state):
    """Tensors as bytes."""
    found = tree_leaves(state)
    return [leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else leaf for leaf in found]


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def zipped(compression):
    """A file like torch.save's with much of nothing."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    return content.getvalue()


def test_no_wrong_bit_of_a_checkpoint_is_taken_and_nothing_in_it_is_run(tmp_path, monkeypatch):
    """torch.load itself takes damaged numbers for what they are."""
    monkeypatch.chdir(tmp_path)
    path, identity = tmp_path / "checkpoint.pt", {"seed": 0}
    good = {"format": train.FORMAT, "identity": identity, "weights": torch.arange(1000.0), "loss": [0.5, 2.0]}
    train._save(good, path)
    content, refused = path.read_bytes(), 0
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            assert leaves(train._saved(path, identity)) == leaves(good)  # between the records
        except train.CheckpointError as error:
            refused += str(error).startswith(f"{path}: truncated or corrupted: ")
    assert refused > 600
    bomb, junk = zipped(zipfile.ZIP_DEFLATED), zipped(zipfile.ZIP_STORED)
    for wrong in (Evil(), {"format": train.FORMAT, "identity": identity, "more": Evil()}, bomb, junk):
        path.write_bytes(wrong) if isinstance(wrong, bytes) else torch.save(wrong, path)
        with pytest.raises(train.CheckpointError, match=f"^{path}: truncated or corrupted: ") as error:
            train._saved(path, identity)
        assert (wrong is bomb) == ("unpacks to more than it is" in str(error.value))
    assert not Path("pwned").exists()
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError) as error:
        train._saved(path, identity)
    assert error.value.filename == str(path)


def test_a_checkpoint_of_the_wrong_things(tmp_path, capsys):
    """Whole, but made to mislead: each is refused before it is used."""
    path = tmp_path / "checkpoint.pt"
    assert command(tmp_path, "fashion_dnn") == 0
    good = path.read_bytes()

    def refused(*keys, value):
        state = at = torch.load(io.BytesIO(good), weights_only=True)
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value
        torch.save(state, path)
        capsys.readouterr()
        assert command(tmp_path, "fashion_dnn", "--resume") == 2, keys
        assert capsys.readouterr().err.startswith(f"fastconv: {path}: not a checkpoint of this "), keys

    refused("identity", value=None)
    for value in ("3", -1, 11, 3.0, None):
        refused("trainer", "done", value=value)
    for value in (None, [], {}, {"0": 1}):
        for keys in (("trainer",), ("trainer", "model"), ("trainer", "optimizer"), ("history",), ("random",)):
            refused(*keys, value=value)
    moments = "trainer", "optimizer", "state", 0
    for name, value in {
        "exp_avg": torch.zeros(3),  # Adam's kernel would read and write beyond it
        "exp_avg_sq": None,
        "step": torch.zeros(2),
    }.items():
        refused(*moments, name, value=value)
    refused(*moments, value={})
    for value in ([], ["0.5"] * 10, [0.5] * 9):
        refused("history", "loss", value=value)
    refused("random", value=[{"cpu": torch.zeros(3, dtype=torch.uint8), "cuda": None}])


def test_adam_state_of_one_number_in_many_places_is_spread_out():
    """Its kernel goes through memory without regard to strides."""
    trainers = [_training.Trainer(torch.nn.Linear(8, 4), 1e-3, 10) for _ in range(2)]
    trainers[0].step(torch.randn(4, 8), torch.arange(4))
    state = trainers[0].state_dict()
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1).expand(4, 8)
    trainers[1].load_state_dict(state)
    assert trainers[1].optimizer.state_dict()["state"][0]["exp_avg"].stride() == (8, 1)


def test_damaged_data_ends_with_its_name(tmp_path, capsys):
    for path in fastconv.data.FashionMNIST.subset_folder.glob("*.gz"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-100])
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fastconv: {tmp_path}/train-images-idx3-ubyte.gz: truncated or corrupted: ")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("write", [2, 3])
def test_full_disk(tmp_path, capsys, monkeypatch, write):
    """The second checkpoint, or the parameters at the end, find no room: the last checkpoint stays."""
    saves, before = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    save = train._save

    def fills_up(state, path):
        saves.append(path.name)
        if len(saves) == write:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100000, before[1]))
        save(state, path)

    monkeypatch.setattr(train, "_save", fills_up)
    try:
        assert command(tmp_path / "full", "lenet") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"'{tmp_path}/full/{saves[-1]}'" in capsys.readouterr().err
    assert os.listdir(tmp_path / "full") == ["checkpoint.pt"]
    monkeypatch.setattr(train, "_save", save)
    assert command(tmp_path / "full", "lenet", "--resume") == 0
    assert command(tmp_path / "whole", "lenet") == 0
    assert result(tmp_path / "full") == result(tmp_path / "whole")


def test_what_a_killed_write_left_is_cleared(tmp_path):
    (tmp_path / ".checkpoint.pt.123.tmp").write_bytes(b"half")
    assert command(tmp_path, "lenet", "--resume") == 0
    assert not list(tmp_path.glob(".*"))


def test_cifarnet(tmp_path, monkeypatch, capsys):
    """Color images, brighter from class to class."""
    md5, root = {}, tmp_path / "cifar-10-batches-bin"
    root.mkdir()
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        content = b"".join(bytes([i % 10]) + bytes([i % 10 * 25]) * 3072 for i in range(20))
        (root / name).write_bytes(content)
        md5[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(fastconv.data.CIFAR10, "_md5", md5)
    arguments = ["--data", str(tmp_path), "--batch-size", "10", "--epochs", "8", "--lr", "0.003"]
    assert main(["train", "--model", "cifarnet", *arguments, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["settings"]["dataset"] == "cifar10" and report["data"]["train"] == 100
    assert report["loss"][-1] < 0.9 * report["loss"][0] and report["classes"][0] == "airplane"
    capsys.readouterr()
    assert (
        main(["train", "--model", "fashion_cnn", "--dataset", "cifar10", *arguments, "--out", str(tmp_path)])
        == 2
    )
    assert "fashion_cnn takes images of 28x28, got image_size (3, 32, 32)" in capsys.readouterr().err


def test_confusion_by_hand():
    """A model that takes every image for the class of its first value, whatever dropout does in training."""
    model = torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.Identity())
    eye = torch.eye(3)
    exam = [(eye[[0, 0, 1]], torch.tensor([0, 1, 1])), (eye[[2, 0]], torch.tensor([2, 2]))]
    model.train()
    counts = _training.confusion(model, exam, 3)
    assert counts.tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]] and model.training
    assert _training.accuracy(counts) == 3 / 5


def test_a_narrow_trainer_goes_on_with_its_float32_copies():
    x, y = torch.randn(4, 8).bfloat16(), torch.arange(4)

    def fresh():
        torch.manual_seed(0)
        return _training.Trainer(torch.nn.Linear(8, 4).bfloat16(), 1e-3, 10)

    whole, parts = fresh(), fresh()
    for _ in range(6):
        whole.step(x, y)
    for _ in range(3):
        parts.step(x, y)
    state, parts = parts.state_dict(), fresh()
    parts.load_state_dict(state)
    for _ in range(3):
        parts.step(x, y)
    assert all(map(torch.equal, whole.master, parts.master))


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "--out"),
        (["--out", "x", "--model", "resnet"], "'resnet'"),
        (["--out", "x", "--dataset", "imagenet"], "'imagenet'"),
        (["--out", "x", "--save-every", "0"], "'0'"),
        (["--out", "x", "--device", "tpu"], "'tpu'"),
    ],
)
def test_bad_arguments_exit_with_2(arguments, named, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", *arguments])
    assert exit.value.code == 2
    assert named in capsys.readouterr().err


def test_an_out_that_is_a_file(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert command(tmp_path / "out", "lenet") == 2
    assert f"{tmp_path}/out" in capsys.readouterr().err
