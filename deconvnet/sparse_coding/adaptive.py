"""The lasso of one layer on the CPU without maps in memory, with thresholds that a pilot decides.

    minimise over z      lam/2 ||A z - b||^2 + sum_i w_i |z_i|
    w_i = base / max(|c_i| / (gain level), 1 / WORST)        c = F'pilot, the same at every look

The method is that of `coordinates`, round by round the same, and so is what comes of it. But there
maps are what is given and what is returned, and weights for each entry take as much again. Here
correlations and weights are made in strips of rows when they are looked at, and the entries that
are not zero are all that is kept of z. So memory grows with the pixels and with these entries,
some 1% of the maps: an image of any size is solved as one problem, in which nothing is cut.

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
from deconvnet.sparse_coding.coordinate_descent import _Work
from deconvnet.sparse_coding.kernels import Entries
from deconvnet.sparse_coding.prior import Prior
from deconvnet.sparse_coding.solvers import data_term

# Thresholds of entries rise by no more than this factor.
WORST = 50.0
# Limits of up to this many bytes are kept between rounds; larger ones are recomputed each time.
KEPT = 2**27


@dataclass(frozen=True)
class Thresholds:
    """The weights of the prior, entry by entry where there is a pilot.

    base: (K,) what a map's threshold is where nothing is known of a place; gain: (K,) the norms of
    the filters; group: consecutive maps that have one weight. level: the correlation, of a filter
    of norm 1, at which an entry has its base.
    """

    base: Tensor
    gain: Tensor
    group: int = 1
    pilot: Tensor | None = None
    level: float = 1.0

    def of_maps(self) -> Tensor:
        """(K,): without a pilot."""
        return _of_groups(self.base.view(-1, 1, 1), self.group).flatten()

    def of_entries(self, c: Tensor) -> Tensor:
        """(.., K, rows, columns) from the correlations of the pilot there."""
        gain = self.gain.view(-1, 1, 1)
        fit = torch.where(gain > 0, c.abs() / gain, torch.zeros_like(c))
        fit = _of_groups(fit, self.group)
        return self.of_maps().view(-1, 1, 1) / (fit / self.level).clamp(min=1 / WORST)


@dataclass(frozen=True)
class SparseSolution:
    """The entries of the maps (1, K, rows, columns) of one image that are not zero.

    residual: b - A z (1, C, H, W). lam, objective: of the problem; iterations: rounds.
    """

    entries: Entries = field(repr=False)
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
        """The maps (1, K, ...), or some of their rows and columns."""
        (top, bottom, _), (left, right, _) = (
            part.indices(size) for part, size in zip((rows, columns), self.shape[1:], strict=True)
        )
        e, G = self.entries, self.entries.z.shape[1]
        inside = (e.i >= top) & (e.i < bottom) & (e.j >= left) & (e.j < right)
        g, i, j, value = (of[inside] for of in (e.g, e.i, e.j, e.z))
        z = self.residual.new_zeros(1, self.shape[0], bottom - top, right - left)
        for u in range(G):
            z[0].numpy()[g * G + u, i - top, j - left] = value[:, u]
        return z

    def magnitudes(self) -> Tensor:
        """(K,) float64: sum |z| of every map."""
        e, G = self.entries, self.entries.z.shape[1]
        total = np.zeros((self.shape[0] // G, G))
        np.add.at(total, e.g, np.abs(e.z, dtype=np.float64))
        return torch.from_numpy(total).flatten()

    def painted(self) -> Tensor:
        """F z (1, C, H, W), also where a mask hides it."""
        f = self.A.f.detach().to(self.residual).contiguous()
        painted = torch.zeros_like(self.residual, memory_format=torch.contiguous_format)
        filters = kernels.Filters.of(f.numpy(), self.entries.z.shape[1])
        grid = _grid(self.A.boundary, self.residual, f)
        kernels.subtract(painted[0].numpy(), filters, grid, self.entries)
        return painted.neg_()


def explain(
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
    tick: Callable[[], None] | None = None,
) -> SparseSolution:
    """The solution for one image b (1, C, H, W), from z = 0 or from another.

    It stops when a round has lowered the objective by at most `tolerance` of it or, with `gap`,
    when the duality gap is at most that share of it. tick() is called in every round.
    """
    work = _Pixels(A, b, thresholds, lam, non_negative, start, tick)
    count = work.run(iterations, 0.0 if gap else tolerance, gap, None)
    entries = work.entries[0]
    entries = entries.take((entries.z != 0).any(1))
    return SparseSolution(entries, work.residual, float(work.costs[0]), lam, count, A)


class _Pixels(_Work):
    """The work on one image whose weights are made when they are looked at."""

    def __init__(
        self,
        A: Deconvolution,
        b: Tensor,
        thresholds: Thresholds,
        lam: float,
        non_negative: bool,
        start: SparseSolution | None,
        tick: Callable[[], None] | None,
    ):
        self.thresholds, self.tick = thresholds, tick
        self.start = None if start is None else start.entries
        self.pilot = None if thresholds.pilot is None else thresholds.pilot.to(b).contiguous()
        self.kept: dict[int, Tensor] = {}
        weights = thresholds.of_maps() if self.pilot is None else None
        prior = Prior(weights=weights, group=thresholds.group, non_negative=non_negative)
        size = map_size(b.shape[2:], A.f.shape[2:], A.boundary)
        # Maps of zeros that take no memory.
        zeros = b.new_zeros(()).expand(1, len(A.f), *size)
        super().__init__(A, b, zeros, lam, prior, torch.arange(1))

    def _set_limits(self, images: Tensor, shape: tuple[int, int, int, int]) -> None:
        if self.pilot is None:
            super()._set_limits(images, shape)
            return
        self.limits, self.inverse, self.free = None, np.ones(shape[1], self.number), False
        paints = torch.from_numpy(self.inner > 0).repeat_interleave(self.G).view(-1, 1, 1)
        self.least = torch.finfo(self.f.dtype).tiny
        self.never = torch.where(paints, 0.0, torch.inf).to(self.f)
        self.base, self.gain = (
            of.to(self.f).view(-1, self.G).numpy()
            for of in (self.thresholds.of_maps(), self.thresholds.gain)
        )
        self.keeps = 4 * shape[1] * self.G * shape[2] * shape[3] <= KEPT

    def _look(self, images: list[int]) -> None:
        if self.pilot is not None:
            self.strips = correlate_strips(self.pilot, self.f, self.boundary)
        super()._look(images)

    def _relate(self, n: int, rows: slice, c: Tensor) -> None:
        if self.pilot is None:
            super()._relate(n, rows, c)
            return
        limits = self.kept.get(rows.start)
        if limits is None:
            # The strips of residual and pilot are the same, since their shapes are.
            of = next(self.strips)[2][0]
            limits = (self.thresholds.of_entries(of) / self.lam).clamp_(min=self.least) + self.never
            if self.keeps:
                self.kept[rows.start] = limits
        c /= limits

    def _descend(self, images: list[int]) -> None:
        super()._descend(images)
        if self.tick:
            self.tick()

    def _from_maps(self, n: int, maps: Tensor) -> Entries:
        if self.start is None:
            return super()._from_maps(n, maps)
        found = self._entries(n, self.start.g, self.start.i, self.start.j)
        found.z[:] = self.start.z
        return found

    def _weights_at(self, n: int, g: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        if self.pilot is None:
            return super()._weights_at(n, g, i, j)
        grid = _grid(self.boundary, self.pilot, self.f)
        where = (self.f.numpy(), grid.rows, grid.columns, self.G, g, i, j)
        c = np.abs(kernels.correlations_at(self.pilot[0].numpy(), *where))
        gain = self.gain[g]
        fit = np.divide(c, gain, out=np.zeros_like(c), where=gain > 0).mean(1)
        level = self.number(self.thresholds.level)
        return self.base[g, 0] / np.maximum(fit / level, self.number(1 / WORST))


def _grid(boundary: str, image: Tensor, f: Tensor) -> kernels.Grid:
    """Where entries paint an image all of which counts."""
    H, W = image.shape[2:]
    return kernels.Grid(
        kernels.footprint(boundary, H, f.shape[2]),
        kernels.footprint(boundary, W, f.shape[3]),
        np.empty((0, 0, 0), f.numpy().dtype),
    )


def _of_groups(maps: Tensor, group: int) -> Tensor:
    """(.., K, rows, columns) with the mean over the maps of each group in all of them."""
    if group == 1:
        return maps
    return maps.unflatten(-3, (-1, group)).mean(-3).repeat_interleave(group, -3)
