"""Inference of sparse maps: the public functions, which call a method from the settings.

`solve` rescales the problem so that its squares stay within the range of float32, splits a large
batch, and calls the method of the settings. `sparse_code` is `solve` for one layer of filters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from deconvnet.operators.convolution import Boundary, map_size
from deconvnet.operators.linear import Deconvolution, LinearOperator, Mask
from deconvnet.sparse_coding.admm import admm
from deconvnet.sparse_coding.half_quadratic import half_quadratic
from deconvnet.sparse_coding.implicit_gradient import (
    check_differentiable,
    requires_gradient,
    with_gradient,
)
from deconvnet.sparse_coding.iteration import Method, Start, Until
from deconvnet.sparse_coding.prior import Prior
from deconvnet.sparse_coding.problem import (
    Problem,
    Solution,
    SolverSettings,
    checked_maps,
    in_units,
)
from deconvnet.sparse_coding.proximal_gradient import fista, ista
from deconvnet.support.allocation import memory_kept
from deconvnet.support.renaming import renamed_arguments
from deconvnet.support.scaling import Units, exponent, magnitude, times_power
from deconvnet.support.torch_modes import full_precision, plain
from deconvnet.support.validation import (
    as_filters,
    as_images,
    as_number,
    as_positive_integer,
    as_positive_number,
    as_weights,
    check_settings,
)

# The maps of a batch: beyond this size batches gain nothing, and where memory is not kept, the C
# library returns that of arrays above 32 MiB to the system when they are freed.
BATCH_BYTES = 2**24
# From this size of the maps on, memory is kept from iteration to iteration (`memory_kept`).
KEEP_BYTES = 2**20

Callback = Callable[[int, Tensor, Tensor], None]
Solver = Callable[[Problem, Start, SolverSettings, Until], Solution]


def _coordinate_descent(
    problem: Problem, start: Start, settings: SolverSettings, until: Until
) -> Solution:
    # Imported here because it loads numba, which the other methods do not need.
    from deconvnet.sparse_coding.coordinate_descent import coordinate_descent

    return coordinate_descent(problem, start, settings, until)


SOLVERS: Mapping[str, Solver] = MappingProxyType(
    {
        "admm": admm,
        "half_quadratic": half_quadratic,
        "fista": fista,
        "ista": ista,
        "coordinate": _coordinate_descent,
    }
)


@renamed_arguments(share="lam_ratio")
@full_precision
def sparse_code(
    images: Tensor,
    filters: Tensor,
    *,
    lam: float | Tensor | None = None,
    lam_ratio: float | None = None,
    lam_max_quantile: float = 1.0,
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

    images: (N, C, H, W) of float32 or float64, coded without preprocessing; filters: (K, C, h, w);
    tensors or numpy arrays, but the solution holds tensors. lam weights the reconstruction, as in
    the papers: SPORCO's lambda is 1/lam, and its objective 1/lam times this one. lam_ratio instead
    of lam, in (0, 1]: lambda relative to the smallest that makes all maps zero, or with
    lam_max_quantile below 1 to this quantile over the images (`lam_from_ratio`).
    mask: (N or 1, C or 1, H, W), >= 0; pixels where it is 0 are ignored and may have any value.
    p, weights (K,) or of the shape of the maps, group and non_negative: the prior, `prior.Prior`.
    settings: by default those of `default_solver`. chunk: at most this many images at a time, which
    bounds the memory beyond that of the maps and changes results by rounding only; None: a fast
    number on a CPU, all images on a GPU.

    Differentiable if images, filters, lam, mask or weights require a gradient: z, residual,
    reconstruction, sparsity and objective then have that of the minimum (`implicit_gradient`), and
    the maps must be close to it: give settings with a gap of 1e-3 or less, since the default is
    coarser. The rest of the solution is plain. Not for p < 1, lam_ratio or half_quadratic, and only
    once. Raises ValueError if an argument is out of range or does not fit the others.
    """
    check_settings(settings, SolverSettings, "settings")
    check_one_weight(lam, lam_ratio, lam_max_quantile)
    A, b, prior = coding_problem(
        images,
        filters,
        p=p,
        boundary=boundary,
        mask=mask,
        weights=weights,
        group=group,
        non_negative=non_negative,
    )
    settings = settings or default_solver(b, prior.p)
    given = dict(images=images, filters=filters, lam=lam, mask=mask, weights=weights)
    differentiable = requires_gradient(*given.values())
    if differentiable:
        check_differentiable(prior.p, lam_ratio, settings)
    if lam_ratio is not None:
        lam = lam_from_ratio(A, b, lam_ratio, prior, lam_max_quantile=lam_max_quantile)
        settings = relative_schedule(settings, A, lam, lam_ratio)
    solution = solve(A, b, lam=lam, prior=prior, settings=settings, chunk=chunk)
    solution = of_one_layer(solution, A)
    if not differentiable:
        return solution
    return with_gradient(solution, **given, boundary=boundary, prior=prior)


