"""The sparse prior sum |x|^p: its value and its proximal map for every 0 <= p <= 1.

`Prior` adds weights, groups of maps, non-negativity and a pooling window; the other functions
implement the plain sum.

    x, v maps of any shape · beta > 0 weight of the quadratic term · p exponent; 0^0 = 0, so p = 0
    counts non-zero coefficients

For p = 1 the map is the soft threshold, for p = 0 the hard one. In between, the minimiser jumps
from 0 to a finite value at a threshold tau, beyond which the equation is solved by Newton's method,
to rounding, on every device. No look-up table is used (that of Krishnan and Fergus, NIPS 2009, is
too coarse for large beta).

With a pooling window the prior also allows at most one non-zero coefficient in each window. Its
proximal map shrinks the largest coefficient of each window and sets the others to zero: keeping one
of them lowers the cost by beta/2 v^2 - min_x (|x|^p + beta/2 (x - v)^2), which grows with |v|. So
pooling and unpooling after every shrinkage, as in Zeiler et al. 2011, does not depart from proximal
gradient steps: it is the proximal map of this prior.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from deconvnet.operators.pooling import Window, pool, strongest, unpool
from deconvnet.support.validation import (
    as_number,
    as_positive_integer,
    as_weights,
    check_numbers,
    check_tensors,
)


@dataclass(frozen=True, eq=False)
class Prior:
    """sum_i w_i |z_i|^p over maps z (N, K, H, W), or over the l2 norms of groups of maps.

    weights: w >= 0, (K,) or any shape that broadcasts to z; 0 leaves a coefficient unpenalised;
    None: all 1. group: this many consecutive maps share one magnitude, their l2 norm at each
    position, and one weight. non_negative: only z >= 0 is feasible. window: at most one non-zero
    coefficient in each pooling window, as in `shrink`; not together with weights or groups. Raises
    ValueError if values are out of range or do not fit together.
    """

    p: float = 1.0
    window: Window | None = None
    weights: Tensor | None = None
    group: int = 1
    non_negative: bool = False

    def __post_init__(self) -> None:
        check_exponent(self.p)
        as_positive_integer(self.group, "group")
        if not isinstance(self.non_negative, bool):
            raise ValueError(f"non_negative={self.non_negative!r}: must be True or False")
        if self.window is not None and (self.group > 1 or self.weights is not None):
            raise ValueError(
                f"window={tuple(self.window)}: not together with weights or group={self.group}"
            )
        if self.weights is None:
            return
        if not isinstance(self.weights, Tensor):
            object.__setattr__(self, "weights", as_weights(self.weights))
        w = self.weights
        check_numbers(w, "weights")
        if len(invalid := w[~((w >= 0) & (w < torch.inf))]):
            raise ValueError(f"weights={float(invalid[0])}: must be finite and not negative")
        if self.group > 1 and not self._one_for_each_group():
            raise ValueError(
                f"weights of shape {tuple(w.shape)}: the {self.group} maps of a group have one "
                "weight at each position"
            )

    @property
    def convex(self) -> bool:
        """Whether there is one minimum, which a duality gap can certify."""
        return self.p == 1 and self.window is None

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError if weights or groups do not fit maps of the shape (N, K, H, W)."""
        if len(shape) != 4:
            raise ValueError(f"maps must have the shape (N, K, H, W), got {tuple(shape)}")
        if shape[1] % self.group:
            raise ValueError(f"group={self.group}: must divide the {shape[1]} maps")
        if self.weights is None:
            return
        w = _at_maps(self.weights)
        fits = w.ndim <= len(shape) and all(
            a in (1, b) for a, b in zip(reversed(w.shape), reversed(shape), strict=False)
        )
        if not fits:
            raise ValueError(
                f"weights of shape {tuple(self.weights.shape)}: expected ({shape[1]},), or a shape "
                f"that broadcasts to maps of shape {tuple(shape)}"
            )

    def shrink(self, v: Tensor, beta: float | Tensor) -> Tensor:
        """argmin_x prior(x) + beta/2 ||x - v||^2, the proximal map; beta: number or (N, 1, 1, 1).

        Weights replace beta by beta / w, coefficient by coefficient. The prior of a group depends
        only on its length, so the length is shrunk and the direction kept, for every p.
        """
        if self.group == 1:
            return self._shrink_elements(v, beta)
        if self.non_negative:
            v = v.clamp(min=0)
        length = self._lengths(v)
        factor = self._shrink_elements(length, beta) / length.clamp(min=torch.finfo(v.dtype).tiny)
        return (v.unflatten(1, (-1, self.group)) * factor[:, :, None]).flatten(1, 2)

    def __call__(self, z: Tensor) -> Tensor:
        """The value for every image, (N,) in float64; infinity where z is infeasible: negative
        with non_negative, or with several non-zero coefficients in a window.
        """
        value = self.value(z)
        if self.window is None and not self.non_negative:
            return value
        infeasible = (self.feasible(z) != z).flatten(1).any(1) & ~value.isnan()
        return torch.where(infeasible, torch.inf, value)

    def feasible(self, z: Tensor) -> Tensor:
        """The nearest feasible maps: z >= 0, only the strongest coefficient of each window."""
        if self.non_negative:
            z = z.clamp(min=0)
        if self.window is None:
            return z
        switches = strongest(z, self.window)
        return unpool(pool(z, switches), switches, z.shape)

    def value(self, z: Tensor) -> Tensor:
        """The value for every image of feasible maps, (N,) in float64."""
        x = z if self.group == 1 else self._lengths(z)
        if self.entry_weights is None:
            return penalties(x, self.p)
        magnitude = (x != 0).to(x.dtype) if self.p == 0 else x.abs()
        if 0 < self.p < 1:
            magnitude = _power(magnitude, self.p)
        return (self.entry_weights.to(x) * magnitude).sum((1, 2, 3)).double()

    def dual_norm(self, c: Tensor) -> Tensor:
        """(N,): for p = 1 the smallest s for which c / s is a subgradient at z = 0.

        max |c_i| / w_i; with non_negative c is first clamped at 0, with groups |c_i| are their
        lengths. Infinite if a weight is 0 and its c is not.
        """
        if self.p != 1:
            raise ValueError(f"p={self.p}: only the prior with p=1 has a dual norm")
        if self.non_negative:
            c = c.clamp(min=0)
        c = c.abs() if self.group == 1 else self._lengths(c)
        if self.entry_weights is not None:
            # A zero correlation is feasible even if its weight is 0 (0 / 0).
            c = torch.where(c > 0, c / self.entry_weights.to(c), c)
        return c.flatten(1).amax(1)

    def _shrink_elements(self, v: Tensor, beta: float | Tensor) -> Tensor:
        """The proximal map of the coefficients, or of the lengths of groups."""
        w = None if self.entry_weights is None else self.entry_weights.to(v)
        if self.p == 1 and self.window is None and (w is not None or isinstance(beta, Tensor)):
            # Bit-equal to `shrink` without weights, and several times faster.
            # 1 / beta of a tensor takes several times as long.
            inverse = beta.reciprocal() if isinstance(beta, Tensor) else 1 / beta
            tau = inverse if w is None else w * inverse
            positive = (v - tau).relu_()
            if self.non_negative:
                return positive
            negative = (v + tau).neg_().relu_()
            # Autograd needs what relu_ returned, unchanged.
            return positive - negative if positive.requires_grad else positive.sub_(negative)
        if w is None:
            return shrink(v, beta, self.p, non_negative=self.non_negative, window=self.window)
        x = shrink(v, beta / w.clamp(min=1e-30), self.p, non_negative=self.non_negative)
        free = v.clamp(min=0) if self.non_negative else v
        return torch.where(w > 0, x, free)

    def _lengths(self, v: Tensor) -> Tensor:
        """(N, K / group, H, W): the l2 norm of every group of maps."""
        # vector_norm takes fifty times as long over an axis in the middle.
        return _root(v.unflatten(1, (-1, self.group)).square().sum(2))

    @cached_property
    def entry_weights(self) -> Tensor | None:
        """The weights of coefficients, or of groups, as they broadcast; None if they are all 1."""
        if self.weights is None or (self.weights == 1).all():
            return None
        w = _at_maps(self.weights)
        by_map = self.group > 1 and w.ndim >= 3 and w.shape[-3] > 1
        return w[..., :: self.group, :, :] if by_map else w

    def _one_for_each_group(self) -> bool:
        """Whether the maps of every group have the same weights."""
        w = _at_maps(self.weights)
        if w.ndim < 3 or w.shape[-3] == 1:
            return True
        if w.shape[-3] % self.group:
            return False
        groups = w.unflatten(-3, (-1, self.group))
        return bool((groups == groups[..., :1, :, :]).all())


