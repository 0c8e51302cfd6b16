# SPDX-License-Identifier: MIT
"""The stages of benchmarks.gpu_check that need the built extension; each is a function of the Run."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch

import fastconv
from benchmarks.device import CALLS, captured, kernels
from benchmarks.gpu_check import ROOT, Run, floor
from benchmarks.passes import (
    PASSES,
    SHAPES,
    TINY,
    Shape,
    calls_of,
    flops,
    largest_error,
    least_bytes,
    operands_of,
    rows_of,
)
from fastconv import _timing, _training
from fastconv._accuracy import allowance, image_losses
from fastconv.models import FashionCNN, LeNet

SOFTWARE = {"fastconv": fastconv.__version__, "threads": torch.get_num_threads()}


# --- tests --------------------------------------------------------------------------------------------------


class Recorder:
    """A pytest plugin: saves the outcome of each test, leaves out those that have passed, ends in time."""

    def __init__(self, run: Run):
        self.run, self.result, self.saved, self.left = run, run.read("tests"), time.time(), 0

    def pytest_collection_modifyitems(self, items):
        done = self.result["items"]
        items[:] = [each for each in items if done.get(each.nodeid, {}).get("outcome") != "passed"]
        self.left = len(items)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.result["items"][report.nodeid] = {"outcome": report.outcome}
        if report.when == "teardown":
            self.left -= 1

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item):
        item.session.shouldstop = "the time is over" if time.time() > self.run.deadline else False
        if time.time() - self.saved > 1:
            self.save("cut")

    def save(self, state: str):
        outcomes = [each["outcome"] for each in self.result["items"].values()]
        note = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in sorted(set(outcomes)))
        self.result.update(state=state, note=note + f", {self.left} left for --resume" * (self.left > 0))
        self.run.write("tests", self.result)
        self.saved = time.time()


def tests(run: Run) -> None:
    """`pytest -m gpu`, recorded in fastconv/kernels.json and DIR; a dry run takes a few tests of the CPU."""
    recorder, start = Recorder(run), time.time()
    chosen = ["-m", "gpu and not slow", "--record", "tests"] if not run.dry else ["tests/test_layering.py"]
    os.chdir(ROOT)
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    code = pytest.main([*options, *chosen], plugins=[recorder])
    recorder.result["seconds"] += time.time() - start
    fine = code in (pytest.ExitCode.OK, pytest.ExitCode.INTERRUPTED)  # interrupted when the time is over
    recorder.save("failed" if not fine else "cut" if recorder.left else "done")
    if not run.dry:
        shutil.copy(ROOT / "fastconv" / "kernels.json", run.folder)


# --- sanitizer ----------------------------------------------------------------------------------------------


def sanitizer(run: Run) -> None:
    """Every row once on tiny calls, under compute-sanitizer; a dry run does without it."""
    places = os.pathsep.join((os.environ["PATH"], os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"))
    tool = shutil.which("compute-sanitizer", path=places)
    if tool is None and not run.dry:
        return run.write("sanitizer", {**run.read("sanitizer"), "state": "absent", "note": "not installed"})

    def check(kind: str) -> dict:
        if run.dry:
            touch_rows("cpu")
            return {}
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-c"]
        command += ["from benchmarks.gpu_stages import touch_rows; touch_rows('cuda')"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        (run.folder / f"{kind}.log").write_text(done.stdout + done.stderr)
        if done.returncode:
            raise RuntimeError(f"{kind} found something: {kind}.log")
        return {"command": " ".join(command[:5])}

    run.work("sanitizer", {kind: functools.partial(check, kind) for kind in ("memcheck", "racecheck")})


def touch_rows(device: str) -> None:
    """Calls every row that accepts a tiny shape once."""
    with _training.fp32_precision("tf32"):
        for shape in TINY:
            for pass_ in PASSES[shape.op]:
                ours, _ = calls_of(shape, pass_, operands_of(shape, torch.float32, device))
                for row, _ in rows_of(shape, pass_, torch.float32, device):
                    ours(row)
    if device == "cuda":
        torch.cuda.synchronize()


# --- rows ---------------------------------------------------------------------------------------------------


def _timed(run: Run, peers: dict[str, Callable], calls: int, seconds: float) -> dict[str, dict]:
    """The seconds a call of each peer, turn by turn; a peer makes `calls` of them at once."""
    if run.dry:  # nothing is measured
        _timing.SETTLE = _timing.SAMPLE = 1e-3
    timed = _timing.compare(peers, seconds=0.01 if run.dry else seconds, device=run.device)
    return {name: {"samples": [each / calls for each in timed.samples[name]]} for name in peers}


def _group(dtype: torch.dtype, shape: Shape, pass_: str) -> str:
    return f"{shape.name} {str(dtype).removeprefix('torch.')} {pass_}"


@torch.no_grad()
def _measure(run: Run, dtype: torch.dtype, shape: Shape, pass_: str) -> dict:
    """Every row that takes the call, and torch in each of its forms, in turns, by name in TF32 or in full."""
    operands = operands_of(shape, dtype, run.device)
    exact = calls_of(shape, pass_, {name: t.double() for name, t in operands.items()})[1]()
    ours, _ = calls_of(shape, pass_, operands)
    with _training.fp32_precision("ieee"):
        chosen = next(row for row, is_chosen in rows_of(shape, pass_, dtype, run.device) if is_chosen)
    with _training.fp32_precision("tf32"):
        accepting = [row for row, _ in rows_of(shape, pass_, dtype, run.device)]
    functions = {row: functools.partial(ours, row) for row in accepting}
    precision = {row: "tf32" for row in accepting if row.endswith("_tf32")}
    last = {name: t.to(memory_format=torch.channels_last) for name, t in operands.items() if t.dim() == 4}
    for layout, moved in {"contiguous": {}, **({"channels_last": last} if last else {})}.items():
        for tf32 in ("ieee", "tf32") if shape.weight and dtype is torch.float32 else ("ieee",):
            name = f"torch {layout}" + " TF32" * (tf32 == "tf32")
            functions[name], precision[name] = calls_of(shape, pass_, operands | moved)[1], tf32
    found, peers = {}, {}
    for name, function in functions.items():
        with _training.fp32_precision(precision.get(name, "ieee")):
            found[name] = {"error": largest_error(function(), exact)}
            peers[name] = function if run.dry else captured(function, CALLS)
    for name, timed in _timed(run, peers, 1 if run.dry else CALLS, 0.6).items():
        theirs = "torch contiguous" + " TF32" * (precision.get(name) == "tf32")
        found[name] |= {**timed, "allowed": allowance(found[theirs]["error"], 1.0, dtype)}
    return {
        "group": _group(dtype, shape, pass_),
        "suite": "passes",
        "chosen": chosen,
        **SOFTWARE,
        "shape": asdict(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "direction": pass_,
        "flops": flops(shape, pass_),
        "bytes": least_bytes(shape, pass_, dtype.itemsize),
        "contenders": found,
    }


def last_measured(run: Run) -> dict[str, str]:
    """When each row was measured last, by the results of earlier runs; those never measured are missing."""
    found = {}
    for path in run.history.glob("*.json") if run.history.is_dir() else ():
        report = json.loads(path.read_text())
        for extra in [each["extra_info"] for each in report["benchmarks"]]:
            if "implementation" in extra and not extra.get("dry"):
                row = extra["implementation"]
                found[row] = max(found.get(row, ""), report["datetime"])
    return found


def rows(run: Run) -> None:
    """Times every row on every shape; first those calls whose rows were measured longest ago, or never."""
    before = last_measured(run)

    def age(dtype: torch.dtype, shape: Shape, pass_: str) -> str:
        return min((before.get(row, "") for row, _ in rows_of(shape, pass_, dtype, run.device)), default="")

    shapes = TINY if run.dry else SHAPES
    dtypes = [torch.float32] if run.dry else [torch.float32, torch.bfloat16]
    calls = [(dtype, shape, pass_) for dtype in dtypes for shape in shapes for pass_ in PASSES[shape.op]]
    calls.sort(key=lambda call: age(*call))
    torch.backends.cudnn.benchmark = True
    run.work("rows", {_group(*call): functools.partial(_measure, run, *call) for call in calls})


# --- networks -----------------------------------------------------------------------------------------------


def _step(model, optimizer, images, labels):
    optimizer.zero_grad()
    loss = image_losses(model(images), labels).mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


NETWORKS = {"lenet": (LeNet, (1, 32, 32)), "fashion_cnn": (FashionCNN, (1, 28, 28))}


def _network(run: Run, network: str, batch: int, training: bool) -> dict:
    """A network by torch and by fastconv: eager, compiled, and each in a CUDA graph."""
    make, size = NETWORKS[network]
    torch.manual_seed(0)
    images = torch.rand(batch, *size).to(run.device)
    labels = torch.randint(10, (batch,)).to(run.device)
    theirs = make(torch.nn).to(run.device).train(training)
    for each in theirs.modules():
        if isinstance(each, torch.nn.Dropout):
            each.p = 0.0  # chance would differ from form to form
    models = {"torch": theirs, "torch channels_last": copy.deepcopy(theirs)}
    models["torch channels_last"].to(memory_format=torch.channels_last)
    models["torch compiled"] = torch.compile(copy.deepcopy(theirs), disable=run.dry)
    models["fastconv"] = fastconv.convert(copy.deepcopy(theirs))
    models["fastconv optimized"] = fastconv.optimize(copy.deepcopy(theirs))
    exact = copy.deepcopy(theirs).double()(images.double())
    exact = image_losses(exact, labels).mean() if training else exact
    found, peers = {}, {}
    for name, model in models.items():
        x = images.to(memory_format=torch.channels_last) if name.endswith("last") else images
        try:
            if training:  # at a learning rate of zero the work stays the same
                sgd = torch.optim.SGD(model.parameters(), 0.0)
                function = functools.partial(_step, model, sgd, x, labels)
            else:
                function = torch.no_grad()(functools.partial(model, x))
            entry = {"error": largest_error((function(),), (exact.detach(),))}
            peers[name], found[name] = function, entry
            if not run.dry:
                peers[f"{name}, graph"], found[f"{name}, graph"] = captured(function), dict(entry)
        except Exception as error:
            found[name] = {**found.get(name, {}), "failed": f"{type(error).__name__}: {error}".split("\n")[0]}
    allowed = allowance(found["torch"]["error"], 1.0, torch.float32)
    for name, timed in _timed(run, peers, 1, 2.0).items():
        found[name] |= {**timed, "allowed": allowed}
    direction = "training step" if training else "inference"
    return {
        "group": f"{network} batch {batch} {direction}",
        "suite": "networks",
        "network": network,
        "batch_size": batch,
        "chosen": "fastconv optimized" + ", graph" * (not run.dry),
        **SOFTWARE,
        "dtype": "float32",
        "direction": direction,
        "contenders": found,
    }


def networks(run: Run) -> None:
    """LeNet and FashionCNN as a whole, in full float32."""
    torch.backends.cudnn.benchmark = True
    sizes = [("lenet", 2), ("fashion_cnn", 2)]
    if not run.dry:
        sizes = [("lenet", 64), ("lenet", 1), ("fashion_cnn", 64), ("lenet", 256), ("lenet", 8192)]
    calls = [(*size, training) for size in sizes for training in (False, True)]
    with _training.fp32_precision("ieee"):
        run.work("networks", {str(call): functools.partial(_network, run, *call) for call in calls})


# --- ceilings and profile -----------------------------------------------------------------------------------


def ceilings(run: Run) -> None:
    """What the machine reaches at best: bytes a second of a copy, FLOP/s of a float32 product."""

    def reached(amount: float, function: Callable) -> dict:
        return {"amount": amount, **_timed(run, {"peer": function}, 1, 0.5)["peer"]}

    n = 16 if run.dry else 8192
    a, b, c = (torch.randn(n, n, device=run.device) for _ in range(3))
    copied = functools.partial(reached, 8 * n**2, lambda: c.copy_(a))
    product = functools.partial(reached, 2 * n**3, lambda: torch.mm(a, b, out=c))
    with _training.fp32_precision("ieee"):
        run.work("ceilings", {"bytes": copied, "flops": product})


def profile(run: Run) -> None:
    """The kernels of the chosen rows that lose most time against their floors, by torch.profiler."""
    measured = [each for each in run.read("rows")["items"].values() if "contenders" in each]
    shapes = {shape.name: shape for shape in [*SHAPES, *TINY]}
    ceiling = run.read("ceilings")["items"]

    def lost(each: dict) -> float:
        samples = each["contenders"].get(each["chosen"], {}).get("samples")
        return statistics.median(samples) - floor(each, ceiling)[0] if samples else -math.inf

    @torch.no_grad()
    def kernels_of(each: dict) -> dict:
        shape, dtype = shapes[each["shape"]["name"]], getattr(torch, each["dtype"])
        ours, _ = calls_of(shape, each["direction"], operands_of(shape, dtype, run.device))
        found = kernels(functools.partial(ours, each["chosen"]), run.device)
        return {"row": each["chosen"], "calls": CALLS, "kernels": found}

    slowest = sorted(measured, key=lost, reverse=True)[: 1 if run.dry else 12]
    run.work("profile", {each["group"]: functools.partial(kernels_of, each) for each in slowest})
