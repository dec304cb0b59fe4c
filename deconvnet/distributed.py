"""Several processes that share one piece of work; the only module that knows torch.distributed.

Under torchrun each process has a rank. Without it there is one, of rank 0, and nothing is started.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


@contextmanager
def started() -> Iterator[None]:
    """Within it the processes of torchrun can reach each other."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    # What is sent are small tables in memory, whatever the devices.
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gathered(value: Value) -> list[Value]:
    """The values of all processes, in the order of their ranks; all of them wait here."""
    if ranks() == 1:
        return [value]
    values: list[Value | None] = [None] * ranks()
    dist.all_gather_object(values, value)
    return values
