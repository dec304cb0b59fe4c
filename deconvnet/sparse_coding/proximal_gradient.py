"""Proximal gradient methods: ISTA, and FISTA, which adds momentum (Beck and Teboulle 2009).

They need only A and A', and the objective never rises, not even with a pooling window. They are the
methods for operators through several layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deconvnet.operators.linear import dot, norm
from deconvnet.sparse_coding.iteration import Method, Start, Until, iterate
from deconvnet.sparse_coding.prior import shrink
from deconvnet.sparse_coding.problem import Problem, Solution, SolverSettings

# The gradient step grows by this factor per iteration, and falls to this fraction of the longest
# step that the curvature allows (measured on four layers: a growth of 1.5 or more is no faster, and
# the steps are often rejected).
GROWTH, CAUTION = 1.02, 0.9


def fista(problem: Problem, start: Start, settings: SolverSettings, until: Until) -> Solution:
    """Maps by accelerated proximal gradient steps; `ProximalGradient` with momentum."""
    return _run(ProximalGradient(problem, start, settings, momentum=True), until)


def ista(problem: Problem, start: Start, settings: SolverSettings, until: Until) -> Solution:
    """Maps by proximal gradient steps; `ProximalGradient` without momentum."""
    return _run(ProximalGradient(problem, start, settings, momentum=False), until)


def _run(method: ProximalGradient, until: Until) -> Solution:
    count = iterate(method, until)
    return method.problem.solution(
        method.z, count, certify=until.certifies, step=method.step_size, Az=method.Az
    )


class ProximalGradient(Method):
    """A gradient step on the data term, then the proximal map; the objective never rises.

        z <- argmin prior(x) + 1/(2 step) ||x - (y - step lam A'(A y - b))||^2   y = z, or beyond it

    This minimises an upper bound of the objective that is tight at y, provided that the curvature
    of its move d, lam ||A d||^2 / ||d||^2, is at most 1 / step: from y = z the objective then
    cannot rise, whether or not the prior is convex. A step of 1 / (lam ||A||^2) is always short
    enough, and is used without `adaptive` unless a step is given. But the curvature of sparse moves
    is far below the norm of A: with `adaptive` a move is repeated with a shorter step if the step
    was too long, and otherwise the step grows slightly (Scheinberg, Goldfarb and Bai 2014, as is
    the momentum); the steps become many times longer. This costs almost nothing: A y is a
    combination of earlier products.

    A move that raises the objective is undone, image by image: if y was beyond z, the momentum
    restarts (O'Donoghue and Candes 2015); if y was z itself, the step is halved. An image stops
    when its relative change is at most the tolerance.
    """

    def __init__(self, problem: Problem, start: Start, settings: SolverSettings, *, momentum: bool):
        super().__init__(problem)
        self.momentum, self.adaptive = momentum, settings.adaptive
        self.z = start.state
        self.Az = problem.A(self.z)
        self.step_size = problem.per_image(self._first_step(start.step))
        self.cost = self._objective()
        self.y, self.Ay = self.z, self.Az
        self.t = torch.ones_like(self.step_size)

    def step(self, stopped: Tensor | None) -> None:
        """A proximal gradient step from y, undone for images where it failed; then the next y."""
        self.z_before, Az_old, cost_old = self.z, self.Az, self.cost
        z_old, step_old = self.z, self.step_size
        self._move_from_y()
        # Ignore rounding, but count a NaN as a rise.
        rose = ~(self.cost <= cost_old * (1 + 10 * torch.finfo(z_old.dtype).eps))
        too_long = self._adapt_step() if self.adaptive else torch.zeros_like(rose)
        halved = rose & (self.t == 1) & ~too_long
        if stopped is not None:
            halved = halved & ~stopped
        if _acts(halved):
            self.step_size = torch.where(halved, step_old / 2, self.step_size)
        self.undone = rose | too_long if stopped is None else rose | too_long | stopped
        if _acts(self.undone):
            self.z = torch.where(self.undone, z_old, self.z)
            self.Az = torch.where(self.undone, Az_old, self.Az)
            self.cost = torch.where(self.undone, cost_old, self.cost)
        if self.momentum:
            self._look_ahead(z_old, Az_old, step_old, rose, too_long)
        else:
            self.y, self.Ay = self.z, self.Az

    def maps(self) -> Tensor:
        return self.z

    def penalty(self) -> Tensor:
        return 1 / self.step_size

    def converged(self, tolerance: float) -> Tensor:
        return ~self.undone & (norm(self.z - self.z_before) <= tolerance * norm(self.z))

    def certified(self, gap: float) -> Tensor:
        return self.problem.certified(self.z, self.problem.b - self.Az, gap)

    def _first_step(self, given: Tensor | float | None) -> Tensor | float:
        A, b, lam, prior = self.problem.A, self.problem.b, self.problem.lam, self.problem.prior
        if given is not None:
            return given
        if not self.adaptive:
            return 1 / (lam * A.squared_norm(b))
        first = shrink(A.adjoint(b - self.Az), 1e30, window=prior.window)
        return 1 / _curvature(first, dot(Af := A(first), Af), lam)

    def _move_from_y(self) -> None:
        A, b, lam, prior = self.problem.A, self.problem.b, self.problem.lam, self.problem.prior
        v = torch.addcmul(self.y, A.adjoint(b - self.Ay), lam * self.step_size)
        self.z = prior.shrink(v, self.step_size.reciprocal())
        self.Az = A(self.z)
        self.cost = self._objective()

    def _adapt_step(self) -> Tensor:
        """Adapt the step to the curvature of the move; (N, 1, 1, 1): whether it was too long."""
        step, moved = self.step_size, self.Az - self.Ay
        # The curvature of a move close to rounding is meaningless.
        squared = dot(moved, moved)
        measurable = squared.sqrt() > 100 * torch.finfo(moved.dtype).eps * norm(self.Az)
        curvature = _curvature(self.z - self.y, squared, self.problem.lam)
        longest = torch.where(measurable, curvature.reciprocal(), step)
        too_long = step > longest
        self.step_size = torch.where(too_long, CAUTION * longest, (GROWTH * step).minimum(longest))
        return too_long

    def _look_ahead(
        self, z_old: Tensor, Az_old: Tensor, step_old: Tensor, rose: Tensor, too_long: Tensor
    ) -> None:
        """The next y: beyond z; z itself after a rise; the same y after a step that is too long."""
        repeated = too_long & ~rose
        t_next = (1 + (1 + 4 * step_old / self.step_size * self.t.square()).sqrt()) / 2
        ahead = torch.where(rose, torch.zeros_like(self.t), (self.t - 1) / t_next)
        y, Ay = self.z.lerp(z_old, -ahead), self.Az.lerp(Az_old, -ahead)
        if _acts(repeated):
            y, Ay = torch.where(repeated, self.y, y), torch.where(repeated, self.Ay, Ay)
        self.y, self.Ay = y, Ay
        t = torch.where(repeated, self.t, t_next)
        self.t = torch.where(rose, torch.ones_like(t), t)

    def _objective(self) -> Tensor:
        objective = self.problem.objective(self.z, self.problem.b - self.Az)
        return objective.view(-1, 1, 1, 1)


def _acts(mask: Tensor) -> bool:
    """Whether a mask must be applied: on a GPU always, since checking would synchronise."""
    return mask.device.type != "cpu" or bool(mask.any())


def _curvature(move: Tensor, squared: Tensor, lam: float) -> Tensor:
    """lam ||A d||^2 / ||d||^2 of a move d of the maps, squared = ||A d||^2; never exactly 0, so
    that the inverse step stays finite when multiplied by lam.
    """
    return lam * squared / dot(move, move).clamp(min=torch.finfo(move.dtype).tiny) + 1e-30
