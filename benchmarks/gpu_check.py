# SPDX-License-Identifier: MIT
"""All that a machine with a GPU can tell, in one command and few minutes, without a network.

    python -m benchmarks.gpu_check --out DIR [--stages build,rows] [--minutes 9]
    python -m benchmarks.gpu_check --resume DIR        goes on with what an earlier call left undone
    python -m benchmarks.gpu_check --out DIR --dry-run  every stage with tiny work on the CPU; no GPU figures

Run it in the root of a source tree. Each stage is a process of its own and has a limit: its share of the time
that is left. It saves each item as soon as that is done, so one that is cut short keeps what it has. DIR gets
a file for each stage and, after each, results in pytest-benchmark's format and as a Markdown table, named
after the GPU, the version of torch and the state of the source.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
import traceback
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
STAGES = {  # and the share of the time of each
    "build": 6.0,
    "tests": 1.5,
    "sanitizer": 0.5,
    "ceilings": 0.1,
    "rows": 2.2,
    "networks": 1.3,
    "profile": 0.4,
}
NOT_BEGUN = {"state": "not begun", "note": "", "seconds": 0.0, "items": {}}
GRACE = 5.0  # seconds that a stage may take beyond its limit to finish an item
FORK = multiprocessing.get_context("fork")  # torch is imported once; nothing in this process touches the GPU


@dataclass(frozen=True)
class Run:
    """What a stage is told."""

    folder: Path
    dry: bool
    history: Path  # with results of earlier runs
    deadline: float = 0.0  # of the stage, by time.time()

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def read(self, stage: str) -> dict:
        """What is known of a stage: {"state", "note", "seconds", "items": {key: result}}."""
        try:
            return json.loads((self.folder / f"{stage}.json").read_text())
        except FileNotFoundError:
            return json.loads(json.dumps(NOT_BEGUN))

    def write(self, stage: str, result: dict) -> None:
        save(self.folder / f"{stage}.json", json.dumps(result, indent=1))

    def work(self, stage: str, items: dict) -> None:
        """Does items (key -> function that returns a dict) in order until the deadline, saving each.

        Those that an earlier run has done are left alone; those that failed are tried again.
        """
        result, longest, begin = self.read(stage), 0.0, time.time()
        before, done, parent = result["seconds"], result["items"], multiprocessing.parent_process()
        result.update(state="cut", note="")
        for key, function in tqdm(items.items(), desc=stage, leave=False, disable=None):
            if "when" in done.get(key, {}):
                continue
            start = time.time()
            if start + longest > self.deadline or (parent and not parent.is_alive()):
                break
            try:
                done[key] = {**function(), "when": now()}
            except Exception as error:
                done[key] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
                traceback.print_exc()
            longest = max(longest, time.time() - start)
            self.write(stage, {**result, "seconds": before + time.time() - begin})
        left = sum(key not in done for key in items)
        failed = [key for key in items if "failed" in done.get(key, {})]
        result["state"] = "cut" if left else "failed" if failed else "done"
        notes = [f"{left} of {len(items)} items left for --resume"] if left else []
        notes += [f"{len(failed)} failed, as {failed[0]}: {done[failed[0]]['failed']}"] if failed else []
        self.write(stage, {**result, "note": "; ".join(notes), "seconds": before + time.time() - begin})


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def save(path: Path, text: str) -> None:
    """Writes a file whole, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def build(run: Run) -> None:
    """Installs the tree for the GPU of this machine alone; a dry run builds nothing."""

    def install() -> dict:
        command, environment = [sys.executable, "-c", "print('nothing is built')"], dict(os.environ)
        if not run.dry:
            command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "."]
            environment.update(
                FASTCONV_CUDA="1",
                TORCH_CUDA_ARCH_LIST="{}.{}".format(*torch.cuda.get_device_capability()),
                MAX_JOBS=environment.get("MAX_JOBS", str(os.cpu_count())),
            )
        with open(run.folder / "build.log", "w") as log:
            subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)
        return {"command": " ".join(command)}

    run.work("build", {"install": install})


def is_installed() -> bool:
    return any(Path(sysconfig.get_path("platlib"), "fastconv").glob("_C*"))


def _stage(name: str, run: Run) -> None:
    os.setsid()  # with all that it starts, it can be ended at once
    if run.dry:
        torch.set_num_threads(1)
    if name == "build":
        return build(run)
    getattr(importlib.import_module("benchmarks.gpu_stages"), name)(run)


def perform(name: str, run: Run, limit: float) -> dict:
    """Does a stage, or ends it after `limit` seconds; returns what is known of it then."""
    start = time.time()
    process = FORK.Process(target=_stage, args=(name, replace(run, deadline=start + limit)))
    process.start()
    try:
        process.join(limit + GRACE)
    finally:
        late = process.is_alive()
        if late:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
    result = run.read(name)
    if late and result["state"] in ("not begun", "cut"):
        result.update(state="cut", note=f"ended after {limit + GRACE:.0f} s; the rest is left for --resume")
    elif process.exitcode and not late:
        result.update(state="failed", note=f"exit code {process.exitcode}")
    run.write(name, result)
    return result


