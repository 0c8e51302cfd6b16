# SPDX-License-Identifier: MIT
"""What `fastconv train` and `fastconv validate` share: devices, data by name, the trainer, the exam."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterable, Iterator

import torch
from tqdm import tqdm

import fastconv
from fastconv import _C, data
from fastconv._accuracy import Batch, image_losses
from fastconv._distributed import ALONE, Processes

DATASETS = {"fashion-mnist": data.FashionMNIST, "mnist": data.MNIST, "cifar10": data.CIFAR10}


def dataset_of(model: str) -> str:
    """The data set that a network of models.NETWORKS is meant for."""
    return "cifar10" if model == "cifarnet" else "fashion-mnist"


def load(
    dataset: str, root: str | None, limit: int | None = None, download: bool = False
) -> tuple[data.images.ImageSet, data.images.ImageSet, list[str]]:
    """The training set and the test set, cut to `limit` images, and the warnings they came with."""
    kind = DATASETS[dataset]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        train, test = (kind(root, train=train, download=download) for train in (True, False))
    for each in (train, test):
        each.images, each.labels = each.images[:limit], each.labels[:limit]
    return train, test, [str(warning.message) for warning in caught]


def image_size(dataset: data.images.ImageSet) -> tuple[int, ...]:
    """[channels, height, width]"""
    return tuple(dataset[0][0].shape)


def best_device() -> tuple[torch.device, str]:
    """The device to work on, and why: CUDA where there is a GPU and this build has CUDA kernels."""
    build = _C.build_info()
    if not build["cuda"]:
        return torch.device("cpu"), f"this build has no CUDA kernels: {build['cuda_reason']}"
    if not torch.cuda.is_available():
        return torch.device("cpu"), "no CUDA device is visible"
    return torch.device("cuda"), torch.cuda.get_device_name()


def place(asked: str | None) -> tuple[torch.device, dict]:
    """The device that was asked for, else the best, and a report's versions and device."""
    device, reason = best_device() if asked is None else (torch.device(asked), "asked for")
    versions = {"fastconv": fastconv.__version__, "torch": torch.__version__, "build": _C.build_info()}
    place = {"name": str(device), "reason": reason, "threads": torch.get_num_threads()}
    return device, {"versions": versions, "device": place}


@contextlib.contextmanager
def fp32_precision(value: str) -> Iterator[None]:
    """Has float32 convolutions and products computed in "ieee" or, on GPUs, in "tf32"; restores the flags.

    The older allow_tf32 follows, since torch.compile and torch.export fail where the two disagree.
    """
    backends = torch.backends
    on_gpu = [backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul]
    on_cpu = [backends.mkldnn.conv, backends.mkldnn.matmul]
    before = [(flag, flag.fp32_precision) for flag in on_gpu + on_cpu]
    allowed = backends.cudnn.conv.fp32_precision == "tf32"
    try:
        backends.cudnn.allow_tf32 = value == "tf32"
        for flag in on_gpu:
            flag.fp32_precision = value
        for flag in on_cpu:
            flag.fp32_precision = "ieee"
        yield
    finally:
        backends.cudnn.allow_tf32 = allowed
        for flag, old in before:
            flag.fp32_precision = old


def progress(items: Iterable, what: str, total: int, start: int = 0, hidden: bool = False) -> Iterable:
    """`items` with a progress bar, on a terminal; `start` of the `total` are done."""
    hidden = hidden or not sys.stderr.isatty()
    return tqdm(items, desc=what, total=total, initial=start, leave=False, disable=hidden)


class Trainer:
    """Adam on `model`, the learning rate falling from `lr` to zero over `steps` steps.

    Parameters narrower than float32 are updated through float32 copies, and float16's loss is multiplied by
    128: many of their updates and gradients would vanish otherwise. Of several `processes` each computes its
    part of a batch.
    """

    def __init__(self, model: torch.nn.Module, lr: float, steps: int, processes: Processes = ALONE):
        self.model, self.lr, self.steps, self.done = model, lr, steps, 0
        self.processes, self.network = processes, processes.wrap(model)
        self.parameters = list(model.parameters())
        self.narrow = self.parameters[0].element_size() < 4
        self.scale = 128.0 if self.parameters[0].dtype is torch.float16 else 1.0
        self.master = [p.detach().float() for p in self.parameters] if self.narrow else self.parameters
        self.optimizer = torch.optim.Adam(self.master, lr, fused=True)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One training step; returns the mean loss before it, a scalar on the device.

        Of several processes each returns its share of that mean.
        """
        self.optimizer.param_groups[0]["lr"] = self.lr * max(0.0, 1 - self.done / self.steps)
        self.done += 1
        self.model.zero_grad()
        mine = self.processes.part
        loss = image_losses(self.network(mine(images)), mine(labels)).sum() / len(labels)
        (loss * self.scale).backward()
        if self.narrow:
            for master, parameter in zip(self.master, self.parameters, strict=True):
                master.grad = parameter.grad.float() / self.scale
        self.optimizer.step()
        if self.narrow:
            with torch.no_grad():
                for master, parameter in zip(self.master, self.parameters, strict=True):
                    parameter.copy_(master)
        return loss.detach()

    def state_dict(self) -> dict:
        """All that decides the steps to come, but for torch's random state."""
        return {
            "done": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "master": self.master if self.narrow else None,
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on where another was; a `state` that is none of its kind gives one of several exceptions."""
        if type(state["done"]) is not int or not 0 <= state["done"] <= self.steps:
            raise ValueError(f"it has done {state['done']} of {self.steps} steps")
        self.done = state["done"]
        self.model.load_state_dict(state["model"])
        kept = state["optimizer"]["state"]
        moments = {i: _moments(p, kept[i]) for i, p in enumerate(self.master) if self.done}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if self.narrow:
            with torch.no_grad():
                for master, saved in zip(self.master, state["master"], strict=True):
                    master.copy_(saved)


def _moments(parameter: torch.Tensor, kept: dict) -> dict:
    """What Adam keeps for a parameter, of a checkpoint. Its kernel trusts sizes and strides."""
    sizes = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
    found = {name: value.shape for name, value in kept.items()}
    if found != sizes:
        raise ValueError(f"Adam's state is of sizes {found}, expected {sizes}")
    moments = {name: torch.empty_like(parameter).copy_(kept[name]) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": kept["step"].clone(), **moments}


def confusion(model: torch.nn.Module, exam: Iterable[Batch], classes: int) -> torch.Tensor:
    """How many images of each class (rows) `model`, in eval mode, takes for each (columns): int64."""
    counts = torch.zeros(classes * classes, dtype=torch.int64)
    training = model.training
    model.eval()
    with torch.no_grad():
        for images, labels in exam:
            pairs = labels * classes + model(images).argmax(1)
            counts += torch.bincount(pairs.cpu(), minlength=len(counts))
    model.train(training)
    return counts.view(classes, classes)


def accuracy(counts: torch.Tensor) -> float:
    """The share of a confusion matrix that is right."""
    return counts.diagonal().sum().item() / counts.sum().item()
