"""The context shared by all steps of a training run: network, data, run folder, monitor, limits."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from deconvnet.monitoring.monitor import Monitor
from deconvnet.network.network import DeconvNet
from deconvnet.support.communicator import Communicator
from deconvnet.training.run_folder import RunFolder
from deconvnet.training.training_set import TrainingSet


@dataclass(frozen=True)
class Limits:
    """Limits on the memory and disk space of a run.

    chunk: images inferred at a time. hold_codes: whether the codes of finished layers are held in
    memory; otherwise they are inferred again at every visit. memory: GiB that the warm starts of
    all images may take, in all ranks together. disk: GiB that they may take in the run folder if
    they exceed `memory`; if they exceed this as well, every visit infers from zero maps.
    """

    chunk: int = 8
    hold_codes: bool = True
    memory: float = math.inf
    disk: float = 0.0


UNLIMITED = Limits()


@dataclass(frozen=True)
class Session:
    """A training run in progress. run: its folder, only on rank 0; None to write no files.

    stop_requested: whether this process was asked to stop.
    """

    net: DeconvNet
    data: TrainingSet
    run: RunFolder | None
    monitor: Monitor
    limits: Limits
    seed: int
    stop_requested: Callable[[], bool]

    @property
    def communicator(self) -> Communicator:
        return self.data.communicator


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """A function: whether SIGINT or SIGTERM has arrived; a second signal takes immediate effect."""
    requested = False

    def handle(number: int, frame: object) -> None:
        nonlocal requested
        requested = True
        signal.signal(number, previous[number])

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
