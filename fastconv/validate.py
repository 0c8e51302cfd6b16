# SPDX-License-Identifier: MIT
"""Trains LeNet on torch.nn and on fastconv and compares the two: the work of `fastconv validate`."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

import fastconv
from fastconv import _accuracy, _report, data
from fastconv._timing import compare
from fastconv.models import LeNet

STEPS = 20  # steps that the error rule is applied to
LAYERS = {"torch.nn": torch.nn, "fastconv": fastconv}
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

Batch = _accuracy.Batch


@dataclass
class Settings:
    """What `run` does.

    data: folder of the data, see fastconv.data.FashionMNIST.
    device: None for the best there is.
    limit: how many images to take of the training set and of the test set, None for all.
    tf32: let GPUs compute float32 in TF32.
    seconds: time for each comparison of speed.
    """

    data: str | None = None
    epochs: int = 3
    batch_size: int = 64
    lr: float = 3e-3
    seed: int = 0
    device: str | None = None
    dtype: str = "float32"
    limit: int | None = None
    tf32: bool = False
    seconds: float = 4.0


def best_device() -> tuple[torch.device, str]:
    """The device to work on, and why: CUDA where there is a GPU and this build has CUDA kernels."""
    build = fastconv._C.build_info()
    if not build["cuda"]:
        return torch.device("cpu"), f"this build has no CUDA kernels: {build['cuda_reason']}"
    if not torch.cuda.is_available():
        return torch.device("cpu"), "no CUDA device is visible"
    return torch.device("cuda"), torch.cuda.get_device_name()


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


def run(settings: Settings, say: Callable[[str], None] = print) -> dict:
    """Does the whole comparison, says it section by section, and returns it as plain dicts and lists.

    Keys: versions, device, settings, data, same_start, first_step, check, training, speed, passed. `passed`
    is False where the initial parameters differ or the rule of fastconv._accuracy is broken.
    """
    dtype = DTYPES[settings.dtype]
    if settings.device is None:
        device, reason = best_device()
    else:
        device, reason = torch.device(settings.device), "asked for"
    train, test, notes = _load(settings)
    report = {
        "versions": {
            "fastconv": fastconv.__version__,
            "torch": torch.__version__,
            "build": fastconv._C.build_info(),
        },
        "device": {"name": str(device), "reason": reason, "threads": torch.get_num_threads()},
        "settings": asdict(settings),
        "data": {
            "source": train.source,
            "full": train.full and test.full and settings.limit is None,
            "train": len(train),
            "test": len(test),
            "notes": notes,
        },
    }
    say(_report.header(report))

    def batches(epoch: int) -> Iterator[Batch]:
        size, seed = settings.batch_size, settings.seed
        return data.batches(train, size, seed=seed, epoch=epoch, device=device, dtype=dtype)

    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device, fp32_precision("tf32" if settings.tf32 else "ieee"):
        models = {}
        for side, layers in LAYERS.items():
            torch.manual_seed(settings.seed)
            models[side] = LeNet(layers, padding=2)
        report["same_start"] = _same_parameters(*models.values())
        models["fastconv"].load_state_dict(models["torch.nn"].state_dict())
        models = {side: model.to(device, dtype) for side, model in models.items()}

        report["first_step"] = _accuracy.first_step(models, next(batches(0)))
        say(_report.first_step(report))

        steps = settings.epochs * math.ceil(len(train) / settings.batch_size)
        guide = Trainer(copy.deepcopy(models["torch.nn"]), settings.lr, steps)
        endless = itertools.chain.from_iterable(map(batches, itertools.count()))
        checked = _progress(itertools.islice(endless, STEPS), "error rule", STEPS)
        report["check"] = _accuracy.check(copy.deepcopy(models), guide.model, guide.step, checked)
        report["passed"] = report["same_start"] and report["check"]["passed"]
        say(_report.check(report))

        exam = list(data.batches(test, 1000, shuffle=False, device=device, dtype=dtype))
        report["training"] = {}
        for side, model in models.items():
            trainer = Trainer(copy.deepcopy(model), settings.lr, steps)
            report["training"][side] = _train(side, trainer, settings.epochs, batches, exam)
        say(_report.training(report))

        report["speed"] = _speed(models, next(batches(0)), settings.seconds)
        say(_report.speed(report))
    say(_report.verdict(report))
    return report


def _load(settings: Settings) -> tuple[data.FashionMNIST, data.FashionMNIST, list[str]]:
    """The training set and the test set, cut to `settings.limit` images, and the warnings they came with."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        train, test = (data.FashionMNIST(settings.data, train=train) for train in (True, False))
    for each in (train, test):
        each.images, each.labels = each.images[: settings.limit], each.labels[: settings.limit]
    return train, test, [str(warning.message) for warning in caught]