def coding_problem(
    images: Tensor,
    filters: Tensor,
    *,
    p: float,
    boundary: Boundary,
    mask: Tensor | None,
    weights: Tensor | None,
    group: int,
    non_negative: bool,
) -> tuple[Deconvolution, Tensor, Prior]:
    """(A, b, prior) of the problem that `sparse_code` solves for these arguments, once checked."""
    images = as_images(images)
    filters = as_filters(filters, images.shape[1])
    weights = None if weights is None else as_weights(weights)
    A, b = Deconvolution(filters.to(images), boundary), images
    if mask is not None:
        M = Mask(mask, images)
        A, b = M @ A, M.target(images)
    # The largest magnitude is not finite if any value is not, and takes a tenth of the time.
    finite, finite_filters = (math.isfinite(magnitude(x)) for x in (b, filters))
    if not finite or not finite_filters:
        use = "" if finite else " (the mask may be 0 where images have no value)"
        raise ValueError(
            f"images and filters must be finite: there are NaN or infinite values{use}"
        )
    weights = None if weights is None else weights.to(images)
    p, group = as_number(p, "p"), as_positive_integer(group, "group")
    return A, b, Prior(p, weights=weights, group=group, non_negative=non_negative)


def of_one_layer(solution: Solution, A: Deconvolution) -> Solution:
    """The solution, with what places its events in the image."""
    return dataclasses.replace(solution, filter_size=tuple(A.f.shape[2:]), boundary=A.boundary)


def default_solver(images: Tensor, p: float = 1.0) -> SolverSettings:
    """The fastest settings for one layer: on a CPU with p = 1 coordinate descent, whatever the
    sizes and the density of the code (docs/performance.md), otherwise ADMM with about the same
    accuracy (up to 500 iterations; sparse codes take about 50).
    """
    if images.device.type != "cpu" or p != 1:
        return SolverSettings(iterations=500)
    # One round of a training visit sweeps ten times over the non-zero coefficients.
    return SolverSettings("coordinate", iterations=200, training_iterations=1, tolerance=1e-4)


@renamed_arguments(quantile="lam_max_quantile")
@plain
def lam_from_ratio(
    A: LinearOperator,
    b: Tensor,
    lam_ratio: float,
    prior: Prior | None = None,
    *,
    lam_max_quantile: float = 1.0,
) -> float:
    """The lam with lambda = 1/lam = lam_ratio * lambda_max, the smallest lambda that makes z = 0.

        lam = 1 / (lam_ratio * max over the images of prior.dual_norm(A'b))                p = 1

    lam_ratio: in (0, 1]. With 1 all maps are zero; the smaller it is, the denser they are. The
    image with the largest correlation determines lam for all; with a lam_max_quantile below 1, in
    (0, 1], it is this quantile over the images instead of the maximum, which a few images with
    extreme values do not move. If the data are scaled by s, so is lambda_max: with the same ratio
    the maps are scaled by s and otherwise unchanged, whereas a given lam would have to be divided
    by s. With a ratio of 1 ADMM, whose maps only approach zero, may leave a few small coefficients.
    """
    check_lam_ratio(lam_ratio)
    quantile = check_quantile(lam_max_quantile)
    b, prior = as_images(b, "b"), prior or Prior()
    (A, filters_exponent), data_exponent = A.normalised(), exponent(magnitude(b))
    correlations = A.adjoint(times_power(b, -data_exponent))
    prior.check(correlations.shape)
    norms = prior.dual_norm(correlations)
    # The maximum by itself: interpolating between two infinite norms would give NaN.
    largest = float(norms.max() if quantile == 1 else norms.quantile(quantile))
    lam = lam_of_largest(largest, lam_ratio, b.dtype)
    return math.ldexp(lam, -data_exponent - filters_exponent)


