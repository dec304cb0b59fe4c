"""Rescaling of a problem by powers of two, so that squares stay within the range of float32.

The problem is scale-invariant (p is the exponent of the prior):

    b = s b'    A = k A'    prior = v prior'    z = (s/k) z'

    lam' = lam s^(2-p) k^p / v    beta' = beta (s/k)^(2-p) / v    objective' = objective (k/s)^p / v

is the same problem. Floating-point numbers are not: the square of 1e-20 is 0 in float32. Scaling by
powers of two is exact in both directions, and data of ordinary magnitude are not scaled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Between 2^-ORDINARY and 2^ORDINARY nothing is rescaled; a product of several such numbers is still
# far from the limits of float32.
ORDINARY = 20
# Exponents are multiples of this, so that their roots, and halves and quarters of them, are exact.
STEP = 8


def exponent(value: float, *, ordinary: int = ORDINARY) -> int:
    """e with value = 2^e times a number near one; 0 for ordinary values, 0, NaN and infinity."""
    if not 0 < value < math.inf:
        return 0
    e = math.frexp(value)[1]
    return 0 if abs(e) <= ordinary else STEP * round(e / STEP)


def magnitude(x: Tensor) -> float:
    """The largest magnitude in x; 0 if x is empty, NaN if it has one."""
    if not x.numel():
        return 0.0
    # aminmax needs no copy of x, unlike x.abs().max().
    lowest, highest = torch.aminmax(x.detach())
    return float(torch.maximum(-lowest, highest))


def times_power(x: Tensor, e: int) -> Tensor:
    """x 2^e, where 2^e itself may exceed the range of x's type; x itself for e = 0."""
    while e:
        part = max(-120, min(120, e))
        x, e = x * 2.0**part, e - part
    return x


@dataclass(frozen=True)
class Units:
    """Exponents of the scales s (data), k (filters) and v (prior), and the prior's exponent p."""

    data: int
    filters: int
    prior: int
    p: float

    @classmethod
    def of(cls, b: Tensor, filters: int, lam: float, p: float, weights: Tensor | None) -> Units:
        """The exponents for data b; filters: that of `LinearOperator.normalised`.

        In units of data and filters, lam indicates the size of the weights.
        """
        data = exponent(magnitude(b))
        units = cls(data, filters, 0, p)
        prior = 0 if weights is None else exponent(units.lam(lam), ordinary=2 * ORDINARY)
        return cls(data, filters, prior, p)

    @property
    def ordinary(self) -> bool:
        return not (self.data or self.filters or self.prior)

    @property
    def maps(self) -> int:
        return self.data - self.filters

    def lam(self, lam: float) -> float:
        """lam'."""
        return _times(lam, (2 - self.p) * self.data + self.p * self.filters - self.prior)

    def beta(self, beta: float) -> float:
        """beta', also the inverse of a gradient step."""
        return _times(beta, (2 - self.p) * self.maps - self.prior)

    def step(self, step: Tensor | float, *, back: bool = False) -> Tensor | float:
        """A gradient step in units of the problem or, `back`, in those of the caller.

        float64 if it is a tensor: steps leave the range of float32 long before maps do.
        """
        e = self.prior - (2 - self.p) * self.maps
        e = -e if back else e
        return step.double() * _times(1.0, e) if isinstance(step, Tensor) else _times(step, e)

    def cost(self, cost: Tensor) -> Tensor:
        """A cost (N,), float64, in units of the caller."""
        return cost * _times(1.0, self.p * self.maps + self.prior)

    def weights(self, weights: Tensor | None) -> Tensor | None:
        """The weights of the prior'."""
        if weights is None or not self.prior:
            return weights
        # A weight that forces a coefficient to zero must still do so.
        return times_power(weights, -self.prior).clamp(max=torch.finfo(weights.dtype).max)


def _times(value: float, e: float) -> float:
    """value 2^e; infinity or 0 beyond the range of float64."""
    try:
        return math.ldexp(value, int(e)) if e == int(e) else value * 2.0**e
    except OverflowError:
        return math.inf
