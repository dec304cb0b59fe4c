"""Sparse coding of one large image with one layer: coordinate descent without maps in memory.

    minimise over z      lam/2 ||A z - b||^2 + sum_i w_i |z_i|
    w_i = base / max(|c_i| / (gain level), 1 / MAX_RAISE)    c = F'pilot, the same in every round

The method and the result are those of `coordinate_descent`, round for round. But there the input
and output are dense maps, and weights per coefficient take as much memory again. Here correlations
and weights are computed in strips of rows when they are needed, and only the non-zero coefficients
of z are stored. Memory grows with the pixels and with these coefficients, about 1% of the maps: an
image of any size is solved as one problem, without tiles.

    b, pilot image (1, C, H, W)   f filters (K, C, h, w)   base, gain (K,)   z maps (1, K, ...)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from deconvnet.operators.convolution import correlate_strips, map_size
from deconvnet.operators.linear import Deconvolution
from deconvnet.sparse_coding import kernels
from deconvnet.sparse_coding.active_set import ActiveSet, Grid
from deconvnet.sparse_coding.coordinate_descent import PriorWeights
from deconvnet.sparse_coding.iteration import Until, iterate
from deconvnet.sparse_coding.prior import Prior
from deconvnet.sparse_coding.problem import Problem, data_term
from deconvnet.sparse_coding.working_set import Atoms, WorkingSetSolver

# A pilot raises thresholds by at most this factor.
MAX_RAISE = 50.0
# Limits of up to this many bytes are cached between rounds; larger ones are recomputed each time.
CACHE_BYTES = 2**27


@dataclass(frozen=True)
class Thresholds:
    """The weights of the prior, one per map or, with a pilot, one per coefficient.

    base: (K,), the threshold of each map without a pilot; gain: (K,), the norms of the filters;
    group: the number of consecutive maps that share a weight. pilot: an estimate of the image;
    level: the correlation with it, of a filter of norm 1, at which a coefficient has its base
    threshold.
    """

    base: Tensor
    gain: Tensor
    group: int = 1
    pilot: Tensor | None = None
    level: float = 1.0

    def per_map(self) -> Tensor:
        """(K,): the weights without a pilot."""
        return _group_mean(self.base.view(-1, 1, 1), self.group).flatten()

    def per_coefficient(self, c: Tensor) -> Tensor:
        """(.., K, rows, columns): the weights for correlations c of the pilot."""
        gain = self.gain.view(-1, 1, 1)
        strength = torch.where(gain > 0, c.abs() / gain, torch.zeros_like(c))
        strength = _group_mean(strength, self.group)
        return self.per_map().view(-1, 1, 1) / (strength / self.level).clamp(min=1 / MAX_RAISE)


@dataclass(frozen=True)
class SparseSolution:
    """The non-zero coefficients of the maps (1, K, rows, columns) of one image.

    residual: b - A z (1, C, H, W). lam, objective: of the problem; iterations: rounds.
    """

    coefficients: ActiveSet = field(repr=False)
    residual: Tensor
    objective: float
    lam: float
    iterations: int
    A: Deconvolution = field(repr=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(K, rows, columns) of the maps."""
        f = self.A.f
        return len(f), *map_size(self.residual.shape[2:], f.shape[2:], self.A.boundary)

    @property
    def reconstruction(self) -> Tensor:
        """(1,) lam/2 ||residual||^2."""
        return data_term(self.residual, self.lam)

    @property
    def sparsity(self) -> Tensor:
        """(1,) the value of the prior."""
        return self.objective - self.reconstruction

    def maps(self, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """The maps (1, K, ...), or a crop of them."""
        (top, bottom, _), (left, right, _) = (
            part.indices(size) for part, size in zip((rows, columns), self.shape[1:], strict=True)
        )
        e, group = self.coefficients, self.coefficients.z.shape[1]
        inside = (e.i >= top) & (e.i < bottom) & (e.j >= left) & (e.j < right)
        g, i, j, value = (column[inside] for column in (e.g, e.i, e.j, e.z))
        z = self.residual.new_zeros(1, self.shape[0], bottom - top, right - left)
        for u in range(group):
            z[0].numpy()[g * group + u, i - top, j - left] = value[:, u]
        return z

    def magnitudes(self) -> Tensor:
        """(K,) float64: sum |z| of every map."""
        e, group = self.coefficients, self.coefficients.z.shape[1]
        total = np.zeros((self.shape[0] // group, group))
        np.add.at(total, e.g, np.abs(e.z, dtype=np.float64))
        return torch.from_numpy(total).flatten()

    def synthesis(self) -> Tensor:
        """F z (1, C, H, W), without the mask."""
        plain = Deconvolution(self.A.f, self.A.boundary)
        atoms = Atoms(plain, self.residual, self.coefficients.z.shape[1])
        image, pixels = atoms.zeros(1)
        kernels.subtract(pixels[0], atoms.filters, atoms.grid(0), self.coefficients)
        return image.neg_()


def solve_whole_image(
    A: Deconvolution,
    b: Tensor,
    thresholds: Thresholds,
    *,
    lam: float,
    non_negative: bool = False,
    iterations: int,
    tolerance: float,
    gap: float | None = None,
    start: SparseSolution | None = None,
    on_round: Callable[[], None] | None = None,
) -> SparseSolution:
    """The solution for one image b (1, C, H, W), from z = 0 or from an earlier solution.

    It stops when a round has lowered the objective by at most `tolerance` of it or, with `gap`,
    when the duality gap is at most this fraction of it. on_round() is called after every round.
    """
    per_map = thresholds.per_map() if thresholds.pilot is None else None
    prior = Prior(weights=per_map, group=thresholds.group, non_negative=non_negative)
    problem, atoms = Problem(A, b, lam, prior), Atoms(A, b, thresholds.group)
    if thresholds.pilot is None:
        weights = PriorWeights(problem, atoms)
    else:
        weights = PilotWeights(thresholds, lam, atoms)
    solver = WorkingSetSolver(problem, atoms, weights)
    if start is not None:
        solver.activate(0, *start.coefficients[:4])
    solver.refresh_residual([0])
    callback = None if on_round is None else lambda count, method: on_round()
    until = Until(iterations, 0.0 if gap else tolerance, gap, callback=callback)
    count = iterate(solver, until, check_every=1, check_start=True)
    coefficients = solver.active[0]
    coefficients = coefficients.take((coefficients.z != 0).any(1))
    objective = float(solver.costs[0])
    return SparseSolution(coefficients, solver.residual, objective, lam, count, A)


class PilotWeights:
    """Weights from the correlations with a pilot, computed when they are needed."""

    divides, has_zeros = True, False

    def __init__(self, thresholds: Thresholds, lam: float, atoms: Atoms):
        self.thresholds, self.lam, self.atoms = thresholds, lam, atoms
        self.pilot = atoms.frames(thresholds.pilot.to(atoms.f))
        f, group = atoms.f, atoms.group
        self.inverse = np.ones(len(f) // group, atoms.dtype)
        self.least = torch.finfo(f.dtype).tiny
        # Added to the limits: infinity where a group paints nothing.
        paints = torch.from_numpy(atoms.curvature > 0).repeat_interleave(group).view(-1, 1, 1)
        self.never = torch.where(paints, 0.0, torch.inf).to(f)
        self.base, self.gain = (
            values.to(f).view(-1, group).numpy()
            for values in (thresholds.per_map(), thresholds.gain)
        )
        rows, columns = map_size(self.pilot.images.shape[2:], f.shape[2:], atoms.boundary)
        self.is_cached = 4 * len(f) * rows * columns <= CACHE_BYTES
        self.cache: dict[int, Tensor] = {}

    def divide_by_limits(self, n: int, rows: slice, c: Tensor) -> None:
        if rows.start == 0:
            atoms = self.atoms
            self.strips = correlate_strips(self.pilot.images, atoms.f, atoms.boundary)
        limits = self.cache.get(rows.start)
        if limits is None:
            # Residual and pilot have the same strips, since they have the same shape.
            pilot = next(self.strips)[2][0]
            weights = self.thresholds.per_coefficient(pilot)
            limits = (weights / self.lam).clamp_(min=self.least) + self.never
            if self.is_cached:
                self.cache[rows.start] = limits
        c /= limits

    def at(self, n: int, g: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        atoms = self.atoms
        grid = Grid(*atoms.axes, np.empty((0, 0, 0), atoms.dtype))
        c = np.empty((len(g), atoms.group), atoms.dtype)
        kernels.correlations_at(self.pilot.pixels[0], atoms.filters.f, grid, g, i, j, c)
        c, gain = np.abs(c), self.gain[g]
        strength = np.divide(c, gain, out=np.zeros_like(c), where=gain > 0).mean(1)
        level = atoms.dtype(self.thresholds.level)
        return self.base[g, 0] / np.maximum(strength / level, atoms.dtype(1 / MAX_RAISE))


def _group_mean(maps: Tensor, group: int) -> Tensor:
    """(.., K, rows, columns): every map replaced by the mean over its group."""
    if group == 1:
        return maps
    return maps.unflatten(-3, (-1, group)).mean(-3).repeat_interleave(group, -3)
