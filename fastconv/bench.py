# SPDX-License-Identifier: MIT
"""Times a network on torch.nn and on fastconv: the work of `fastconv bench`.

Every contender is checked against float64 before any is timed. Its outputs keep the error rule of
fastconv._accuracy. Gradients may be off by more than rounding, torch.nn's too: where a ReLU or a pooling
window lies within rounding of a tie, float32 takes another branch than float64. Up to 0.3 % of the largest
gradient has been seen, so they are held to `GRADIENT_ERROR` alone; `fastconv validate` has a strict rule.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

import fastconv
from fastconv import _accuracy, _report, _training, models
from fastconv._accuracy import Batch
from fastconv._timing import compare
from fastconv._training import Trainer, fp32_precision, progress

INFERENCE, TRAINING = "inference", "training step"
GROUPS = [(INFERENCE, 1), (INFERENCE, 64), (INFERENCE, 256), (TRAINING, 64), (TRAINING, 256)]
MOST = max(count for _, count in GROUPS)  # images
GRADIENT_ERROR = 0.02  # allowed, in units of the largest gradient

Models = dict[str, torch.nn.Module]


@dataclass
class Settings:
    """What `run` does.

    model: one of fastconv.models.NETWORKS.
    device: None for the best there is.
    seconds: time for each of GROUPS.
    """

    model: str = "lenet"
    device: str | None = None
    seconds: float = 10.0


def run(settings: Settings, say: Callable[[str], None] = print) -> dict:
    """Checks every contender and times it, says it group by group, and returns it as plain dicts and lists.

    Keys: versions, device, settings, wrong, passed, speed. `wrong` has a sentence for each contender that
    lies too far from float64; then nothing is timed, and `passed` is False. `speed` has for each of GROUPS
    what the function `speed` returns, and each contender's "error": the largest difference of its outputs,
    in a training step of its gradients, from float64, in units of the largest value.
    """
    device, report = _training.place(settings.device)
    report["settings"] = asdict(settings)
    say("\n".join([*_report.place(report), f"  model    {settings.model}, float32 in full precision"]))
    size = (3, 32, 32) if settings.model == "cifarnet" else (1, 28, 28)
    torch.manual_seed(0)
    model = models.build(settings.model, torch.nn, size)
    batch = torch.rand(MOST, *size), torch.randint(10, (MOST,))

    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device, fp32_precision("ieee"):
        errors, report["wrong"] = _check(model, batch, device)
        report["passed"] = not report["wrong"]
        report["speed"] = []
        for sentence in report["wrong"]:
            say(f"\nWRONG, so nothing is timed: {sentence}")
        contenders = _contenders(model, device)
        for kind, count in progress(GROUPS if report["passed"] else [], "timing", len(GROUPS)):
            batches = {name: _part(name, batch, count, device) for name in contenders}
            group = speed(contenders, batches, kind, settings.seconds)
            for name, row in group["contenders"].items():
                row["error"] = errors[kind, count][name]
            report["speed"].append(group)
            with tqdm.external_write_mode():
                say(_report.speed(group))
    return report


def speed(contenders: Models, batches: dict[str, Batch], kind: str, seconds: float) -> dict:
    """Times `contenders` in turns, each on its batch of `batches`. They stay as they are.

    kind: INFERENCE, in eval mode and without gradients, or TRAINING: a step of forward, cross-entropy,
        backward and Adam with a learning rate of zero, so that the work stays the same.

    Returns {"kind", "batch": images, "contenders": {name: {"seconds", "images", "ratio"}}}: quartiles of the
    seconds for a batch, of the images a second, and of how many times as fast as "torch.nn" it is.
    """
    prepare = {INFERENCE: _inference, TRAINING: _training_step}[kind]
    calls = {name: prepare(copy.deepcopy(model), *batches[name]) for name, model in contenders.items()}
    images, _ = batches["torch.nn"]
    with torch.set_grad_enabled(kind == TRAINING):
        timed = compare(calls, seconds=seconds, device=images.device)
    rows = {
        name: {
            "seconds": asdict(timed.time(name)),
            "images": asdict(timed.time(name).inverted(len(images))),
            "ratio": asdict(timed.ratio(name, "torch.nn")),
        }
        for name in calls
    }
    return {"kind": kind, "batch": len(images), "contenders": rows}


def _inference(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable:
    model.eval()
    return lambda: model(images)


def _training_step(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable:
    trainer = Trainer(model.train(), 0.0, 1)
    return lambda: trainer.step(images, labels)


def _fused_lenet(model: models.LeNet) -> models.LeNet:
    first, last = model.conv1, model.fc3
    fused = models.LeNet(fastconv, first.in_channels, last.out_features, first.padding[0], fused=True)
    fused.load_state_dict(model.state_dict())
    return fused.to(first.weight.device)


# Each is made of a network on torch.nn, which it may change.
CONTENDERS = {
    "torch.nn": lambda model: model,
    "torch.nn channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "fastconv": fastconv.convert,
    "fastconv fused": _fused_lenet,  # of LeNet alone
    "fastconv.optimize": fastconv.optimize,
}


def _contenders(model: torch.nn.Module, device: torch.device) -> Models:
    return {
        name: make(copy.deepcopy(model).to(device))
        for name, make in CONTENDERS.items()
        if make is not _fused_lenet or isinstance(model, models.LeNet)
    }


def _part(name: str, batch: Batch, count: int, device: torch.device) -> Batch:
    """The first `count` images, in the layout that the contender takes, and their labels."""
    layout = torch.channels_last if name.endswith("channels_last") else torch.contiguous_format
    images, labels = (each[:count].to(device) for each in batch)
    return images.contiguous(memory_format=layout), labels


def _check(model: torch.nn.Module, batch: Batch, device: torch.device) -> tuple[dict, list[str]]:
    """Errors from float64, {group: {contender: error}}, and a sentence for each that is too large.

    The rule for outputs takes torch.nn's error over all images; that of a few may be small by chance.
    """
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0  # each contender would draw masks of its own
    exact, contenders = copy.deepcopy(model).double(), _contenders(model, device)

    def error(values: Callable, count: int, name: str) -> tuple[float, float]:
        """Of the contender's values, in units of the largest one, and that one."""
        right = values(exact, batch[0][:count].double(), batch[1][:count])
        wrong_by = values(contenders[name], *_part(name, batch, count, device)) - right
        largest = right.abs().max().item()
        return wrong_by.abs().max().item() / largest, largest

    theirs, largest = error(_outputs, MOST, "torch.nn")
    rule = _accuracy.allowance(theirs * largest, largest, torch.float32) / largest
    checks = {INFERENCE: (_outputs, rule), TRAINING: (_gradients, GRADIENT_ERROR)}
    errors, wrong = {}, []
    for kind, count in GROUPS:
        values, allowed = checks[kind]
        errors[kind, count] = {name: error(values, count, name)[0] for name in contenders}
        wrong += [
            f"{name}, {kind} of {count} images, has an error of {found:.1e} of the largest value, "
            f"where {allowed:.1e} are allowed"
            for name, found in errors[kind, count].items()
            if not found <= allowed
        ]
    return errors, wrong


def _outputs(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images).cpu().double()


def _gradients(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of the mean loss, for all parameters, one after another."""
    loss = _accuracy.image_losses(model.train()(images), labels).mean()
    parameters = [parameter for _, parameter in sorted(model.named_parameters())]
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, parameters)]).cpu().double()
