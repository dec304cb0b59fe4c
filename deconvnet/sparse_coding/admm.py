"""The alternating direction method of multipliers (Boyd et al. 2011)."""

from __future__ import annotations

import torch
from torch import Tensor

from deconvnet.operators.linear import norm
from deconvnet.sparse_coding.iteration import Method, Start, Until, iterate
from deconvnet.sparse_coding.problem import Problem, Solution, SolverSettings

# ADMM converges only if its beta eventually stays constant.
ADAPT_UNTIL = 100
# For filters whose squared norm is within this factor of 1, beta is rho lam, since the default rho
# is only a rule of thumb; outside this range beta is proportional to the squared norm.
UNIT_NORM = 2.5


def admm(problem: Problem, start: Start, settings: SolverSettings, until: Until) -> Solution:
    """Maps from a splitting of z and x at a finite beta, with a multiplier u.

        z-step   z = argmin lam/2 ||A z - b||^2 + beta/2 ||z - v||^2           v = x - u
                   = v + lam A'w                with (beta I + lam A A') w = b - A v
                 z <- relaxation z + (1 - relaxation) x
        x-step   x = argmin prior(x) + beta/2 ||x - (z + u)||^2
        u-step   u <- u + z - x                                    the scaled multiplier

    The system for w is in the space of the images, with K/C times fewer unknowns than the maps.
    For p = 1 ADMM converges to the minimum; for p < 1, or with a window, it is a heuristic that
    works with a fixed beta. An image stops when its relative residuals are at most the tolerance.
    """
    # If the prior is not convex, a beta that keeps changing does not converge.
    adaptive = settings.adaptive and problem.prior.convex and not until.training
    beta = settings.rho * problem.lam * _norm_to_follow(problem.A.curvature())
    method = Admm(problem, start.state, beta, settings.relaxation, adaptive)
    count = iterate(method, until, always_check=adaptive)
    return problem.solution(method.x, count, certify=until.certifies, state=method.state())


class Admm(Method):
    """t = z + u is the whole state, since x = shrink(t) and u = t - x."""

    def __init__(
        self,
        problem: Problem,
        t: Tensor,
        beta: float | Tensor,
        relaxation: float,
        adaptive: bool,
    ):
        super().__init__(problem)
        self.relaxation, self.adaptive = relaxation, adaptive
        self.first_beta = problem.per_image(beta) if isinstance(beta, Tensor) else beta
        self.beta = problem.per_image(beta)
        self.t, self.x = t, problem.prior.shrink(t, self.beta)
        self.w: Tensor | None = None

    def step(self, stopped: Tensor | None) -> None:
        """z-step over v = x - u = 2x - t; then t <- t + relaxation (z - x), and x-step."""
        A, b, lam = self.problem.A, self.problem.b, self.problem.lam
        v, beta = self.t.lerp(self.x, 2.0), self.beta if self.adaptive else self.first_beta
        self.w = A.solve(
            b - A(v), lam, beta, self.w, tolerance=0.0, max_iterations=A.inexact_cg_steps
        )
        self.z = v.add_(A.adjoint(self.w), alpha=lam)
        t = self.t.add(self.z - self.x, alpha=self.relaxation)
        self.t = t if stopped is None else torch.where(stopped, self.t, t)
        self.x_before, self.x = self.x, self.problem.prior.shrink(self.t, self.beta)
        self._residuals: tuple[Tensor, Tensor] | None = None

    def maps(self) -> Tensor:
        return self.x

    def penalty(self) -> Tensor:
        return self.beta

    def state(self) -> Tensor:
        """t in the scale of the first beta, in which a later solve starts."""
        return self.x + (self.t - self.x) * (self.beta / self.first_beta)

    def converged(self, tolerance: float) -> Tensor:
        return torch.maximum(*self._relative_residuals()) <= tolerance

    def adapt(self, count: int, stopped: Tensor) -> None:
        """Residual balancing: raise beta where z and x disagree, lower it where x still moves."""
        if not self.adaptive or count > ADAPT_UNTIL:
            return
        primal, dual = self._relative_residuals()
        factor = (primal / dual.clamp(min=_tiny(self.t))).sqrt().clamp(0.2, 5)
        unchanged = stopped | ((factor > 0.8) & (factor < 1.25))
        factor = torch.where(unchanged, torch.ones_like(factor), factor)
        # The unscaled multiplier beta u does not change.
        self.t, self.beta = self.x + (self.t - self.x) / factor, self.beta * factor

    def _relative_residuals(self) -> tuple[Tensor, Tensor]:
        """Primal and dual residual, (N, 1, 1, 1) each."""
        if self._residuals is None:
            x, z = self.x, self.z
            primal = norm(z - x) / torch.maximum(norm(z), norm(x)).clamp(min=_tiny(z))
            dual = norm(x - self.x_before) / norm(self.t - x).clamp(min=_tiny(z))
            self._residuals = primal, dual
        return self._residuals


def _norm_to_follow(squared: float | Tensor) -> float | Tensor:
    """The squared norm of filters, replaced by 1 if it is near 1."""
    if not isinstance(squared, Tensor):
        near = 1 / UNIT_NORM <= squared <= UNIT_NORM
        return 1.0 if near or squared == 0 else squared
    near = (squared >= 1 / UNIT_NORM) & (squared <= UNIT_NORM)
    return torch.where(near | (squared == 0), 1.0, squared)


def _tiny(x: Tensor) -> float:
    """The smallest positive normal number of the dtype of x, to avoid division by zero."""
    return torch.finfo(x.dtype).tiny