def lam_of_largest(largest: float, lam_ratio: float, dtype: torch.dtype) -> float:
    """`lam_from_ratio` for the dual norm of the correlations, in the rounding of this dtype."""
    check_lam_ratio(lam_ratio)
    if not 0 < largest < math.inf:
        need = (
            "all weights to be positive" if largest > 0 else "images that the filters can explain"
        )
        raise ValueError(f"lam_ratio={lam_ratio}: needs {need}")
    if lam_ratio == 1:
        # Exceed the rounding of the correlations, so that no coefficient remains.
        largest *= 1 + 32 * torch.finfo(dtype).eps
    return 1 / (float(lam_ratio) * largest)


def check_lam_ratio(lam_ratio: float) -> None:
    """Raise ValueError unless lambda_max times this is a lambda with a code."""
    if not 0 < as_number(lam_ratio, "lam_ratio") <= 1:
        raise ValueError(f"lam_ratio={lam_ratio}: must lie in (0, 1]")


def check_quantile(lam_max_quantile: float) -> float:
    """The number; ValueError unless it is a quantile of lambda_max."""
    number = as_number(lam_max_quantile, "lam_max_quantile")
    if not 0 < number <= 1:
        raise ValueError(f"lam_max_quantile={lam_max_quantile}: must lie in (0, 1]")
    return float(number)


def check_one_weight(
    lam: float | Tensor | None, lam_ratio: float | None, lam_max_quantile: float
) -> None:
    """Raise ValueError unless there is lam, or lam_ratio with the quantile that it refers to."""
    if (lam is None) == (lam_ratio is None):
        raise ValueError(f"lam={lam}, lam_ratio={lam_ratio}: give one of the two")
    if check_quantile(lam_max_quantile) != 1 and lam_ratio is None:
        raise ValueError(f"lam_max_quantile={lam_max_quantile}: needs lam_ratio instead of lam")


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
    # Keep a number a number: as a tensor it would have torch's default dtype.
    unit = lam_ratio * lam * float(largest.max() if isinstance(largest, Tensor) else largest)
    start, end = unit * settings.beta_start, unit * settings.beta_end
    return dataclasses.replace(settings, beta_start=start, beta_end=end)


