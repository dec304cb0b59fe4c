"""Inference of sparse maps: half-quadratic splitting, ADMM, FISTA and ISTA on one problem.

    minimise over z, for every image by itself      lam/2 ||A z - b||^2 + prior(z)

    b what is explained (N, C, H, W)   A operator, maps -> b   z maps (N, K, ...)   0 <= p <= 1
    prior: sum |z|^p, or with weights, groups of maps, signs or a pooling window (sparsity.Prior,
    whose fields p, window, weights, group, non_negative are the keywords `prior` here)
    x auxiliary maps, as z: x carries the prior, z the data, and beta/2 ||z - x||^2 couples them

The four methods share the proximal map of the prior and differ in what they do with the data term:

- half_quadratic: the splitting of the CVPR 2010 paper; beta rises on a schedule, each beta gets one
  x-step and one z-step. It ends near z = x but, on a short schedule, far above the minimum of the
  cost (docs/mathematics.md has the table).
- admm: the same split with a multiplier u, at a fixed or balanced beta, over-relaxed. Reaches the
  minimum for p = 1.
- ista, fista: a gradient step on the data term, then the proximal map; FISTA adds momentum. They
  need only A and A', and their objective never rises, with a window neither: the place for
  operators through several layers.

Parameters that adapt and tests that stop are per image, so that a result does not depend on the
rest of the batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deconvnet.operators.convolution import Boundary, map_size
from deconvnet.operators.linear import Deconvolution, LinearOperator, conjugate_gradients, dot, norm
from deconvnet.operators.pooling import Window
from deconvnet.sparse_coding.prior import Prior, shrink
from deconvnet.support.modes import plain
from deconvnet.support.renaming import renamed
from deconvnet.support.units import Units, exponent, magnitude, times_power
from deconvnet.support.validation import (
    as_filters,
    as_images,
    as_number,
    as_tensor,
    as_weights,
    check_settings,
    positive,
    whole,
)

METHODS = ("admm", "half_quadratic", "fista", "ista", "coordinate")
Z_STEPS = ("exact", "cg")
CHECK_EVERY = 10
# Above 32 MiB the C library gives an array back when it is done with it, and its pages are made
# anew for the next one, which doubles the time of an iteration; below, they are used again.
PART = 2**24
# The gradient step grows by this factor in an iteration, and falls to this share of what the
# curvature would allow (measured on four layers: 1.5 and more is no faster and often refused).
GROWTH, CAUTION = 1.02, 0.9
# ADMM converges only if its beta is left alone in the end.
ADAPT_UNTIL = 100
# Its coupling is a rule of thumb: for filters whose squared norm is one up to this factor it holds
# as it is, beyond that beta follows the norm.
UNIT_NORM = 2.5

Callback = Callable[[int, Tensor, Tensor], None]


# More can only be a mistake, or a file that is to keep its reader busy for ever.
MOST_ITERATIONS = 1_000_000


@renamed(coupling="rho")
@dataclass
class SolverSettings:
    """How maps are inferred. The same in every layer unless a layer says otherwise."""

    # admm | half_quadratic | fista | ista | coordinate (one layer, on the CPU)
    method: str = "admm"
    # at most this many iterations for new images (half_quadratic: passes through its schedule)
    iterations: int = 50
    # iterations of each visit to an image in training, which starts where the last visit ended
    training_iterations: int = 5
    # an image stops when its relative residuals (admm), its relative change (fista, ista) or what a
    # round takes off its objective (coordinate) are below
    tolerance: float = 1e-3
    # p = 1, all but half_quadratic: if given, an image stops instead when its duality gap is at
    # most this share of its objective, which is then so near the minimum for certain (float32 can
    # show it down to about 1e-6)
    gap: float | None = None
    # admm: the penalty that couples z and x, relative to the curvature of the data term:
    # beta / (lam ||f||^2), with the largest norm of a filter (1 where it is about 1)
    rho: float = 2.5
    # admm: over-relaxation, 1 (none) to 1.9
    relaxation: float = 1.8
    # admm with p = 1: balance the residuals of new images by changing beta, in 100 iterations;
    # fista, ista: let the step follow the curvature that is met, far beyond what is always safe
    adaptive: bool = True
    # half_quadratic: the first beta, the factor from one to the next, and the upper bound. In units
    # of z^(p-2) or, where lam_ratio is given in place of lam, of lam_ratio * lam * ||f||^2, so that
    # the units of the data do not matter
    beta_start: float = 1.0
    beta_factor: float = 6.0
    beta_end: float = 1e5
    # half_quadratic: how the z-step is solved: exact, or cg_iterations of conjugate gradients (cg)
    z_step: str = "exact"
    cg_iterations: int = 2
    # fista, ista: the first gradient step, which is also the threshold, and with adaptive: false
    # all of them; null: from the curvature, or 1 / (lam ||A||^2)
    step: float | None = None

    def __post_init__(self) -> None:
        _choose("solver.method", self.method, METHODS)
        _choose("solver.z_step", self.z_step, Z_STEPS)
        for key in ("iterations", "training_iterations", "cg_iterations"):
            if not 1 <= getattr(self, key) <= MOST_ITERATIONS:
                raise ValueError(
                    f"solver.{key}={getattr(self, key)}: must be at least 1, and at most "
                    f"{MOST_ITERATIONS}"
                )
        for key in ("rho", "beta_start", "step", "gap"):
            if getattr(self, key) is not None and not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"solver.{key}={getattr(self, key)}: must be positive and finite")
        if self.gap is not None and self.method == "half_quadratic":
            raise ValueError(
                f"solver.gap={self.gap}: half_quadratic goes through its schedule; choose admm, "
                "fista, ista or coordinate"
            )
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"solver.tolerance={self.tolerance}: must lie between 0 and 1")
        if not 0 < self.relaxation < 2:
            raise ValueError(f"solver.relaxation={self.relaxation}: must lie between 0 and 2")
        rises = self.beta_factor > 1 and self.beta_start <= self.beta_end < math.inf
        if not rises:
            raise ValueError(
                f"solver.beta_start={self.beta_start}, beta_factor={self.beta_factor}, "
                f"beta_end={self.beta_end}: the schedule must rise to a finite end"
            )

    def betas(self) -> list[float]:
        """The schedule of half-quadratic splitting: beta_start * beta_factor^i, up to beta_end."""
        betas = [self.beta_start]
        while betas[-1] * self.beta_factor <= self.beta_end * (1 + 1e-9):
            betas.append(betas[-1] * self.beta_factor)
        return betas


@dataclass(frozen=True)
class Solution:
    """Sparse maps z and how they were found.

    objective: (N,) in float64, and its terms: reconstruction, lam/2 ||A z - b||^2, and sparsity,
    the value of the prior. residual: b - A z, in the shape of b. iterations: the most that an image
    took. state: what a later call needs to go on from here, in the shape of z. step: (N, 1, 1, 1),
    the gradient step that served each image, for a later call (fista, ista; else None). gap: (N,)
    in float64, the duality gap: how far above the minimum the objective is at most (where
    settings.gap asks for it, but not in training; else None). lam: the weight that was used.
    """

    z: Tensor
    residual: Tensor
    reconstruction: Tensor
    sparsity: Tensor
    iterations: int
    state: Tensor = field(repr=False)
    step: Tensor | None = field(default=None, repr=False)
    gap: Tensor | None = None
    lam: float | None = None

    @property
    def objective(self) -> Tensor:
        return self.reconstruction + self.sparsity

    def __repr__(self) -> str:
        return f"Solution({self})"

    def __str__(self) -> str:
        """One line of what was found, with the duality gap where it was asked for."""
        total = float(self.objective.sum())
        density = float(torch.count_nonzero(self.z)) / max(self.z.numel(), 1)
        line = (
            f"{len(self.z)} images, maps {'x'.join(map(str, self.z.shape[1:]))}, {density:.2%} not "
            f"zero, objective {total:.6g}, {self.iterations} iterations"
        )
        if self.gap is None:
            return line
        # Where there is nothing to explain the objective is 0, which is the minimum.
        relative_gap = float(self.gap.sum()) / total if total > 0 else 0.0
        return f"{line}, at most {relative_gap:.2%} above the minimum"


@plain
def sparse_code(
    images: Tensor,
    filters: Tensor,
    *,
    lam: float | None = None,
    lam_ratio: float | None = None,
    p: float = 1.0,
    boundary: Boundary = "valid",
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    group: int = 1,
    non_negative: bool = False,
    settings: SolverSettings | None = None,
    chunk: int | None = None,
) -> Solution:
    """Sparse maps of images under given filters, without a network.

        minimise over z      lam/2 ||mask * (sum_k f_k * z_k - y)||^2 + prior(z)

    images: (N, C, H, W) of float32 or float64, explained as they are; filters: (K, C, h, w);
    tensors or numpy arrays, but what comes back are tensors. lam weighs the
    reconstruction, as in the papers: SPORCO's lambda is 1/lam, and its objective 1/lam times this
    one. lam_ratio instead of lam, in (0, 1]: lambda relative to the smallest that makes all maps
    zero (`lam_from_ratio`).
    mask: (N or 1, C or 1, H, W), >= 0; where it is 0 a pixel is not explained and may be anything.
    p, weights (K,) or as the maps, group and non_negative: the prior, `sparsity.Prior`.
    settings: by default those of `default_solver`. chunk: at most so many images at a time, which
    bounds the memory beside that of the maps and changes results by rounding only; None: what is
    fast on a CPU, all on a GPU. What comes back are plain tensors without a gradient.
    """
    images = as_images(images)
    filters = as_filters(filters, images.shape[1])
    mask = None if mask is None else as_tensor(mask, "mask")
    weights = None if weights is None else as_weights(weights)
    check_settings(settings, SolverSettings, "settings")
    if (lam is None) == (lam_ratio is None):
        raise ValueError(f"lam={lam}, lam_ratio={lam_ratio}: give one of the two")
    A, b = Deconvolution(filters.to(images), boundary, mask), images
    if mask is not None:
        each = zip(mask.shape, images.shape, strict=True)
        if not all(size in (1, whole) for size, whole in each) or mask.shape[2:] != b.shape[2:]:
            raise ValueError(
                f"mask of shape {tuple(mask.shape)} does not fit images of shape "
                f"{tuple(images.shape)}: expected (N or 1, C or 1, H, W)"
            )
        b = torch.where(A.mask > 0, A.mask * images, torch.zeros_like(images))
    if not torch.isfinite(b).all() or not torch.isfinite(filters).all():
        raise ValueError("images and filters must be finite: there are NaN or infinite values")
    weights = None if weights is None else weights.to(images)
    p, group = as_number(p, "p"), whole(group, "group")
    prior = dict(p=p, weights=weights, group=group, non_negative=non_negative)
    settings = settings or default_solver(images, p)
    if lam_ratio is not None:
        lam = lam_from_ratio(A, b, lam_ratio, **prior)
        settings = relative_schedule(settings, A, lam, lam_ratio)
    return solve(A, b, lam=lam, settings=settings, chunk=chunk, **prior)


def default_solver(images: Tensor, p: float = 1.0) -> SolverSettings:
    """What is fastest for one layer: on a CPU with p = 1 coordinate descent, else ADMM, of about
    the same accuracy (up to 500 iterations; sparse codes take some 50).
    """
    if images.device.type != "cpu" or p != 1:
        return SolverSettings(iterations=500)
    # One round of a training visit sweeps ten times over what is not zero.
    return SolverSettings("coordinate", iterations=200, training_iterations=1, tolerance=1e-4)


@plain
def lam_from_ratio(A: LinearOperator, b: Tensor, lam_ratio: float, **prior: Any) -> float:
    """The lam with lambda = 1/lam = lam_ratio * lambda_max, the smallest lambda that makes z = 0.

        lam = 1 / (lam_ratio * max over the images of prior.dual_norm(A'b))                p = 1

    lam_ratio: in (0, 1]. With 1 all maps are zero; the smaller it is, the denser they are. The
    brightest image decides for all. If the data are scaled by s, so is lambda_max: with the same
    ratio the maps are scaled by s and otherwise unchanged, while a given lam would have to be
    divided by s. With a ratio of 1 ADMM, whose maps only approach zero, may leave a few small
    coefficients.
    """
    if not 0 < as_number(lam_ratio, "lam_ratio") <= 1:
        raise ValueError(f"lam_ratio={lam_ratio}: must lie in (0, 1]")
    b, asked = as_images(b, "b"), Prior(**prior)
    (A, of_filters), of_data = A.normalised(), exponent(magnitude(b))
    data = A.adjoint(times_power(b, -of_data))
    asked.check(data.shape)
    largest = float(asked.dual_norm(data).max())
    if not 0 < largest < math.inf:
        why = "all weights to be positive" if largest > 0 else "images that the filters can explain"
        raise ValueError(f"lam_ratio={lam_ratio}: needs {why}")
    if lam_ratio == 1:
        # By more than the rounding of correlations, so that not one entry is left.
        largest *= 1 + 32 * torch.finfo(b.dtype).eps
    return math.ldexp(1 / (float(lam_ratio) * largest), -of_data - of_filters)


def relative_schedule(
    settings: SolverSettings, A: LinearOperator, lam: float, lam_ratio: float
) -> SolverSettings:
    """The settings with the schedule of half_quadratic in units of lam_ratio * lam * ||f||^2.

    In these units 1 is the beta whose threshold is the largest coefficient that explains any image
    alone.
    """
    if settings.method != "half_quadratic":
        return settings
    largest = A.curvature()
    # A number stays one: as a tensor it would have the type that is the default of torch.
    unit = lam_ratio * lam * float(largest.max() if isinstance(largest, Tensor) else largest)
    start, end = unit * settings.beta_start, unit * settings.beta_end
    return dataclasses.replace(settings, beta_start=start, beta_end=end)


@plain
def solve(
    A: LinearOperator,
    b: Tensor,
    *,
    lam: float,
    p: float = 1.0,
    window: Window | None = None,
    weights: Tensor | None = None,
    group: int = 1,
    non_negative: bool = False,
    settings: SolverSettings,
    state: Tensor | None = None,
    step: Tensor | None = None,
    training: bool = False,
    callback: Callback | None = None,
    chunk: int | None = None,
) -> Solution:
    """Infer z by the method of the settings, from z = 0 or from state and step of an earlier one.

    For fista, ista and coordinate the state may be any maps: what the prior does not allow in them
    is taken away first. b, A, lam and weights may be in any units; half_quadratic has its schedule
    in those of z.
    p, window, weights, group, non_negative: the prior, `sparsity.Prior`. With `training` it is one
    visit of a training epoch: few iterations, nothing adapts, nothing stops early. callback(i, z,
    beta) sees the sparse maps after iteration i = 1, 2, ... and the beta (N, 1, 1, 1) of each image
    then; for fista and ista beta is 1 / step. It sees all images: with it there are no chunks.
    """
    chunk = None if chunk is None else whole(chunk, "chunk")
    b, lam = as_images(b, "b"), positive(lam, "lam")
    check_settings(settings, SolverSettings, "settings")
    fields = dict(p=p, window=window, weights=weights, group=group, non_negative=non_negative)
    prior = Prior(**fields)
    if settings.gap is not None and not prior.convex:
        raise ValueError(
            f"solver.gap={settings.gap}: only a minimum for p=1 without a window has a duality gap,"
            f" not for p={p}, window={window}"
        )
    start = _zeros(A, b, settings.method) if state is None else _checked_maps(A, b, state, "state")
    prior.check(start.shape)
    if state is not None and settings.method in ("fista", "ista", "coordinate"):
        # Steps that never raise the objective would stay where it is lower than it can be.
        start = prior.feasible(start)
    step = settings.step if step is None else step
    A, of_filters = A.normalised()
    units = Units.of(b, of_filters, lam, p, weights)
    given = dict(lam=lam, settings=settings, step=step, callback=callback, weights=weights)
    if units.ordinary:
        return _solve_parts(A, b, start, training=training, chunk=chunk, **{**fields, **given})
    own = {**fields, **_in_units(units, **given)}
    b, start = times_power(b, -units.data), times_power(start, -units.maps)
    found = _solve_parts(A, b, start, training=training, chunk=chunk, **own)
    return _in_units_of_the_caller(units, found, lam)


def _checked_maps(A: LinearOperator, b: Tensor, z: Any, name: str) -> Tensor:
    """Maps for these data, in their type."""
    z = as_tensor(z, name).to(b)
    if isinstance(A, Deconvolution):
        size = map_size(b.shape[2:], A.f.shape[2:], A.boundary)
        expected = (len(b), len(A.f), *size)
        if tuple(z.shape) != expected:
            raise ValueError(f"{name} of shape {tuple(z.shape)}: expected maps of {expected}")
    elif z.ndim != 4 or len(z) != len(b):
        raise ValueError(
            f"{name} of shape {tuple(z.shape)}: expected maps (N, K, rows, columns) of {len(b)} "
            "images"
        )
    return z


def _zeros(A: LinearOperator, b: Tensor, method: str) -> Tensor:
    """Maps to start from; for coordinate descent, which only reads them, without their memory."""
    if method != "coordinate" or not isinstance(A, Deconvolution):
        return A.zeros(b)
    size = map_size(b.shape[2:], A.f.shape[2:], A.boundary)
    return b.new_zeros(1, 1, 1, 1).expand(len(b), len(A.f), *size)


def _in_units(
    units: Units,
    *,
    lam: float,
    settings: SolverSettings,
    step: Tensor | float | None,
    callback: Callback | None,
    weights: Tensor | None,
) -> dict[str, Any]:
    """Arguments of `solve` in other units; the callback still sees those of the caller."""

    def watch(i: int, z: Tensor, beta: Tensor) -> None:
        callback(i, times_power(z, units.maps), beta.double() / units.beta(1.0))

    schedule = units.beta(settings.beta_start), units.beta(settings.beta_end)
    return dict(
        lam=units.lam(lam),
        settings=dataclasses.replace(settings, beta_start=schedule[0], beta_end=schedule[1]),
        step=step if step is None else units.step(step),
        callback=callback and watch,
        weights=units.weights(weights),
    )


def _in_units_of_the_caller(units: Units, found: Solution, lam: float) -> Solution:
    z = times_power(found.z, units.maps)
    return dataclasses.replace(
        found,
        z=z,
        residual=times_power(found.residual, units.data),
        reconstruction=units.cost(found.reconstruction),
        sparsity=units.cost(found.sparsity),
        state=z if found.state is found.z else times_power(found.state, units.maps),
        step=found.step if found.step is None else units.step(found.step, back=True),
        gap=found.gap if found.gap is None else units.cost(found.gap),
        lam=lam,
    )


def _solve_parts(
    A: LinearOperator,
    b: Tensor,
    start: Tensor,
    *,
    step: Tensor | float | None,
    chunk: int | None,
    weights: Tensor | None,
    **options: Any,
) -> Solution:
    """`solve` of all images together, or of some at a time."""
    if options["callback"] or (options["settings"].method == "coordinate" and chunk is None):
        return _solve(A, b, start, step=step, weights=weights, **options)
    found = []
    for images in _parts(A, b, start, chunk):
        own = dict(step=_some(step, images), weights=_some(weights, images))
        found.append(_solve(A[images], b[images], start[images], **own, **options))
    return _joined(found)


def _solve(
    A: LinearOperator,
    b: Tensor,
    start: Tensor,
    *,
    lam: float,
    settings: SolverSettings,
    step: Tensor | float | None,
    training: bool,
    callback: Callback | None,
    **fields: Any,
) -> Solution:
    """`solve` for images that are inferred together."""
    prior = Prior(**fields)
    iterations = settings.training_iterations if training else settings.iterations
    gap = None if training else settings.gap
    tolerance = 0.0 if training or gap is not None else settings.tolerance
    common = dict(lam=lam, callback=callback, **fields)
    until = dict(iterations=iterations, tolerance=tolerance, gap=gap)
    if settings.method == "coordinate":
        # Imported here, since it loads numba, which the other methods do without.
        from deconvnet.sparse_coding.coordinate_descent import coordinate_descent

        z, residual, gaps, count = coordinate_descent(
            A, b, start, lam=lam, prior=prior, callback=callback, **until
        )
        cost = data_term(residual, lam), _value_by_image(prior, z)
        return Solution(z, residual, *cost, count, z, None, None if gap is None else gaps, lam)
    if settings.method == "half_quadratic":
        cg = settings.cg_iterations if settings.z_step == "cg" else None
        passes = 1 if training else iterations
        betas = settings.betas() * passes
        z, state = half_quadratic(A, b, start, betas=betas, cg_iterations=cg, **common)
        step, count = None, len(betas)
    elif settings.method == "admm":
        z, state, count = admm(
            *(A, b, start),
            beta=settings.rho * lam * _norm_to_follow(A.curvature()),
            relaxation=settings.relaxation,
            # Where the prior is not convex a beta that keeps moving loses its way.
            adaptive=settings.adaptive and prior.convex and not training,
            **common,
            **until,
        )
        step = None
    else:
        z, step, count = proximal_gradient(
            *(A, b, start),
            momentum=settings.method == "fista",
            adaptive=settings.adaptive,
            step=step,
            **common,
            **until,
        )
        state = z
    residual = b - A(z)
    cost = data_term(residual, lam), prior.value(z)
    if gap is not None:
        # At the minimum rounding takes it below 0.
        gap = (sum(cost) - _dual(A, b, residual, lam, prior)).clamp(min=0)
    return Solution(z, residual, *cost, count, state, step, gap, lam)


def _norm_to_follow(squared: float | Tensor) -> float | Tensor:
    """The squared norm of filters, 1 where it is near one."""
    if not isinstance(squared, Tensor):
        near = 1 / UNIT_NORM <= squared <= UNIT_NORM
        return 1.0 if near or squared == 0 else squared
    near = (squared >= 1 / UNIT_NORM) & (squared <= UNIT_NORM)
    return torch.where(near | (squared == 0), 1.0, squared)


def _parts(A: LinearOperator, b: Tensor, z: Tensor, chunk: int | None) -> list[slice]:
    """At most `chunk` images each, and on a CPU as many as keep an array of maps within PART."""
    together = max(1, len(b)) if chunk is None else chunk
    if b.device.type == "cpu" and len(b) > 0:
        numbers = max(z[0].numel(), b[0].numel(), A.max_intermediate_numel)
        together = max(1, min(together, PART // (numbers * b.element_size())))
    return [slice(n, n + together) for n in range(0, max(1, len(b)), together)]


def _some(value: Any, images: slice) -> Any:
    """The part for these images of what has one for each, as maps or as (N, 1, 1, 1); else all."""
    each = isinstance(value, Tensor) and value.ndim == 4 and len(value) > 1
    return value[images] if each else value


def _joined(parts: list[Solution]) -> Solution:
    """The solutions of parts of a batch as that of the batch."""
    if len(parts) == 1:
        return parts[0]
    found = {key: [getattr(part, key) for part in parts] for key in vars(parts[0])}
    tensors = {
        key: torch.cat(values) for key, values in found.items() if isinstance(values[0], Tensor)
    }
    return dataclasses.replace(parts[0], **tensors, iterations=max(found["iterations"]))


def half_quadratic(
    A: LinearOperator,
    b: Tensor,
    z: Tensor,
    *,
    lam: float,
    betas: list[float],
    cg_iterations: int | None = None,
    callback: Callback | None = None,
    **prior: Any,
) -> tuple[Tensor, Tensor]:
    """(x, z) after one x-step and one z-step for every beta in turn  (Zeiler et al. 2010).

        x-step   x = argmin prior(x) + beta/2 ||x - z||^2                  sparsity.Prior.shrink
        z-step   (lam A'A + beta I) z = lam A'b + beta x

    The z-step is exact, or cg_iterations of conjugate gradients from the last z, as in the paper.
    What is returned as the solution is one more x-step: the paper keeps z, which has no zeros but
    is within the threshold of the last beta.
    """
    shrink = Prior(**prior).shrink
    data = lam * A.adjoint(b)
    w = None
    for i, beta in enumerate(betas, 1):
        x = shrink(z, beta)
        if cg_iterations is None:
            z, w = _z_step(A, b, x, lam, _per_image(beta, b), w, tolerance=1e-5)
        else:
            z = conjugate_gradients(
                lambda v, beta=beta: lam * A.adjoint(A(v)) + beta * v,
                data + beta * x,
                z,
                tolerance=1e-6,
                max_iterations=cg_iterations,
            )
        if callback:
            callback(i, shrink(z, beta), _per_image(beta, b))
    return shrink(z, betas[-1]), z


def admm(
    A: LinearOperator,
    b: Tensor,
    state: Tensor,
    *,
    lam: float,
    beta: float | Tensor,
    relaxation: float = 1.8,
    adaptive: bool = False,
    iterations: int,
    tolerance: float,
    gap: float | None = None,
    callback: Callback | None = None,
    **prior: Any,
) -> tuple[Tensor, Tensor, int]:
    """(x, state, iterations) of the alternating direction method of multipliers (Boyd et al. 2011).

        z-step   (lam A'A + beta I) z = lam A'b + beta (x - u)
                 z <- relaxation z + (1 - relaxation) x
        x-step   x = argmin prior(x) + beta/2 ||x - (z + u)||^2
        u-step   u <- u + z - x                                    the scaled multiplier

    Since x = shrink(t) and u = t - x for t = z + u, the one array t is the whole state, in the
    scale of the `beta` that was given. For p = 1 it converges to the minimum; for p < 1, or with a
    window, it is a heuristic that works at a fixed beta. Every CHECK_EVERY iterations an image
    stops whose relative residuals are at most `tolerance`, or whose duality gap is at most `gap`
    times its objective.
    """
    prior = Prior(**prior)
    beta = _per_image(beta, b) if isinstance(beta, Tensor) else beta
    beta_given, beta = beta, _per_image(beta, b)
    t, x, w = state, prior.shrink(state, beta), None
    done, some_done = torch.zeros_like(beta, dtype=torch.bool), False
    count = 0
    for count in range(1, iterations + 1):
        # Each line is one pass over the maps: v = 2x - t, and t + relaxation (z - x).
        v, of_step = t.lerp(x, 2.0), beta if adaptive else beta_given
        z, w = _z_step(A, b, v, lam, of_step, w, max_iterations=A.inexact_cg_steps)
        t_new = t.add(z - x, alpha=relaxation)
        t = torch.where(done, t, t_new) if some_done else t_new
        x_old, x = x, prior.shrink(t, beta)
        if callback:
            callback(count, x, beta)
        if count % CHECK_EVERY == 0 and (adaptive or tolerance or gap):
            primal = norm(z - x) / torch.maximum(norm(z), norm(x)).clamp(min=_tiny(z))
            dual = norm(x - x_old) / norm(t - x).clamp(min=_tiny(z))
            done = done | (torch.maximum(primal, dual) <= tolerance)
            if gap:
                done = done | _certified(A, b, x, b - A(x), lam, prior, gap)
            if done.all():
                break
            some_done = bool(done.any())
            if adaptive and count <= ADAPT_UNTIL:
                t, beta = _balance(t, x, beta, primal, dual, done)
    return x, x + (t - x) * (beta / beta_given), count


def proximal_gradient(
    A: LinearOperator,
    b: Tensor,
    z: Tensor,
    *,
    lam: float,
    momentum: bool = True,
    adaptive: bool = True,
    step: Tensor | float | None = None,
    iterations: int,
    tolerance: float,
    gap: float | None = None,
    callback: Callback | None = None,
    **prior: Any,
) -> tuple[Tensor, Tensor, int]:
    """(z, step, iterations) of ISTA, or with momentum of FISTA, whose objective never rises.

        z <- argmin prior(x) + 1/(2 step) ||x - (y - step lam A'(A y - b))||^2   y = z, or beyond it

    It minimises a bound of the objective that touches it at y if the curvature of the move d that
    it makes, lam ||A d||^2 / ||d||^2, is at most 1 / step: from y = z the objective then cannot
    rise, whether or not the prior is convex. A step of 1 / (lam ||A||^2) is always short enough,
    and is what it is without `adaptive`, unless given. But sparse moves meet far less than the norm
    of A: with `adaptive` a move is made anew with a shorter step where that was too long, and the
    step grows a little otherwise (Scheinberg, Goldfarb and Bai 2014, whose momentum this is). It
    ends many times longer. All of this is nearly free: A y is a combination of what was computed.

    A move that raises the objective is taken back, image by image: from a y beyond z the momentum
    starts anew (O'Donoghue and Candes 2015), from z itself the step is halved. Every CHECK_EVERY
    iterations an image stops whose relative change is at most `tolerance`, or, with a `gap`, whose
    duality gap is at most `gap` times its objective.
    """
    prior = Prior(**prior)
    seen = A(z)
    if step is None and adaptive:
        first = shrink(A.adjoint(b - seen), 1e30, window=prior.window)
        step = 1 / _curvature(first, A(first), lam)
    elif step is None:
        step = 1 / (lam * A.squared_norm(b))
    step = _per_image(step, b)
    cost = _cost(b - seen, z, lam, prior)
    y, y_seen, t = z, seen, torch.ones_like(step)
    done = torch.zeros_like(step, dtype=torch.bool)
    count = 0
    for count in range(1, iterations + 1):
        z_old, seen_old, cost_old = z, seen, cost
        z = prior.shrink(torch.addcmul(y, A.adjoint(b - y_seen), lam * step), 1 / step)
        seen = A(z)
        cost = _cost(b - seen, z, lam, prior)
        # Rounding is no rise, but a NaN is one.
        rose = ~(cost <= cost_old * (1 + 10 * torch.finfo(b.dtype).eps))
        too_long, step_old = torch.zeros_like(rose), step
        if adaptive:
            moved = seen - y_seen
            # A move that is next to rounding says nothing of the curvature.
            known = norm(moved) > 100 * torch.finfo(b.dtype).eps * norm(seen)
            longest = torch.where(known, 1 / _curvature(z - y, moved, lam), step)
            too_long = step > longest
            step = torch.where(too_long, CAUTION * longest, (GROWTH * step).minimum(longest))
        if _acts(halved := rose & (t == 1) & ~too_long & ~done):
            step = torch.where(halved, step_old / 2, step)
        if _acts(back := rose | too_long | done):
            z = torch.where(back, z_old, z)
            seen, cost = torch.where(back, seen_old, seen), torch.where(back, cost_old, cost)
        if callback:
            callback(count, z, 1 / step)
        if count % CHECK_EVERY == 0 and (tolerance or gap):
            if gap:
                done = done | _certified(A, b, z, b - seen, lam, prior, gap)
            else:
                done = done | (~back & (norm(z - z_old) <= tolerance * norm(z)))
            if done.all():
                break
        if not momentum:
            y, y_seen = z, seen
            continue
        again = too_long & ~rose
        t_next = (1 + (1 + 4 * step_old / step * t.square()).sqrt()) / 2
        ahead = torch.where(rose, torch.zeros_like(t), (t - 1) / t_next)
        beyond, beyond_seen = z.lerp(z_old, -ahead), seen.lerp(seen_old, -ahead)
        if _acts(again):
            beyond, beyond_seen = (
                torch.where(again, y, beyond),
                torch.where(again, y_seen, beyond_seen),
            )
        y, y_seen = beyond, beyond_seen
        t = torch.where(rose, torch.ones_like(t), torch.where(again, t, t_next))
    return z, step, count


def _acts(mask: Tensor) -> bool:
    """Whether a mask has to be looked at: on a GPU always, since to ask would be to wait for it."""
    return mask.device.type != "cpu" or bool(mask.any())


def _curvature(move: Tensor, seen: Tensor, lam: float) -> Tensor:
    """lam ||A d||^2 / ||d||^2 of a move d of the maps, seen = A d; never quite 0, so that a step
    of its inverse can be multiplied by lam.
    """
    return lam * dot(seen, seen) / dot(move, move).clamp(min=_tiny(move)) + 1e-30


@plain
def duality_gap(A: LinearOperator, b: Tensor, z: Tensor, lam: float, **prior: Any) -> Tensor:
    """An upper bound (N,) on the objective of z above the minimum, for p = 1; 0 at the minimum.

    The dual of the problem is  maximise <b, v> - ||v||^2 / (2 lam)  over prior.dual_norm(A'v) <= 1,
    without weights |A'v| <= 1; the residual lam (b - A z), made feasible by scaling, is a point of
    it. No scaling does that where a weight is 0 and A'v is not: the gap is infinite, and with
    weights of 0 it hardly ever is not.
    """
    asked = Prior(**prior)
    if not asked.convex:
        raise ValueError(f"p={asked.p}, window={asked.window}: only p=1 has a dual, and no window")
    b, lam = as_images(b, "b"), positive(lam, "lam")
    z = _checked_maps(A, b, z, "z")
    asked.check(z.shape)
    A, of_filters = A.normalised()
    units = Units.of(b, of_filters, lam, 1.0, asked.weights)
    b, z, lam = times_power(b, -units.data), times_power(z, -units.maps), units.lam(lam)
    asked = dataclasses.replace(asked, weights=units.weights(asked.weights))
    residual = b - A(z)
    gap = data_term(residual, lam) + asked(z) - _dual(A, b, residual, lam, asked)
    # At the minimum rounding takes it below 0.
    return units.cost(gap.clamp(min=0))


def _dual(A: LinearOperator, b: Tensor, residual: Tensor, lam: float, prior: Prior) -> Tensor:
    """The dual objective (N,) of the residual of some z, -inf where no scaling is feasible."""
    v = lam * residual.double()
    reach = prior.dual_norm(A.adjoint(lam * residual)).double()
    v = v / reach.clamp(min=1).view(-1, 1, 1, 1)
    dual = (b * v).sum((1, 2, 3)) - v.square().sum((1, 2, 3)) / (2 * lam)
    return torch.where(reach == math.inf, torch.full_like(dual, -math.inf), dual)


def _certified(
    A: LinearOperator, b: Tensor, z: Tensor, residual: Tensor, lam: float, prior: Prior, gap: float
) -> Tensor:
    """Whether the duality gap of every image is at most `gap` times its objective, (N, 1, 1, 1)."""
    cost = data_term(residual, lam) + prior.value(z)
    return (cost - _dual(A, b, residual, lam, prior) <= gap * cost).view(-1, 1, 1, 1)


def data_term(residual: Tensor, lam: float) -> Tensor:
    """lam/2 ||residual||^2 of every image, (N,) in float64."""
    return lam / 2 * residual.double().square().sum((1, 2, 3))


def _tiny(x: Tensor) -> float:
    """The least that a positive number of x divides by."""
    return torch.finfo(x.dtype).tiny


def _z_step(
    A: LinearOperator,
    b: Tensor,
    v: Tensor,
    lam: float,
    beta: float | Tensor,
    w: Tensor | None,
    *,
    tolerance: float = 0.0,
    max_iterations: int = 100,
) -> tuple[Tensor, Tensor]:
    """argmin_z lam/2 ||A z - b||^2 + beta/2 ||z - v||^2, written over v, and the w to go on from.

    Setting the gradient to zero gives z = v + lam A'w with (beta I + lam A A') w = b - A v: a
    system in the space of the images, with K/C times fewer unknowns than that of the maps. Beside
    it A and A' are applied once each.
    """
    w = A.solve(b - A(v), lam, beta, w, tolerance=tolerance, max_iterations=max_iterations)
    return v.add_(A.adjoint(w), alpha=lam), w


def _balance(
    t: Tensor, x: Tensor, beta: Tensor, primal: Tensor, dual: Tensor, done: Tensor
) -> tuple[Tensor, Tensor]:
    """Residual balancing: raise beta where z and x disagree, lower it where x still moves."""
    factor = (primal / dual.clamp(min=_tiny(t))).sqrt().clamp(0.2, 5)
    unchanged = done | ((factor > 0.8) & (factor < 1.25))
    factor = torch.where(unchanged, torch.ones_like(factor), factor)
    return x + (t - x) / factor, beta * factor


def _per_image(value: float | Tensor, b: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=b.dtype, device=b.device).expand(b.shape[0], 1, 1, 1)


def _cost(residual: Tensor, z: Tensor, lam: float, prior: Prior) -> Tensor:
    """The objective of every image, (N, 1, 1, 1) in float64."""
    return (data_term(residual, lam) + prior.value(z)).view(-1, 1, 1, 1)


def _value_by_image(prior: Prior, z: Tensor) -> Tensor:
    """The value of the prior (N,), which copies one image where it can, not all."""
    if prior.weights is not None or len(z) < 2:
        return prior.value(z)
    return torch.cat([prior.value(image) for image in z.split(1)])


def _choose(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key}={value}: choose one of {', '.join(choices)}")
