"""Coordinate descent on a working set: the few entries of maps that are not zero, or will be.

    minimise over z      lam/2 ||A z - b||^2 + prior(z)       A one deconvolution, r = b - A z

About one percent of the entries of a sparse code are not zero, and all that the others need is to
be looked at now and then. A round

1. correlates the residual with all filters, c = A'r, the one pass over whole maps; it also tells
   the duality gap;
2. drops the entries that have become zero, and takes in new ones where |c| says that zero is not
   their minimum: of many in a tile of places only the strongest, because an entry that is taken in
   explains what its neighbours saw;
3. minimises over one entry after the other, several times over the set. That costs what one filter
   paints, and uses the curvature of that entry, which is many times smaller than that of A.

Working sets of violators are those of Massias, Gramfort and Salmon (2018, "celer"), strongest
entries tile by tile those of Moreau, Oudre and Vayatis (2018, "DICOD"). Entries are swept by bands
of rows, first the even bands: those of one parity do not touch, so that threads may share them, and
neither the threads nor the batch change the result.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from deconvnet.operators.convolution import correlate, correlate_strips
from deconvnet.operators.linear import Deconvolution, LinearOperator
from deconvnet.sparse_coding import kernels
from deconvnet.sparse_coding.kernels import Entries
from deconvnet.sparse_coding.prior import Prior, threshold

Callback = Callable[[int, Tensor, Tensor], None]

# Between two looks at all entries, which cost as much as several sweeps over the working set, even
# and odd bands take turns, and a band is swept so often in its turn.
TURNS, SWEEPS = 5, 2
# By which factor about the working set grows at most in a round.
GROWTH = 3
# Bytes of maps that are looked at together; more images at a time are no faster.
TOGETHER = 2**25


def check_coordinate_descent(A: LinearOperator, b: Tensor, prior: Prior) -> None:
    """Refuse what coordinate descent cannot do, with what to use instead."""
    instead = "use solver.method=fista or admm"
    if not isinstance(A, Deconvolution):
        raise ValueError(f"solver.method=coordinate: not through several layers; {instead}")
    if prior.window is not None:
        raise ValueError(f"solver.method=coordinate: not with pooling in the loop; {instead}")
    if b.device.type != "cpu":
        raise ValueError(f"solver.method=coordinate: runs on the CPU, not on {b.device}; {instead}")


def coordinate_descent(
    A: Deconvolution,
    b: Tensor,
    z: Tensor,
    *,
    lam: float,
    prior: Prior,
    iterations: int,
    tolerance: float = 0.0,
    gap: float | None = None,
    callback: Callback | None = None,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(z, b - A z, duality gaps (N,) in float64, rounds), from the maps z (N, K, rows, columns).

    An image stops when a round has lowered its objective by at most `tolerance` of what all have
    lowered it from that of z = 0, and of the objective, or, with `gap`, when its duality gap is at
    most that share of it; without `gap` the gaps are NaN. Where the prior is not convex the end is
    a point that no step of one entry alone betters, but for entries at a mirrored border, and with
    groups, whose steps lower a bound of the objective. callback(i, z, beta) sees the maps after
    round i; beta is lam, the curvature of unit filters being 1. Nothing of it is differentiable.
    """
    check_coordinate_descent(A, b, prior)
    b, z = b.detach(), z.detach()
    found, residual = z.new_zeros(z.shape), torch.empty_like(b)
    gaps = torch.full((len(b),), math.nan, dtype=torch.float64)
    together = max(torch.get_num_threads(), TOGETHER // (z[0].numel() * z.element_size()))
    rounds = 0
    for images in torch.arange(len(b)).split(len(b) if callback else together):
        work = _Work(A, b, z, lam, prior, images)
        rounds = max(rounds, work.run(iterations, tolerance, gap, callback))
        work.write(found)
        residual[images], gaps[images] = work.residual, torch.from_numpy(work.gaps)
    return found, residual, gaps, rounds


class _Work:
    """Some images that are worked on together, each by itself."""

    def __init__(
        self, A: Deconvolution, b: Tensor, z: Tensor, lam: float, prior: Prior, images: Tensor
    ):
        self.lam, self.prior, self.images = lam, prior, images
        self.b = b[images].contiguous()
        self.residual = torch.empty_like(self.b)
        self.f, self.boundary = A.f.detach().to(b).contiguous(), A.boundary
        self.mask = (
            None if A.mask is None else A.mask.detach().to(b).expand_as(b)[images].contiguous()
        )
        K, C, h, w = self.f.shape
        self.maps_shape, self.G = tuple(z.shape[1:]), prior.group
        self.number = self.f.numpy().dtype.type
        self.filters = kernels.Filters.of(self.f.numpy(), self.G)
        sides = zip(self.b.shape[2:], (h, w), strict=True)
        self.axes = [kernels.footprint(self.boundary, *side) for side in sides]
        self.inner = _curvatures(self.f, self.G)
        # A band reaches into the next one only; with an even number of them also where they wrap.
        self.bands = max(1, z.shape[2] // h // 2 * 2)
        every = np.arange(self.bands)
        self.turns = [of for of in (every[::2].copy(), every[1::2].copy()) if len(of)] * TURNS
        self._set_limits(images, (b.shape[0], K // self.G, *z.shape[2:]))
        N = len(images)
        self.best = np.zeros((N, *z.shape[2:]), self.number)
        self.which = np.zeros((N, *z.shape[2:]), np.int32)
        self.costs, self.gaps = np.full(N, math.inf), np.full(N, math.nan)
        # The objective of z = 0.
        self.nothing = lam / 2 * self.b.double().square().sum((1, 2, 3)).numpy()
        self.starts: list[np.ndarray | None] = [None] * N
        self.entries = [self._from_maps(n, z[image]) for n, image in enumerate(images)]

    def _set_limits(self, images: Tensor, shape: tuple[int, int, int, int]) -> None:
        """The weights (N, groups, rows, columns), and up to which correlation an entry stays zero.

        With one weight for each map the limits are 1 / inverse (groups,), else an array.
        """
        w = self.prior.entry_weights
        w = self.f.new_ones(()) if w is None else w.to(self.f)
        w = w[(None,) * (4 - w.ndim)]
        if w.shape[0] > 1:
            w = w[images]
        self.weights, self.free = w.expand(len(images), *shape[1:]).numpy(), bool((w == 0).any())
        L = self._curvatures_of_places()
        # Where a weight is 0 any correlation is too much; with p < 1 the threshold there is 0 / 0.
        limits = torch.where(w > 0, L * threshold(self.lam * L / w, self.prior.p)[1], 0.0)
        limits = torch.where(L > 0, limits.clamp(min=torch.finfo(limits.dtype).tiny), math.inf)
        self.limits = None if limits[0, 0].numel() * len(limits) == 1 else limits
        if self.limits is None:
            self.inverse = (1 / limits).flatten().numpy()
        else:
            self.inverse = np.ones(shape[1], self.number)
            self.limits = limits.repeat_interleave(self.G, 1)

    def _curvatures_of_places(self) -> Tensor:
        """L (1 or N, groups, rows, columns), or (1, groups, 1, 1) where only the group matters."""
        L = torch.from_numpy(self.inner).view(1, -1, 1, 1)
        if self.prior.p == 1 or (self.boundary == "circular" and self.mask is None):
            return L
        squares = self.f.square()
        seen = torch.ones_like(self.b[:1]) if self.mask is None else self.mask.square()
        part = correlate(seen, squares, boundary=self.boundary).unflatten(1, (-1, self.G)).sum(2)
        whole = squares.sum((1, 2, 3)).view(1, -1, self.G).sum(2).view(L.shape)
        return part if self.mask is not None else torch.where(part > 0.9999 * whole, L, part)

    def run(
        self, iterations: int, tolerance: float, gap: float | None, callback: Callback | None
    ) -> int:
        """Rounds until every image has stopped, or all of them; how many there were."""
        going, self.certified = list(range(len(self.images))), gap is not None
        for count in range(iterations + 1):
            before = self.costs[going]
            self._explain(going)
            if gap is not None or count < iterations:
                self._look(going)
            now = self.costs[going]
            if callback and count:
                z = self.write(torch.zeros(len(self.images), *self.maps_shape, dtype=self.b.dtype))
                callback(count, z, torch.full((len(z), 1, 1, 1), self.lam, dtype=z.dtype))
            if count == iterations:
                break
            done = np.zeros(len(going), bool)
            if tolerance:
                # A constant that cannot be explained is in the objective, but in no difference.
                explained = np.maximum(self.nothing[going] - now, 0)
                done |= before - now <= tolerance * np.minimum(now, explained)
            if gap is not None:
                done |= self.gaps[going] <= gap * now
            going = [n for n, stop in zip(going, done, strict=True) if not stop]
            if not going:
                break
            self._descend(going)
        return count

    def write(self, z: Tensor) -> Tensor:
        """Fill the entries into zeros z (N, K, ...), in which these images have their places."""
        for image, e in zip(self.images.tolist(), self.entries, strict=True):
            for u in range(self.G):
                z[image].numpy()[e.g * self.G + u, e.i, e.j] = e.z[:, u]
        return z

    def _explain(self, images: list[int]) -> None:
        """The residual from the entries, free of what rounding had added up, and the objective."""

        def explain(n: int) -> None:
            e, r = self.entries[n], self.residual[n].copy_(self.b[n]).numpy()
            kernels.subtract(r, self.filters, self._grid(n), e)
            length, p = np.linalg.norm(e.z.astype(np.float64), axis=1), self.prior.p
            prior = e.weight @ (length**p if p else (length > 0).astype(np.float64))
            self.costs[n] = self.lam / 2 * np.square(r, dtype=np.float64).sum() + prior

        _share([functools.partial(explain, n) for n in images])

    def _look(self, images: list[int]) -> None:
        """Step 1: the correlations of the residual with all filters, and what they say."""
        seen = self.residual if len(images) == len(self.images) else self.residual[images]
        if self.mask is not None:
            seen = self.mask[images] * seen
        reach, by_row = dict.fromkeys(images, 0.0), {}
        for part, rows, c in correlate_strips(seen, self.f, self.boundary):
            if self.prior.non_negative:
                c.clamp_(min=0)
            each = list(zip(images[part], c, strict=True))
            for n, of in each:
                self._relate(n, rows, of)
                # Without its own entries, each place shows the strongest that could be taken in.
                here = slice(None)
                if rows != slice(0, self.maps_shape[1]):
                    if n not in by_row:
                        order = self.entries[n].i.argsort(kind="stable")
                        by_row[n] = order, self.entries[n].i[order]
                    order, i = by_row[n]
                    here = order[slice(*np.searchsorted(i, (rows.start, rows.stop)))]
                reach[n] = max(reach[n], self._take_out(n, of.numpy(), rows.start, here))
            tasks = [self._find_strongest(n, of.numpy(), rows) for n, of in each]
            _share([task for image in tasks for task in image])
        if self.certified:
            for n in images:
                self._certify(n, max(reach[n], float(self.best[n].max())))

    def _relate(self, n: int, rows: slice, c: Tensor) -> None:
        """Divide correlations (K, rows, columns) by their limits, unless `inverse` has these."""
        if self.limits is not None:
            c /= self.limits[n if len(self.limits) > 1 else 0][..., rows, :]

    def _take_out(self, n: int, c: np.ndarray, top: int, here: slice | np.ndarray) -> float:
        """Set the correlations of these entries to zero, in maps from the row `top` on; the
        largest, as a share of its limit, where a duality gap asks for it.
        """
        e, share = self.entries[n], np.zeros(0)
        g, i, j = e.g[here], e.i[here] - top, e.j[here]
        at = g, i, j
        if self.G > 1:
            at = g[:, None] * self.G + np.arange(self.G), i[:, None], j[:, None]
        if self.certified:
            with np.errstate(over="ignore"):
                share = np.linalg.norm(c[at].reshape(-1, self.G), axis=1) * self.inverse[g]
        c[at] = 0
        return float(share.max(initial=0))

    def _find_strongest(self, n: int, c: np.ndarray, rows: slice) -> list[Callable[[], None]]:
        """What is to be done to fill in some rows of `best` and `which`."""
        best, which = self.best[n][rows], self.which[n][rows]
        step = -(-len(best) // torch.get_num_threads())
        return [
            functools.partial(
                kernels.strongest,
                *(c, self.inverse, self.G, best, which, top, min(top + step, len(best))),
            )
            for top in range(0, len(best), step)
        ]

    def _certify(self, n: int, reach: float) -> None:
        """The duality gap for p = 1 (solvers.duality_gap), A'r being at most `reach` / lam."""
        b, r = self.b[n].double(), self.residual[n].double()
        if self.free and reach > np.finfo(self.number).tiny ** -0.5:
            # No scaling makes a correlation feasible where the weight is 0.
            self.gaps[n] = math.inf
            return
        share = 1 / max(reach, 1.0)
        dual = share * float((b * r).sum()) - share**2 / 2 * float(r.square().sum())
        # At the minimum rounding takes it below 0; a NaN stays one.
        self.gaps[n] = np.maximum(self.costs[n] - self.lam * dual, 0)

    def _descend(self, images: list[int]) -> None:
        """Steps 2 and 3. Threads share the images or, of a few, the bands."""
        if len(images) >= torch.get_num_threads():
            _share([functools.partial(self._descend_alone, n) for n in images])
            return
        for n in images:
            self._choose(n)
            for bands in self.turns:
                # Dealt out in turn, because what there is to do lies together.
                workers = min(torch.get_num_threads(), len(bands))
                parts = [bands[first::workers].copy() for first in range(workers)]
                _share([functools.partial(self._sweep, n, part) for part in parts])

    def _descend_alone(self, n: int) -> None:
        self._choose(n)
        for bands in self.turns:
            self._sweep(n, bands)

    def _choose(self, n: int) -> None:
        """Step 2: the working set of the next sweeps, sorted."""
        old, best = self.entries[n], self.best[n]
        old = old.take((old.z != 0).any(1))
        i, j = kernels.leaders(best, _tile(best, self.f.shape[2], len(old.g)))
        e = old.join(self._entries(n, self.which[n][i, j], i, j))
        order, self.starts[n] = kernels.by_bands(e.i, e.j, *best.shape, self.bands)
        self.entries[n] = e.take(order)

    def _sweep(self, n: int, bands: np.ndarray) -> None:
        """Step 3, in some bands that do not touch."""
        kernels.descend(
            *(self.residual[n].numpy(), self.filters, self._grid(n), self.entries[n]),
            *(self.starts[n], bands, SWEEPS),
            *(self.number(self.lam), self.number(self.prior.p), self.prior.non_negative),
        )

    def _from_maps(self, n: int, maps: Tensor) -> Entries:
        if _is_one_zero(maps):
            return self._entries(n, *np.empty((3, 0), np.int32))
        z = maps.contiguous().numpy()
        g, i, j = kernels.active(z, self.G)
        e = self._entries(n, g, i, j)
        e.z[:] = z.reshape(-1, self.G, *z.shape[1:])[g, :, i, j]
        return e

    def _entries(self, n: int, g: np.ndarray, i: np.ndarray, j: np.ndarray) -> Entries:
        """Entries at these places, zero as yet."""
        g, i, j = (of.astype(np.int32) for of in (g, i, j))
        scratch = np.zeros(self.b.shape[1:], self.number)
        L = kernels.curvatures(self.filters, self.inner, self._grid(n), g, i, j, scratch)
        weight = self._weights_at(n, g, i, j)
        return Entries(g, i, j, np.zeros((len(g), self.G), self.number), L, weight)

    def _weights_at(self, n: int, g: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return self.weights[n, g, i, j]

    def _grid(self, n: int) -> kernels.Grid:
        mask = np.empty((0, 0, 0), self.number) if self.mask is None else self.mask[n].numpy()
        return kernels.Grid(*self.axes, mask)


def _is_one_zero(maps: Tensor) -> bool:
    """Whether they are a single zero that is expanded, so that there is nothing to look for.

    A copy of them would have the size of maps, and take longer than a sweep.
    """
    sides = zip(maps.shape, maps.stride(), strict=True)
    return all(size == 1 or stride == 0 for size, stride in sides) and float(maps[0, 0, 0]) == 0


def _curvatures(f: Tensor, group: int) -> np.ndarray:
    """(groups,): the largest eigenvalue of what the filters of each group paint at one place."""
    atoms = f.reshape(len(f) // group, group, -1)
    if group == 1:
        return atoms.square().sum((1, 2)).numpy()
    return 1.0001 * torch.linalg.matrix_norm(atoms, 2).square().numpy()


def _tile(best: np.ndarray, size: int, active: int) -> int:
    """The side of the tiles that give one entry each: the set should grow a few times, no more."""
    places = np.count_nonzero(best > 1)
    most = GROWTH * max(active, best.size // 64)
    return next(
        (side for side in (1, size // 4) if side and places <= most * side**2), size // 2 or 1
    )


def _share(tasks: list[Callable[[], object]]) -> None:
    """Do all of these on as many threads as torch has, this one among them."""
    workers = min(torch.get_num_threads(), len(tasks))

    def some(first: int) -> None:
        for task in tasks[first::workers]:
            task()

    others = [_pool(workers - 1).submit(some, first) for first in range(1, workers)]
    if workers:
        some(0)
    for other in others:
        other.result()


@functools.lru_cache(maxsize=1)
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="coordinates")


if hasattr(os, "register_at_fork"):
    # A forked process has the pool, but not its threads, and would wait for them for ever.
    os.register_at_fork(after_in_child=_pool.cache_clear)