@plain
def solve(
    A: LinearOperator,
    b: Tensor,
    *,
    lam: float,
    prior: Prior | None = None,
    settings: SolverSettings,
    state: Tensor | None = None,
    step: Tensor | None = None,
    training: bool = False,
    certify: bool = False,
    callback: Callback | None = None,
    chunk: int | None = None,
) -> Solution:
    """Infer z by the method of the settings, from z = 0 or from state and step of an earlier one.

        minimise over z, separately for every image      lam/2 ||A z - b||^2 + prior(z)

    b: (N, C, H, W); prior: by default sum |z|. b, A, lam and weights may be in any units; the
    schedule of half_quadratic is in those of z. For fista, ista and coordinate the state may be any
    maps; they are made feasible for the prior first. training: one visit of a training epoch, with
    few iterations, in which no image stops early and ADMM keeps its beta. certify: compute the
    duality gap of the solution even if settings.gap is not set (p = 1). callback(i, z, beta) gets
    the sparse maps after iteration i = 1, 2, ... and the beta (N, 1, 1, 1) of each image; for fista
    and ista beta is 1 / step. With a callback all images are solved in one batch. Raises ValueError
    if an argument is out of range or does not fit the others.
    """
    chunk = None if chunk is None else as_positive_integer(chunk, "chunk")
    b, lam, prior = as_images(b, "b"), as_positive_number(lam, "lam"), prior or Prior()
    check_settings(settings, SolverSettings, "settings")
    if settings.refit and not prior.convex:
        raise ValueError(
            f"solver.refit=True: for p=1 without a window, not p={prior.p}, window={prior.window}"
        )
    if (settings.gap is not None or certify) and not prior.convex:
        raise ValueError(
            f"solver.gap={settings.gap}: only a minimum for p=1 without a window has a duality gap,"
            f" not for p={prior.p}, window={prior.window}"
        )
    z = _zeros(A, b, settings.method) if state is None else checked_maps(A, b, state, "state")
    prior.check(z.shape)
    if state is not None and settings.method in ("fista", "ista", "coordinate"):
        # These methods never raise the objective, and it is infinite at an infeasible start.
        z = prior.feasible(z)
    start = Start(z, settings.step if step is None else step)
    until = _until(settings, training, certify)
    A, filters_exponent = A.normalised()
    units = Units.of(b, filters_exponent, lam, prior.p, prior.weights)
    if callback:
        until = dataclasses.replace(until, callback=_in_units_of_the_caller(callback, units))
    problem = Problem(A, b, lam, prior)
    if units.ordinary:
        return _solve_batches(problem, start, settings, until, chunk)
    return _solve_in_units(units, problem, start, settings, until, chunk)


def _until(settings: SolverSettings, training: bool, certify: bool) -> Until:
    if training:
        return Until(settings.training_iterations, certify=certify, training=True)
    tolerance = settings.tolerance if settings.gap is None else 0.0
    return Until(settings.iterations, tolerance, settings.gap, certify)


def _zeros(A: LinearOperator, b: Tensor, method: str) -> Tensor:
    """Maps of zeros; for coordinate descent, which only reads them, without their memory."""
    if method != "coordinate" or not isinstance(A, Deconvolution):
        return A.zeros(b)
    size = map_size(b.shape[2:], A.f.shape[2:], A.boundary)
    return b.new_zeros(1, 1, 1, 1).expand(len(b), len(A.f), *size)


def _solve_in_units(
    units: Units,
    problem: Problem,
    start: Start,
    settings: SolverSettings,
    until: Until,
    chunk: int | None,
) -> Solution:
    """Solve the problem in other units and return the solution in the units of the caller."""
    scaled = Problem(
        problem.A,
        times_power(problem.b, -units.data),
        units.lam(problem.lam),
        in_units(problem.prior, units),
    )
    step = None if start.step is None else units.step(start.step)
    start = Start(times_power(start.state, -units.maps), step)
    schedule = units.beta(settings.beta_start), units.beta(settings.beta_end)
    settings = dataclasses.replace(settings, beta_start=schedule[0], beta_end=schedule[1])
    solution = _solve_batches(scaled, start, settings, until, chunk)
    z, state = times_power(solution.z, units.maps), solution.state
    return dataclasses.replace(
        solution,
        z=z,
        residual=times_power(solution.residual, units.data),
        reconstruction=units.cost(solution.reconstruction),
        sparsity=units.cost(solution.sparsity),
        state=z if state is solution.z else times_power(state, units.maps),
        step=None if solution.step is None else units.step(solution.step, back=True),
        gap=None if solution.gap is None else units.cost(solution.gap),
        lam=problem.lam,
    )


def _in_units_of_the_caller(callback: Callback, units: Units) -> Callable[[int, Method], None]:
    def watch(count: int, method: Method) -> None:
        z, beta = method.maps(), method.penalty()
        if not units.ordinary:
            z, beta = times_power(z, units.maps), beta.double() / units.beta(1.0)
        callback(count, z, beta)

    return watch


