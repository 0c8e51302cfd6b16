# SPDX-License-Identifier: MIT
"""Trains a network on torch.nn and on fastconv and compares the two: the work of `fastconv validate`."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

import fastconv
from fastconv import _accuracy, _report, _training, bench, data, models
from fastconv._training import Trainer, fp32_precision, progress

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

    model: one of fastconv.models.NETWORKS.
    dataset: one of fastconv._training.DATASETS; None for the one that the model is meant for.
    data: folder of the data, see fastconv.data.
    device: None for the best there is.
    limit: how many images to take of the training set and of the test set, None for all.
    tf32: let GPUs compute float32 in TF32.
    seconds: time for each comparison of speed.
    """

    model: str = "lenet"
    dataset: str | None = None
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


def run(settings: Settings, say: Callable[[str], None] = print) -> dict:
    """Does the whole comparison, says it section by section, and returns it as plain dicts and lists.

    Keys: versions, device, settings, data, same_start, first_step, check, training, speed, passed. `passed`
    is False where the initial parameters differ or the rule of fastconv._accuracy is broken.
    """
    dtype = DTYPES[settings.dtype]
    device, report = _training.place(settings.device)
    dataset = settings.dataset or _training.dataset_of(settings.model)
    train, test, notes = _training.load(dataset, settings.data, settings.limit)
    size, classes = _training.image_size(train), len(train.classes)
    report["settings"] = asdict(settings)
    report["data"] = {
        "source": train.source,
        "full": train.full and test.full and settings.limit is None,
        "train": len(train),
        "test": len(test),
        "notes": notes,
    }
    say(_report.header(report))

    def batches(epoch: int) -> Iterator[Batch]:
        size, seed = settings.batch_size, settings.seed
        return data.batches(train, size, seed=seed, epoch=epoch, device=device, dtype=dtype)

    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device, fp32_precision("tf32" if settings.tf32 else "ieee"):
        sides = {}
        for side, layers in LAYERS.items():
            torch.manual_seed(settings.seed)
            sides[side] = models.build(settings.model, layers, size, classes)
        report["same_start"] = _same_parameters(*sides.values())
        sides["fastconv"].load_state_dict(sides["torch.nn"].state_dict())
        sides = {side: model.to(device, dtype) for side, model in sides.items()}

        report["first_step"] = _accuracy.first_step(copy.deepcopy(sides), next(batches(0)))
        say(_report.first_step(report))

        steps = settings.epochs * math.ceil(len(train) / settings.batch_size)
        guide = Trainer(copy.deepcopy(sides["torch.nn"]), settings.lr, steps)
        endless = itertools.chain.from_iterable(map(batches, itertools.count()))
        checked = progress(itertools.islice(endless, STEPS), "error rule", STEPS)
        report["check"] = _accuracy.check(copy.deepcopy(sides), guide.model, guide.step, checked)
        report["passed"] = report["same_start"] and report["check"]["passed"]
        say(_report.check(report))

        exam = list(data.batches(test, 1000, shuffle=False, device=device, dtype=dtype))
        report["training"] = {}
        for side, model in sides.items():
            torch.manual_seed(settings.seed)  # the same dropout
            trainer = Trainer(copy.deepcopy(model), settings.lr, steps)
            report["training"][side] = _train(side, trainer, settings.epochs, batches, exam, classes)
        say(_report.training(report))

        first = dict.fromkeys(sides, next(batches(0)))
        report["speed"] = []
        for kind in (bench.TRAINING, bench.INFERENCE):
            report["speed"].append(bench.speed(sides, first, kind, settings.seconds))
            say(_report.speed(report["speed"][-1]))
    say(_report.verdict(report))
    return report


def _same_parameters(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether names and values are equal, bit for bit."""
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _train(
    side: str,
    trainer: Trainer,
    epochs: int,
    batches: Callable[[int], Iterator[Batch]],
    exam: list[Batch],
    classes: int,
) -> dict:
    """Trains, with progress on stderr.

    Returns {"loss": [[epochs done, mean loss since the entry before]], "accuracy": [share right after each
    epoch]}.
    """
    result = {"loss": [], "accuracy": []}
    per_epoch = trainer.steps // epochs
    for epoch in range(epochs):
        bar = progress(batches(epoch), f"{side}, epoch {epoch + 1} of {epochs}", per_epoch)
        losses = torch.stack([trainer.step(images, labels) for images, labels in bar]).cpu()
        done = 0
        for part in losses.chunk(20):
            done += len(part)
            result["loss"].append([epoch + done / len(losses), part.mean().item()])
        result["accuracy"].append(_training.accuracy(_training.confusion(trainer.model, exam, classes)))
        tqdm.write(
            f"{side}, epoch {epoch + 1} of {epochs}: loss {losses[-1]:.3f}, "
            f"test accuracy {result['accuracy'][-1]:.2%}",
            file=sys.stderr,
        )
    return result
