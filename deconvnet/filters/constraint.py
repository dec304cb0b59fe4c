"""Constraints on filters after every update: norm, signs, means, rank, ends and connectivity.

f filters (K, C, h, w)   g connectivity (K, C) of 0 and 1   t taper (h, w), from 0 to 1
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from deconvnet.operators.convolution import connected
from deconvnet.support.scaling import exponent, magnitude, times_power
from deconvnet.support.validation import as_number, check_tensors

NORMS = ("filter", "plane")


@dataclass(frozen=True)
class FilterConstraint:
    """The set of filters that learning chooses from, with the projection onto it.

    norm: "filter", unit l2 norm of each filter, or "plane", of each of its 2-D planes (Zeiler et
    al. 2010). non_negative: no coefficient is negative. zero_mean: every plane has mean zero.
    connectivity: (K, C) of 0 and 1; disconnected planes are zero; None: all are connected.

    rank1: all planes of a filter are multiples of one plane: f = u v' as a matrix (C, h*w), in
    space u and in time v (Dupre la Tour et al. 2018). taper: in [0, 0.5], the share of the rows and
    of the columns at each end over which filters fall to zero; 0: none. Then filters are f = t g,
    with t the `taper_window` and g of unit norm: a coefficient of f costs 1 / t^2 times as much of
    the norm, so that one near an end stays small. Distances between filters are measured in the
    same way, as the norm of f / t.
    """

    norm: str = "filter"
    non_negative: bool = False
    zero_mean: bool = False
    connectivity: Tensor | None = field(default=None, compare=False)
    rank1: bool = False
    taper: float = 0.0

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm={self.norm}: choose one of {', '.join(NORMS)}")
        if self.non_negative and self.zero_mean:
            raise ValueError("zero_mean=True: not with non_negative, which leaves only zeros")
        if not isinstance(self.rank1, (bool, np.bool_)):
            raise ValueError(f"rank1={self.rank1!r}: must be True or False")
        if self.rank1 and (self.non_negative or self.norm == "plane"):
            other = "non_negative=True" if self.non_negative else "norm=plane"
            raise ValueError(f"rank1=True: not with {other}, whose nearest filters are not known")
        if not 0 <= as_number(self.taper, "taper") <= 0.5:
            raise ValueError(f"taper={self.taper}: must lie between 0 and 0.5")

    def project(self, f: Tensor, *, fallback: Tensor | None = None) -> Tensor:
        """The filters of this set nearest to f (K, C, h, w).

        Sets disconnected planes to zero, sets negative coefficients to zero (non_negative) or
        subtracts the mean of each plane (zero_mean; with a taper, a multiple of t^2), takes the
        leading singular pair (rank1) and scales to unit norm, all of f / t. A filter (or plane)
        that is zero by then is taken from `fallback` (K, C, h, w), or stays zero without one.
        Raises ValueError if f has another shape.
        """
        check_tensors(f=f)
        if f.ndim != 4:
            raise ValueError(f"filters must have the shape (K, C, h, w), got {tuple(f.shape)}")
        axes = (2, 3) if self.norm == "plane" else (1, 2, 3)
        t = self.window(f)
        f = unprojected = connected(f, self.connectivity)
        if self.non_negative:
            f = f.clamp(min=0)
        if self.zero_mean:
            f = f - (f.mean((2, 3), keepdim=True) if t is None else _weighted_mean(f, t))
        if t is not None:
            f = f / t
        if self.rank1:
            f = leading_pair(f)
        length = length_of(f, axes)
        if self.zero_mean:
            # A constant plane leaves only rounding errors, which must not become a filter.
            rounding = 10 * torch.finfo(f.dtype).eps * unprojected.abs().amax(axes, keepdim=True)
            rounding = rounding if t is None else rounding / t.min()
            f = torch.where(length > rounding, f, torch.zeros_like(f))
            length = torch.where(length > rounding, length, torch.zeros_like(length))
        unit = f / torch.where(length > 0, length, torch.ones_like(length))
        unit = unit if t is None else unit * t
        if fallback is None:
            return unit
        return torch.where(length > 0, unit, connected(fallback, self.connectivity))

    def of_filters(self, part: slice) -> FilterConstraint:
        """The constraint on some of the filters."""
        if self.connectivity is None:
            return self
        return replace(self, connectivity=self.connectivity[part])

    def window(self, f: Tensor) -> Tensor | None:
        """t (h, w) for filters f (K, C, h, w); None without a taper."""
        return taper_window(self.taper, tuple(f.shape[2:])).to(f) if self.taper else None


def taper_window(taper: float, size: tuple[int, int]) -> Tensor:
    """t (h, w), float64: 1 in the middle, falling at each end of an axis as sin^2.

    The product of one window for each axis, both of which would be 0 one pixel beyond the filter
    (a Tukey window). taper: the share of the axis at each end; an axis of one pixel is left out.
    """
    rows, columns = (_taper_along(taper, length) for length in size)
    return rows[:, None] * columns


def leading_pair(f: Tensor) -> Tensor:
    """The nearest filters (K, C, h, w) of rank 1 as matrices (C, h*w)."""
    u, s, v = torch.linalg.svd(f.flatten(2), full_matrices=False)
    return (s[:, :1, None] * u[:, :, :1] * v[:, :1]).view(f.shape)


def _taper_along(taper: float, length: int) -> Tensor:
    count = math.ceil(taper * length) if length > 1 else 0
    distance = torch.arange(1, length + 1, dtype=torch.float64)
    distance = torch.minimum(distance, distance.flip(0)).clamp(max=count + 1)
    return torch.sin(math.pi / 2 * distance / (count + 1)).square()


def _weighted_mean(f: Tensor, t: Tensor) -> Tensor:
    """The multiple of t^2 that gives the planes of f mean zero at the least distance."""
    return f.sum((2, 3), keepdim=True) * t.square() / t.square().sum()


def normalize(f: Tensor, norm: str = "filter") -> Tensor:
    """f (K, C, h, w) with unit l2 norm of each filter, or of each plane; zeros stay zeros."""
    return FilterConstraint(norm).project(f)


def length_of(f: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The l2 norm over these axes, kept with length 1.

    Exact also where the squares would leave the range of float32.
    """
    e = exponent(magnitude(f))
    return times_power(torch.linalg.vector_norm(times_power(f, -e), dim=axes, keepdim=True), e)
