# SPDX-License-Identifier: MIT
"""The command line: `fastconv`, or `python -m fastconv`, with the commands that `fastconv --help` lists."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import fastconv
from fastconv import _explain, _report, _training, bench, kernels, models, show, train, validate
from fastconv._distributed import ProcessError

LAYOUTS = ("contiguous", "channels_last")
INSTRUCTION_SETS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512", "avx_vnni", "amx")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0, or 1 where fastconv and torch.nn disagree, 2 for what can't be done, 130 on Ctrl-C.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("\nfastconv: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, fastconv.data.DataError, train.CheckpointError, models.SizeError, ProcessError) as error:
        print(f"fastconv: {error}", file=sys.stderr)  # it names the file, or the argument
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastconv", description="Fast layers for small convolutional networks."
    )
    parser.add_argument("--version", action="version", version=f"fastconv {fastconv.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, help, **more):
        added = commands.add_parser(name, help=help, description=help, **more)
        added.set_defaults(run=run)
        return added

    defaults = validate.Settings()
    add = command(
        "validate",
        _validate,
        "train a network on torch.nn and on fastconv, and compare them",
        epilog=_VALIDATE_EPILOG,
    ).add_argument
    _add_training(add, defaults)
    add("--dtype", choices=validate.DTYPES, default=defaults.dtype, help="default %(default)s")
    add("--tf32", action="store_true", help="let GPUs compute float32 in TF32, on both sides")
    add("--seconds", type=_positive, default=defaults.seconds, help="for each timing, default %(default)s")
    add("--save", type=_new_file, metavar="REPORT.json", help="write the report to a file")
    add("--plot", type=_new_file, metavar="CURVES.png", help="draw the curves (needs matplotlib)")

    defaults = bench.Settings()
    add = command(
        "bench", _bench, "time a network on torch.nn and on fastconv", epilog=_BENCH_EPILOG
    ).add_argument
    _add_model(add, defaults)
    _add_machine(add)
    add("--seconds", type=_positive, default=defaults.seconds, help="for each table, default %(default)s")
    add("--save", type=_new_file, metavar="REPORT.json", help="write the report to a file")

    defaults = train.Settings(out="")
    add = command(
        "train", _train, "train a network on fastconv, resumably", epilog=_TRAIN_EPILOG
    ).add_argument
    _add_training(add, defaults)
    add("--out", required=True, metavar="DIR", help="folder for checkpoint, parameters and report")
    add("--resume", action="store_true", help="go on from the checkpoint in DIR, if there is one")
    add("--save-every", type=_count, metavar="STEPS", help="checkpoints within an epoch, too")
    add("--download", action="store_true", help="fetch data that ROOT lacks from its published mirrors")

    defaults = show.Settings(out="")
    add = command("show", _show, "draw what a network has learned (needs matplotlib)").add_argument
    _add_data(add, defaults)
    add("--weights", metavar="model.pt", help="as train has written them (default: none, untrained)")
    add("--image", type=_seed, default=defaults.image, help="of the test set, default %(default)s")
    add("--out", required=True, metavar="DIR", help="folder for the pictures")

    add = command("kernels", _kernels, "list the rows of every kernel table").add_argument
    add("--json", action="store_true", help="as JSON")

    explain = command(
        "explain",
        _explain_network,
        "which kernels run, and why not the others: in a network, or for one call",
    )
    add = explain.add_argument
    add("--model", choices=models.NETWORKS, help="the network to run, where no OP is given")
    form = explain.add_mutually_exclusive_group()
    form.add_argument("--fused", action="store_true", help="its fused form, which lenet has")
    form.add_argument("--optimize", action="store_true", help="through fastconv.optimize")
    add("--batch", type=_count, default=64, help="images, default %(default)s")
    add("--train", action="store_true", help="a training step, forward and backward; else eval mode")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one and this build can use it)")
    add("--threads", type=_count, metavar="N", help="CPU threads")
    add("--reasons", action="store_true", help="all rows of each table, too")
    ops = explain.add_subparsers(metavar="OP", dest="op")
    common = argparse.ArgumentParser(add_help=False)
    common.set_defaults(run=_explain_op)
    common.add_argument("--input", type=_shape, required=True, metavar="N,C,H,W", help="its sizes")
    common.add_argument("--device", choices=("cpu", "cuda"), help="default both")
    common.add_argument("--dtype", choices=validate.DTYPES, default="float32", help="default %(default)s")
    numbers = "one number, or one for each axis, default %(default)s"
    images = argparse.ArgumentParser(add_help=False)
    images.add_argument("--layout", choices=LAYOUTS, default="contiguous", help="default %(default)s")
    images.add_argument("--padding", type=_extents, default=0, help=numbers)
    dilated = argparse.ArgumentParser(add_help=False)
    dilated.add_argument("--dilation", type=_extents, default=1, help=numbers)
    filters = argparse.ArgumentParser(add_help=False)
    filters.add_argument("--weight", type=_shape, required=True, metavar="K,C,R,S", help="its sizes")
    filters.add_argument("--stride", type=_extents, default=1, help=numbers)
    filters.add_argument("--groups", type=_count, default=1, help="default %(default)s")
    pools = argparse.ArgumentParser(add_help=False)
    add = pools.add_argument
    add("--kernel-size", type=_extents, required=True, help="one number, or one for each axis")
    add("--stride", type=_extents, help="one number, or one for each axis, default the kernel size")
    add("--ceil-mode", action="store_true", help="count windows that end outside the padded input")

    for axes in (1, 2, 3):
        ops.add_parser(f"conv{axes}d", parents=[common, images, dilated, filters])
        ops.add_parser(f"max_pool{axes}d", parents=[common, images, dilated, pools])
        ops.add_parser(f"avg_pool{axes}d", parents=[common, images, pools])
    for op, parents in {
        "conv2d_relu_max_pool2d": [dilated, filters],
        "batch_norm_relu_max_pool2d": [],
    }.items():
        add = ops.add_parser(op, parents=[common, images, *parents]).add_argument
        add("--pool-kernel-size", type=_extents, required=True, help="one number or two")
        add("--pool-stride", type=_extents, help="one number or two, default the kernel size")
        add("--pool-padding", type=_extents, default=0, help="one number or two, default %(default)s")
    add = ops.add_parser("linear", parents=[common]).add_argument
    add("--weight", type=_shape, required=True, metavar="OUT,IN", help="its sizes")

    command("info", _info, "what this build, torch and this machine offer")
    return parser


def _add_data(add, defaults) -> None:
    """What validate, train and show have in common."""
    _add_model(add, defaults)
    add(
        "--dataset",
        choices=_training.DATASETS,
        help="default fashion-mnist, for cifarnet cifar10",
    )
    add(
        "--data",
        metavar="ROOT",
        help="folder with the data in torchvision's layout (default: FASTCONV_DATA; for Fashion-MNIST "
        "without either, the system's or a bundled subset)",
    )


def _add_training(add, defaults) -> None:
    """What validate and train have in common."""
    _add_data(add, defaults)
    add("--epochs", type=_count, default=defaults.epochs, help="default %(default)s")
    add("--batch-size", type=_count, default=defaults.batch_size, help="default %(default)s")
    add("--lr", type=_positive, default=defaults.lr, help="learning rate at the start, default %(default)s")
    add("--seed", type=_seed, default=defaults.seed, help="of parameters and batches, default %(default)s")
    add("--limit", type=_count, metavar="N", help="take only the first N training and N test images")
    _add_machine(add)


def _add_model(add, defaults) -> None:
    add("--model", choices=models.NETWORKS, default=defaults.model, help="default %(default)s")


def _add_machine(add) -> None:
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one and this build can use it)")
    add("--threads", type=_count, metavar="N", help="CPU threads")


_TRAIN_EPILOG = """
A run that was killed and resumed with the same arguments ends with the same bits as one that was not.

