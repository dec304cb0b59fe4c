"""Codes of layer 1 with adaptive thresholds for several images, on any device.

`solve_dense` solves the same problem as `sparse_coding.whole_image`, but holds all maps in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deconvnet.operators.linear import Deconvolution
from deconvnet.sparse_coding.prior import Prior
from deconvnet.sparse_coding.problem import Solution, SolverSettings
from deconvnet.sparse_coding.solve import solve
from deconvnet.sparse_coding.whole_image import Thresholds


@dataclass(frozen=True)
class DenseSolution:
    """All maps of several images, with the interface of `SparseSolution`."""

    solution: Solution
    A: Deconvolution

    @property
    def residual(self) -> Tensor:
        return self.solution.residual

    @property
    def reconstruction(self) -> Tensor:
        return self.solution.reconstruction

    @property
    def sparsity(self) -> Tensor:
        return self.solution.sparsity

    @property
    def iterations(self) -> int:
        return self.solution.iterations

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.solution.z.shape[1:])

    def maps(self, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        return self.solution.z[:, :, rows, columns]

    def magnitudes(self) -> Tensor:
        return self.solution.z.abs().sum((0, 2, 3), dtype=torch.float64)

    def synthesis(self) -> Tensor:
        return Deconvolution(self.A.f, self.A.boundary)(self.solution.z)


def solve_dense(
    A: Deconvolution,
    b: Tensor,
    thresholds: Thresholds,
    *,
    lam: float,
    non_negative: bool,
    start: DenseSolution | None,
) -> DenseSolution:
    """The solution for images b (N, C, H, W) by the default solver of their device."""
    if thresholds.pilot is None:
        weights = thresholds.per_map()
    else:
        unmasked = Deconvolution(A.f, A.boundary)
        weights = thresholds.per_coefficient(unmasked.adjoint(thresholds.pilot))
    solution = solve(
        *(A, b),
        lam=lam,
        prior=Prior(weights=weights, group=thresholds.group, non_negative=non_negative),
        settings=SolverSettings(),
        state=None if start is None else start.solution.state,
    )
    return DenseSolution(solution, A)