def _at_maps(weights: Tensor) -> Tensor:
    return weights[:, None, None] if weights.ndim == 1 else weights


def penalty(x: Tensor, p: float = 1.0) -> Tensor:
    """sum |x|^p over all coefficients, a float64 scalar; p = 0 counts the non-zero ones."""
    return penalties(x.flatten()[None], p)[0]


def penalties(x: Tensor, p: float = 1.0) -> Tensor:
    """`penalty` of every image of x (N, ...): (N,) in float64."""
    check_exponent(p)
    axes = tuple(range(1, x.ndim))
    if p == 0:
        return torch.count_nonzero(x, axes).double()
    magnitude = x.abs()
    if p != 1:
        magnitude = _power(magnitude, p)
    # The pairwise sum is accurate to 1e-7 and takes a quarter of the time of converting first.
    return magnitude.sum(axes).double()


def shrink(
    v: Tensor,
    beta: float | Tensor,
    p: float = 1.0,
    *,
    non_negative: bool = False,
    window: Window | None = None,
) -> Tensor:
    """argmin_x |x|^p + beta/2 (x - v)^2, element by element  (Zeiler et al. 2010, the x-step).

    beta: a positive number, or a tensor (N, 1, 1, 1). With non_negative the minimum over x >= 0;
    with window = (groups, h, w) over maps x (N, K, H, W) with at most one non-zero coefficient in
    each window of `pooling.max_pool`. At the threshold itself, where two minimisers tie, the result
    is 0.
    """
    check_exponent(p)
    check_tensors(v=v)
    if window is not None:
        switches = strongest(v.clamp(min=0) if non_negative else v, window)
        x = shrink(pool(v, switches), beta, p, non_negative=non_negative)
        return unpool(x, switches, v.shape)
    if not isinstance(beta, Tensor):
        if not as_number(beta, "beta") > 0:
            raise ValueError(f"beta={beta}: must be positive")
        if p == 1:
            return _soft_threshold(v, 1 / beta, non_negative)
    if non_negative:
        v = v.clamp(min=0)
    magnitude = v.abs()
    _, tau = threshold(beta, p)
    if p == 1:
        result = magnitude - tau
    elif p == 0:
        result = magnitude
    else:
        result = _largest_root(magnitude, beta, p, tau)
    # <= and not >, so that NaNs propagate.
    return torch.where(magnitude <= tau, torch.zeros_like(result), result).copysign(v)