On several GPUs, or with several processes on a CPU: torchrun --nproc-per-node N -m fastconv train ... Each
process takes its part of every batch of --batch-size images (DistributedDataParallel), on the GPU of its
number or with --device cpu; the first one writes. --resume needs the same number of processes.
"""

_BENCH_EPILOG = """
Inference and training steps on random images, in tables of a few batch sizes; the contenders of a table take
turns. All are checked against float64 first. Exit code 1: one of them is wrong, and nothing is timed.
"""

_VALIDATE_EPILOG = """
Exit code 1: fastconv and torch.nn start from different parameters, or an output, loss or gradient of the
first 20 steps lies further from float64 than the error rule allows; see `python -m pydoc fastconv._accuracy`.
"""


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2**63 - 1, got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas between, got {text!r}") from None
    if any(abs(size) >= 2**63 for size in sizes):
        raise argparse.ArgumentTypeError(f"must be numbers of less than 64 bits, got {text!r}")
    return sizes


def _extents(text: str) -> int | tuple[int, ...]:
    sizes = _shape(text)
    return sizes[0] if len(sizes) == 1 else sizes


def _new_file(text: str) -> str:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, got {text!r}")
    return text


def _validate(options: argparse.Namespace) -> int:
    if options.plot:
        _need_matplotlib("--plot")
    report = validate.run(_settings(validate.Settings, options), say=_say)
    return _finish(report, {options.save: _report.save, options.plot: _report.plot})


def _bench(options: argparse.Namespace) -> int:
    report = bench.run(_settings(bench.Settings, options), say=_say)
    return _finish(report, {options.save: _report.save})


def _finish(report: dict, files: dict[str | None, Callable]) -> int:
    """Writes the report into the files that were asked for; the exit code."""
    for path, write in files.items():
        if path:
            write(report, path)
            print(f"Written: {path}")
    return 0 if report["passed"] else 1


def _train(options: argparse.Namespace) -> int:
    train.run(_settings(train.Settings, options), say=_say)
    return 0


def _show(options: argparse.Namespace) -> int:
    _need_matplotlib("show")
    try:
        show.run(_chosen(show.Settings, options), say=_say)
    except IndexError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return 0


def _need_matplotlib(what: str) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError(f"{what} needs matplotlib: pip install matplotlib")


def _settings(kind, options: argparse.Namespace):
    """The command's settings; sets the number of threads."""
    _device(options)
    return _chosen(kind, options)


