"""How much time a run of several layers still takes, estimated while it learns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerCost:
    """The relative cost of a layer: of learning its filters, and of inferring all maps after."""

    learning: float
    inference: float


class TimeLeft:
    """The time left, from the costs of all layers and the time that this process has taken so far.

    What the current layer still has to learn takes as long per update as its updates so far.
    Everything else is estimated: it takes as long per unit of cost as the run so far, so that the
    estimate improves from layer to layer.
    """

    def __init__(self, costs: Sequence[LayerCost]):
        self.costs = costs
        self.layer = 0
        self._began = time.monotonic()
        # Of the whole run, until the current layer: the cost of what this process has done.
        self._before = 0.0
        # Of the current layer: its number of updates, those done at the start and those done now.
        self._total = self._start = self._done = 0
        self._layer_began = self._began

    def begin(self, layer: int, done: int, total: int) -> None:
        """A layer begins, or resumes after `done` of its updates; total: 0 if it is not known."""
        if self.layer:
            past = self.costs[self.layer - 1]
            self._before += past.learning * (1 - self._start / self._total) + past.inference
        self.layer, self._start, self._done, self._total = layer, done, done, total
        self._layer_began = time.monotonic()

    def advance(self) -> None:
        """One more update is done."""
        self._done += 1

    @property
    def learned(self) -> bool:
        """Whether the current layer has made all of its updates."""
        return self._done >= self._total

    def layer_seconds(self) -> float | None:
        """Seconds that the current layer still learns; None if that is not known yet."""
        if self._done == self._start or self._done > self._total:  # not begun, or a stream
            return None
        elapsed = time.monotonic() - self._layer_began
        return elapsed * (self._total - self._done) / (self._done - self._start)

    def run_seconds(self) -> float | None:
        """Seconds that the run still takes; None if that is not known yet."""
        learning = self.layer_seconds()
        if learning is None:
            return None
        current, *above = self.costs[self.layer - 1 :]
        learned = current.learning * (self._done - self._start) / self._total
        elapsed = time.monotonic() - self._began
        rest = current.inference + sum(cost.learning + cost.inference for cost in above)
        return learning + elapsed * rest / (self._before + learned)


def in_words(seconds: float) -> str:
    """A time in words, no more precise than an estimate is."""
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 55:
        return "5 s" if seconds < 7.5 else f"{max(10, round(seconds, -1)):.0f} s"
    if minutes < 10:
        return f"{max(1, round(minutes))} min"
    if minutes < 57:
        return f"{5 * round(minutes / 5)} min"
    if hours < 10:
        return f"{max(1, round(2 * hours) / 2):g} h"
    return f"{round(hours)} h" if hours < 47 else f"{round(hours / 24)} days"