def _solved(problem: Problem, start: Start, settings: SolverSettings, until: Until) -> Solution:
    """The solution by the method of the settings, refitted if they say so."""
    solution = SOLVERS[settings.method](problem, start, settings, until)
    return _refitted(solution, problem, settings) if settings.refit else solution


def _refitted(solution: Solution, problem: Problem, settings: SolverSettings) -> Solution:
    """The solution with the non-zero coefficients of least squared error.

    The same problem with a weight of 0 where a coefficient is non-zero, and elsewhere one that no
    correlation with a residual exceeds, for which ||f|| ||b|| is a measure.
    """
    z, b, prior = solution.z, problem.b, problem.prior
    support = prior.feasible(z) != 0
    if prior.group > 1:
        support = support.unflatten(1, (-1, prior.group)).any(2)
        support = support.repeat_interleave(prior.group, 1)
    largest = float(torch.linalg.vector_norm(b.flatten(1), dim=1).max())
    bound = problem.lam * largest * math.sqrt(float(torch.as_tensor(problem.A.curvature()).max()))
    weights = torch.where(support, 0.0, 100 * bound + 1).to(b)
    free = dataclasses.replace(problem, prior=dataclasses.replace(prior, weights=weights))
    until = Until(settings.iterations, settings.tolerance)
    fitted = SOLVERS[settings.method](free, Start(z, solution.step), settings, until)
    return dataclasses.replace(
        solution,
        z=fitted.z,
        residual=fitted.residual,
        reconstruction=fitted.reconstruction,
        sparsity=prior.value(fitted.z),
    )


def _solve_batches(
    problem: Problem, start: Start, settings: SolverSettings, until: Until, chunk: int | None
) -> Solution:
    """The solution of all images, in one batch or several."""
    if until.training:
        settings = dataclasses.replace(settings, refit=False)
    numel = max(start.state.numel(), len(problem.b) * problem.A.max_intermediate_numel)
    large = numel * problem.b.element_size() >= KEEP_BYTES
    on_cpu = problem.b.device.type == "cpu" and settings.method != "coordinate"
    with memory_kept(large and on_cpu):
        return _solve_in_batches(problem, start, settings, until, chunk)


def _solve_in_batches(
    problem: Problem, start: Start, settings: SolverSettings, until: Until, chunk: int | None
) -> Solution:
    if until.callback or (settings.method == "coordinate" and chunk is None):
        return _solved(problem, start, settings, until)
    solutions = []
    for images in _batches(problem, start.state, chunk):
        step = start.step
        if isinstance(step, Tensor) and step.ndim == 4 and len(step) > 1:
            step = step[images]
        part = Start(start.state[images], step)
        solutions.append(_solved(problem[images], part, settings, until))
    return _joined(solutions)


def _batches(problem: Problem, z: Tensor, chunk: int | None) -> list[slice]:
    """Batches of at most `chunk` images, on a CPU with maps of at most BATCH_BYTES."""
    A, b = problem.A, problem.b
    size = max(1, len(b)) if chunk is None else chunk
    if b.device.type == "cpu" and len(b) > 0:
        numel = max(z[0].numel(), b[0].numel(), A.max_intermediate_numel)
        size = max(1, min(size, BATCH_BYTES // (numel * b.element_size())))
    return [slice(n, n + size) for n in range(0, max(1, len(b)), size)]


def _joined(parts: list[Solution]) -> Solution:
    """The solutions of several batches as one solution."""
    if len(parts) == 1:
        return parts[0]
    tensors = {
        key: torch.cat([getattr(part, key) for part in parts])
        for key, value in vars(parts[0]).items()
        if isinstance(value, Tensor)
    }
    return dataclasses.replace(
        parts[0], **tensors, iterations=max(part.iterations for part in parts)
    )
