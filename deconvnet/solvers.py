"""Inference of sparse maps: half-quadratic splitting, ADMM, FISTA and ISTA on one problem.

    minimise over z, for every image by itself      lam/2 ||A z - b||^2 + sum |z|^p

    b what is explained (N, C, H, W)   A operator, maps -> b   z maps (N, K, ...)   0 <= p <= 1
    window: if given, at most one entry of z in each pooling window is not zero (sparsity)
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

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deconvnet.convolution import Boundary
from deconvnet.operators import Deconvolution, Operator, conjugate_gradients, dot, norm
from deconvnet.pooling import Window
from deconvnet.sparsity import check_exponent, penalties, shrink

METHODS = ("admm", "half_quadratic", "fista", "ista")
Z_STEPS = ("exact", "cg")
CHECK_EVERY = 10
# The gradient step grows by this factor in an iteration, and falls to this share of what the
# curvature would allow (measured on four layers: 1.5 and more is no faster and often refused).
GROWTH, CAUTION = 1.02, 0.9
# ADMM converges only if its beta is left alone in the end.
ADAPT_UNTIL = 100

Callback = Callable[[int, Tensor, Tensor], None]


@dataclass
class SolverSettings:
    """How maps are inferred. The same in every layer unless a layer says otherwise."""

    # admm | half_quadratic | fista | ista
    method: str = "admm"
    # at most this many iterations for new images (half_quadratic: passes through its schedule)
    iterations: int = 50
    # iterations of each visit to an image in training, which starts where the last visit ended
    training_iterations: int = 5
    # an image stops when its relative residuals (admm) or relative change (fista, ista) are below
    tolerance: float = 1e-3
    # admm: beta / lam, the weight of the coupling of z and x
    coupling: float = 2.5
    # admm: over-relaxation, 1 (none) to 1.9
    relaxation: float = 1.8
    # admm with p = 1: balance the residuals of new images by changing beta, in 100 iterations;
    # fista, ista: let the step follow the curvature that is met, far beyond what is always safe
    adaptive: bool = True
    # half_quadratic: the first beta, the factor from one to the next, and the bound of all
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
            if getattr(self, key) < 1:
                raise ValueError(f"solver.{key}={getattr(self, key)}: must be at least 1")
        for key in ("coupling", "beta_start", "step"):
            if getattr(self, key) is not None and not getattr(self, key) > 0:
                raise ValueError(f"solver.{key}={getattr(self, key)}: must be positive")
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
    sum |z|^p. residual: b - A z, in the shape of b. iterations: the most that an image took.
    state: what a later call needs to go on from here, in the shape of z. step: (N, 1, 1, 1), the
    gradient step that served each image, for a later call (fista, ista; else None).
    """

    z: Tensor
    residual: Tensor
    reconstruction: Tensor
    sparsity: Tensor
    iterations: int
    state: Tensor = field(repr=False)
    step: Tensor | None = field(default=None, repr=False)

    @property
    def objective(self) -> Tensor:
        return self.reconstruction + self.sparsity


def sparse_code(
    images: Tensor,
    filters: Tensor,
    *,
    lam: float,
    p: float = 1.0,
    boundary: Boundary = "valid",
    settings: SolverSettings | None = None,
) -> Solution:
    """Sparse maps of images under given filters, without a network.

        minimise over z      lam/2 ||sum_k f_k * z_k - y||^2 + sum |z|^p

    images: (N, C, H, W), explained as they are; filters: (K, C, h, w). lam weighs the
    reconstruction, as in the papers: SPORCO's lambda is 1/lam, and its objective 1/lam times this
    one.
    """
    if images.ndim != 4:
        raise ValueError(f"images must have the shape (N, C, H, W), got {tuple(images.shape)}")
    if filters.ndim != 4 or filters.shape[1] != images.shape[1]:
        raise ValueError(
            f"filters must have the shape (K, {images.shape[1]}, h, w) for images of "
            f"{images.shape[1]} channels, got {tuple(filters.shape)}"
        )
    if not torch.isfinite(images).all() or not torch.isfinite(filters).all():
        raise ValueError("images and filters must be finite: there are NaN or infinite values")
    A = Deconvolution(filters.to(images), boundary)
    return solve(A, images, lam=lam, p=p, settings=settings or SolverSettings())