def source_state() -> str:
    """The commit, with -dirty where the tree differs from it; without git a hash of the sources."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        sources = ("benchmarks", "buildtools", "csrc", "fastconv", "setup.py")
        results = (":!benchmarks/results", ":!fastconv/kernels.json")  # a run may write these
        changed = git("status", "--porcelain", "--", *sources, *results)
        return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        digest, kinds = hashlib.sha256(), {".py", ".h", ".cuh", ".inl", ".cpp", ".cu"}
        for folder in ("benchmarks", "buildtools", "csrc", "fastconv"):
            for path in sorted((ROOT / folder).rglob("*")):
                if path.suffix in kinds:
                    digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
        return f"hash-{digest.hexdigest()[:10]}"


def describe(dry: bool) -> dict:
    """The machine, for pytest-benchmark's machine_info. Runs in a process of its own: it starts CUDA."""
    found = {"gpu": "no GPU", "threads": torch.get_num_threads(), "torch": torch.__version__}
    found |= {"cuda": torch.version.cuda, "dry": dry}
    if not dry:
        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device; --dry-run works without one")
        found["gpu"] = torch.cuda.get_device_name()
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
        if shutil.which(command[0]):
            found[query] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    host = {"python_version": platform.python_version(), "cores": os.cpu_count()}
    return {**found, **host, "device": found["gpu"], "source": source_state(), "begun": now()}


# --- results ------------------------------------------------------------------------------------------------


def floor(measured: dict, ceilings: dict) -> tuple[float, str]:
    """The least seconds that a call can take, by the ceilings of the machine, and what holds it there."""
    best = {
        kind: measured[kind] / each["amount"] * statistics.median(each["samples"])
        for kind, each in ceilings.items()
        if "samples" in each
    }
    return max(((seconds, kind) for kind, seconds in best.items()), default=(0.0, ""))


def benchmarks(machine: dict, results: dict) -> dict:
    """Results in the format of pytest-benchmark, with the extra_info of benchmarks/conftest.py."""
    found = []
    for measured in [*results["rows"]["items"].values(), *results["networks"]["items"].values()]:
        timed = {name: each for name, each in measured.get("contenders", {}).items() if "samples" in each}
        for name, each in timed.items():
            quartiles = {base: _ratio(each, other) for base, other in timed.items() if base != name}
            stats = _stats(each["samples"])
            extra = {key: value for key, value in measured.items() if key != "contenders"}
            extra |= {
                "implementation": name,
                "device": machine["gpu"],
                "torch": machine["torch"],
                "seconds": _quartiles(each["samples"]),
                "times_as_fast_as": quartiles,
                "errors": {"largest_error": each["error"], "allowed": each["allowed"]},
                "layout": "channels_last" if "channels_last" in name else "contiguous",
                "dry": machine["dry"],
            }
            if "flops" in measured:
                extra["gflop_per_s"] = measured["flops"] / stats["median"] / 1e9
                extra["gbyte_per_s"] = measured["bytes"] / stats["median"] / 1e9
                least, _ = floor(measured, results["ceilings"]["items"])
                extra["share_of_peak"] = least / stats["median"]
            title = f"{measured['group']} {name}"
            entry = {"group": extra.pop("group"), "name": title, "fullname": f"gpu_check.py::{title}"}
            entry |= {"params": None, "param": None, "options": {}, "extra_info": extra, "stats": stats}
            found.append(entry)
    return {
        "machine_info": machine,
        "commit_info": {"id": machine["source"], "dirty": machine["source"].endswith("-dirty")},
        "benchmarks": found,
        "stages": {name: {**each, "items": len(each["items"])} for name, each in results.items()},
        "ceilings": results["ceilings"]["items"],
        "profile": results["profile"]["items"],
        "datetime": machine["begun"],
        "version": "5.1.0",
    }


def _quartiles(samples: list[float]) -> dict:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high, "count": len(samples)}


def _ratio(each: dict, base: dict) -> dict:
    return _quartiles([b / a for a, b in zip(each["samples"], base["samples"], strict=True)])


def _stats(samples: list[float]) -> dict:
    found, deviation = _quartiles(samples), statistics.stdev(samples)
    stats = {"min": min(samples), "max": max(samples), "mean": statistics.mean(samples), "stddev": deviation}
    stats |= {"rounds": len(samples), "total": sum(samples), "median": found["median"]}
    return {**stats, "q1": found["low"], "q3": found["high"], "iqr": found["high"] - found["low"]}


