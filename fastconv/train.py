# SPDX-License-Identifier: MIT
"""Trains one of fastconv.models' networks: the work of `fastconv train`.

A checkpoint holds all that the steps to come depend on: parameters, Adam's state, torch's random state, the
position in the epoch's order. A run that was killed and resumed ends with the bits of one that was not.

Under torchrun each process computes its part of every batch; all of them go through `_run`, and the first one
speaks and writes. Dropout and batch-norm work on a process's part, as usual with DistributedDataParallel.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import math
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import fastconv
from fastconv import _distributed, _files, _report, _training, data, models
from fastconv._distributed import ProcessError, Processes
from fastconv._training import Trainer, progress

FORMAT = 2  # of checkpoints
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

    Under torchrun it is to be called in each process, with the same settings.

    Raises:
        FileExistsError: There is a checkpoint already, and `settings.resume` is False.
        CheckpointError: The checkpoint is damaged, or one of another run.
        ProcessError: The processes can't share the work, or another one has ended.
        OSError: A file can't be written; it names the file. The last checkpoint stays.
    """
    settings = replace(settings, dataset=settings.dataset or _training.dataset_of(settings.model))
    device, reason = _device(settings.device)
    with _distributed.join(device) as processes:
        return _run(settings, device, reason, processes, say if processes.first else lambda _: None)


def _device(name: str | None) -> tuple[torch.device, str]:
    """The device of this process, and why: of several processes each has the GPU of its number."""
    device, reason = _training.best_device() if name is None else (torch.device(name), "asked for")
    count = _distributed.process_count()
    if count == 1 or device.type != "cuda":
        return device, reason
    if device.index is not None:
        raise ProcessError(f"--device {name}: {count} processes need a GPU each; give cuda or cpu")
    device, there = _distributed.own_gpu(), torch.cuda.device_count()
    if device.index >= there:
        raise ProcessError(f"process {device.index} finds no GPU of its own: {there} are visible")
    return device, reason


def _run(
    settings: Settings,
    device: torch.device,
    reason: str,
    processes: Processes,
    say: Callable[[str], None],
) -> dict:
    out = Path(settings.out)
    if processes.first:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("checkpoint.pt", *RESULTS):
            _files.clear(out / name)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists() and not settings.resume:
        raise FileExistsError(
            f"{checkpoint}: there is a checkpoint already: go on with --resume, or use another folder"
        )
    if not processes.first:
        processes.wait()  # until the first has downloaded
    train, test, notes = _training.load(settings.dataset, settings.data, settings.limit, settings.download)
    if processes.first:
        processes.wait()
    smallest = len(train) % settings.batch_size or settings.batch_size
    if smallest < processes.count:
        raise ProcessError(
            f"--batch-size {settings.batch_size}: the last batch has {smallest} of the {len(train)} images, "
            f"fewer than there are processes ({processes.count})"
        )
    identity = _identity(settings, processes, train)
    saved = _saved(checkpoint, identity) if checkpoint.exists() else None

    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device, _training.fp32_precision("ieee"):
        torch.manual_seed(settings.seed)
        size, classes = _training.image_size(train), len(train.classes)
        model = models.build(settings.model, fastconv, size, classes).to(device)
        if not processes.first:  # other masks of dropout
            torch.manual_seed((settings.seed + processes.rank) % 2**63)
        per_epoch = math.ceil(len(train) / settings.batch_size)
        trainer = Trainer(model, settings.lr, settings.epochs * per_epoch, processes)
        history = {"loss": [], "accuracy": []}  # of each step, and after each epoch
        if saved is not None:
            try:
                trainer.load_state_dict(saved["trainer"])
                counts = {"loss": trainer.done, "accuracy": trainer.done // per_epoch}
                history = {name: _numbers(saved["history"][name], count) for name, count in counts.items()}
                _set_random_state(saved["random"][processes.rank], device)
            except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                raise CheckpointError(f"{checkpoint}: not a checkpoint of this network: {error}") from error
        say(
            f"{settings.model} on {device} ({reason})"
            + (f", the first of {processes.count} processes" if processes.count > 1 else "")
            + "\n"
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
                "random": processes.gather(_random_state(device)),
            }
            if processes.first:
                _save(state, checkpoint)

        for epoch in range(trainer.done // per_epoch, settings.epochs):
            batches = data.batches(train, settings.batch_size, seed=settings.seed, epoch=epoch, device=device)
            start = trainer.done % per_epoch
            rest = itertools.islice(batches, start, None)
            losses, title = [], f"epoch {epoch + 1} of {settings.epochs}"
            for images, labels in progress(rest, title, per_epoch, start, hidden=not processes.first):
                losses.append(trainer.step(images, labels))
                if trainer.done % per_epoch and trainer.done % (settings.save_every or per_epoch) == 0:
                    _extend(history["loss"], losses, processes)
                    save()
            _extend(history["loss"], losses, processes)
            history["accuracy"].append(_training.accuracy(_training.confusion(model, exam, classes)))
            save()
            say(
                f"{title}: mean loss {math.fsum(history['loss'][-per_epoch:]) / per_epoch:.4f}, "
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
    if not processes.first:
        return report
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


def _extend(history: list[float], losses: list[torch.Tensor], processes: Processes) -> None:
    """Moves the processes' shares of losses from the device into the history."""
    if losses:
        history.extend(processes.sum(torch.stack(losses)).tolist())
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


def _identity(settings: Settings, processes: Processes, train: data.images.ImageSet) -> dict:
    """What a checkpoint and the run that goes on from it must agree in."""
    names = ("model", "dataset", "epochs", "batch_size", "lr", "seed", "limit")
    images = hashlib.blake2b(train.images.numpy(), digest_size=8)
    images.update(train.labels.numpy())
    given = {name: getattr(settings, name) for name in names}
    return {**given, "processes": processes.count, "data": images.hexdigest()}


def load(path: Path) -> object:
    """What `run` has written to a .pt file, on the CPU.

    Raises:
        CheckpointError: It is truncated or corrupted.
        OSError: It can't be read.
    """
    content = _files.read(path)
    try:
        _check_zip(content)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes of the reader
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: truncated or corrupted: {first}") from error


def _saved(path: Path, identity: dict) -> dict:
    """The checkpoint at `path`, of a run with this identity."""
    state = load(path)
    if type(state) is not dict or state.get("format") != FORMAT or type(state.get("identity")) is not dict:
        raise CheckpointError(f"{path}: not a checkpoint of this version of fastconv train")
    for name, value in identity.items():
        there = state["identity"].get(name)
        if there != value:
            raise CheckpointError(f"{path}: is of a run with {name} {there}, this one has {value}")
    return state


def _check_zip(content: bytes) -> None:
    """Raises an exception unless the checksums of a file by torch.save are right; torch.load ignores them."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sum(each.file_size for each in archive.infolist()) > len(content):
            raise ValueError("it unpacks to more than it is")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} is wrong")


def _numbers(values: list, count: int) -> list[float]:
    if not (len(values) == count and all(type(value) is float for value in values)):
        raise ValueError(f"its history has not {count} numbers")
    return list(values)