def solve(
    A: Operator,
    b: Tensor,
    *,
    lam: float,
    p: float = 1.0,
    window: Window | None = None,
    settings: SolverSettings,
    state: Tensor | None = None,
    step: Tensor | None = None,
    training: bool = False,
    callback: Callback | None = None,
) -> Solution:
    """Infer z by the method of the settings, from z = 0 or from state and step of an earlier one.

    With `training` it is one visit of a training epoch: few iterations, nothing adapts, nothing
    stops early. callback(i, z, beta) sees the sparse maps after iteration i = 1, 2, ... and the
    beta (N, 1, 1, 1) of each image then; for fista and ista beta is 1 / step.
    """
    if not lam > 0:
        raise ValueError(f"lam={lam}: must be positive")
    check_exponent(p)
    iterations = settings.training_iterations if training else settings.iterations
    tolerance = 0.0 if training else settings.tolerance
    start = torch.zeros_like(A.adjoint(b)) if state is None else state
    common = dict(lam=lam, p=p, window=window, callback=callback)
    if settings.method == "half_quadratic":
        cg = settings.cg_iterations if settings.z_step == "cg" else None
        passes = 1 if training else iterations
        z, state = half_quadratic(
            A, b, start, betas=settings.betas() * passes, cg_iterations=cg, **common
        )
        count = passes * len(settings.betas())
    elif settings.method == "admm":
        z, state, count = admm(
            A,
            b,
            start,
            beta=settings.coupling * lam,
            relaxation=settings.relaxation,
            # Where the prior is not convex a beta that keeps moving loses its way.
            adaptive=settings.adaptive and p == 1 and window is None and not training,
            iterations=iterations,
            tolerance=tolerance,
            **common,
        )
    else:
        z, step, count = proximal_gradient(
            A,
            b,
            start,
            momentum=settings.method == "fista",
            adaptive=settings.adaptive,
            step=settings.step if step is None else step,
            iterations=iterations,
            tolerance=tolerance,
            **common,
        )
        state = z
    residual = b - A(z)
    cost = data_term(residual, lam), penalties(z, p)
    return Solution(z, residual, *cost, count, state, step)


def half_quadratic(
    A: Operator,
    b: Tensor,
    z: Tensor,
    *,
    lam: float,
    p: float = 1.0,
    window: Window | None = None,
    betas: list[float],
    cg_iterations: int | None = None,
    callback: Callback | None = None,
) -> tuple[Tensor, Tensor]:
    """(x, z) after one x-step and one z-step for every beta in turn  (Zeiler et al. 2010).

        x-step   x = argmin |x|^p + beta/2 (x - z)^2                       sparsity.shrink
        z-step   (lam A'A + beta I) z = lam A'b + beta x

    The z-step is exact, or cg_iterations of conjugate gradients from the last z, as in the paper.
    What is returned as the solution is one more x-step: the paper keeps z, which has no zeros but
    is within the threshold of the last beta.
    """
    data = lam * A.adjoint(b)
    w = None
    for i, beta in enumerate(betas, 1):
        x = shrink(z, beta, p, window=window)
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
            callback(i, shrink(z, beta, p, window=window), _per_image(beta, b))
    return shrink(z, betas[-1], p, window=window), z