def markdown(machine: dict, results: dict) -> str:
    """One table of what was measured, below the state of the stages; a dry run's has no figures."""
    dry = machine["dry"]
    lines = [f"# {machine['gpu']}, torch {machine['torch']}, source {machine['source']}", ""]
    lines += ["**Dry run on a CPU: nothing here was measured on a GPU.**", ""] if dry else []
    lines += ["| stage | state | items | |", "| --- | --- | --- | --- |"]
    for name, each in results.items():
        lines.append(f"| {name} | {each['state']} | {len(each['items'])} | {each['note']} |")
    lines += [
        "",
        "Microseconds a call, without TF32 unless named; single passes in CUDA graphs of ten, caches warm;"
        " cudnn.benchmark on. Errors are the largest ones, in units of what the error rule allows.",
        "",
        "| call | ours | us | error | torch's best | us | error | times as fast | TF32, us | of the floor |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in [*results["rows"]["items"].values(), *results["networks"]["items"].values()]:
        if "contenders" in each:
            lines.append(_line(each, results["ceilings"]["items"], dry))
    return "\n".join(lines) + "\n"


def _line(measured: dict, ceilings: dict, dry: bool) -> str:
    timed = {name: each for name, each in measured["contenders"].items() if "samples" in each}
    seconds = {name: statistics.median(each["samples"]) for name, each in timed.items()}

    def cell(value: float, form: str) -> str:
        return "dry" if dry else f"{value:{form}}"

    def cells(name: str) -> list[str]:
        if not name:
            return ["failed", "", ""]
        error, allowed = timed[name]["error"], timed[name]["allowed"]
        return [name, cell(1e6 * seconds[name], ",.2f"), cell(error / allowed if allowed else 0.0, ".2f")]

    ours = measured["chosen"] if measured["chosen"] in timed else ""
    theirs = [name for name in timed if name.startswith("torch")]
    tf32 = min((name for name in theirs if name.endswith("TF32")), key=seconds.get, default="")
    best = min((name for name in theirs if not name.endswith("TF32")), key=seconds.get, default="")
    ratio = cell(_ratio(timed[ours], timed[best])["median"], ".2f") if ours and best else ""
    least, kind = floor(measured, ceilings) if "flops" in measured else (0.0, "")
    share = cell(least / seconds[ours], ".0%") + f" ({kind})" if ours and kind else ""
    row = [measured["group"], *cells(ours), *cells(best), ratio, cells(tf32)[1] if tf32 else "", share]
    return "| " + " | ".join(row) + " |"


# --- the command --------------------------------------------------------------------------------------------


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__.split("\n")[0]
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="DIR", help="a new folder for the results")
    where.add_argument("--resume", type=Path, metavar="DIR", help="the folder of an earlier run")
    parser.add_argument("--stages", default=",".join(STAGES), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages, default %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="tiny work on the CPU, no GPU figures")
    parser.add_argument(
        "--history",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        help="results of earlier runs: what was measured longest ago comes first; default %(default)s",
    )
    options = parser.parse_args(arguments)
    options.stages = [name for name in options.stages.split(",") if name]
    if unknown := [name for name in options.stages if name not in STAGES]:
        parser.error(f"--stages: {unknown[0]!r} is none of {', '.join(STAGES)}")
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive, got {options.minutes}")
    return options


def _begin(options: argparse.Namespace, machine: dict) -> Run:
    """The folder of the run; fails where results of different runs would be mixed."""
    folder = options.out or options.resume
    run = Run(folder, machine["dry"], options.history)
    known = folder / "run.json"
    if options.out:
        if known.exists():
            raise SystemExit(f"gpu_check: {folder} holds a run already; --resume {folder} goes on with it")
        folder.mkdir(parents=True, exist_ok=True)
        save(known, json.dumps(machine, indent=1))
        return run
    if not known.exists():
        raise SystemExit(f"gpu_check: {folder} holds no run")
    before = json.loads(known.read_text())
    for key in ("gpu", "torch", "source", "dry"):
        if before[key] != machine[key]:
            raise SystemExit(f"gpu_check: {folder} is of another {key}: {before[key]}, not {machine[key]}")
    return run


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 where all stages are done or cut short, else 1."""
    options = _options(arguments)
    try:
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=FORK) as pool:
            machine = pool.submit(describe, options.dry_run).result()
    except RuntimeError as error:
        raise SystemExit(f"gpu_check: {error}") from None
    run = _begin(options, machine)
    end = time.time() + 60 * options.minutes
    name = "-".join(re.sub(r"[^\w.+]+", "_", machine[key]) for key in ("gpu", "torch", "source"))
    name += "-dry" * run.dry
    failed, tqdm.monitor_interval = False, 0  # no thread of tqdm's: stages are forked
    for i, stage in enumerate(tqdm(options.stages, desc="gpu_check", disable=None)):
        if stage == "build" and not (run.dry or is_installed()):  # a fresh machine for an earlier run
            run.write(stage, NOT_BEGUN)
        if run.read(stage)["state"] in ("done", "absent"):
            continue
        shares = [STAGES[each] for each in options.stages[i:]]
        result = perform(stage, run, max(0.0, end - time.time()) * shares[0] / sum(shares))
        tqdm.write(f"{stage}: {result['state']} after {result['seconds']:.1f} s  {result['note']}".rstrip())
        results = {each: run.read(each) for each in STAGES}
        save(run.folder / f"{name}.json", json.dumps(benchmarks(machine, results), indent=1))
        save(run.folder / f"{name}.md", markdown(machine, results))
        failed = failed or result["state"] == "failed"
        if stage == "build" and result["state"] != "done":
            break  # nothing else would run what stands in the tree
    print(f"{run.folder / name}.md")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
