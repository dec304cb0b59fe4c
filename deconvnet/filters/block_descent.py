"""Block coordinate descent on the filters of a gram without shifts, one filter after another.

    f filters (K, C, h, w)   linear (K, C, h, w), gram (K, K, 1, 1) of `FilterStatistics`

Mairal, Bach, Ponce and Sapiro (2010, algorithm 2). The other filters being fixed, the cost of
filter k is 1/2 gram_kk ||f_k||^2 - <u, f_k>, with u = linear_k - the sum over j != k of
gram_kj f_j. Filters of a constraint have the same norm, so the minimum is the one nearest to u.
They project onto the ball; here filters keep their norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deconvnet.filters.constraint import FilterConstraint

# The gradient is computed for this many filters at a time and kept up to date among them.
BLOCK = 32
# The descent ends when a pass lowers the cost by less than this fraction of what all have, since
# the codes change afterwards anyway.
LEAST_DECREASE = 0.05


def descend(
    start: Tensor,
    linear: Tensor,
    gram: Tensor,
    constraint: FilterConstraint,
    *,
    passes: int,
) -> Tensor:
    """Filters (K, C, h, w) after at most this many passes from `start`, which meets the constraint.

    All float64; the constraint without a taper. No step raises the cost.
    """
    f, linear, gram = start.clone(), linear.flatten(1), gram[..., 0, 0]
    flat = f.flatten(1)
    total = 0.0
    for _ in range(passes):
        decrease = torch.zeros((), dtype=f.dtype, device=f.device)
        for first in range(0, len(f), BLOCK):
            block = slice(first, first + BLOCK)
            # The negative gradient.
            slope = linear[block] - gram[block] @ flat
            for k, among in enumerate(gram[block, block], first):
                u = slope[k - first] + gram[k, k] * flat[k]
                part = slice(k, k + 1)
                best = constraint.of_filters(part).project(u.view(f[part].shape), fallback=f[part])
                change = best.flatten() - flat[k]
                decrease += u @ change
                slope.addr_(among, change, alpha=-1)
                flat[k] += change
        total += float(decrease)
        if float(decrease) <= LEAST_DECREASE * total:
            break
    return f
