"""Measurement of time and memory, and statistics over several rounds.

A clock runs while a solver works and stands still while its maps are judged. Maps are judged after
every iteration up to the twentieth, then every 5 % more of them: the time to a level is that of the
first maps that were seen below it.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np

LEVELS = (1e-1, 1e-2, 1e-3, 1e-4)
PACKAGES = ("torch", "numpy", "scipy", "numba", "scikit-image", "sporco", "pyFFTW", "numexpr")

# (iteration, seconds, objective)
Point = tuple[int, float, float]


class Enough(Exception):
    """Raised in a callback to end a solver that has no stopping test of this kind."""


class Clock:
    """Seconds that have passed while it ran; `synchronize` waits for what a device still does."""

    def __init__(self, synchronize: Callable[[], None] = lambda: None):
        self.synchronize = synchronize
        self._passed, self._since = 0.0, None

    def start(self) -> None:
        self.synchronize()
        self._since = time.perf_counter()

    def stop(self) -> None:
        self.synchronize()
        if self._since is not None:
            self._passed += time.perf_counter() - self._since
            self._since = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.stop()
        yield
        self.start()

    @property
    def seconds(self) -> float:
        return self._passed + (0.0 if self._since is None else time.perf_counter() - self._since)


class Due:
    """Which iterations are looked at: all up to `every`, then each `growth` times the last."""

    def __init__(self, every: int = 20, growth: float = 1.05):
        self.every, self.growth, self.next = every, growth, 1

    def __call__(self, iteration: int) -> bool:
        if iteration < self.next:
            return False
        further = iteration if iteration < self.every else math.ceil(self.growth * iteration) - 1
        self.next = max(iteration, further) + 1
        return True


class Recorder:
    """The objective, summed over the images, by the seconds of a solver's own work.

    Called with the number of the iteration and a function that returns the maps; it says whether
    the goal or the limit of seconds has been reached. Without an objective it stops a solver after
    some iterations.
    """

    def __init__(
        self,
        objective: Callable[[np.ndarray], np.ndarray] | None,
        *,
        goal: float = -math.inf,
        limit: float = math.inf,
        iterations: float = math.inf,
        synchronize: Callable[[], None] = lambda: None,
    ):
        self.objective, self.goal, self.limit, self.iterations = objective, goal, limit, iterations
        self.clock, self.due = Clock(synchronize), Due()
        self.points: list[Point] = []

    def start(self) -> None:
        self.clock.start()

    def __call__(self, iteration: int, maps: Callable[[], np.ndarray], last: bool = False) -> bool:
        enough = iteration >= self.iterations
        if self.objective is None or not (last or self.due(iteration)):
            return enough
        with self.clock.paused():
            value = float(self.objective(maps()).sum())
            self.points.append((iteration, self.clock.seconds, value))
        return enough or value <= self.goal or self.clock.seconds > self.limit


class Snapshots:
    """A recorder of learning: the filters after some of the iterations, and the seconds until then.

    The iterations that are kept do not depend on time, so that rounds keep the same filters.
    """

    def __init__(
        self,
        *,
        iterations: float = math.inf,
        limit: float = math.inf,
        synchronize: Callable[[], None] = lambda: None,
    ):
        self.iterations, self.limit = iterations, limit
        self.clock, self.due = Clock(synchronize), Due(every=2, growth=1.3)
        self.kept: list[tuple[int, float, np.ndarray]] = []

    def start(self) -> None:
        self.clock.start()

    def __call__(
        self, iteration: int, filters: Callable[[], np.ndarray], last: bool = False
    ) -> bool:
        enough = last or iteration >= self.iterations or self.clock.seconds > self.limit
        if self.due(iteration) or enough:
            with self.clock.paused():
                self.kept.append((iteration, self.clock.seconds, filters()))
        return enough


def time_to(points: list[Point], minimum: float, level: float) -> tuple[float, int]:
    """Seconds and iterations until the objective is within `level` of the minimum, relatively;
    infinite and 0 where it never was.
    """
    for iteration, seconds, value in points:
        if value <= minimum * (1 + level):
            return seconds, iteration
    return math.inf, 0


def spread(values: list[float], digits: int = 2) -> str:
    """The median, and in brackets the least and the most."""
    middle = statistics.median(values)
    if math.isinf(middle):
        return "never"
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def best(rounds: list[list[float]]) -> list[float]:
    """The least of several solvers, round by round; rounds: one list for each solver."""
    return [min(values) for values in zip(*rounds, strict=True)]


def ratios(others: list[float], ours: list[float]) -> list[float]:
    """How many times as long the others took, round by round; infinite if only ours arrived."""
    pairs = zip(others, ours, strict=True)
    return [math.nan if math.isinf(b) else a / b for a, b in pairs]


def fresh_peak() -> float:
    """Forget the peak of memory so far, where Linux lets us; what is in use now, in bytes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> float:
    """The peak of memory of this process in bytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def machine() -> dict:
    """The processor, its cores, how busy they are, and the versions of what is measured."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        model = next((value.strip() for key, _, value in lines if "model name" in key), model)
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }
