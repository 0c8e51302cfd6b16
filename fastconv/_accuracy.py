# SPDX-License-Identifier: MIT
"""How two implementations of one network are compared: by their errors against float64, along a training.

Two correct implementations round differently, and training amplifies the difference until the two have
little in common, so comparing their 20th losses shows nothing. Instead, at each of the first 20 steps both
get the parameters that torch.nn's training has reached, and the same batch. The same network in float64 on
the CPU says what is right, and one rule holds at every step, for the outputs, the loss of each image and the
gradient of each parameter:

    error of fastconv <= 2 * error of torch.nn + 2 ulp of the largest value

An error is the largest absolute difference from float64 within a tensor. Two things would break the rule by
luck alone:

* ReLU and max-pool branch. Where a value lies within rounding of zero, or two within rounding of each other,
  float32 may take another branch than float64, and a gradient changes by a thousandth, not by a millionth.
  So gradients are compared with float64 derivatives at the implementation's own activations: each float64
  layer passes on the value that the implementation computed. Wrong values don't hide behind this, since
  outputs and losses are compared with a plain float64 run.
* A small tensor, such as a bias, may have a small error by chance. A mean over a batch doesn't depend on the
  order of the images, but its rounding does; so errors are averaged over four orders, on both sides.

Dropout would draw other masks on each side, so here each call of it takes the mask of a generator of its own,
and the mask follows the images through the four orders. Batch-norm normalises by the batch, as in training.

For float64 there is no finer reference. Rounding errors are proportional to the unit roundoff, so there
torch.nn's error is measured in float32 and scaled.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

SIDES = ("torch.nn", "fastconv")
ORDERS = 4  # orders of each batch that errors are averaged over

Models = dict[str, torch.nn.Module]  # one for each of SIDES
Batch = tuple[torch.Tensor, torch.Tensor]  # images [N, C, H, W], labels int64 [N]


def allowance(torch_error: float, largest: float, dtype: torch.dtype) -> float:
    """The rule: how far from float64 a result may lie, given torch's own error and the largest value."""
    ulp = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)) if 0 < largest < math.inf else 0.0
    return 2 * torch_error + 2 * ulp


