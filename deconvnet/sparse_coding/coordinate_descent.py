"""Coordinate descent for one layer on the CPU, with dense maps as input and output."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from deconvnet.operators.convolution import correlate
from deconvnet.operators.linear import Deconvolution
from deconvnet.sparse_coding.iteration import Start, Until, iterate
from deconvnet.sparse_coding.pointwise import Gram, PointwiseSolver, is_pointwise
from deconvnet.sparse_coding.prior import threshold
from deconvnet.sparse_coding.problem import Problem, Solution, SolverSettings
from deconvnet.sparse_coding.working_set import Atoms, WorkingSetSolver

# Images are coded in batches of at most this many bytes of maps; larger batches are no faster.
BATCH_BYTES = 2**25


def coordinate_descent(
    problem: Problem, start: Start, settings: SolverSettings, until: Until
) -> Solution:
    """Maps by minimising over one coefficient after another (`working_set`).

    An image stops when a round has lowered its objective by at most the tolerance times the
    objective, and times its total decrease from z = 0. If the prior is not convex, no change of a
    single coefficient improves the result, except for coefficients at a mirrored border, and with
    groups, whose steps minimise an upper bound of the objective. Not differentiable.
    """
    check_coordinate_descent(problem)
    b, z = problem.b.detach(), start.state.detach()
    maps, residual = z.new_zeros(z.shape), torch.empty_like(b)
    gaps, *terms = torch.full((3, len(b)), math.nan, dtype=torch.float64)
    batch_size = max(torch.get_num_threads(), BATCH_BYTES // (z[0].numel() * z.element_size()))
    rounds, gram = 0, Gram.of(problem.A, b) if is_pointwise(problem) else None
    for images in _batches(len(b), len(b) if until.callback else batch_size):
        if gram is None:
            solver = _solver(problem[images], z[images])
        else:
            solver = PointwiseSolver(problem[images], z[images], gram)
        rounds = max(rounds, iterate(solver, until, check_every=1, check_start=True))
        if until.certify and until.gap is None:
            solver.certify(solver.images)
        gaps[images] = torch.from_numpy(solver.gaps)
        solver.write(maps[images])
        residual[images], *parts = solver.terms()
        for term, part in zip(terms, parts, strict=True):
            term[images] = part
    gap = gaps if until.certifies else None
    return Solution(maps, residual, *terms, rounds, maps, None, gap, problem.lam)


def check_coordinate_descent(problem: Problem) -> None:
    """Raise ValueError for problems that need another method, and name the methods."""
    instead = "use solver.method=fista or admm"
    if not isinstance(problem.A, Deconvolution):
        raise ValueError(f"solver.method=coordinate: not through several layers; {instead}")
    if problem.prior.window is not None:
        raise ValueError(f"solver.method=coordinate: not with pooling in the loop; {instead}")
    device = problem.b.device
    if device.type != "cpu":
        raise ValueError(f"solver.method=coordinate: runs on the CPU, not on {device}; {instead}")


def _batches(images: int, size: int) -> list[slice]:
    return [slice(n, min(n + size, images)) for n in range(0, images, size)]


def _solver(problem: Problem, z: Tensor) -> WorkingSetSolver:
    """The solver of a batch of images, starting from the maps z."""
    atoms = Atoms(problem.A, problem.b, problem.prior.group)
    solver = WorkingSetSolver(problem, atoms, PriorWeights(problem, atoms))
    for n, maps in enumerate(z):
        solver.activate_maps(n, maps)
    solver.refresh_residual(solver.images)
    return solver


class PriorWeights:
    """The weights of a prior, and the limits up to which a correlation leaves a coefficient zero.

    inverse: (groups,), 1 / limit if the limits are the same everywhere, else 1; correlations are
    then first divided by `limits` (1 or N, K, rows, columns), as `divides` says. has_zeros: whether
    a weight is 0.
    """

    def __init__(self, problem: Problem, atoms: Atoms):
        K, N = len(atoms.f), len(problem.b)
        w = problem.prior.entry_weights
        w = atoms.f.new_ones(()) if w is None else w.to(atoms.f)
        w = w[(None,) * (4 - w.ndim)]
        self.weights = w.expand(N, K // atoms.group, *atoms.map_size).numpy()
        self.has_zeros = bool((w == 0).any())
        L, lam, p = _curvatures(problem, atoms), problem.lam, problem.prior.p
        # If a weight is 0, any correlation is too large; with p < 1 the threshold would be 0 / 0.
        limits = torch.where(w > 0, L * threshold(lam * L / w, p)[1], 0.0)
        limits = torch.where(L > 0, limits.clamp(min=torch.finfo(limits.dtype).tiny), math.inf)
        self.limits = None
        if limits[0, 0].numel() * len(limits) == 1:
            self.inverse = (1 / limits).flatten().numpy()
        else:
            self.inverse = atoms.f.new_ones(K // atoms.group).numpy()
            self.limits = limits.repeat_interleave(atoms.group, 1)
        self.divides = self.limits is not None

    def divide_by_limits(self, n: int, rows: slice, c: Tensor) -> None:
        """Divide correlations c (K, rows, columns) of an image by their limits, unless they are in
        `inverse`.
        """
        if self.limits is not None:
            c /= self.limits[n if len(self.limits) > 1 else 0][..., rows, :]

    def at(self, n: int, g: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """The weights (m,) of coefficients at these positions of an image."""
        return self.weights[n, g, i, j]


def _curvatures(problem: Problem, atoms: Atoms) -> Tensor:
    """L (1 or N, groups, rows, columns), or (1, groups, 1, 1) if it depends only on the group."""
    L = torch.from_numpy(atoms.curvature).view(1, -1, 1, 1)
    if problem.prior.p == 1 or (atoms.boundary == "circular" and atoms.mask is None):
        return L
    squares = atoms.f.square()
    visible = torch.ones_like(problem.b[:1]) if atoms.mask is None else atoms.mask.images.square()
    part = correlate(visible, squares, boundary=atoms.boundary)
    part = part.unflatten(1, (-1, atoms.group)).sum(2)
    total = squares.sum((1, 2, 3)).view(1, -1, atoms.group).sum(2).view(L.shape)
    return part if atoms.mask is not None else torch.where(part > 0.9999 * total, L, part)
