"""Coordinate descent on a working set, from maps to maps: one layer, on the CPU."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from deconvnet.operators.convolution import correlate
from deconvnet.operators.linear import Deconvolution
from deconvnet.sparse_coding.iteration import Start, Until, iterate
from deconvnet.sparse_coding.prior import Prior, threshold
from deconvnet.sparse_coding.problem import Problem, Solution, SolverSettings, data_term
from deconvnet.sparse_coding.working_set import Atoms, WorkingSetSolver

# Bytes of maps whose images are coded together; more images at a time are no faster.
TOGETHER = 2**25


def coordinate_descent(
    problem: Problem, start: Start, settings: SolverSettings, until: Until
) -> Solution:
    """Maps by minimising over one coefficient after another (`working_set`).

    An image stops when a round has lowered its objective by at most the tolerance times what all
    rounds have lowered it from that of z = 0, and times the objective. Where the prior is not
    convex the result is a point that no step of one coefficient alone improves, except for
    coefficients at a mirrored border, and with groups, whose steps lower a bound of the objective.
    Not differentiable.
    """
    check_coordinate_descent(problem)
    b, z = problem.b.detach(), start.state.detach()
    maps, residual = z.new_zeros(z.shape), torch.empty_like(b)
    gaps = torch.full((len(b),), math.nan, dtype=torch.float64)
    together = max(torch.get_num_threads(), TOGETHER // (z[0].numel() * z.element_size()))
    rounds = 0
    for images in _parts(len(b), len(b) if until.callback else together):
        solver = _solver(problem[images], z[images])
        rounds = max(rounds, iterate(solver, until, check_every=1, check_start=True))
        solver.write(maps[images])
        residual[images], gaps[images] = solver.residual, torch.from_numpy(solver.gaps)
    terms = data_term(residual, problem.lam), _value_by_image(problem.prior, maps)
    gap = None if until.gap is None else gaps
    return Solution(maps, residual, *terms, rounds, maps, None, gap, problem.lam)


def check_coordinate_descent(problem: Problem) -> None:
    """Refuse what coordinate descent cannot do, and name the methods that can."""
    instead = "use solver.method=fista or admm"
    if not isinstance(problem.A, Deconvolution):
        raise ValueError(f"solver.method=coordinate: not through several layers; {instead}")
    if problem.prior.window is not None:
        raise ValueError(f"solver.method=coordinate: not with pooling in the loop; {instead}")
    device = problem.b.device
    if device.type != "cpu":
        raise ValueError(f"solver.method=coordinate: runs on the CPU, not on {device}; {instead}")


def _parts(images: int, together: int) -> list[slice]:
    return [slice(n, min(n + together, images)) for n in range(0, images, together)]


def _solver(problem: Problem, z: Tensor) -> WorkingSetSolver:
    """The solver of a few images, at the maps z."""
    atoms = Atoms(problem.A, problem.b, problem.prior.group)
    solver = WorkingSetSolver(problem, atoms, PriorWeights(problem, atoms))
    for n, maps in enumerate(z):
        solver.activate_maps(n, maps)
    solver.refresh_residual(solver.images)
    return solver


class PriorWeights:
    """The weights of a prior, and up to which correlation a coefficient stays zero.

    inverse: (groups,), 1 / limit where the limits are the same everywhere, else 1; correlations are
    then divided by `limits` (1 or N, K, rows, columns) first. has_zeros: whether a weight is 0.
    """

    def __init__(self, problem: Problem, atoms: Atoms):
        K, N = len(atoms.f), len(problem.b)
        w = problem.prior.entry_weights
        w = atoms.f.new_ones(()) if w is None else w.to(atoms.f)
        w = w[(None,) * (4 - w.ndim)]
        self.weights = w.expand(N, K // atoms.group, *atoms.map_size).numpy()
        self.has_zeros = bool((w == 0).any())
        L, lam, p = _curvatures(problem, atoms), problem.lam, problem.prior.p
        # Where a weight is 0, any correlation is too large; with p < 1 the threshold is 0 / 0.
        limits = torch.where(w > 0, L * threshold(lam * L / w, p)[1], 0.0)
        limits = torch.where(L > 0, limits.clamp(min=torch.finfo(limits.dtype).tiny), math.inf)
        self.limits = None
        if limits[0, 0].numel() * len(limits) == 1:
            self.inverse = (1 / limits).flatten().numpy()
        else:
            self.inverse = atoms.f.new_ones(K // atoms.group).numpy()
            self.limits = limits.repeat_interleave(atoms.group, 1)

    def divide_by_limits(self, n: int, rows: slice, c: Tensor) -> None:
        """Divide correlations c (K, rows, columns) of an image by their limits, unless `inverse`
        holds these.
        """
        if self.limits is not None:
            c /= self.limits[n if len(self.limits) > 1 else 0][..., rows, :]

    def at(self, n: int, g: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """The weights (m,) of coefficients at these places of an image."""
        return self.weights[n, g, i, j]


def _curvatures(problem: Problem, atoms: Atoms) -> Tensor:
    """L (1 or N, groups, rows, columns), or (1, groups, 1, 1) where only the group matters."""
    L = torch.from_numpy(atoms.curvature).view(1, -1, 1, 1)
    if problem.prior.p == 1 or (atoms.boundary == "circular" and atoms.mask is None):
        return L
    squares = atoms.f.square()
    visible = torch.ones_like(problem.b[:1]) if atoms.mask is None else atoms.mask.square()
    part = correlate(visible, squares, boundary=atoms.boundary)
    part = part.unflatten(1, (-1, atoms.group)).sum(2)
    whole = squares.sum((1, 2, 3)).view(1, -1, atoms.group).sum(2).view(L.shape)
    return part if atoms.mask is not None else torch.where(part > 0.9999 * whole, L, part)


def _value_by_image(prior: Prior, z: Tensor) -> Tensor:
    """The value of the prior (N,), which copies one image at a time where it can."""
    if prior.weights is not None or len(z) < 2:
        return prior.value(z)
    return torch.cat([prior.value(image) for image in z.split(1)])