def admm(
    A: Operator,
    b: Tensor,
    state: Tensor,
    *,
    lam: float,
    p: float = 1.0,
    window: Window | None = None,
    beta: float,
    relaxation: float = 1.8,
    adaptive: bool = False,
    iterations: int,
    tolerance: float,
    callback: Callback | None = None,
) -> tuple[Tensor, Tensor, int]:
    """(x, state, iterations) of the alternating direction method of multipliers (Boyd et al. 2011).

        z-step   (lam A'A + beta I) z = lam A'b + beta (x - u)
                 z <- relaxation z + (1 - relaxation) x
        x-step   x = argmin |x|^p + beta/2 (x - (z + u))^2
        u-step   u <- u + z - x                                    the scaled multiplier

    Since x = shrink(t) and u = t - x for t = z + u, the one array t is the whole state, in the
    scale of the `beta` that was given. For p = 1 it converges to the minimum; for p < 1, or with a
    window, it is a heuristic that works at a fixed beta.
    """
    beta = _per_image(beta, b)
    beta_given = beta
    t, x, w = state, shrink(state, beta, p, window=window), None
    done = torch.zeros_like(beta, dtype=torch.bool)
    count = 0
    for count in range(1, iterations + 1):
        z, w = _z_step(A, b, 2 * x - t, lam, beta, w, max_iterations=A.warm_steps)
        t_new = t - x + relaxation * z + (1 - relaxation) * x
        t = torch.where(done, t, t_new) if done.any() else t_new
        x_old, x = x, shrink(t, beta, p, window=window)
        if callback:
            callback(count, x, beta)
        if count % CHECK_EVERY == 0 and (adaptive or tolerance):
            primal = norm(z - x) / torch.maximum(norm(z), norm(x)).clamp(min=_TINY)
            dual = norm(x - x_old) / norm(t - x).clamp(min=_TINY)
            done = done | (torch.maximum(primal, dual) <= tolerance)
            if done.all():
                break
            if adaptive and count <= ADAPT_UNTIL:
                t, beta = _balance(t, x, beta, primal, dual, done)
    return x, x + (t - x) * (beta / beta_given), count


def proximal_gradient(
    A: Operator,
    b: Tensor,
    z: Tensor,
    *,
    lam: float,
    p: float = 1.0,
    window: Window | None = None,
    momentum: bool = True,
    adaptive: bool = True,
    step: Tensor | float | None = None,
    iterations: int,
    tolerance: float,
    callback: Callback | None = None,
) -> tuple[Tensor, Tensor, int]:
    """(z, step, iterations) of ISTA, or with momentum of FISTA, whose objective never rises.

        z <- argmin |x|^p + 1/(2 step) (x - (y - step lam A'(A y - b)))^2        y = z, or beyond it

    It minimises a bound of the objective that touches it at y if the curvature of the move d that
    it makes, lam ||A d||^2 / ||d||^2, is at most 1 / step: from y = z the objective then cannot
    rise, whether or not the prior is convex. A step of 1 / (lam ||A||^2) is always short enough,
    and is what it is without `adaptive`, unless given. But sparse moves meet far less than the norm
    of A: with `adaptive` a move is made anew with a shorter step where that was too long, and the
    step grows a little otherwise (Scheinberg, Goldfarb and Bai 2014, whose momentum this is). It
    ends many times longer. All of this is nearly free: A y is a combination of what was computed.

    A move that raises the objective is taken back, image by image: from a y beyond z the momentum
    starts anew (O'Donoghue and Candes 2015), from z itself the step is halved.
    """
    seen = A(z)
    if step is None and adaptive:
        first = shrink(A.adjoint(b - seen), 1e30, window=window)
        step = 1 / _curvature(first, A(first), lam)
    elif step is None:
        step = 1 / (lam * A.squared_norm(b))
    step = _per_image(step, b)
    cost = _cost(b - seen, z, lam, p)
    y, y_seen, t = z, seen, torch.ones_like(step)
    done = torch.zeros_like(step, dtype=torch.bool)
    count = 0
    for count in range(1, iterations + 1):
        z_old, seen_old, cost_old = z, seen, cost
        z = shrink(y - step * lam * A.adjoint(y_seen - b), 1 / step, p, window=window)
        seen = A(z)
        cost = _cost(b - seen, z, lam, p)
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
        if (halved := rose & (t == 1) & ~too_long & ~done).any():
            step = torch.where(halved, step_old / 2, step)
        if (back := rose | too_long | done).any():
            z = torch.where(back, z_old, z)
            seen, cost = torch.where(back, seen_old, seen), torch.where(back, cost_old, cost)
        if callback:
            callback(count, z, 1 / step)
        if tolerance and count % CHECK_EVERY == 0:
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
        if again.any():
            beyond, beyond_seen = (
                torch.where(again, y, beyond),
                torch.where(again, y_seen, beyond_seen),
            )
        y, y_seen = beyond, beyond_seen
        t = torch.where(rose, torch.ones_like(t), torch.where(again, t, t_next))
    return z, step, count