def image_losses(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each image, [N], in float32 or float64."""
    if outputs.element_size() < 4:
        outputs = outputs.float()
    return F.cross_entropy(outputs, labels, reduction="none")


def first_step(models: Models, batch: Batch) -> dict:
    """How far outputs, losses and gradients of one step lie from each other and from a plain float64 run.

    Returns {"batch": N, "tensors": {name: {"shape", "largest", "difference", "torch.nn", "fastconv"}},
    "branches": {side: count}}. "largest" is the scale of the values; "difference" is between the two
    sides, the last two are from float64. "branches" counts the ReLUs and pooling windows that
    decide otherwise than in float64.
    """
    images, labels = batch
    exact = _Pass(_float64(models["torch.nn"]), images.cpu().double(), labels.cpu())
    found = {side: _Pass(model, images, labels) for side, model in models.items()}
    tensors = {}
    for name, right in exact.values.items():
        theirs, ours = (found[side].values[name] for side in SIDES)
        tensors[name] = {
            "shape": list(right.shape),
            "largest": _scale(name, exact.values),
            "difference": _largest(ours - theirs),
            "torch.nn": _largest(theirs - right),
            "fastconv": _largest(ours - right),
        }
    branches = {
        side: sum(int((a != b).sum()) for a, b in zip(each.branches, exact.branches, strict=True))
        for side, each in found.items()
    }
    return {"batch": len(labels), "tensors": tensors, "branches": branches}


def check(models: Models, guide: torch.nn.Module, advance: Callable, batches: Iterable[Batch]) -> dict:
    """Applies the rule told at the top of this file to each of `batches`; the parameters of `models` change.

    guide: the model on torch.nn whose parameters both sides take at each step.
    advance: called with images and labels, makes one training step of `guide`.

    Returns {"passed", "steps", "worst": {"outputs": record, "losses": record, "gradients": record},
    "failures": [record], "gradients": {side: [largest relative gradient error of each step]}}. A record is
    {"step", "tensor", "largest", "torch.nn", "fastconv", "allowed"}: the tensor's largest value, the errors
    of both sides, and the bound.
    """
    dtype = next(guide.parameters()).dtype
    unit = 1.0  # what torch.nn's errors are multiplied by
    if dtype is torch.float64:
        models = {**models, "torch.nn": models["torch.nn"].float()}
        unit = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    reference = _float64(guide)
    generator = torch.Generator().manual_seed(0)
    records = []
    for step, (images, labels) in enumerate(batches, 1):
        orders = [torch.randperm(len(labels), generator=generator) for _ in range(ORDERS)]
        errors = {}
        for side, model in models.items():
            model.load_state_dict(guide.state_dict())
            reference.load_state_dict(model.state_dict())
            exact, errors[side] = _errors(model, reference, images, labels, orders)
        for name in exact:
            largest = _scale(name, exact)
            theirs, ours = unit * errors["torch.nn"][name], errors["fastconv"][name]
            bound = allowance(theirs, largest, dtype)
            found = {"torch.nn": theirs, "fastconv": ours, "allowed": bound}
            records.append({"step": step, "tensor": name, "largest": largest, **found})
        advance(images, labels)

    def worst(kind: str) -> dict:
        return max((r for r in records if r["tensor"].startswith(kind)), key=_share)

    failures = [record for record in records if not record["fastconv"] <= record["allowed"]]
    return {
        "passed": not failures,
        "steps": step,
        "worst": {"outputs": worst("outputs"), "losses": worst("losses"), "gradients": worst("grad ")},
        "failures": failures,
        "gradients": {side: _relative_gradient_errors(records, side, step) for side in SIDES},
    }


def _errors(model, reference, images, labels, orders) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The right value of each tensor, and `model`'s largest error in it, averaged over `orders`."""
    images = images.to(next(model.parameters()).dtype)
    exact = _Pass(reference, images.cpu().double(), labels.cpu()).values
    errors = dict.fromkeys(exact, 0.0)
    for rows in orders:
        x, y = images[rows.to(images.device)], labels[rows.to(labels.device)]
        found = _Pass(model, x, y, rows=rows)
        same_branches = _Pass(reference, x.cpu().double(), y.cpu(), found.activations, rows).values
        for name, value in found.values.items():
            right = same_branches[name] if name.startswith("grad ") else exact[name][rows]
            errors[name] += _largest(value - right) / len(orders)
    return exact, errors


def _share(record: dict) -> float:
    """The error as a share of what is allowed; infinite for NaN."""
    if record["fastconv"] == 0:
        return 0.0
    share = record["fastconv"] / record["allowed"] if record["allowed"] else math.inf
    return math.inf if math.isnan(share) else share


def _relative_gradient_errors(records: list[dict], side: str, steps: int) -> list[float]:
    """For each step, the largest error of a gradient in units of that gradient's largest value."""
    worst = [0.0] * steps
    for record in records:
        if record["tensor"].startswith("grad ") and record["largest"] > 0:
            worst[record["step"] - 1] = max(worst[record["step"] - 1], record[side] / record["largest"])
    return worst


class _Pass:
    """One forward and backward pass of `model` over a batch, as float64 copies on the CPU.

    values       name -> tensor: "outputs" [N, 10], "losses" [N], "grad <parameter>" for each parameter
    activations  the output of each layer, in the order of the calls
    branches     what decides a branch, layer by layer: the sign of each output, the place of each maximum

    Given `activations`, each layer passes these on instead of its own output; only derivatives are `model`'s.
    `rows` says which images of the step's batch these are, for dropout's masks.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        activations: list[torch.Tensor] | None = None,
        rows: torch.Tensor | None = None,
    ):
        self.activations, self.branches = [], []

        def hook(layer, inputs, output):
            if isinstance(layer, torch.nn.Dropout) and layer.training:
                output = inputs[0] * _mask(layer.p, inputs[0], len(self.activations), rows)
            if activations is not None:
                output = activations[len(self.activations)] + (output - output.detach())
            value = _float64_copy(output)
            self.activations.append(value)
            if isinstance(layer, torch.nn.MaxPool2d):
                window = layer.kernel_size, layer.stride, layer.padding
                self.branches.append(F.max_pool2d(_float64_copy(inputs[0]), *window, return_indices=True)[1])
            else:
                self.branches.append(value > 0)
            return output

        layers = [layer for layer in model.modules() if not any(layer.children())]
        hooks = [layer.register_forward_hook(hook) for layer in layers]
        try:
            outputs = model(images)
            losses = image_losses(outputs, labels)
            gradients = torch.autograd.grad(losses.mean(), list(model.parameters()))
        finally:
            for each in hooks:
                each.remove()
        self.branches.pop()  # nothing branches on the network's output
        names = [f"grad {name}" for name, _ in model.named_parameters()]
        found = {"outputs": outputs, "losses": losses, **dict(zip(names, gradients, strict=True))}
        self.values = {name: _float64_copy(value) for name, value in found.items()}


def _mask(p: float, like: torch.Tensor, seed: int, rows: torch.Tensor | None) -> torch.Tensor:
    """What dropout multiplies by: the same for every implementation, dtype and device."""
    drawn = torch.rand(like.shape, generator=torch.Generator().manual_seed(seed))
    kept = (drawn if rows is None else drawn[rows]) >= p
    return (kept.double() / (1 - p)).to(like)


def _scale(name: str, exact: dict[str, torch.Tensor]) -> float:
    """The largest value of a tensor.

    A bias before batch-norm has a gradient of zero, a sum that cancels: its scale is its layer's weight's.
    """
    largest = _largest(exact[name])
    weight = exact.get(name.removesuffix("bias") + "weight")
    if weight is None or largest > 1e-9 * _largest(weight):
        return largest
    return _largest(weight)


def _float64(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in float64 on the CPU."""
    return copy.deepcopy(model).cpu().double()


def _float64_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().double()


def _largest(tensor: torch.Tensor) -> float:
    """The largest absolute value; NaN if there is one."""
    return tensor.abs().max().item()
