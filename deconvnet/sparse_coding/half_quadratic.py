"""Half-quadratic splitting, the method of Zeiler et al. 2010 (CVPR)."""

from __future__ import annotations

from torch import Tensor

from deconvnet.operators.linear import conjugate_gradients
from deconvnet.sparse_coding.iteration import Method, Start, Until, iterate
from deconvnet.sparse_coding.problem import Problem, Solution, SolverSettings


def half_quadratic(
    problem: Problem, start: Start, settings: SolverSettings, until: Until
) -> Solution:
    """Maps after one x-step and one z-step for each beta of the schedule.

        x-step   x = argmin prior(x) + beta/2 ||x - z||^2
        z-step   z = argmin lam/2 ||A z - b||^2 + beta/2 ||z - x||^2

    The prior acts on x, a copy of z, and the data term on z; increasing beta pulls them together.
    The method ends near z = x but, with a short schedule, far above the minimum (table in
    docs/mathematics.md). The paper returns z, which has no zeros but is within the threshold of the
    last beta of x; here the solution is one more x-step. until.iterations: passes through the
    schedule.
    """
    betas = settings.betas() * (1 if until.training else until.iterations)
    method = HalfQuadratic(problem, start.state, betas, settings)
    # No tolerance: the schedule determines the number of iterations.
    iterate(method, Until(len(betas), callback=until.callback))
    return problem.solution(method.maps(), len(betas), certify=False, state=method.z)


class HalfQuadratic(Method):
    """z: the maps of the data term. Each step uses the next beta of the schedule."""

    def __init__(self, problem: Problem, z: Tensor, betas: list[float], settings: SolverSettings):
        super().__init__(problem)
        self.z, self.w = z, None
        self.schedule, self.beta = iter(betas), betas[0]
        self.cg_iterations = settings.cg_iterations if settings.z_step == "cg" else None
        self.data = problem.lam * problem.A.adjoint(problem.b)

    def step(self, stopped: Tensor | None) -> None:
        """x-step and z-step with the next beta."""
        self.beta = next(self.schedule)
        x = self.maps()
        self.z = self._z_step_exact(x) if self.cg_iterations is None else self._z_step_cg(x)

    def _z_step_exact(self, x: Tensor) -> Tensor:
        """x + lam A'w with (beta I + lam A A') w = b - A x, in the space of the images."""
        A, b, lam = self.problem.A, self.problem.b, self.problem.lam
        beta = self.problem.per_image(self.beta)
        self.w = A.solve(b - A(x), lam, beta, self.w, tolerance=1e-5)
        return x.add_(A.adjoint(self.w), alpha=lam)

    def _z_step_cg(self, x: Tensor) -> Tensor:
        """A few conjugate gradient steps from the last z, as in the paper."""
        A, lam, beta = self.problem.A, self.problem.lam, self.beta
        return conjugate_gradients(
            lambda v: lam * A.adjoint(A(v)) + beta * v,
            self.data + beta * x,
            self.z,
            tolerance=1e-6,
            max_iterations=self.cg_iterations,
        )

    def maps(self) -> Tensor:
        return self.problem.prior.shrink(self.z, self.beta)

    def penalty(self) -> Tensor:
        return self.problem.per_image(self.beta)

    def converged(self, tolerance: float) -> Tensor:
        raise NotImplementedError("half_quadratic follows its schedule to the end")
