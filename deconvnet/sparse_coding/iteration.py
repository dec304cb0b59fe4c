"""The iteration loop shared by all methods: step, call the callback, stop image by image.

Parameters adapt and images stop individually, so that a result does not depend on the rest of the
batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from deconvnet.sparse_coding.problem import Problem

# Iterations between two checks of whether an image may stop.
CHECK_EVERY = 10


@dataclass(frozen=True)
class Start:
    """The start of a solve: the state of an earlier one, or zeros, and its gradient step."""

    state: Tensor
    step: Tensor | float | None = None


@dataclass(frozen=True)
class Until:
    """The stopping criteria of a solve, and its callback.

    iterations: the maximum. tolerance: an image stops when the method's own measure of convergence
    is at most this; gap: it stops instead when its duality gap is at most this fraction of its
    objective. certify: whether the solution needs its duality gap, also without `gap`. training:
    one visit of a training epoch, in which ADMM keeps its beta.
    callback(count, method) is called after every iteration.
    """

    iterations: int
    tolerance: float = 0.0
    gap: float | None = None
    certify: bool = False
    training: bool = False
    callback: Callable[[int, Method], None] | None = None

    @property
    def certifies(self) -> bool:
        """Whether the solution has its duality gap."""
        return self.certify or self.gap is not None


class Method(ABC):
    """The state of a method that solves a problem, and its iteration.

    stopped: (N, 1, 1, 1), the images that no longer change, or None.
    """

    def __init__(self, problem: Problem):
        self.problem = problem

    @abstractmethod
    def step(self, stopped: Tensor | None) -> None:
        """One iteration."""

    @abstractmethod
    def maps(self) -> Tensor:
        """The current sparse maps z (N, K, rows, columns)."""

    @abstractmethod
    def penalty(self) -> Tensor:
        """beta (N, 1, 1, 1), the weight of the quadratic term of the last proximal map."""

    @abstractmethod
    def converged(self, tolerance: float) -> Tensor:
        """(N, 1, 1, 1): whether the method's own measure of convergence is at most this."""

    def certified(self, gap: float) -> Tensor:
        """(N, 1, 1, 1): whether the duality gap is at most this fraction of the objective."""
        z = self.maps()
        return self.problem.certified(z, self.problem.b - self.problem.A(z), gap)

    def adapt(self, count: int, stopped: Tensor) -> None:  # noqa: B027  most methods do not
        """Change the parameters of the images that continue, after a check."""


def iterate(
    method: Method,
    until: Until,
    *,
    check_every: int = CHECK_EVERY,
    check_start: bool = False,
    always_check: bool = False,
) -> int:
    """Iterate until every image has stopped; returns the number of iterations.

    always_check: check (and adapt) even without a tolerance and a gap.
    """
    checks = bool(until.tolerance or until.gap is not None or always_check)
    stopped = None
    for count in range(until.iterations + 1):
        if count:
            method.step(stopped)
            if until.callback:
                until.callback(count, method)
        if not checks or count % check_every or not (count or check_start):
            continue
        converged = (
            method.converged(until.tolerance) if until.gap is None else method.certified(until.gap)
        )
        converged = converged if stopped is None else stopped | converged
        if converged.all():
            break
        stopped = converged if converged.any() else None
        method.adapt(count, converged)
    return count