def _curvature(move: Tensor, seen: Tensor, lam: float) -> Tensor:
    """lam ||A d||^2 / ||d||^2 of a move d of the maps, seen = A d; never quite 0."""
    return lam * dot(seen, seen) / dot(move, move).clamp(min=_TINY) + _TINY


def duality_gap(A: Operator, b: Tensor, z: Tensor, lam: float) -> Tensor:
    """An upper bound (N,) on the objective of z above the minimum, for p = 1; 0 at the minimum.

    The dual of the problem is  maximise <b, v> - ||v||^2 / (2 lam)  over |A'v| <= 1; the residual
    lam (b - A z), made feasible by scaling, is a point of it.
    """
    residual = b - A(z)
    v = lam * residual.double()
    reach = A.adjoint(lam * residual).abs().flatten(1).amax(1).double()
    v = v / reach.clamp(min=1).view(-1, 1, 1, 1)
    dual = (b * v).sum((1, 2, 3)) - v.square().sum((1, 2, 3)) / (2 * lam)
    return data_term(residual, lam) + penalties(z) - dual


def data_term(residual: Tensor, lam: float) -> Tensor:
    """lam/2 ||residual||^2 of every image, (N,) in float64."""
    return lam / 2 * residual.double().square().sum((1, 2, 3))


_TINY = torch.finfo(torch.float32).tiny


def _z_step(
    A: Operator,
    b: Tensor,
    v: Tensor,
    lam: float,
    beta: Tensor,
    w: Tensor | None,
    *,
    tolerance: float = 0.0,
    max_iterations: int = 100,
) -> tuple[Tensor, Tensor]:
    """argmin_z lam/2 ||A z - b||^2 + beta/2 ||z - v||^2, and the w that the next one starts from.

    Setting the gradient to zero gives z = v + lam A'w with (beta I + lam A A') w = b - A v: a
    system in the space of the images, with K/C times fewer unknowns than that of the maps. Beside
    it A and A' are applied once each.
    """
    w = A.solve(b - A(v), lam, beta, w, tolerance=tolerance, max_iterations=max_iterations)
    return v + lam * A.adjoint(w), w


def _balance(
    t: Tensor, x: Tensor, beta: Tensor, primal: Tensor, dual: Tensor, done: Tensor
) -> tuple[Tensor, Tensor]:
    """Residual balancing: raise beta where z and x disagree, lower it where x still moves."""
    factor = (primal / dual.clamp(min=_TINY)).sqrt().clamp(0.2, 5)
    unchanged = done | ((factor > 0.8) & (factor < 1.25))
    factor = torch.where(unchanged, torch.ones_like(factor), factor)
    return x + (t - x) / factor, beta * factor


def _per_image(value: float | Tensor, b: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=b.dtype, device=b.device).expand(b.shape[0], 1, 1, 1)


def _cost(residual: Tensor, z: Tensor, lam: float, p: float) -> Tensor:
    """The objective of every image, (N, 1, 1, 1) in float64."""
    return (data_term(residual, lam) + penalties(z, p)).view(-1, 1, 1, 1)


def _choose(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key}={value}: choose one of {', '.join(choices)}")
