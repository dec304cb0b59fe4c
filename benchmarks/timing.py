"""Measuring time and memory, and summarising the times of several rounds.

A clock runs while a solver works and is paused while its maps are evaluated. Maps are evaluated
after each of the first twenty iterations, then each time their number has grown by 5 %: the time to
a level is that of the first evaluated maps below it.
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
PACKAGES = ("torch", "numpy", "scipy", "numba", "scikit-image")
PACKAGES += ("sporco", "pyFFTW", "numexpr", "alphacsc")

# (iteration, seconds, objective)
Point = tuple[int, float, float]


class StopSolver(Exception):
    """Raised in a callback to stop a solver."""


class Clock:
    """A stopwatch; `synchronize` waits until a device has finished its work.

    clock: perf_counter or, for the seconds of the CPU, process_time, of the module time.
    """

    def __init__(
        self,
        synchronize: Callable[[], None] = lambda: None,
        clock: str = "perf_counter",
    ):
        self.synchronize, self.clock = synchronize, clock
        self._passed, self._since = 0.0, None

    def start(self) -> None:
        self.synchronize()
        self._since = self._now()

    def stop(self) -> None:
        self.synchronize()
        if self._since is not None:
            self._passed += self._now() - self._since
            self._since = None

    def _now(self) -> float:
        return getattr(time, self.clock)()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.stop()
        yield
        self.start()

    @property
    def seconds(self) -> float:
        return self._passed + (0.0 if self._since is None else self._now() - self._since)


class Due:
    """Which iterations are evaluated: all up to `every`, then each `growth` times the last."""

    def __init__(self, every: int = 20, growth: float = 1.05):
        self.every, self.growth, self.next = every, growth, 1

    def __call__(self, iteration: int) -> bool:
        if iteration < self.next:
            return False
        last = iteration if iteration < self.every else math.ceil(self.growth * iteration) - 1
        self.next = max(iteration, last) + 1
        return True


class Recorder:
    """Records the objective, summed over the images, against the seconds that a solver worked.

    It is called with the number of the iteration and a function that returns the maps, and returns
    whether the solver should stop: at the goal, the time limit or the number of iterations. Without
    an objective it only counts iterations.
    """

    def __init__(
        self,
        objective: Callable[[np.ndarray], np.ndarray] | None,
        *,
        goal: float = -math.inf,
        limit: float = math.inf,
        iterations: float = math.inf,
        synchronize: Callable[[], None] = lambda: None,
        clock: str = "perf_counter",
    ):
        self.objective, self.goal, self.limit, self.iterations = objective, goal, limit, iterations
        self.clock, self.due = Clock(synchronize, clock), Due()
        self.points: list[Point] = []

    def start(self) -> None:
        self.clock.start()

    def __call__(self, iteration: int, maps: Callable[[], np.ndarray], last: bool = False) -> bool:
        stop = iteration >= self.iterations
        if self.objective is None or not (last or self.due(iteration)):
            return stop
        with self.clock.paused():
            value = float(self.objective(maps()).sum())
            self.points.append((iteration, self.clock.seconds, value))
        return stop or value <= self.goal or self.clock.seconds > self.limit


class Snapshots:
    """Records the filters after some iterations of learning, and the seconds until then.

    Which iterations are recorded does not depend on time, so all rounds record the same filters.
    """

    def __init__(
        self,
        *,
        iterations: float = math.inf,
        limit: float = math.inf,
        synchronize: Callable[[], None] = lambda: None,
        clock: str = "perf_counter",
    ):
        self.iterations, self.limit = iterations, limit
        self.clock, self.due = Clock(synchronize, clock), Due(every=2, growth=1.3)
        self.recorded: list[tuple[int, float, np.ndarray]] = []

    def start(self) -> None:
        self.clock.start()

    def __call__(
        self, iteration: int, filters: Callable[[], np.ndarray], last: bool = False
    ) -> bool:
        stop = last or iteration >= self.iterations or self.clock.seconds > self.limit
        if self.due(iteration) or stop:
            with self.clock.paused():
                self.recorded.append((iteration, self.clock.seconds, filters()))
        return stop


def time_to(points: list[Point], minimum: float, level: float) -> tuple[float, int]:
    """Seconds and iterations until the objective is within a relative `level` of the minimum.

    (inf, 0) if it never is.
    """
    for iteration, seconds, value in points:
        if value <= minimum * (1 + level):
            return seconds, iteration
    return math.inf, 0


def spread(values: list[float], digits: int = 2) -> str:
    """The median, with the lowest and the highest value in brackets."""
    middle = statistics.median(values)
    if math.isinf(middle):
        return "never"
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def best(rounds: list[list[float]]) -> list[float]:
    """The lowest time of several solvers in each round; rounds: one list for each solver."""
    return [min(values) for values in zip(*rounds, strict=True)]


def ratios(others: list[float], ours: list[float]) -> list[float]:
    """Time of the others over ours, round by round; inf if only ours reached the level."""
    pairs = zip(others, ours, strict=True)
    return [math.nan if math.isinf(b) else a / b for a, b in pairs]


def fresh_peak() -> float:
    """Reset the peak memory, where Linux permits it; returns the memory now in use, in bytes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> float:
    """The peak memory of this process in bytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def machine() -> dict:
    """The processor, its cores and load, and the versions of the packages that are measured."""
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
