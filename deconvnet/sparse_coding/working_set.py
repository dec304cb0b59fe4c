"""Coordinate descent on a working set: the coefficients that are non-zero, or may become so.

    minimise over z      lam/2 ||A z - b||^2 + prior(z)       A one deconvolution, r = b - A z

About one percent of the coefficients of a sparse code are non-zero, and the others need only be
checked occasionally. Each round

1. correlates the residual with all filters, c = A'r, the only pass over dense maps, which also
   gives the duality gap;
2. drops the coefficients that have become zero, and adds new ones for which |c| exceeds the limit
   up to which zero is optimal: only the strongest in each tile of positions, because an added
   coefficient explains much of what its neighbours respond to (with many channels, the strongest
   of each of a few parts of the maps, because a position needs many coefficients);
3. minimises over one coefficient after another, sweeping several times over the set. A step costs
   as much as painting one filter, and uses the curvature of that coefficient, which is many times
   smaller than that of A. From sweep to sweep coefficients gain momentum (Nesterov 1983), and the
   residual with them; if the objective has risen after a round, that is repeated without.

Working sets of violators follow Massias, Gramfort and Salmon (2018, "celer"), the strongest
coefficient of each tile Moreau, Oudre and Vayatis (2018, "DICOD"). Coefficients are swept by bands
of rows, for signals of columns, the even bands first: bands of one parity do not touch, so threads
may share them, and neither the threads nor the batch change the result.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.operators.convolution import correlate_strips, map_size
from deconvnet.operators.linear import Deconvolution
from deconvnet.sparse_coding import kernels
from deconvnet.sparse_coding.active_set import ActiveSet, Filters, Footprint, Grid, footprint
from deconvnet.sparse_coding.descent import CoordinateDescent, is_expanded_zero
from deconvnet.sparse_coding.problem import Problem, data_term
from deconvnet.support.thread_pool import run_all, run_in_turns
from deconvnet.support.vectors import BLOCK, FILTERS, LONG, padded

# A pass over all coefficients costs as much as several sweeps over the working set. Between two
# passes, even and odd bands alternate TURNS times, in rounds with longer momentum MORE_TURNS times,
# and each time a band is swept SWEEPS times.
TURNS, MORE_TURNS, SWEEPS = 10, 20, 1
# Longer momentum is tried if more than so many of the coefficients of the working set are not zero,
# and fewer than so many times as many as a round before.
SETTLED, GROWING = 0.75, 1.1
# The working set grows at most by about this factor in a round.
GROWTH = 3
# From so many channels on, the compiled loops take them side by side (`Atoms`). A position then
# needs many coefficients, of which each of so many PARTS of the maps may add one in a round.
CHANNELS_LAST, PARTS = 16, 4


class Frames(NamedTuple):
    """Images as the loops take them: a row has LONG more numbers, which vectors read and write.

    images (N, C, H, W): a view without those numbers, which stay 0. pixels (N, C, H, W + LONG) or,
    if channels are last, (N, 1, H, W C + LONG).
    """

    images: Tensor
    pixels: np.ndarray


class Atoms:
    """The filters as used by the compiled loops, with their footprints and curvatures.

    curvature: (groups,), the largest squared norm of the image that coefficients of norm 1 of a
    group paint, far from borders and without a mask.

    If there are many channels, those of a pixel are next to each other in memory (`channels_last`):
    the loops see images of one channel and W C columns, (1, H, W C), and filters (K, 1, h, w C), so
    that a row of a filter is one run of memory. Such rows are padded with zeros to whole vectors.
    """

    def __init__(self, A: Deconvolution, b: Tensor, group: int):
        self.f, self.boundary, self.group = A.f.detach().to(b).contiguous(), A.boundary, group
        C = b.shape[1]
        dense = C >= CHANNELS_LAST and bool(self.f.any(3).any(2).float().mean() > 0.5)
        self.channels_last = dense
        self.image_size, self.dtype = b.shape[1:], self.f.numpy().dtype.type
        self.mask = None
        if A.mask is not None:
            self.mask = self.frames(A.mask.detach().to(b).expand_as(b))
        self.by_tap = _by_tap(self.f.numpy())
        f = self.f.permute(0, 2, 3, 1).flatten(2)[:, None] if dense else self.f
        self.filters = Filters.from_array(padded(f.numpy()))
        sides = zip(b.shape[2:], self.f.shape[2:], strict=True)
        rows, columns = (footprint(self.boundary, *side) for side in sides)
        self.footprints = rows, columns
        self.axes = [rows, columns.repeated(C) if dense else columns]
        self.map_size = map_size(b.shape[2:], self.f.shape[2:], self.boundary)
        self.curvature = _group_curvatures(self.f, group)

    def zeros(self, N: int) -> Frames:
        """N images of zeros, as the loops take them."""
        C, H, W = self.image_size
        rows = (1, H, W * C) if self.channels_last else (C, H, W)
        pixels = np.zeros((N, *rows[:2], rows[2] + LONG), self.dtype)
        images = torch.from_numpy(pixels)[..., : rows[2]]
        if self.channels_last:
            images = images[:, 0].unflatten(2, (W, C)).permute(0, 3, 1, 2)
        return Frames(images, pixels)

    def frames(self, images: Tensor) -> Frames:
        """A copy of images (N, C, H, W), as the loops take them."""
        frames = self.zeros(len(images))
        frames.images.copy_(images)
        return frames

    def beyond_borders(self, N: int) -> np.ndarray:
        """Zeros for what filters at all positions of the maps of N images see, as
        `kernels.correlate_and_search` takes it; `continue_image` fills it in.
        """
        (h, w), (rows, columns) = self.f.shape[2:], self.map_size
        whole_blocks = -(-columns // BLOCK) * BLOCK
        return np.zeros((N, self.image_size[0], rows + h - 1, whole_blocks + w - 1), self.dtype)

    def continue_image(self, y: np.ndarray, image: np.ndarray) -> None:
        """Write an image (C, H, W) and what continues it beyond its borders to y; not "reflect"."""
        (_, H, W), (h, w) = image.shape, self.f.shape[2:]
        centred = (h - 1) // 2, (w - 1) // 2
        top, left = {"valid": (h - 1, w - 1), "zero": centred, "circular": (0, 0)}[self.boundary]
        y[:, top : top + H, left : left + W] = image
        if self.boundary == "circular":
            y[:, H : H + h - 1, :W] = image[:, : h - 1]
            y[:, :, W : W + w - 1] = y[:, :, : w - 1]

    def grid(self, n: int) -> Grid:
        """The footprints and the mask of an image."""
        mask = np.empty((0, 0, 0), self.dtype) if self.mask is None else self.mask.pixels[n]
        return Grid(*self.axes, mask)

    def curvatures_at(self, n: int, g: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """L (m,) of coefficients at these positions of an image."""
        if self.mask is not None or self.boundary == "reflect":
            scratch, L = self.zeros(1).pixels[0], np.empty(len(g), self.dtype)
            where = self.grid(n), g, i, j
            kernels.curvatures(self.filters.f, self.group, self.curvature, *where, scratch, L)
            return L
        L = self.curvature[g]
        if self.boundary == "circular":
            return L
        rows, columns = self.footprints
        cut = np.flatnonzero((rows.first[i] < 0) | (columns.first[j] < 0))
        if len(cut):
            norms, row, column = self._visible
            L[cut] = norms[g[cut], row[i[cut]], column[j[cut]]]
        return L

    def steps(self, n: int, e: ActiveSet, lam: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(pixel, inverse, threshold) of coefficients, as `kernels.descend` takes them."""
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            inverse = 1 / e.L
            threshold = e.weight * (inverse / self.dtype(lam))
        rows, columns = self.axes
        top, left = rows.first[e.i].astype(np.int64), columns.first[e.j]
        direct = (top >= 0) & (left >= 0) & np.isfinite(inverse)
        if self.mask is not None:
            corner = rows.first[e.i[direct]], self.footprints[1].first[e.j[direct]]
            direct[direct] = self._unmasked[n][corner]
        C, _, W = self.image_size
        width = (W * C if self.channels_last else W) + LONG
        return np.where(direct, top * width + left, -1), inverse, threshold

    @functools.cached_property
    def _unmasked(self) -> np.ndarray:
        """(N, rows, columns): whether the mask is 1 at all pixels of a filter with this corner."""
        hidden = (self.mask.images != 1).any(1, keepdim=True).float()
        h, w = (
            min(side, taps) for side, taps in zip(hidden.shape[2:], self.f.shape[2:], strict=True)
        )
        rows = F.max_pool2d(hidden, (h, 1), stride=1)
        return (F.max_pool2d(rows, (1, w), stride=1)[:, 0] == 0).numpy()

    @functools.cached_property
    def _visible(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(norms, row, column): norms[g, row[i], column[j]] is the squared norm of the part of the
        filters of group g that lies inside the image at position (i, j), summed over the group.
        """
        squares = self.f.square().sum(1).unflatten(0, (-1, self.group)).sum(1).numpy()
        (rows, row), (columns, column) = (
            _taps_inside(axis, taps, self.dtype)
            for axis, taps in zip(self.footprints, squares.shape[1:], strict=True)
        )
        return rows @ squares @ columns.T, row, column


@dataclass(frozen=True)
class Bands:
    """Equal parts of the rows of maps or, if these are too few to share, of their columns.

    Filters reach at most into the next band, also where they wrap, because the number is even.
    """

    number: int
    of_columns: bool = False

    @classmethod
    def of(cls, maps: tuple[int, int], filters: tuple[int, int]) -> Bands:
        # Along a row, vectors write up to LONG - 1 unchanged pixels beyond the end of a filter.
        reaches = filters[0], filters[1] + LONG - 1
        by_rows, by_columns = (
            max(1, side // reach // 2 * 2) for side, reach in zip(maps, reaches, strict=True)
        )
        return cls(by_rows) if by_rows > 1 else cls(by_columns, of_columns=True)

    def sort(self, e: ActiveSet, maps: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """(order, starts): the coefficients of maps of this size, sorted by band; in a band, those
        of its two halves take turns, so that no step has to wait for the pixels of the last.
        """
        rows, columns = maps
        if self.of_columns:
            order, starts = kernels.by_bands(e.j, e.i, columns, rows, columns)
            starts = starts[self._firsts(columns)]
        else:
            order, starts = kernels.by_bands(e.i, e.j, rows, columns, self.number)
        sizes = np.diff(starts)
        halves, firsts = (np.repeat(each, sizes) for each in ((sizes + 1) // 2, starts[:-1]))
        rank = np.arange(len(order)) - firsts
        turn = firsts + 2 * rank
        turn -= (rank >= halves) * (2 * halves - 1)
        taking_turns = np.empty_like(order)
        taking_turns[turn] = order
        return taking_turns, starts

    def spans(self, axes: tuple[Footprint, Footprint], size: tuple[int, int]) -> np.ndarray:
        """(number, 4): from which to which row and column of images of this size each band counts
        as its own: what even bands paint, and what lies between, of odd ones.
        """
        axis, pixels = axes[self.of_columns], size[self.of_columns]
        painted, firsts = axis.length > 0, self._firsts(len(axis.first))[:-1]
        first = np.where(painted, axis.pixel, pixels).min(1)
        last = np.where(painted, axis.pixel + axis.length, 0).max(1)
        edges = np.zeros(self.number + 1, np.int64)
        edges[2:-1:2] = np.minimum.reduceat(first, firsts)[2::2]
        edges[1:-1:2] = np.maximum.reduceat(last, firsts)[:-1:2]
        edges[-1] = pixels
        spans = np.tile(np.array([0, size[0], 0, size[1]]), (self.number, 1))
        spans[:, 2 * self.of_columns], spans[:, 2 * self.of_columns + 1] = edges[:-1], edges[1:]
        return spans

    def _firsts(self, positions: int) -> np.ndarray:
        """The first of so many positions that is in each band, and their number."""
        return -(-np.arange(self.number + 1) * positions // self.number)


class Turns:
    """How often even and odd bands of an image alternate in a round.

    Momentum pays for longer where an image converges slowly, except where coefficients depend on
    each other so much that it overshoots.
    """

    def __init__(self) -> None:
        self.number, self._decrease, self._nonzero = TURNS, math.inf, 0
        self._on_trial, self._overshoots = False, False

    def adapt(self, decrease: float, nonzero: int, size: int) -> None:
        """After a round that has lowered the objective by so much, with so many non-zero
        coefficients in a working set of this size.
        """
        settled = SETTLED * size < nonzero < GROWING * self._nonzero
        before, self._decrease, self._nonzero = self._decrease, decrease, nonzero
        if self._on_trial:
            self._on_trial, self._overshoots = False, not decrease > before
            longer = not self._overshoots
        elif self.number == TURNS:
            self._on_trial = longer = settled and not self._overshoots and decrease > before / 2
        else:
            longer = decrease > before / 4
        self.number = MORE_TURNS if longer else TURNS


class Weights(Protocol):
    """The weights of the prior, and the limits up to which a correlation leaves a coefficient zero.

    inverse: (groups,), 1 / limit, or 1 if `divides`, that is, if `divide_by_limits` is needed.
    has_zeros: whether any weight is 0.
    """

    inverse: np.ndarray
    divides: bool
    has_zeros: bool

    def divide_by_limits(self, n: int, rows: slice, c: Tensor) -> None: ...

    def at(self, n: int, g: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray: ...


class WorkingSetSolver(CoordinateDescent):
    """Solves a few images, each separately with its own active set.

    problem: of these images; its prior defines p, group and sign, and `weights` the weights.
    """

    def __init__(self, problem: Problem, atoms: Atoms, weights: Weights):
        super().__init__(problem)
        self.atoms, self.weights = atoms, weights
        N = len(self.b)
        self.frames = atoms.zeros(N)
        self.residual = self.frames.images
        self.maps_shape = (len(atoms.f), *atoms.map_size)
        self.bands = Bands.of(atoms.map_size, tuple(atoms.f.shape[2:]))
        self.spans = np.empty((0, 4), np.int64)
        self.frames_before, self.before = self.frames, [np.empty((0, 0))] * N
        if problem.prior.p == 1:
            self.spans = self.bands.spans(atoms.axes, self.frames.pixels.shape[2:])
            self.frames_before = atoms.zeros(N)
        groups = len(atoms.f) // atoms.group
        parts = min(PARTS, groups) if atoms.channels_last else 1
        self.parts = np.array([groups * part // parts for part in range(parts + 1)])
        # Otherwise correlations are computed by torch, in strips.
        self.compiled_search = atoms.boundary != "reflect" and not weights.divides
        self.extended = atoms.beyond_borders(N if self.compiled_search else 0)
        self.best = np.zeros((N, parts, *self.maps_shape[1:]), atoms.dtype)
        self.which = np.zeros(self.best.shape, np.int32)
        self.starts: list[np.ndarray | None] = [None] * N
        no_positions = np.empty((3, 0), np.int32)
        self.active = [self._active_set(n, *no_positions) for n in range(N)]
        self.steps = [atoms.steps(n, e, problem.lam) for n, e in enumerate(self.active)]
        self.turns = [Turns() for _ in range(N)]
        # The value of the prior of each image, in float64.
        self.penalties = np.zeros(N)
        # Whether the correlations of the images of the last round match the residual.
        self.correlated = False

    def activate_maps(self, n: int, maps: Tensor) -> None:
        """Start an image from maps (K, rows, columns)."""
        if is_expanded_zero(maps):
            return
        z, group = maps.contiguous().numpy(), self.atoms.group
        g, i, j = kernels.active(z, group)
        self.activate(n, g, i, j, z.reshape(-1, group, *z.shape[1:])[g, :, i, j])

    def activate(self, n: int, g: np.ndarray, i: np.ndarray, j: np.ndarray, z: np.ndarray) -> None:
        """Start an image from the values z (m, G) of coefficients at these positions."""
        self.active[n] = self._active_set(n, g, i, j)
        self.active[n].z[:] = z

    def descend(self, images: list[int]) -> None:
        """A round: correlate the residual, grow the working set, sweep over it."""
        if not self.correlated:
            self.correlate_residual(images, certify=False)
        start = list(self.active)
        for n in images:
            z = self.active[n].z
            decrease = self.costs_before[n] - self.costs[n]
            self.turns[n].adapt(decrease, np.count_nonzero(z.any(1)), len(z))
        self.sweep(images, momentum=True)
        self.refresh_residual(images)
        allowed = (1 + 4 * np.finfo(self.atoms.dtype).eps) * self.costs_before
        if risen := [n for n in images if len(self.spans) and self.costs[n] > allowed[n]]:
            # It rarely happens: repeat the sweeps without momentum, which cannot raise it.
            for n in risen:
                self.active[n] = start[n]
            self.refresh_residual(risen)
            self.sweep(risen, momentum=False)
            self.refresh_residual(risen)

    def maps(self) -> Tensor:
        return self.write(self.b.new_zeros(len(self.images), *self.maps_shape))

    def certify(self, images: list[int]) -> None:
        self.correlate_residual(images, certify=True)

    def write(self, z: Tensor) -> Tensor:
        group = self.atoms.group
        for maps, e in zip(z, self.active, strict=True):
            for u in range(group):
                maps.numpy()[e.g * group + u, e.i, e.j] = e.z[:, u]
        return z

    def terms(self) -> tuple[Tensor, Tensor, Tensor]:
        error = data_term(self.residual, self.problem.lam)
        return self.residual, error, torch.from_numpy(self.penalties)

    def refresh_residual(self, images: list[int]) -> None:
        """Recompute residual and objective from the coefficients, removing accumulated rounding."""
        self.costs_before[images] = self.costs[images]
        run_all([functools.partial(self._refresh_residual, n) for n in images])
        self.correlated = False

    def _refresh_residual(self, n: int) -> None:
        # Not torch's copy, whose threads would have to meet.
        self.residual[n].numpy()[:] = self.b[n].numpy()
        e, r = self.active[n], self.frames.pixels[n]
        kernels.subtract(r, self.atoms.filters, self.atoms.grid(n), e)
        length, p = np.linalg.norm(e.z.astype(np.float64), axis=1), self.problem.prior.p
        # Not a product of vectors: for these, numpy's library would wake its own threads.
        penalty = (e.weight * (length**p if p else length > 0)).sum(dtype=np.float64)
        self.costs[n] = self.problem.lam / 2 * np.square(r, dtype=np.float64).sum() + penalty
        self.penalties[n] = penalty

    def correlate_residual(self, images: list[int], *, certify: bool) -> None:
        """Step 1: the strongest inactive correlation at every position, and the duality gaps."""
        largest = (self._search if self.compiled_search else self._search_in_strips)(
            images, certify
        )
        if certify:
            for n in images:
                self._compute_gap(n, max(largest[n], float(self.best[n].max())))
        self.correlated = True

    def _search(self, images: list[int], certify: bool) -> dict[int, float]:
        """Fill in `best` and `which`; the largest correlation of each image's active coefficients,
        relative to its limit. Threads share the images or, if these are few, their rows.
        """
        rows, threads = self.maps_shape[1], torch.get_num_threads()
        parts = 1 if len(images) >= threads else min(4 * threads, rows)
        spans = list(itertools.pairwise(rows * part // parts for part in range(parts + 1)))
        by_row: dict[int, tuple[np.ndarray, ...]] = {}
        run_all([functools.partial(self._prepare_search, n, by_row) for n in images])
        largest = {n: np.zeros(parts) for n in images}
        run_all(
            [
                functools.partial(self._search_rows, n, by_row[n], span, largest[n][part:])
                for n in images
                for part, span in enumerate(spans)
            ]
        )
        return {n: float(each.max()) for n, each in largest.items()}

    def _prepare_search(self, n: int, by_row: dict[int, tuple[np.ndarray, ...]]) -> None:
        """Continue the residual beyond the borders, and sort the active coefficients by row."""
        r, mask, e = self.residual[n].numpy(), self.atoms.mask, self.active[n]
        self.atoms.continue_image(
            self.extended[n], r if mask is None else mask.images[n].numpy() * r
        )
        rows, columns = self.maps_shape[1:]
        order, starts = kernels.by_bands(e.i, e.j, rows, columns, rows)
        by_row[n] = e.g[order], e.j[order], starts

    def _search_rows(
        self, n: int, active: tuple[np.ndarray, ...], rows: tuple[int, int], largest: np.ndarray
    ) -> None:
        atoms = self.atoms
        scratch = np.empty((len(atoms.by_tap) * FILTERS, BLOCK), atoms.dtype)
        largest[0] = kernels.correlate_and_search(
            *(self.extended[n], atoms.by_tap, tuple(atoms.f.shape[2:]), self.weights.inverse),
            *(atoms.group, self.parts, self.problem.prior.non_negative, active, scratch),
            *(np.empty((2, BLOCK), atoms.dtype), self.best[n], self.which[n], *rows),
        )

    def _search_in_strips(self, images: list[int], certify: bool) -> dict[int, float]:
        """The same, for limits that depend on the position, and mirrored borders."""
        atoms = self.atoms
        r = self.residual if len(images) == len(self.images) else self.residual[images]
        if atoms.mask is not None:
            r = atoms.mask.images[images] * r
        largest, by_row = dict.fromkeys(images, 0.0), {}
        for part, rows, c in correlate_strips(r, atoms.f, atoms.boundary):
            if self.problem.prior.non_negative:
                c.clamp_(min=0)
            strips = list(zip(images[part], c, strict=True))
            for n, strip in strips:
                self.weights.divide_by_limits(n, rows, strip)
                # With the active coefficients masked, the strongest at each position may be added.
                active = self._active_in(n, rows, by_row)
                strength = self.mask_active(n, strip.numpy(), rows.start, active, measure=certify)
                largest[n] = max(largest[n], strength)
            tasks = [self._find_strongest(n, strip, rows) for n, strip in strips]
            run_all([task for image in tasks for task in image])
        return largest

    def _active_in(
        self, n: int, rows: slice, by_row: dict[int, tuple[np.ndarray, np.ndarray]]
    ) -> slice | np.ndarray:
        """The indices of active coefficients in these rows; by_row caches their order by row."""
        if rows == slice(0, self.maps_shape[1]):
            return slice(None)
        if n not in by_row:
            order = self.active[n].i.argsort(kind="stable")
            by_row[n] = order, self.active[n].i[order]
        order, i = by_row[n]
        return order[slice(*np.searchsorted(i, (rows.start, rows.stop)))]

    def mask_active(
        self, n: int, c: np.ndarray, top: int, active: slice | np.ndarray, *, measure: bool
    ) -> float:
        """Set the correlations c of these active coefficients to zero; c begins at row top.

        Returns the largest one relative to its limit if `measure` is set, for the duality gap.
        """
        e, group, strength = self.active[n], self.atoms.group, np.zeros(0)
        g, i, j = e.g[active], e.i[active] - top, e.j[active]
        at = g, i, j
        if group > 1:
            at = g[:, None] * group + np.arange(group), i[:, None], j[:, None]
        if measure:
            with np.errstate(over="ignore"):
                length = np.linalg.norm(c[at].reshape(-1, group), axis=1)
                strength = length * self.weights.inverse[g]
        c[at] = 0
        return float(strength.max(initial=0))

    def _find_strongest(self, n: int, c: Tensor, rows: slice) -> list[Callable[[], None]]:
        """The tasks that fill in some rows of `best` and `which` from correlations c."""
        group = self.atoms.group
        c = (c if group == 1 else c.unflatten(0, (-1, group)).norm(dim=1)).numpy()
        best, which = self.best[n][:, rows], self.which[n][:, rows]
        height, inverse = best.shape[1], self.weights.inverse
        step = -(-height // torch.get_num_threads())
        return [
            functools.partial(
                kernels.strongest,
                *(c[first:end], inverse[first:end]),
                *(best[part], which[part], top, min(top + step, height)),
            )
            for part, (first, end) in enumerate(itertools.pairwise(self.parts))
            for top in range(0, height, step)
        ]

    def _compute_gap(self, n: int, largest: float) -> None:
        """The duality gap for p = 1 (`problem.duality_gap`), A'r being at most `largest` / lam."""
        b, r, lam = self.b[n].double(), self.residual[n].double(), self.problem.lam
        if self.weights.has_zeros and largest > np.finfo(self.atoms.dtype).tiny ** -0.5:
            # No scaling makes a correlation feasible where the weight is 0.
            self.gaps[n] = math.inf
            return
        scale = 1 / max(largest, 1.0)
        dual = scale * float((b * r).sum()) - scale**2 / 2 * float(r.square().sum())
        # Rounding can make the gap negative at the minimum; NaNs propagate.
        self.gaps[n] = np.maximum(self.costs[n] - lam * dual, 0)

    def sweep(self, images: list[int], *, momentum: bool) -> None:
        """Steps 2 and 3. Threads share the images or, if these are few, their bands."""
        threads = torch.get_num_threads()
        if len(images) >= threads:
            run_all([functools.partial(self._sweep_image, n, 1, momentum) for n in images])
            return
        for n in images:
            self._sweep_image(n, min(threads, max(1, self.bands.number // 2)), momentum)

    def _sweep_image(self, n: int, shares: int, momentum: bool) -> None:
        self.grow_working_set(n)
        # Shares of about as many coefficients, in bands next to each other.
        starts, number = self.starts[n], self.bands.number
        edges = np.searchsorted(starts, np.arange(1, shares) * starts[-1] / shares)
        edges = np.maximum.accumulate([0, *edges, number])
        progress = np.zeros(number, np.int64)
        run_in_turns(
            [
                self._sweep_bands(n, (int(first), int(last)), momentum, progress)
                for first, last in itertools.pairwise(edges)
            ]
        )

    def grow_working_set(self, n: int) -> None:
        """Step 2: the sorted working set of the next sweeps."""
        old, best = self.active[n], self.best[n]
        old = old.take(np.flatnonzero(old.z.any(1)))
        tile = _tile(best, self.atoms.f.shape[2:], len(old.g))
        e = old
        for first, strength, which in zip(self.parts, best, self.which[n], strict=False):
            i, j = kernels.leaders(strength, tile)
            e = e.join(self._active_set(n, first + which[i, j], i, j))
        order, self.starts[n] = self.bands.sort(e, best.shape[1:])
        self.active[n] = e.take(order)
        self.steps[n] = self.atoms.steps(n, self.active[n], self.problem.lam)
        self.before[n] = np.empty_like(e.z)

    def _sweep_bands(
        self, n: int, share: tuple[int, int], momentum: bool, progress: np.ndarray
    ) -> Callable[[], bool]:
        """Step 3 in a share of the bands, which returns False to be called again."""
        atoms, prior, number = self.atoms, self.problem.prior, self.atoms.dtype
        spans = self.spans if momentum else self.spans[:0]
        return functools.partial(
            kernels.descend,
            *(self.frames.pixels[n], atoms.filters, atoms.grid(n), self.active[n], self.steps[n]),
            *(self.starts[n], share, self.turns[n].number, SWEEPS),
            (spans, self.frames_before.pixels[n], self.before[n]),
            *(number(self.problem.lam), number(prior.p), prior.non_negative),
            *(atoms.group if atoms.group > 1 else None, np.empty(atoms.group, number)),
            *(progress, np.zeros(2, np.int64)),
        )

    def _active_set(self, n: int, g: np.ndarray, i: np.ndarray, j: np.ndarray) -> ActiveSet:
        """Zero coefficients at these positions of an image."""
        g, i, j = (index.astype(np.int32) for index in (g, i, j))
        z = np.zeros((len(g), self.atoms.group), self.atoms.dtype)
        L, weight = self.atoms.curvatures_at(n, g, i, j), self.weights.at(n, g, i, j)
        return ActiveSet(g, i, j, z, L, weight)


def _taps_inside(axis: Footprint, taps: int, number: type) -> tuple[np.ndarray, np.ndarray]:
    """(inside, which): inside[which[i], t] is 1 if tap t falls into the image at position i of an
    axis with one run at every position, else 0.
    """
    spans, which = np.unique(axis.tap * (taps + 1) + axis.length, return_inverse=True)
    first, length = np.divmod(spans, taps + 1)
    t = np.arange(taps) - first[:, None]
    return ((t >= 0) & (t < length[:, None])).astype(number), which.ravel()


def _by_tap(f: np.ndarray) -> np.ndarray:
    """(n, C h w, FILTERS): the first tap of FILTERS filters (K, C, h, w), then the second, ..."""
    n = -(-len(f) // FILTERS)
    taps = np.zeros((n * FILTERS, f[0].size), f.dtype)
    taps[: len(f)] = f.reshape(len(f), -1)
    return np.ascontiguousarray(taps.reshape(n, FILTERS, -1).transpose(0, 2, 1))


def _group_curvatures(f: Tensor, group: int) -> np.ndarray:
    """(groups,): the largest eigenvalue of the Gram matrix of the filters of each group."""
    atoms = f.reshape(len(f) // group, group, -1)
    if group == 1:
        return atoms.square().sum((1, 2)).numpy()
    return 1.0001 * torch.linalg.matrix_norm(atoms, 2).square().numpy()


def _tile(best: np.ndarray, size: tuple[int, int], active: int) -> tuple[int, int]:
    """(rows, columns) of tiles that add one coefficient each, for filters of this size; the set may
    grow by a factor of GROWTH.
    """
    candidates = np.count_nonzero(best > 1)
    limit = GROWTH * max(active, best.size // 64)
    quarter = max(1, size[0] // 4), max(1, size[1] // 4)
    for tile in ((1, 1), quarter):
        if candidates <= limit * tile[0] * tile[1]:
            return tile
    return max(1, size[0] // 2), max(1, size[1] // 2)
