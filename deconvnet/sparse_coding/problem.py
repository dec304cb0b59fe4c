"""The sparse coding problem, the settings of its solvers, and the solution that they return.

minimise over z, separately for every image      lam/2 ||A z - b||^2 + prior(z)

b target (N, C, H, W)   A operator, maps -> b   z maps (N, K, rows, columns)
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from deconvnet.operators.convolution import Boundary, map_size
from deconvnet.operators.linear import Deconvolution, LinearOperator
from deconvnet.sparse_coding.events import Events
from deconvnet.sparse_coding.prior import Prior
from deconvnet.support.renaming import renamed
from deconvnet.support.scaling import Units, times_power
from deconvnet.support.torch_modes import plain
from deconvnet.support.validation import as_images, as_positive_number, as_tensor

MethodName = Literal["admm", "half_quadratic", "fista", "ista", "coordinate"]
ZStep = Literal["exact", "cg"]
METHODS: tuple[str, ...] = get_args(MethodName)
Z_STEPS: tuple[str, ...] = get_args(ZStep)

# More can only be a mistake, or a file designed to keep its reader busy for ever.
MOST_ITERATIONS = 1_000_000


@renamed(coupling="rho")
@dataclass
class SolverSettings:
    """How maps are inferred. The same in every layer unless a layer says otherwise."""

    # admm | half_quadratic | fista | ista | coordinate (one layer, on the CPU)
    method: str = "admm"
    # at most this many iterations for new images (half_quadratic: passes through its schedule)
    iterations: int = 50
    # iterations of each visit to an image in training, which starts where the last visit ended
    training_iterations: int = 5
    # an image stops when its relative residuals (admm), the relative change of its maps (fista,
    # ista) or the relative decrease of its objective in a round (coordinate) fall below this
    tolerance: float = 1e-3
    # p = 1, all but half_quadratic: if given, an image stops instead when its duality gap, a bound
    # on its distance from the minimum, is at most this fraction of its objective (float32 resolves
    # gaps down to about 1e-6)
    gap: float | None = None
    # p = 1, all but half_quadratic: when the maps are inferred, minimise the squared error over
    # their non-zero coefficients alone, which the prior has made too small; not in training
    refit: bool = False
    # admm: the penalty that couples z and x, relative to the curvature of the data term:
    # beta / (lam ||f||^2), where ||f|| is the largest norm of a filter (taken as 1 if it is near 1)
    rho: float = 2.5
    # admm: over-relaxation, 1 (none) to 1.9
    relaxation: float = 1.8
    # admm with p = 1: balance the residuals of new images by changing beta in the first 100
    # iterations; fista, ista: let the step follow the observed curvature, which allows far longer
    # steps than the one that is always safe
    adaptive: bool = True
    # half_quadratic: the first beta, the factor from each to the next (beta_factor), and the upper
    # bound (beta_end). In units of z^(p-2) or, if lam_ratio is given instead of lam, relative to
    # lam_ratio * lam * ||f||^2, so that the units of the data do not matter
    beta_start: float = 1.0
    beta_factor: float = 6.0
    beta_end: float = 1e5
    # half_quadratic: how the z-step is solved: exact, or cg_iterations of conjugate gradients (cg)
    z_step: str = "exact"
    cg_iterations: int = 2
    # fista, ista: the first gradient step, which is also the threshold (with adaptive=false: every
    # step); null: from the curvature (with adaptive=false: 1 / (lam ||A||^2))
    step: float | None = None

    def __post_init__(self) -> None:
        _check_choice("solver.method", self.method, METHODS)
        _check_choice("solver.z_step", self.z_step, Z_STEPS)
        for key in ("iterations", "training_iterations", "cg_iterations"):
            if not 1 <= getattr(self, key) <= MOST_ITERATIONS:
                raise ValueError(
                    f"solver.{key}={getattr(self, key)}: must be at least 1, and at most "
                    f"{MOST_ITERATIONS}"
                )
        for key in ("rho", "beta_start", "step", "gap"):
            if getattr(self, key) is not None and not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"solver.{key}={getattr(self, key)}: must be positive and finite")
        if self.gap is not None and self.method == "half_quadratic":
            raise ValueError(
                f"solver.gap={self.gap}: half_quadratic follows its schedule to the end; choose "
                "admm, fista, ista or coordinate"
            )
        if self.refit and self.method == "half_quadratic":
            raise ValueError("solver.refit=True: choose admm, fista, ista or coordinate")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"solver.tolerance={self.tolerance}: must lie between 0 and 1")
        if not 0 < self.relaxation < 2:
            raise ValueError(f"solver.relaxation={self.relaxation}: must lie between 0 and 2")
        rises = self.beta_factor > 1 and self.beta_start <= self.beta_end < math.inf
        if not rises:
            raise ValueError(
                f"solver.beta_start={self.beta_start}, beta_factor={self.beta_factor}, "
                f"beta_end={self.beta_end}: the schedule must rise to a finite end"
            )

    def betas(self) -> list[float]:
        """The schedule of half-quadratic splitting: beta_start * beta_factor^i, up to beta_end."""
        betas = [self.beta_start]
        while betas[-1] * self.beta_factor <= self.beta_end * (1 + 1e-9):
            betas.append(betas[-1] * self.beta_factor)
        return betas


@dataclass(frozen=True, eq=False)
class Problem:
    """minimise over z, separately for every image      lam/2 ||A z - b||^2 + prior(z)

    b: (N, C, H, W), in the dtype and on the device of the computation.
    """

    A: LinearOperator
    b: Tensor
    lam: float
    prior: Prior = Prior()

    def __getitem__(self, images: slice) -> Problem:
        """The problem of these images of the batch."""
        prior = self.prior
        if prior.weights is not None and prior.weights.ndim == 4 and len(prior.weights) > 1:
            prior = dataclasses.replace(prior, weights=prior.weights[images])
        return dataclasses.replace(self, A=self.A[images], b=self.b[images], prior=prior)

    def per_image(self, value: float | Tensor) -> Tensor:
        """A number, or one number per image, as (N, 1, 1, 1) in the dtype of b."""
        value = torch.as_tensor(value, dtype=self.b.dtype, device=self.b.device)
        return value.expand(self.b.shape[0], 1, 1, 1)

    def objective(self, z: Tensor, residual: Tensor) -> Tensor:
        """(N,) in float64, of feasible maps z and their residual b - A z."""
        return data_term(residual, self.lam) + self.prior.value(z)

    def dual_objective(self, residual: Tensor) -> Tensor:
        """(N,) in float64: the dual objective at the residual b - A z, scaled to be feasible.

        -inf if no scaling makes it feasible.
        """
        v = self.lam * residual.double()
        norm = self.prior.dual_norm(self.A.adjoint(self.lam * residual)).double()
        v = v / norm.clamp(min=1).view(-1, 1, 1, 1)
        dual = (self.b * v).sum((1, 2, 3)) - v.square().sum((1, 2, 3)) / (2 * self.lam)
        return torch.where(norm == math.inf, torch.full_like(dual, -math.inf), dual)

    def certified(self, z: Tensor, residual: Tensor, gap: float) -> Tensor:
        """(N, 1, 1, 1): whether the duality gap of z is at most `gap` times its objective."""
        objective = self.objective(z, residual)
        gaps = objective - self.dual_objective(residual)
        return (gaps <= gap * objective).view(-1, 1, 1, 1)

    def solution(
        self,
        z: Tensor,
        iterations: int,
        *,
        certify: bool,
        state: Tensor | None = None,
        step: Tensor | None = None,
        Az: Tensor | None = None,
    ) -> Solution:
        """The solution with maps z, and its duality gap if `certify` is set.

        Az: A z, if it is known.
        """
        residual = self.b - (self.A(z) if Az is None else Az)
        terms = data_term(residual, self.lam), self.prior.value(z)
        gap = None
        if certify:
            # Rounding can make the gap negative at the minimum.
            gap = (sum(terms) - self.dual_objective(residual)).clamp(min=0)
        state = z if state is None else state
        return Solution(z, residual, *terms, iterations, state, step, gap, self.lam)


@dataclass(frozen=True)
class Solution:
    """Sparse maps z, with the objective and the state of the solver.

    objective: (N,) in float64, and its terms: reconstruction, lam/2 ||A z - b||^2, and sparsity,
    the value of the prior. residual: b - A z, in the shape of b. iterations: the most that any
    image took. state: from which a later call continues, in the shape of z. step:
    (N, 1, 1, 1), the last gradient step of each image, for a later call (fista, ista; else None).
    gap: (N,) in float64, the duality gap: an upper bound on how far the objective is above the
    minimum (if settings.gap is set, except in training, or if `solve` is to certify; else None). It
    is that of the maps before a refit, and so is the state.
    lam: the weight that was used.
    filter_size, boundary: the (h, w) of the filters and the boundary, if the code is one of
    `sparse_code`.
    """

    z: Tensor
    residual: Tensor
    reconstruction: Tensor
    sparsity: Tensor
    iterations: int
    state: Tensor = field(repr=False)
    step: Tensor | None = field(default=None, repr=False)
    gap: Tensor | None = None
    lam: float | None = None
    filter_size: tuple[int, int] | None = None
    boundary: Boundary | None = None

    @property
    def objective(self) -> Tensor:
        return self.reconstruction + self.sparsity

    def events(self) -> Events:
        """The non-zero coefficients as a table, sorted by image, map, row and column."""
        return Events.of_maps(self.z, filter_size=self.filter_size, boundary=self.boundary)

    def __repr__(self) -> str:
        return f"Solution({self})"

    def __str__(self) -> str:
        """A one-line summary, with the duality gap if it was computed."""
        total = float(self.objective.detach().sum())
        density = float(torch.count_nonzero(self.z)) / max(self.z.numel(), 1)
        images = "1 image" if len(self.z) == 1 else f"{len(self.z)} images"
        line = (
            f"{images}, maps {'x'.join(map(str, self.z.shape[1:]))}, {density:.2%} "
            f"non-zero, objective {total:.6g}, {self.iterations} iterations"
        )
        if self.gap is None:
            return line
        # For an image of zeros the objective is 0, which is the minimum.
        relative_gap = float(self.gap.sum()) / total if total > 0 else 0.0
        return f"{line}, at most {relative_gap:.2%} above the minimum"


@plain
def duality_gap(
    A: LinearOperator, b: Tensor, z: Tensor, lam: float, prior: Prior | None = None
) -> Tensor:
    """An upper bound (N,) on how far the objective of z is above the minimum; 0 at the minimum.

    For p = 1 without a window. The dual of the problem is

        maximise <b, v> - ||v||^2 / (2 lam)      over prior.dual_norm(A'v) <= 1

    (without weights |A'v| <= 1); the gap is computed at the residual lam (b - A z), scaled to be
    feasible. If a weight is 0 and A'v is not, no scaling makes it feasible and the gap is infinite,
    which is almost always so with weights of 0.
    """
    prior = prior or Prior()
    if not prior.convex:
        raise ValueError(
            f"p={prior.p}, window={prior.window}: only p=1 without a window has a duality gap"
        )
    b, lam = as_images(b, "b"), as_positive_number(lam, "lam")
    z = checked_maps(A, b, z, "z")
    prior.check(z.shape)
    A, filters_exponent = A.normalised()
    units = Units.of(b, filters_exponent, lam, 1.0, prior.weights)
    z = times_power(z, -units.maps)
    problem = Problem(A, times_power(b, -units.data), units.lam(lam), in_units(prior, units))
    residual = problem.b - A(z)
    objective = data_term(residual, problem.lam) + problem.prior(z)
    # Rounding can make the gap negative at the minimum.
    return units.cost((objective - problem.dual_objective(residual)).clamp(min=0))


def data_term(residual: Tensor, lam: float) -> Tensor:
    """lam/2 ||residual||^2 of every image, (N,) in float64."""
    return lam / 2 * residual.double().square().sum((1, 2, 3))


def in_units(prior: Prior, units: Units) -> Prior:
    """The prior with its weights in other units."""
    weights = units.weights(prior.weights)
    return prior if weights is prior.weights else dataclasses.replace(prior, weights=weights)


def checked_maps(A: LinearOperator, b: Tensor, z: Any, name: str) -> Tensor:
    """The maps z in the dtype of b. Raises ValueError if they do not fit the data b."""
    z = as_tensor(z, name).to(b)
    if isinstance(A, Deconvolution):
        size = map_size(b.shape[2:], A.f.shape[2:], A.boundary)
        expected = (len(b), len(A.f), *size)
        if tuple(z.shape) != expected:
            raise ValueError(f"{name} of shape {tuple(z.shape)}: expected maps of {expected}")
    elif z.ndim != 4 or len(z) != len(b):
        raise ValueError(
            f"{name} of shape {tuple(z.shape)}: expected maps (N, K, rows, columns) of {len(b)} "
            "images"
        )
    return z


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key}={value}: choose one of {', '.join(choices)}")
