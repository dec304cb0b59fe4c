"""Several processes that share one piece of work; the only module that knows torch.distributed.

Under torchrun each process has a rank. Without it there is one, of rank 0, and nothing is started.
What they tell each other goes through `Ranks`, which is handed to the work that is shared: code
that was not given any works alone, also inside of a program that has ranks for its own purposes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")

# How long a rank waits for the others before it gives up, in seconds.
PATIENCE = 600.0


class RankLost(RuntimeError):
    """Another rank has failed, or has not answered in time."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work. All of them make the same calls in turn."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and shows progress."""
        return self.rank == 0

    def summed(self, *tensors: Tensor) -> list[Tensor]:
        """The sums over all ranks, in float64 and in one message; alone, the tensors in float64."""
        tensors = [tensor.double() for tensor in tensors]
        if self.count == 1:
            return tensors
        buffer = torch.cat([tensor.flatten() for tensor in tensors])
        with _answered():
            dist.all_reduce(buffer)
        sizes = [tensor.numel() for tensor in tensors]
        parts = zip(buffer.split(sizes), tensors, strict=True)
        return [part.view(tensor.shape) for part, tensor in parts]

    def gathered(self, value: Value) -> list[Value]:
        """The values of all ranks in their order. Small ones: they are pickled."""
        if self.count == 1:
            return [value]
        values: list[Value | None] = [None] * self.count
        with _answered():
            dist.all_gather_object(values, value)
        return values

    def collected(self, value: Value) -> list[Value] | None:
        """`gathered` for the first rank alone; None for the others."""
        if self.count == 1:
            return [value]
        values: list[Value | None] | None = [None] * self.count if self.first else None
        with _answered():
            dist.gather_object(value, values)
        return values

    def told(self, value: Value | None) -> Value:
        """What the first rank has; what the others give is not looked at."""
        if self.count == 1:
            return value
        values = [value if self.first else None]
        with _answered():
            dist.broadcast_object_list(values)
        return values[0]


ALONE = Ranks()


@contextmanager
def started(*, patience: float = PATIENCE) -> Iterator[Ranks]:
    """Within it the processes of torchrun can reach each other; without torchrun, ALONE.

    patience: seconds that a rank waits for the others before it raises RankLost.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    limit = timedelta(seconds=patience)
    with _answered():
        store, rank, count = next(dist.rendezvous("env://", timeout=limit))
        # When torchrun starts all anew, the store may still have the addresses of the dead.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=count,
            timeout=limit,
        )
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def local_rank() -> int:
    """Of the processes on this machine, which this is."""
    return int(os.environ.get("LOCAL_RANK", 0))


@contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise RankLost(
            "another rank has failed or does not answer: look for its message; the same command "
            f"resumes from the last checkpoint ({' '.join(str(error).split())[:120]})"
        ) from error
