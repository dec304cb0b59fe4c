"""Communication between the processes of a distributed run; the only module that uses
torch.distributed.

Under torchrun each process has a rank; otherwise there is a single process, rank 0, and no process
group is started. Code communicates only through the `Communicator` that it is given, so code
without one runs alone even inside a program that uses torch.distributed for other purposes.
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
    """Another rank has failed or has not answered in time."""


@dataclass(frozen=True)
class Communicator:
    """This process among those that share the work. All of them must make the same calls, in the
    same order.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and shows progress."""
        return self.rank == 0

    def all_reduce_sum(self, *tensors: Tensor) -> list[Tensor]:
        """The sums over all ranks in float64, exchanged in one message.

        With a single process: the tensors in float64.
        """
        tensors = [tensor.double() for tensor in tensors]
        if self.world_size == 1:
            return tensors
        buffer = torch.cat([tensor.flatten() for tensor in tensors])
        with _rank_lost_on_failure():
            dist.all_reduce(buffer)
        sizes = [tensor.numel() for tensor in tensors]
        parts = zip(buffer.split(sizes), tensors, strict=True)
        return [part.view(tensor.shape) for part, tensor in parts]

    def all_gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in rank order. They are pickled, so keep them small."""
        if self.world_size == 1:
            return [value]
        values: list[Value | None] = [None] * self.world_size
        with _rank_lost_on_failure():
            dist.all_gather_object(values, value)
        return values

    def gather(self, value: Value) -> list[Value] | None:
        """The values of all ranks, in rank order, on rank 0; None on other ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Value | None] | None = [None] * self.world_size if self.is_main else None
        with _rank_lost_on_failure():
            dist.gather_object(value, values)
        return values

    def broadcast(self, value: Value | None) -> Value:
        """The value of rank 0; values of other ranks are ignored."""
        if self.world_size == 1:
            return value
        values = [value if self.is_main else None]
        with _rank_lost_on_failure():
            dist.broadcast_object_list(values)
        return values[0]


SINGLE = Communicator()


@contextmanager
def started(*, patience: float = PATIENCE) -> Iterator[Communicator]:
    """A context in which the processes of torchrun can communicate; SINGLE without torchrun.

    patience: seconds that a rank waits for the others before it raises RankLost.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield SINGLE
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    limit = timedelta(seconds=patience)
    with _rank_lost_on_failure():
        store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
        # After torchrun restarts the processes, the store may still hold the addresses of the
        # old ones.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=limit,
        )
    try:
        yield Communicator(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def local_rank() -> int:
    """The rank of this process among those on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


@contextmanager
def _rank_lost_on_failure() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise RankLost(
            "another rank has failed or does not answer: look for its message; run the same "
            "command again to resume from the last checkpoint "
            f"({' '.join(str(error).split())[:120]})"
        ) from error
