# SPDX-License-Identifier: MIT
"""Trains one of fastconv.models' networks: the work of `fastconv train`.

A checkpoint holds all that the steps to come depend on: parameters, Adam's state, torch's random state, the
position in the epoch's order. A run that was killed and resumed ends with the bits of one that was not.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import fastconv
from fastconv import _files, _report, _training, data, models
from fastconv._training import Trainer, progress

FORMAT = 1  # of checkpoints
RESULTS = ("model.pt", "report.json", "confusion.txt", "confusion.png")


class CheckpointError(RuntimeError):
    """A checkpoint can't be resumed from; the message begins with its path."""


@dataclass
class Settings:
    """What `run` does.

    out: folder for the checkpoint, the trained parameters and the report.
    model: one of fastconv.models.NETWORKS.
    dataset: one of fastconv._training.DATASETS; None for the one that the model is meant for.
    data: folder of the data, see fastconv.data; download: fetch it from its mirrors if it isn't there.
    device: None for the best there is.
    limit: how many images to take of the training set and of the test set, None for all.
    save_every: steps from checkpoint to checkpoint; None for one at the end of each epoch alone.
    resume: go on from the checkpoint in `out`, if there is one.
    """

    out: str
    model: str = "lenet"
    dataset: str | None = None
    data: str | None = None
    download: bool = False
    epochs: int = 3
    batch_size: int = 64
    lr: float = 1e-3
    seed: int = 0
    device: str | None = None
    limit: int | None = None
    save_every: int | None = None
    resume: bool = False


def run(settings: Settings, say: Callable[[str], None] = print) -> dict:
    """Trains, and writes into `settings.out`: checkpoint.pt on the way; at the end model.pt (the state_dict),
    report.json, confusion.txt, and confusion.png where matplotlib is there. Returns the report.

    Raises:
        FileExistsError: There is a checkpoint already, and `settings.resume` is False.
        CheckpointError: The checkpoint is damaged, or one of another run.
        OSError: A file can't be written; it names the file. The last checkpoint stays.
    """
    settings = replace(settings, dataset=settings.dataset or _training.dataset_of(settings.model))
    device, reason = _training.best_device()
    if settings.device is not None:
        device, reason = torch.device(settings.device), "asked for"
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("checkpoint.pt", *RESULTS):
        for left in out.glob(f".{name}.*.tmp"):  # by a run that was killed while it wrote
            left.unlink()
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists() and not settings.resume:
        raise FileExistsError(
            f"{checkpoint}: there is a checkpoint already: go on with --resume, or use another folder"
        )
    train, test, notes = _training.load(settings.dataset, settings.data, settings.limit, settings.download)
    identity = _identity(settings, train)
    saved = _saved(checkpoint, identity) if checkpoint.exists() else None

    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device, _training.fp32_precision("ieee"):
        torch.manual_seed(settings.seed)
        size, classes = _training.image_size(train), len(train.classes)
        model = models.build(settings.model, fastconv, size, classes).to(device)
        per_epoch = math.ceil(len(train) / settings.batch_size)
        trainer = Trainer(model, settings.lr, settings.epochs * per_epoch)
        history = {"loss": [], "accuracy": []}  # of each step, and after each epoch
        if saved is not None:
            try:
                trainer.load_state_dict(saved["trainer"])
                history = {name: list(saved["history"][name]) for name in history}
                _set_random_state(saved["random"], device)
            except (LookupError, TypeError, ValueError, RuntimeError) as error:
                raise CheckpointError(f"{checkpoint}: not a checkpoint of this network: {error}") from error
        say(
            f"{settings.model} on {device} ({reason})\n"
            + "\n".join(notes or [train.source])
            + (f"\nGoing on after step {trainer.done} of {trainer.steps}" if saved is not None else "")
        )

        exam = list(data.batches(test, 1000, shuffle=False, device=device))

        def save() -> None:
            state = {
                "format": FORMAT,
                "identity": identity,
                "trainer": trainer.state_dict(),
                "history": history,
                "random": _random_state(device),
            }
            _save(state, checkpoint)

        for epoch in range(trainer.done // per_epoch, settings.epochs):
            batches = data.batches(train, settings.batch_size, seed=settings.seed, epoch=epoch, device=device)
            start = trainer.done % per_epoch
            rest = itertools.islice(batches, start, None)
            losses = []
            for images, labels in progress(rest, f"epoch {epoch + 1} of {settings.epochs}", per_epoch, start):
                losses.append(trainer.step(images, labels))
                if trainer.done % per_epoch and trainer.done % (settings.save_every or per_epoch) == 0:
                    _extend(history["loss"], losses)
                    save()
            _extend(history["loss"], losses)
            history["accuracy"].append(_training.accuracy(_training.confusion(model, exam, classes)))
            save()
            say(
                f"epoch {epoch + 1} of {settings.epochs}: "
                f"mean loss {math.fsum(history['loss'][-per_epoch:]) / per_epoch:.4f}, "
                f"test accuracy {history['accuracy'][-1]:.2%}"
            )
        counts = _training.confusion(model, exam, classes)

    report = {
        "settings": asdict(settings),
        "versions": {"fastconv": fastconv.__version__, "torch": torch.__version__},
        "device": str(device),
        "data": {"source": train.source, "train": len(train), "test": len(test)},
        **history,
        "test_accuracy": _training.accuracy(counts),
        "classes": train.classes,
        "confusion": counts.tolist(),
    }
    say(_report.confusion(report))
    written = _write(report, model, out)
    say(f"Test accuracy {report['test_accuracy']:.2%}; written into {out}: {', '.join(written)}")
    return report


def _write(report: dict, model: torch.nn.Module, out: Path) -> list[str]:
    """Writes the RESULTS; returns the names of those that could be made."""
    parameters, words, table, picture = (out / name for name in RESULTS)
    text = _report.confusion(report) + "\n"
    _save({name: value.cpu() for name, value in model.state_dict().items()}, parameters)
    _report.save(report, words)
    _files.replace(table, lambda name: Path(name).write_text(text, encoding="utf-8"))
    drawn = _report.plot_confusion(report, picture)
    return [name for name in RESULTS if drawn or name != picture.name]


def _extend(history: list[float], losses: list[torch.Tensor]) -> None:
    """Moves losses from the device into the history."""
    if losses:
        history.extend(torch.stack(losses).tolist())
        losses.clear()


def _random_state(device: torch.device) -> dict:
    """Of the generators that dropout draws from."""
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": on_gpu}


def _set_random_state(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def _save(state: dict, path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    _files.replace(path, lambda name: Path(name).write_bytes(buffer.getbuffer()))


def _identity(settings: Settings, train: data.images.ImageSet) -> dict:
    """What a checkpoint and the run that goes on from it must agree in."""
    names = ("model", "dataset", "epochs", "batch_size", "lr", "seed", "limit")
    images = hashlib.blake2b(train.images.numpy(), digest_size=8)
    images.update(train.labels.numpy())
    return {**{name: getattr(settings, name) for name in names}, "data": images.hexdigest()}


def _saved(path: Path, identity: dict) -> dict:
    """The checkpoint at `path`, of a run with this identity."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged file makes of the reader
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: truncated or corrupted: {first}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this version of fastconv train")
    for name, value in identity.items():
        there = state["identity"].get(name)
        if there != value:
            raise CheckpointError(f"{path}: is of a run with {name} {there}, this one has {value}")
    return state
