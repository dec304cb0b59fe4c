"""The filter update: filters that minimise the reconstruction error for fixed maps.

    z maps (N, K, H+h-1, W+w-1)   b target (N, C, H, W)   f filters (K, C, h, w)
    T from what the layer synthesizes to b: the identity, or the layers below

The filters minimise the quadratic cost 1/2 ||T Z f - b||^2 within a `FilterConstraint`; the weight
lam of the reconstruction makes no difference to them. There are two updates: "proximal" makes many
steps on sums over images (statistics.py), "cg" makes a few conjugate gradient steps on the normal
equations, which visit the maps again at each step (Zeiler et al. 2010, 2011).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from deconvnet.filters.block_descent import descend
from deconvnet.filters.constraint import FilterConstraint
from deconvnet.filters.initial import INITS
from deconvnet.filters.sparse_statistics import SparseMaps
from deconvnet.filters.statistics import FilterStatistics, gram_product
from deconvnet.operators.convolution import Boundary, connected, filter_gradient
from deconvnet.operators.linear import LinearOperator, conjugate_gradients
from deconvnet.operators.sparse_maps import deconvolve_sparse
from deconvnet.support.communicator import SINGLE, Communicator
from deconvnet.support.renaming import renamed
from deconvnet.support.scaling import exponent, magnitude, times_power

UPDATES = ("proximal", "cg")

# Adaptive steps begin as if this were the largest eigenvalue, which is between 3 and 8 for sparse
# maps. They end when one lowers the cost by less than this fraction of what all have.
FIRST_EIGENVALUE, LEAST_DECREASE = 2.0, 0.02

# z, the residual b - T Z f, and T of some images.
Batch = tuple[Tensor, Tensor, LinearOperator]

# More epochs, or steps of an update, can only be a mistake.
MAX_STEPS = 1_000_000


@renamed(revive="reinit_unused", memory="averaging_epochs")
@dataclass
class LearningSettings:
    """How the filters of a layer are learned."""

    # passes over the training images
    epochs: int = 12
    # images per filter update; null: all, for one update an epoch
    batch_size: int | None = 8
    # proximal: many steps on sums over images; cg: conjugate gradients on the maps of one batch, as
    # in the papers
    update: str = "proximal"
    # steps of one update, at most (the authors' toolbox: 2 or 4 of cg)
    update_iterations: int = 10
    # proximal: sums over earlier batches fade over about this many epochs; 0: each update uses its
    # own batch alone
    averaging_epochs: float = 1.0
    # initial filters: patches of what the layer explains, or random (Gaussian noise, as in the
    # papers)
    init: str = "patches"
    # what has unit norm: each whole filter, or each plane of a filter (the CVPR 2010 paper)
    norm: str = "filter"
    # filters without negative coefficients
    non_negative: bool = False
    # filters in which every 2-D plane has mean zero; not with non_negative
    zero_mean: bool = False
    # re-initialise filters that no map uses or that duplicate another, at the end of every epoch
    # but the last
    reinit_unused: bool = True
    # shift filters that have settled off centre to the middle of their frame, every fourth epoch in
    # the first two thirds: a filter cut off by its frame is a local minimum (of patches, filters
    # are never shifted)
    recenter: bool = True
    # filters of rank 1, one pattern over the channels (space) times one over the pixels (time), for
    # signals of several channels; not with non_negative or norm=plane
    rank1: bool = False
    # fraction of their length, 0 to 0.5, over which filters fall to zero at each end; 0: none
    taper: float = 0.0

    def __post_init__(self) -> None:
        for key, choices in (("update", UPDATES), ("init", INITS)):
            if getattr(self, key) not in choices:
                raise ValueError(
                    f"learning.{key}={getattr(self, key)}: choose one of {', '.join(choices)}"
                )
        for key in ("epochs", "update_iterations"):
            if not 1 <= getattr(self, key) <= MAX_STEPS:
                raise ValueError(
                    f"learning.{key}={getattr(self, key)}: must be at least 1, and at most "
                    f"{MAX_STEPS}"
                )
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"learning.batch_size={self.batch_size}: must be at least 1, or null")
        try:
            self.constraint()
        except ValueError as error:
            raise ValueError(f"learning.{error}") from None
        if not self.averaging_epochs >= 0:
            raise ValueError(
                f"learning.averaging_epochs={self.averaging_epochs}: must not be negative"
            )

    def constraint(self, connectivity: Tensor | None = None) -> FilterConstraint:
        """The constraint on filters with this connectivity (K, C); None: all planes connected."""
        return FilterConstraint(
            self.norm, self.non_negative, self.zero_mean, connectivity, self.rank1, self.taper
        )


class Diverged(RuntimeError):
    """The objective is no longer finite. The filters are those from before the update."""


def update_filters(
    f: Tensor,
    statistics: FilterStatistics,
    constraint: FilterConstraint | None = None,
    *,
    iterations: int = 10,
    adaptive: bool = False,
) -> Tensor:
    """Filters (K, C, h, w) that lower 1/2 f'(gram)f - (linear)'f within the constraint.

    Accelerated projected gradient steps from f. The step of each filter is scaled by the energy of
    its map, so rare filters learn as fast as frequent ones, and with a taper t by t^2, since it
    measures distances. The best of all iterates, including the
    first, is returned, so the cost never rises. If the gram has no shifts, because the filters are
    1x1 or explain patches, at most this many passes of `block_descent` take the place of the steps.

    The length of the steps comes from the largest eigenvalue, whose search takes longer than the
    steps. adaptive: it is found by trial instead (Beck and Teboulle 2009), and the steps end early.

    constraint: by default unit norm of each filter. Raises Diverged if the cost is not finite.
    """
    constraint = constraint or FilterConstraint()
    start = constraint.project(f.double())
    if statistics.gram.shape[2:] == (1, 1) and not constraint.taper:
        _check_finite(statistics)
        gram, linear = statistics.gram, statistics.linear
        return descend(start, linear, gram, constraint, passes=iterations).to(f.dtype)
    product = gram_product(statistics.gram, tuple(f.shape[2:]))
    largest_energy = statistics.energy.max().item()
    energy = statistics.energy.clamp(min=1e-9 * largest_energy if largest_energy > 0 else 1.0)
    scale = energy.rsqrt().view(-1, 1, 1, 1)
    if (t := constraint.window(start)) is not None:
        scale = scale * t
    eigenvalue = FIRST_EIGENVALUE
    if not adaptive:
        # Z'Z is the same for all channels, so one channel is enough.
        eigenvalue = _largest_eigenvalue(lambda v: scale * product(scale * v), start[:, :1])
    step = scale.square() / eigenvalue

    def cost_and_gradient(v: Tensor) -> tuple[float, Tensor]:
        gram_v = product(v)
        return float((v * (0.5 * gram_v - statistics.linear)).sum()), gram_v - statistics.linear

    x, y, t = start, start, 1.0
    lowest, gradient_x = cost_and_gradient(start)
    if not math.isfinite(lowest):
        raise Diverged("the sums over the images are not finite")
    best, gradient_y, first = start, gradient_x, lowest
    for _ in range(iterations):
        x_old, gradient_old, before = x, gradient_x, lowest
        while True:
            x = constraint.project(y - step * gradient_y, fallback=start)
            cost, gradient_x = cost_and_gradient(x)
            if not adaptive:
                break
            # As long as the cost bends by no more than the step assumes, it cannot overshoot.
            bend = float(((x - y) * (gradient_x - gradient_y)).sum())
            assumed = float(((x - y).square() / step).sum())
            if not bend > assumed:
                break
            step = step * (0.9 * assumed / bend)
        if cost < lowest:
            best, lowest = x, cost
        else:
            t = 1.0
        if adaptive and before - lowest <= LEAST_DECREASE * (first - lowest):
            break
        t_next = (1 + (1 + 4 * t * t) ** 0.5) / 2
        momentum = (t - 1) / t_next
        # The gradient is affine, so y needs no product of its own.
        y = x + momentum * (x - x_old)
        gradient_y = gradient_x + momentum * (gradient_x - gradient_old)
        t = t_next
    return best.to(f.dtype)


def update_filters_by_cg(
    f: Tensor,
    batches: Callable[[], Iterable[Batch]],
    constraint: FilterConstraint | None = None,
    *,
    iterations: int = 2,
    boundary: Boundary = "valid",
    communicator: Communicator = SINGLE,
) -> Tensor:
    """Filters (K, C, h, w) after conjugate gradient steps on Z'T'T Z f = Z'T'b, projected.

    The update of Zeiler et al. 2010 (T = I) and 2011: steps from f, then unit norm. The gradient is
    R_(l-1)' of the residual correlated with z_l. batches() iterates over (z, b - T Z f, T) of the
    images; it is called once for the right side and once for each step, and with several processes
    each call exchanges one message of the size of the filters. constraint: by default unit norm of
    each filter. Raises Diverged if the steps are not finite.
    """
    constraint = constraint or FilterConstraint()
    g, size = constraint.connectivity, tuple(f.shape[2:])

    def correlate(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        total = torch.zeros_like(f, dtype=torch.float64)
        for z, y in pairs:
            if exponent(magnitude(z)) or exponent(magnitude(y)):
                # Their products would leave the range of float32.
                z, y = z.double(), y.double()
            for n in range(len(z)):
                image = slice(n, n + 1)
                maps = None if boundary == "reflect" else SparseMaps.from_dense(z[image])
                if maps is None:
                    total += filter_gradient(z[image], y[image], size, boundary=boundary)
                else:
                    maps.filter_gradient(y[image], size, boundary, total=total)
        return communicator.all_reduce_sum(connected(total, g))[0].flatten(2)[None]

    def system(v: Tensor) -> Tensor:
        v = connected(v[0].view(f.shape).to(f.dtype), g)
        synthesized = ((z, deconvolve_sparse(z, v, boundary=boundary), T) for z, _, T in batches())
        return correlate((z, T.adjoint(T(y))) for z, y, T in synthesized)

    right_side = correlate((z, T.adjoint(residual)) for z, residual, T in batches())
    # Rescale, since directions in squared units of the data would leave the range of float32.
    e = exponent(magnitude(right_side))
    change = conjugate_gradients(
        lambda v: times_power(system(v), -e),
        times_power(right_side, -e),
        tolerance=1e-6,
        max_iterations=iterations,
    )
    # Conjugate gradients make no step from a right side that is not finite.
    if not (torch.isfinite(right_side).all() and torch.isfinite(change).all()):
        raise Diverged("the steps of the filter update are not finite")
    start = connected(f.double(), g)
    updated = start + change[0].view(f.shape)
    return constraint.project(updated, fallback=constraint.project(start)).to(f.dtype)


def _check_finite(statistics: FilterStatistics) -> None:
    if not all(math.isfinite(magnitude(x)) for x in (statistics.linear, statistics.gram)):
        raise Diverged("the sums over the images are not finite")


def _largest_eigenvalue(product: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """The largest eigenvalue by power iteration, plus 5% because it converges from below."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like)
    value = 1.0
    for _ in range(100):
        v = product(v / torch.linalg.vector_norm(v).clamp(min=1e-300))
        previous, value = value, float(torch.linalg.vector_norm(v))
        if abs(value - previous) <= 2e-3 * value:
            break
    return 1.05 * value if value > 0 else 1.0