def _chosen(kind, options: argparse.Namespace):
    return kind(**{field.name: getattr(options, field.name) for field in dataclasses.fields(kind)})


def _device(options: argparse.Namespace) -> torch.device:
    """The device to work on; sets the number of threads."""
    if options.device is not None:
        _check_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return _training.best_device()[0] if options.device is None else torch.device(options.device)


def _say(text: str) -> None:
    print(text, flush=True)


def _check_device(name: str) -> None:
    """Raises ArgumentTypeError unless both torch and this build can work on the device."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        build = fastconv._C.build_info()
        if not build["cuda"]:
            raise argparse.ArgumentTypeError(f"--device {name}: no CUDA kernels here: {build['cuda_reason']}")
        if (device.index or 0) >= torch.cuda.device_count():
            raise argparse.ArgumentTypeError(
                f"--device {name}: {torch.cuda.device_count()} CUDA devices are visible"
            )


def _kernels(options: argparse.Namespace) -> int:
    rows = [{key: _words(value) for key, value in row.items()} for row in kernels.list()]
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    titles = {
        "name": "name",
        "op": "op",
        "pass_": "pass",
        "device": "device",
        "dtypes": "dtypes",
        "layouts": "layouts",
        "file": "file",
        "emulated": "emulated",
        "gpu": "ran on",
    }
    table = [list(titles.values())]
    for row in rows:
        cells = [_cell(row[key]) for key in titles]
        table.append(cells + ([] if row["built"] else ["(not in this build)"]))
    widths = [max(len(line[i]) for line in table) for i in range(len(titles))]
    for line in table:
        print(
            "  ".join(
                [cell.ljust(width) for cell, width in zip(line, widths, strict=False)] + line[len(widths) :]
            ).rstrip()
        )
    return 0


def _cell(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else ",".join(value or "-")


def _words(value):
    """The value with dtypes and layouts of torch as their plain names."""
    if isinstance(value, (list, tuple)):
        return [_words(item) for item in value]
    return str(value).removeprefix("torch.") if isinstance(value, (torch.dtype, torch.layout)) else value


def _explain_op(options: argparse.Namespace) -> int:
    other = (
        "run",
        "op",
        "device",
        "dtype",
        "model",
        "fused",
        "optimize",
        "batch",
        "train",
        "threads",
        "reasons",
    )
    given = {key: value for key, value in vars(options).items() if key not in other}
    devices = [options.device] if options.device else ["cpu", "cuda"]
    try:
        passes = [
            each
            for device in devices
            for each in kernels.explain(
                options.op, device=device, dtype=validate.DTYPES[options.dtype], **given
            )
        ]
    except (RuntimeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    for each in passes:
        print(f"{options.op} {each['pass_']}: {each['chosen']}")
        print("\n".join(_explain.lines(each["rows"], each["chosen"])))
    return 0


def _explain_network(options: argparse.Namespace) -> int:
    if options.model is None:
        raise argparse.ArgumentTypeError("explain needs --model or the name of an OP")
    if options.fused and options.model != "lenet":
        raise argparse.ArgumentTypeError(f"--fused: lenet has a fused form, got --model {options.model}")
    device = _device(options)
    torch.manual_seed(0)
    size = (3, 32, 32) if options.model == "cifarnet" else (1, 28, 28)
    if options.fused:
        model = models.LeNet(padding=2, fused=True)
    else:
        model = models.build(options.model, torch.nn if options.optimize else fastconv, size)
    model.to(device).train(options.train)
    if options.optimize:
        model = fastconv.optimize(model)
    images = torch.randn(options.batch, *size, device=device)
    found = fastconv.explain(model, images, backward=options.train)
    print(found)
    if options.reasons:
        print(found.reasons)
    return 0


def _info(options: argparse.Namespace) -> int:
    print(f"fastconv {fastconv.__version__}, {Path(fastconv.__file__).parent}")
    for key, value in fastconv._C.build_info().items():
        print(f"  {key:14} {', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
    device, reason = _training.best_device()
    print(f"torch    {torch.__version__}, CUDA {torch.version.cuda}, {torch.get_num_threads()} CPU threads")
    print(f"device   {device} ({reason})")
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        print(
            f"  cuda:{i}  {found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB"
        )
    name, sets = _processor()
    print(f"CPU      {name}, {os.cpu_count()} cores, {' '.join(sets)}")
    return 0


def _processor() -> tuple[str, list[str]]:
    """The processor's name, and those of its instruction sets that matter here, as Linux lists them."""
    fields = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", "")).split()
    return fields.get("model name", platform.machine()), [f for f in flags if f.startswith(INSTRUCTION_SETS)]


if __name__ == "__main__":
    sys.exit(main())
