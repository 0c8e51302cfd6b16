# SPDX-License-Identifier: MIT
"""Several processes that train together, on a CPU, and the copies that torch.nn.DataParallel makes."""

import concurrent.futures
import copy
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import fastconv
from fastconv import _distributed, train
from fastconv.__main__ import main

SUBSET = str(fastconv.data.FashionMNIST.subset_folder)
TINY = ["--data", SUBSET, "--limit", "36", "--batch-size", "8", "--epochs", "2", "--device", "cpu"]

pytestmark = pytest.mark.filterwarnings("ignore:Fashion-MNIST:UserWarning")  # the subset is meant here


def result(out):
    report = json.loads((out / "report.json").read_text())
    return torch.load(out / "model.pt", weights_only=True), report


def test_torchrun_gives_what_one_process_does(tmp_path, capsys):
    """The same batches, so the same steps to within rounding; the first process alone speaks and writes."""
    arguments = ["--model", "lenet", *TINY]
    assert main(["train", *arguments, "--out", str(tmp_path / "one")]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "fastconv", "train", *arguments, "--out", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "lenet on cpu (asked for), the first of 2 processes" in done.stdout
    assert done.stdout.count("epoch 2 of 2") == 1 and done.stdout.count("Test accuracy") == 1
    assert sorted(os.listdir(tmp_path / "two")) == sorted(os.listdir(tmp_path / "one"))
    (one, of_one), (two, of_two) = result(tmp_path / "one"), result(tmp_path / "two")
    for name, weight in one.items():  # as a whole: Adam makes a step of what rounding leaves of a gradient
        assert torch.dist(two[name], weight) <= 1e-4 * weight.norm(), name
    torch.testing.assert_close(of_two["loss"], of_one["loss"], rtol=1e-5, atol=1e-6)
    capsys.readouterr()
    assert main(["train", *arguments, "--out", str(tmp_path / "two"), "--resume"]) == 2
    assert "is of a run with processes 2, this one has 1" in capsys.readouterr().err


# Forks the processes of three runs: one to its end, one of which a process is killed in a step, its sequel.
RANKS = """
import os, signal, socket, sys
import torch
torch.set_num_threads(1)
from fastconv import _report, train
from fastconv.__main__ import main
_report.plot_confusion = lambda *_: False
folder, arguments, count = sys.argv[1], sys.argv[2:], 3

def run(out, killed=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(count))
    pids = []
    for rank in range(count):
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
        pids.append(os.fork())
        if pids[-1] == 0:
            if killed == rank:
                make_step = train.Trainer.step
                def step(self, *batch):
                    if self.done == 7:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return make_step(self, *batch)
                train.Trainer.step = step
            code = 99
            try:
                code = main(["train", *arguments, "--out", f"{folder}/{out}", "--resume"])
                if code == 0 and not os.path.exists(f"{folder}/{out}/report.json"):
                    code = 98  # all leave together
            finally:
                os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

assert run("whole") == [0, 0, 0]
for rank in (1, 0):
    codes = run(f"parts{rank}", killed=rank)
    assert codes == [-9 if each == rank else 2 for each in range(count)], codes
    assert run(f"parts{rank}") == [0, 0, 0]
"""


def test_a_killed_process_ends_the_others_and_the_run_goes_on_to_the_same_bits(tmp_path):
    """Dropout's masks are each process's own; sums of three gradients depend on their order."""
    arguments = ["--model", "fashion_cnn", *TINY, "--save-every", "3"]
    done = subprocess.run(
        [sys.executable, "-c", RANKS, str(tmp_path), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "fastconv: another of the 3 processes has ended" in done.stderr
    assert done.stdout.count("Going on after step 6 of 10") == 2
    whole, of_whole = result(tmp_path / "whole")
    for name in ("parts0", "parts1"):
        parts, of_parts = result(tmp_path / name)
        assert all(torch.equal(parts[key], value) for key, value in whole.items())
        assert of_parts["loss"] == of_whole["loss"] and of_parts["confusion"] == of_whole["confusion"]
        assert not list((tmp_path / name).glob(".*"))


def test_more_processes_than_images_in_a_batch(tmp_path):
    settings = train.Settings(
        out=str(tmp_path), dataset="fashion-mnist", data=SUBSET, limit=33, batch_size=8, device="cpu"
    )
    with pytest.raises(_distributed.ProcessError, match="the last batch has 1 of the 33 images"):
        train._run(settings, torch.device("cpu"), "", Alone(), print)


class Alone(_distributed.Processes):
    """The first of two processes, as far as it gets without the other."""

    def __init__(self):
        super().__init__(0, 2)

    def wait(self):
        pass


# Two processes train models in shards, each on half of every batch, two halves of it a step. After two steps
# all is stored, another model takes it up and goes on. The first process writes the parameters.
SHARDS = """
import os, sys
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
sys.path.insert(0, sys.argv[2])
torch.set_num_threads(1)
from test_distributed import SHARDED, shardable, two_steps
folder = sys.argv[1]
rank = 0 if os.fork() else 1
store = torch.distributed.FileStore(folder + "/store", 2)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
mesh = torch.distributed.init_device_mesh("cpu", (2,))

def sharded(name, seed):
    model, images = shardable(name, seed)
    if name == "layers":  # others stay one operator
        for each in [m for m in model.children() if list(m.parameters())]:
            fully_shard(each, mesh=mesh)
    model = fully_shard(model, mesh=mesh)
    return model, torch.optim.Adam(model.parameters(), 0.01), images[rank::2]

def state(model, optimizer):
    parameters, states = get_state_dict(model, optimizer)
    return {"model": parameters, "optimizer": states}

for name in SHARDED:
    model, optimizer, images = sharded(name, 0)
    two_steps(model, optimizer, images, model.set_requires_gradient_sync)
    dcp.save(state(model, optimizer), checkpoint_id=f"{folder}/{name}")
    model, optimizer, images = sharded(name, 1)
    found = state(model, optimizer)
    dcp.load(found, checkpoint_id=f"{folder}/{name}")
    set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    two_steps(model, optimizer, images, model.set_requires_gradient_sync)
    whole = {key: value.full_tensor() for key, value in model.state_dict().items()}
    if rank == 0:
        torch.save(whole, f"{folder}/{name}.pt")
torch.distributed.destroy_process_group()
os._exit(0) if rank else sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
SHARDED = {
    "layers": lambda: fastconv.models.LeNet(),
    "optimized": lambda: fastconv.optimize(fastconv.models.LeNet(torch.nn)),
}


def shardable(name, seed):
    """A model and a batch, in float64, where rounding is no excuse."""
    torch.manual_seed(0)
    images = torch.randn(8, 1, 32, 32, dtype=torch.float64)
    torch.manual_seed(seed)
    return SHARDED[name]().double(), images


def two_steps(model, optimizer, images, synchronize=lambda last: None):
    for _ in range(2):
        optimizer.zero_grad()
        for half, last in zip(images.chunk(2), (False, True), strict=True):
            synchronize(last)
            model(half).square().mean().backward()
        optimizer.step()


def test_fully_shard(tmp_path):
    """With gradients accumulated, and a distributed checkpoint on the way: what one process does."""
    here = str(pathlib.Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", SHARDS, str(tmp_path), here], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for name in SHARDED:
        model, images = shardable(name, 0)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(2):
            two_steps(model, optimizer, images)
        found = torch.load(tmp_path / f"{name}.pt")
        torch.testing.assert_close(found, model.state_dict(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:0", "--device cuda:0: 2 processes need a GPU each"), ("cuda", "process 7 finds no GPU")],
)
def test_each_process_has_a_gpu_of_its_own(device, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "7")
    with pytest.raises(_distributed.ProcessError, match=message):
        train._device(device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    if device == "cuda":
        assert train._device(device) == (torch.device("cuda:7"), "asked for")
    assert train._device("cpu")[0] == torch.device("cpu")


def replicas(model, count):
    """Copies as DataParallel makes them: modules without parameters, which are plain tensors there."""
    made = []
    for _ in range(count):
        copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
        for module, replica in copies.items():
            for name, child in module._modules.items():
                replica._modules[name] = copies.get(child)
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    setattr(replica, name, parameter.clone())  # on a GPU, the broadcast
            for name, buffer in module._buffers.items():
                replica._buffers[name] = buffer
        made.append(copies[model])
    return made


@pytest.mark.parametrize("model", ["fused", "chain", *fastconv.models.NETWORKS])
def test_replicas_compute_as_the_model(model):
    """Each on a part of the batch; the gradients reach the model's parameters."""
    size = (3, 32, 32) if model == "cifarnet" else (1, 28, 28)
    if model == "fused":
        model = fastconv.models.LeNet(padding=2, fused=True)
    elif model == "chain":
        model = fastconv.Chain(fastconv.ConvReLUPool2d(1, 3, 5), torch.nn.Flatten(), fastconv.Linear(432, 4))
    else:
        model = fastconv.models.build(model, image_size=size)
    model.eval()
    expected, images = copy.deepcopy(model), torch.randn(4, *size)
    together = expected(images)
    together.square().sum().backward()
    made, parts = replicas(model, 2), images.chunk(2)
    outputs = torch.cat([replica(part) for replica, part in zip(made, parts, strict=True)])
    torch.testing.assert_close(outputs, together)
    outputs.square().sum().backward()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_replicas_of_a_fused_model_keep_apart():
    """Replicas share what a fused model has prepared; each must run on its own parameters nonetheless."""
    model, images = fastconv.models.LeNet(padding=2, fused=True), torch.randn(1, 1, 28, 28)
    made = replicas(model, 2)
    with torch.no_grad():
        made[1].fc3.bias.add_(100)
    expected = [model(images), model(images) + 100]

    def work(i):
        return all(torch.allclose(made[i](images), expected[i]) for _ in range(300))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            assert list(pool.map(work, range(2))) == [True, True]
    finally:
        sys.setswitchinterval(before)


def test_data_parallel_without_a_gpu_is_the_model():
    model = fastconv.models.LeNet(padding=2)
    images = torch.randn(3, 1, 28, 28)
    assert torch.equal(torch.nn.DataParallel(model)(images), model(images))
