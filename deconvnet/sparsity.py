"""The sparse prior sum |x|^p: its value and its proximal map for every 0 <= p <= 1.

    x, v maps of any shape · beta > 0 weight of the quadratic term · p the exponent, 0^0 = 0, so
    that p = 0 counts

For p = 1 the map is the soft threshold, for p = 0 the hard one. Between, the minimiser jumps from 0
to a finite value at a threshold tau and the equation beyond it is solved by Newton's method, to
rounding, on every device: no look-up table (that of Krishnan and Fergus, NIPS 2009, is too coarse
where beta is large).

With a pooling window the prior also allows at most one entry that is not zero in each window. Its
proximal map is the shrinkage of the largest entry of each window, and zero elsewhere: among the
entries of a window, beta/2 v^2 - min_x (|x|^p + beta/2 (x - v)^2) is what keeping one gains, and it
grows with |v|. So pooling and unpooling after every shrinkage, as Zeiler et al. 2011 do it, is no
departure from proximal gradient steps but the proximal map of this prior.
"""

import torch
from torch import Tensor

from deconvnet.pooling import Window, pool, strongest, unpool


def penalty(x: Tensor, p: float = 1.0) -> Tensor:
    """sum |x|^p over all entries, a float64 scalar; p = 0 counts the entries that are not zero."""
    return penalties(x.flatten()[None], p)[0]


def penalties(x: Tensor, p: float = 1.0) -> Tensor:
    """`penalty` of every image of x (N, ...): (N,) in float64."""
    check_exponent(p)
    axes = tuple(range(1, x.ndim))
    if p == 0:
        return torch.count_nonzero(x, axes).double()
    magnitude = x.abs()
    if p != 1:
        magnitude = magnitude**p
    # Summed pairwise, to 1e-7, in a quarter of the time that conversion takes.
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
    with window = (groups, h, w) over the maps x (N, K, H, W) that have at most one entry that is
    not zero in each window of `pooling.max_pool`. At the threshold itself, where two minimisers
    tie, the result is 0.
    """
    check_exponent(p)
    if window is not None:
        switches = strongest(v.clamp(min=0) if non_negative else v, window)
        kept = shrink(pool(v, switches), beta, p, non_negative=non_negative)
        return unpool(kept, switches, v.shape)
    if not isinstance(beta, Tensor):
        if not beta > 0:
            raise ValueError(f"beta={beta}: must be positive")
        if p == 1:
            return _soft_threshold(v, 1 / beta, non_negative)
    if non_negative:
        v = v.clamp(min=0)
    magnitude = v.abs()
    smallest, tau = threshold(beta, p)
    if p == 1:
        result = magnitude - tau
    elif p == 0:
        result = magnitude
    else:
        result = _largest_root(magnitude, beta, p, smallest)
    # <= and not >, so that a NaN stays one.
    return torch.where(magnitude <= tau, torch.zeros_like(result), result).copysign(v)


def threshold(beta: float | Tensor, p: float) -> tuple[float | Tensor, float | Tensor]:
    """(x, tau): up to |v| = tau the minimiser is 0, and just beyond it jumps to x (0 for p = 1).

    x = (2 (1-p) / beta)^(1/(2-p)) and tau = x + p/beta x^(p-1): there the cost of x equals that of
    0.
    """
    if p == 1:
        return 0.0 * beta, 1 / beta
    x = (2 * (1 - p) / beta) ** (1 / (2 - p))
    return x, x + p / beta * x ** (p - 1)


def check_exponent(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"p={p}: the exponent of the sparse prior must lie between 0 and 1")


def _soft_threshold(v: Tensor, tau: float, non_negative: bool) -> Tensor:
    # One fused kernel each: this is called on every map in every iteration.
    return torch.relu(v - tau) if non_negative else torch.nn.functional.softshrink(v, tau)


def _largest_root(
    magnitude: Tensor, beta: float | Tensor, p: float, smallest: float | Tensor
) -> Tensor:
    """The root of p x^(p-1) + beta (x - |v|) = 0 that is the minimum, for |v| beyond the threshold.

    From x = |v| Newton's method descends to it monotonically, the left side being increasing and
    convex there; six steps reach rounding for every p and beta. Entries below the threshold only
    have to stay finite.
    """
    x = torch.maximum(
        magnitude, torch.as_tensor(smallest, dtype=magnitude.dtype, device=magnitude.device)
    )
    for _ in range(6):
        slope = p * x ** (p - 1)
        x = x - (slope + beta * (x - magnitude)) / (beta - (1 - p) * slope / x)
    return x