def _same_parameters(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether names and values are equal, bit for bit."""
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _progress(items: Iterable, what: str, total: int) -> Iterable:
    """`items` with a progress bar, on a terminal."""
    return tqdm(items, desc=what, total=total, leave=False, disable=not sys.stderr.isatty())


class Trainer:
    """Adam on `model`, the learning rate falling from `lr` to zero over `steps` steps.

    Parameters narrower than float32 are updated through float32 copies, and float16's loss is multiplied by
    128: many of their updates and gradients would vanish otherwise.
    """

    def __init__(self, model: torch.nn.Module, lr: float, steps: int):
        self.model, self.lr, self.steps, self.done = model, lr, steps, 0
        self.parameters = list(model.parameters())
        self.narrow = self.parameters[0].element_size() < 4
        self.scale = 128.0 if self.parameters[0].dtype is torch.float16 else 1.0
        self.master = [p.detach().float() for p in self.parameters] if self.narrow else self.parameters
        self.optimizer = torch.optim.Adam(self.master, lr, fused=True)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One training step; returns the mean loss before it, a scalar on the device."""
        self.optimizer.param_groups[0]["lr"] = self.lr * max(0.0, 1 - self.done / self.steps)
        self.done += 1
        self.model.zero_grad()
        loss = _accuracy.image_losses(self.model(images), labels).mean()
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


def _train(
    side: str,
    trainer: Trainer,
    epochs: int,
    batches: Callable[[int], Iterator[Batch]],
    exam: list[Batch],
) -> dict:
    """Trains, with progress on stderr.

    Returns {"loss": [[epochs done, mean loss since the entry before]], "accuracy": [share right after each
    epoch]}.
    """
    result = {"loss": [], "accuracy": []}
    per_epoch = trainer.steps // epochs
    for epoch in range(epochs):
        progress = _progress(batches(epoch), f"{side}, epoch {epoch + 1} of {epochs}", per_epoch)
        losses = torch.stack([trainer.step(images, labels) for images, labels in progress]).cpu()
        done = 0
        for part in losses.chunk(20):
            done += len(part)
            result["loss"].append([epoch + done / len(losses), part.mean().item()])
        with torch.no_grad():
            right = sum((trainer.model(x).argmax(1) == y).sum().item() for x, y in exam)
        result["accuracy"].append(right / sum(len(y) for _, y in exam))
        tqdm.write(
            f"{side}, epoch {epoch + 1} of {epochs}: loss {losses[-1]:.3f}, "
            f"test accuracy {result['accuracy'][-1]:.2%}",
            file=sys.stderr,
        )
    return result


def _speed(models: dict[str, torch.nn.Module], batch: Batch, seconds: float) -> dict:
    """Images a second of a training step and of inference, and how many times as fast fastconv is."""
    images, labels = batch
    # A learning rate of zero: the parameters, and with them the work, stay as they are.
    trainers = {side: Trainer(copy.deepcopy(model), 0.0, 1) for side, model in models.items()}
    steps = {side: lambda trainer=trainer: trainer.step(images, labels) for side, trainer in trainers.items()}
    forwards = {side: lambda model=model: model(images) for side, model in models.items()}

    def measure(peers: dict) -> dict:
        timed = compare(peers, seconds=seconds, device=images.device)
        rates = {side: asdict(timed.time(side).inverted(len(labels))) for side in models}
        return {**rates, "ratio": asdict(timed.ratio("fastconv", "torch.nn"))}

    training = measure(steps)
    with torch.no_grad():
        inference = measure(forwards)
    return {"batch": len(labels), "training step": training, "inference": inference}