def threshold(beta: float | Tensor, p: float) -> tuple[float | Tensor, float | Tensor]:
    """(x, tau): up to |v| = tau the minimiser is 0; just beyond tau it jumps to x (0 for p = 1).

    x = (2 (1-p) / beta)^(1/(2-p)) and tau = x + p/beta x^(p-1), where x and 0 have the same cost.
    """
    if p == 1:
        return 0.0 * beta, 1 / beta
    x = (2 * (1 - p) / beta) ** (1 / (2 - p))
    return x, x + p / beta * x ** (p - 1)


def check_exponent(p: float) -> None:
    if not 0 <= as_number(p, "p") <= 1:
        raise ValueError(f"p={p}: the exponent of the sparse prior must lie between 0 and 1")


def _soft_threshold(v: Tensor, tau: float, non_negative: bool) -> Tensor:
    # Both are single fused kernels: this runs on all maps in every iteration.
    return torch.relu(v - tau) if non_negative else torch.nn.functional.softshrink(v, tau)


def _largest_root(magnitude: Tensor, beta: float | Tensor, p: float, tau: float | Tensor) -> Tensor:
    """The root of p x^(p-1) + beta (x - |v|) = 0 that is the minimum, for |v| beyond the threshold.

    Newton's method from x = |v| descends to it monotonically, because the left side is increasing
    and convex there; six steps reach rounding for every p and beta. Below the threshold tau the
    root for tau is returned: Newton's method would go below 0, and its unused gradient would be
    NaN times 0.
    """
    tau = torch.as_tensor(tau, dtype=magnitude.dtype, device=magnitude.device)
    x = magnitude = torch.maximum(magnitude, tau)
    for _ in range(6):
        slope = p * x ** (p - 1)
        x = x - (slope + beta * (x - magnitude)) / (beta - (1 - p) * slope / x)
    return x


def _root(squares: Tensor) -> Tensor:
    """The square root; its gradient at 0 is 0, a subgradient of a length."""
    return _away_from_zero(squares, torch.sqrt)


def _power(magnitude: Tensor, p: float) -> Tensor:
    """magnitude^p for 0 < p < 1; its gradient at 0, where it is unbounded, is set to 0."""
    return _away_from_zero(magnitude, lambda x: x**p)


def _away_from_zero(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function that is 0 at 0, with its infinite gradient there replaced by 0."""
    if not x.requires_grad:
        return function(x)
    zero = x == 0
    return function(x.masked_fill(zero, 1)).masked_fill(zero, 0)
