"""Coordinate descent with 1x1 filters: every position of an image is coded by itself.

    minimise over z      lam/2 ||m D z - b||^2 + sum_k w_k |z_k|          at each position

    D (C, K) the filters   b (C,) the data   m the mask, else 1   c = m D'(b - m D z) correlations

Here all correlations can be kept up to date: a change of one coefficient changes them by a row of
the Gram matrix G = D'D, times m^2. So the filters meet the data once, in c = m D'b, a matrix
product that takes most of the time. Each round then brings every position close to its minimum: the
strongest coefficients enter the working set of the position, its few coefficients are swept with
their part of G until they settle, and the correlations of all coefficients are updated.

These are the covariance updates of Friedman, Hastie and Tibshirani (2010, section 2.2), with
working sets as in `working_set`. Positions do not touch, so threads may share them.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from deconvnet.operators.linear import Deconvolution
from deconvnet.sparse_coding import pointwise_kernels
from deconvnet.sparse_coding.descent import CoordinateDescent, is_expanded_zero
from deconvnet.sparse_coding.problem import Problem
from deconvnet.support.thread_pool import run_all

# The Gram matrix of so many filters takes 256 MiB in float32. With more of them the residual is
# correlated in every round instead, as with larger filters.
MAX_FILTERS = 8192
# Positions that a thread codes at a time, and rows of the Gram matrix that are computed at a time.
PART, ROWS = 256, 256
# The first capacity of working sets. It doubles when a position needs more.
CAPACITY = 32
# A Gram matrix of at most this many bytes is kept for the next call.
KEPT_BYTES = 2**26


def is_pointwise(problem: Problem) -> bool:
    """Whether `PointwiseSolver` solves this problem: 1x1 filters, p = 1, no groups, and a mask
    that is the same for all channels.
    """
    A, prior = problem.A, problem.prior
    if tuple(A.f.shape[2:]) != (1, 1) or len(A.f) > MAX_FILTERS:
        return False
    if prior.p != 1 or prior.group > 1:
        return False
    return A.mask is None or bool((A.mask == A.mask[:, :1]).all())


class Gram:
    """The filters f (K, C), and their Gram matrix (K, K)."""

    def __init__(self, f: Tensor):
        self.f, K = f, len(f)
        self.matrix = f.new_empty(K, K)
        # Blocks on and above the diagonal, and their mirror images.
        for top in range(0, K, ROWS):
            block = f[top : top + ROWS] @ f[top:].T
            self.matrix[top : top + ROWS, top:] = block
            self.matrix[top:, top : top + ROWS] = block.T

    @classmethod
    def of(cls, A: Deconvolution, b: Tensor) -> Gram:
        """That of an operator of 1x1 filters, for data of the dtype of b."""
        f = A.f.detach().to(b).flatten(1).contiguous()
        last = next(iter(_last), None)
        if last is not None and last.f.dtype == f.dtype and torch.equal(last.f, f):
            return last
        gram = cls(f.clone())
        _last[:] = [gram] if gram.matrix.nbytes <= KEPT_BYTES else []
        return gram


# The Gram matrix of the last filters: many callers code one image after another.
_last: list[Gram] = []


class PointwiseSolver(CoordinateDescent):
    """Solves a few images from maps z (N, K, H, W), for problems that are `is_pointwise`.

    The positions of all images are numbered through, P in all. Each has its non-zero coefficients
    in count (P,), index and value (P, capacity).
    """

    def __init__(self, problem: Problem, z: Tensor, gram: Gram):
        super().__init__(problem)
        self.gram = gram
        self.residual, self.stale = torch.empty_like(self.b), np.ones(len(z), bool)
        self.maps_shape = tuple(z.shape[1:])
        self.per_image = math.prod(z.shape[2:])
        P, self.dtype = len(z) * self.per_image, self.b.numpy().dtype.type
        self.mask = _by_position(problem.A.mask, self.b)
        self.c0 = _correlations(self.b, gram.f).numpy()
        if len(self.mask):
            self.c0 *= self.mask[:, None]
        self.weights = _weights(problem, z.shape)
        limits = np.maximum(self.weights / self.dtype(problem.lam), np.finfo(self.dtype).tiny)
        self.inverse = 1 / limits
        self.rounding = (8 * np.finfo(self.dtype).eps * np.sqrt(self.norms)).astype(self.dtype)
        self.strength = np.zeros(P, self.dtype)
        self.penalties, self.explained, self.squares, self.products = np.zeros((4, P))
        self._start(z)
        # A position that is not finite keeps its code, and its image has no finite objective.
        start = np.where(np.arange(self.value.shape[1]) < self.count[:, None], self.value, 0)
        self.finite = np.isfinite(self.norms) & np.isfinite(start).all(1)
        self._code(self.images, change=False)

    def descend(self, images: list[int]) -> None:
        self._code(images, change=True)

    def certify(self, images: list[int]) -> None:
        """Positions being separate problems, each scales its own residual to a feasible dual point,
        which gives smaller gaps than one scale for the image (`problem.duality_gap`).
        """
        self._compute_residual(images)
        scale = 1 / np.maximum(self.strength.astype(np.float64), 1)
        lam = self.problem.lam
        cost = lam / 2 * self.squares + self.penalties
        with np.errstate(invalid="ignore"):
            gap = cost - lam * (scale * self.products - scale**2 / 2 * self.squares)
        # No scaling makes a correlation feasible where the weight is 0. NaNs propagate.
        endless = self.strength > np.finfo(self.dtype).tiny ** -0.5
        gap = np.where(endless & self.has_zeros, math.inf, np.maximum(gap, 0))
        self.gaps[images] = self._by_image(gap)[images].sum(1)

    def terms(self) -> tuple[Tensor, Tensor, Tensor]:
        self._compute_residual(self.images)
        terms = self.problem.lam / 2 * self.squares, self.penalties
        return self.residual, *(torch.from_numpy(self._by_image(term).sum(1)) for term in terms)

    def _compute_residual(self, images: list[int]) -> None:
        """The residual of these images from their coefficients, with its squares and products."""
        b, r, f = self.b.flatten(2).numpy(), self.residual.flatten(2).numpy(), self.gram.f.numpy()
        codes = self.count, self.index, self.value

        def compute(places: np.ndarray) -> None:
            tile = np.empty((pointwise_kernels.BLOCK, pointwise_kernels.CHANNELS), self.dtype)
            pointwise_kernels.residuals(
                b, f, self.mask, places, codes, r, self.squares, self.products, tile
            )

        images = [n for n in images if self.stale[n]]
        parts = np.array_split(self._places(images), torch.get_num_threads())
        run_all([functools.partial(compute, part) for part in parts])
        self.stale[images] = False

    def _cost_of_zero(self) -> np.ndarray:
        N, _, *size = self.b.shape
        self.norms, y = np.empty(N * math.prod(size)), self.b.flatten(2).numpy()
        parts = np.array_split(np.arange(N), torch.get_num_threads())
        run_all(
            [
                functools.partial(pointwise_kernels.squared_norms, y, images, self.norms)
                for images in parts
            ]
        )
        return self.problem.lam / 2 * self.norms.reshape(N, -1).sum(1)

    def maps(self) -> Tensor:
        return self.write(self.b.new_zeros(len(self.images), *self.maps_shape))

    def write(self, z: Tensor) -> Tensor:
        place, slot = np.nonzero(np.arange(self.value.shape[1]) < self.count[:, None])
        n, position = divmod(place, self.per_image)
        z.flatten(2).numpy()[n, self.index[place, slot], position] = self.value[place, slot]
        return z

    def _start(self, z: Tensor) -> None:
        """Take over the non-zero coefficients of maps z."""
        K, P = z.shape[1], len(self.strength)
        place, k, value = np.empty(0, int), np.empty(0, int), np.empty(0, self.dtype)
        if not is_expanded_zero(z):
            flat = z.contiguous().numpy().ravel()
            at = np.flatnonzero(flat)
            n, k, position = np.unravel_index(at, (len(z), K, self.per_image))
            place = n * self.per_image + position
            order = place.argsort(kind="stable")
            place, k, value = place[order], k[order], flat[at[order]]
        count = np.bincount(place, minlength=P)
        capacity = min(K, max(CAPACITY, int(count.max(initial=0))))
        slot = np.arange(len(place)) - (count.cumsum() - count)[place]
        self.count = count.astype(np.int32)
        self.index = np.zeros((P, capacity), np.int32)
        self.value = np.zeros((P, capacity), self.dtype)
        self.index[place, slot], self.value[place, slot] = k, value

    def _code(self, images: list[int], *, change: bool) -> None:
        """A round of these images, or without `change` only the strength of their correlations."""
        places = self._places(images)
        places = places[self.finite[places]]
        while len(places):
            left: list[np.ndarray] = []
            run_all([functools.partial(self._code_part, p, change, left) for p in _parts(places)])
            # In the order of the images, whichever thread was first.
            places = np.sort(np.concatenate(left))
            if len(places):
                self._double_capacity()
        cost = self.problem.lam / 2 * (self.norms - self.explained) + self.penalties
        cost = self._by_image(np.where(self.finite, cost, math.nan))
        self.costs_before[images], self.costs[images] = self.costs[images], cost[images].sum(1)
        self.stale[images] = True

    def _code_part(self, places: np.ndarray, change: bool, left: list[np.ndarray]) -> None:
        """Code these places; those that need a larger capacity are appended to `left`."""
        K, M, number = len(self.gram.f), self.value.shape[1], self.dtype
        scratch = (
            *(np.empty(K, number) for _ in range(2)),
            np.empty(M, np.int64),
            *(np.empty(M, number) for _ in range(6)),
            np.empty((M, M), number),
            np.empty(M, np.int64),
            np.empty(M, number),
        )
        scale, sums = self.mask**2, (self.strength, self.penalties, self.explained)
        while len(places):
            done = pointwise_kernels.code(
                *(self.c0, self.gram.matrix.numpy(), self.weights, self.inverse),
                *(scale, self.rounding, number(self.problem.lam)),
                *(self.problem.prior.non_negative, change, places),
                *((self.count, self.index, self.value), sums, scratch),
            )
            left.append(places[done : done + 1])
            places = places[done + 1 :]

    def _double_capacity(self) -> None:
        more = min(self.value.shape[1], len(self.gram.f) - self.value.shape[1])
        self.index, self.value = (np.pad(a, ((0, 0), (0, more))) for a in (self.index, self.value))

    def _places(self, images: list[int]) -> np.ndarray:
        starts = np.array(images, np.int64)[:, None] * self.per_image
        return (starts + np.arange(self.per_image)).ravel()

    def _by_image(self, values: np.ndarray) -> np.ndarray:
        return values.reshape(len(self.images), self.per_image)

    @functools.cached_property
    def has_zeros(self) -> bool:
        return bool((self.weights == 0).any())


def _by_position(mask: Tensor | None, b: Tensor) -> np.ndarray:
    """The mask (P,) of all positions of b (N, C, H, W); empty without one."""
    if mask is None:
        return np.empty(0, b.numpy().dtype)
    return mask.detach().to(b)[:, 0].expand(len(b), *b.shape[2:]).numpy().flatten()


def _correlations(b: Tensor, f: Tensor) -> Tensor:
    """(P, K): all positions of b (N, C, H, W) correlated with the filters f (K, C)."""
    y = b.flatten(2)
    N, C, positions = y.shape
    if positions < ROWS:
        # A product of few rows is slow.
        return y.transpose(1, 2).reshape(-1, C) @ f.T
    c = y.new_empty(N, positions, len(f))
    for n in range(N):
        torch.mm(y[n].T, f.T, out=c[n])
    return c.flatten(0, 1)


def _weights(problem: Problem, shape: tuple[int, ...]) -> np.ndarray:
    """The weights of the prior: (1, K), or (P, K) if they differ between positions."""
    w, K = problem.prior.entry_weights, shape[1]
    w = problem.b.new_ones(1) if w is None else w.detach().to(problem.b)
    w = w[(None,) * (4 - w.ndim)]
    if w[:, 0].numel() == 1:
        return w.flatten().expand(K).numpy()[None].copy()
    return w.expand(shape).permute(0, 2, 3, 1).reshape(-1, K).numpy()


def _parts(places: np.ndarray) -> list[np.ndarray]:
    return [places[first : first + PART] for first in range(0, len(places), PART)]
