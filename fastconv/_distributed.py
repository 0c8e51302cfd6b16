# SPDX-License-Identifier: MIT
"""Several processes that train one model together, as `torchrun` starts them.

Each takes its part of every batch; DistributedDataParallel brings the gradients together. They are added in
the order of the processes, so that a run has the same bits each time, resumed or not. torch's own reduction
adds in an order that follows its buckets, and those change after the first step.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel


class ProcessError(RuntimeError):
    """The processes of a run can't work together, or one of them has ended."""


@dataclass(frozen=True)
class Processes:
    """This process's number among those of the run; a run of one process needs no other."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    def part(self, batch: torch.Tensor) -> torch.Tensor:
        """What this process takes of a batch."""
        return batch.tensor_split(self.count)[self.rank]

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """`model` with gradients that are the sum over the processes."""
        if self.count == 1:
            return model
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(self, _sum_bucket)
        return wrapped

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, added in their order."""
        return self._added(self._gather(tensor)) if self.count > 1 else tensor

    def gather(self, value) -> list:
        """The values of all processes, by rank."""
        values = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            distributed.barrier()

    def _gather(self, tensor, **more):
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        work = distributed.all_gather(parts, tensor, **more)
        return parts if work is None else (parts, work)

    @staticmethod
    def _added(parts):
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


ALONE = Processes()


def _sum_bucket(processes, bucket):
    parts, work = processes._gather(bucket.buffer(), async_op=True)

    def add(gathered):
        gathered.value()  # raises what went wrong
        return processes._added(parts)

    return work.get_future().then(add)


def process_count() -> int:
    """How many processes there are, as torchrun's environment variables tell; one where they don't."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_gpu() -> torch.device:
    """The GPU that belongs to this process, by its number among those on this machine."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextlib.contextmanager
def join(device: torch.device) -> Iterator[Processes]:
    """Joins the others of the run.

    Raises:
        ProcessError: Inside, where another process has ended.
    """
    count = process_count()
    if count == 1:
        yield ALONE
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    processes = Processes(distributed.get_rank(), count)
    try:
        yield processes
        # Threads of torch's outlive the group. What they still hold of a tensor they can let go only while
        # there is an interpreter, so no process leaves right after it has sent one.
        processes.wait()
    except RuntimeError as error:
        if not _is_of_the_network(error):
            raise
        raise ProcessError(f"another of the {count} processes has ended; its message says why") from error
    finally:
        distributed.destroy_process_group()


def _is_of_the_network(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, distributed.DistError) or "gloo/" in text or "Connection " in text
