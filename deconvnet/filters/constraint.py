"""Constraints on filters after every update: unit norm, signs, means and connectivity.

f filters (K, C, h, w)   g connectivity (K, C) of 0 and 1
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from deconvnet.operators.convolution import connected
from deconvnet.support.scaling import exponent, magnitude, times_power
from deconvnet.support.validation import check_tensors

NORMS = ("filter", "plane")


@dataclass(frozen=True)
class FilterConstraint:
    """The set of filters that learning chooses from, with the projection onto it.

    norm: "filter", unit l2 norm of each filter, or "plane", of each of its 2-D planes (Zeiler et
    al. 2010). non_negative: no coefficient is negative. zero_mean: every plane has mean zero.
    connectivity: (K, C) of 0 and 1; disconnected planes are zero; None: all are connected.
    """

    norm: str = "filter"
    non_negative: bool = False
    zero_mean: bool = False
    connectivity: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm={self.norm}: choose one of {', '.join(NORMS)}")
        if self.non_negative and self.zero_mean:
            raise ValueError("zero_mean=True: not with non_negative, which leaves only zeros")

    def project(self, f: Tensor, *, fallback: Tensor | None = None) -> Tensor:
        """The filters of this set nearest to f (K, C, h, w).

        Sets disconnected planes to zero, sets negative coefficients to zero (non_negative) or
        subtracts the mean of each plane (zero_mean), and scales to unit norm. A filter (or plane)
        that is zero by then is taken from `fallback` (K, C, h, w), or stays zero without one.
        Raises ValueError if f has another shape.
        """
        check_tensors(f=f)
        if f.ndim != 4:
            raise ValueError(f"filters must have the shape (K, C, h, w), got {tuple(f.shape)}")
        axes = (2, 3) if self.norm == "plane" else (1, 2, 3)
        f = unprojected = connected(f, self.connectivity)
        if self.non_negative:
            f = f.clamp(min=0)
        if self.zero_mean:
            f = f - f.mean((2, 3), keepdim=True)
        length = length_of(f, axes)
        if self.zero_mean:
            # A constant plane leaves only rounding errors, which must not become a filter.
            rounding = 10 * torch.finfo(f.dtype).eps * unprojected.abs().amax(axes, keepdim=True)
            f = torch.where(length > rounding, f, torch.zeros_like(f))
            length = torch.where(length > rounding, length, torch.zeros_like(length))
        unit = f / torch.where(length > 0, length, torch.ones_like(length))
        if fallback is None:
            return unit
        return torch.where(length > 0, unit, connected(fallback, self.connectivity))


def normalize(f: Tensor, norm: str = "filter") -> Tensor:
    """f (K, C, h, w) with unit l2 norm of each filter, or of each plane; zeros stay zeros."""
    return FilterConstraint(norm).project(f)


def length_of(f: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The l2 norm over these axes, kept with length 1.

    Exact also where the squares would leave the range of float32.
    """
    e = exponent(magnitude(f))
    return times_power(torch.linalg.vector_norm(times_power(f, -e), dim=axes, keepdim=True), e)
