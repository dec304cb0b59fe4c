"""The choice of lambda, from the codes along a path.

Which lambda = 1/lam is best depends on what the code is for, and there are three answers:

- held-out pixels: some pixels are hidden at random, and the code of the others must predict them.
  Noise in the hidden pixels adds the same to the error of every lambda, so its level need not be
  known. Detail that cannot be predicted from its surroundings counts as noise.
- Stein's unbiased risk estimate (SURE), if the noise is known: the expected squared error of the
  reconstruction, compared with the n pixels without noise,

      ||A z - b||^2 - n sigma^2 + 2 sigma^2 df,    df = the divergence of b -> A z

  For the lasso (p = 1, no groups) df is the dimension of the span of the active filters (Tibshirani
  and Taylor 2012), which is the number of non-zero coefficients unless active filters are linearly
  dependent. For other priors, and for noise that is not white, it takes a second path, of images
  moved slightly along the noise (Ramani, Blu and Unser 2008).
- a number of non-zero coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deconvnet.operators.convolution import Boundary
from deconvnet.operators.linear import Deconvolution
from deconvnet.sparse_coding.prior import Prior
from deconvnet.sparse_coding.problem import Solution, SolverSettings
from deconvnet.sparse_coding.regularization_path import (
    PathRows,
    RegularizationPath,
    count_by_image,
    lams_of_path,
    path_solver,
    solutions_along,
    squares,
)
from deconvnet.sparse_coding.solve import coding_problem
from deconvnet.support.seeding import seeded_generator
from deconvnet.support.torch_modes import plain
from deconvnet.support.validation import as_number, as_positive_number, as_tensor

Criterion = Literal["held_out", "sure", "density"]

# A step of the images along the noise, in standard deviations, for the divergence: large enough to
# exceed the tolerance of the solver, small enough to keep most of the support.
STEP = 0.1
# A density is reached if it is within this fraction of the one asked for; and the most steps of
# bisection, since the number of non-zero coefficients jumps.
DENSITY_TOLERANCE, BISECTIONS = 0.01, 12


@dataclass(frozen=True, eq=False)
class LamChoice:
    """A lam, the criterion that chose it, and the path that it was chosen from.

    errors: (L, N), the criterion for each lam of the path and each image, an estimate of the mean
    squared error of a pixel; None if a density was asked for. For held-out pixels the path is that
    of the images without them, and the errors contain the noise of these pixels.
    """

    lam: float
    criterion: Criterion
    path: RegularizationPath
    errors: Tensor | None = None

    def __repr__(self) -> str:
        return f"LamChoice(lam={self.lam:.6g} by {self.criterion}, {self.path})"


@plain
def choose_lam(
    images: Tensor,
    filters: Tensor,
    *,
    held_out: float = 0.1,
    noise: float | Tensor | None = None,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    density: float | None = None,
    seed: int = 0,
    lams: Sequence[float] | None = None,
    num_lams: int = 20,
    smallest_ratio: float = 0.01,
    lam_max_quantile: float = 1.0,
    p: float = 1.0,
    boundary: Boundary = "valid",
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    group: int = 1,
    non_negative: bool = False,
    settings: SolverSettings | None = None,
    chunk: int | None = None,
) -> LamChoice:
    """The lam for these images: one for all of them, by one of three criteria.

    By default, held_out, in (0, 1): this fraction of the pixels, drawn with the seed, is hidden,
    and the code of the others must predict them. noise instead: the standard deviation of white
    Gaussian noise in the images, for SURE; or a sample of Gaussian noise of any other kind, in the
    shape of the images. preprocess: the linear function that made the images from noisy ones, for
    example by subtracting the low frequencies, if noise and error are those of the noisy images.
    density instead: the fraction of non-zero coefficients, in (0, 1).

    The criterion is averaged over the images. lam is the minimum of a parabola through the best
    value on the path and its neighbours. All other arguments are those of `regularization_path`.
    Raises ValueError if an argument is out of range or does not fit the others.
    """
    if noise is not None and density is not None:
        raise ValueError(f"noise={noise}, density={density}: give at most one of the two")
    if preprocess is not None and noise is None:
        raise ValueError("preprocess: is for noise=; the other criteria do not need it")
    A, b, prior = coding_problem(
        *(images, filters),
        p=p,
        boundary=boundary,
        mask=mask,
        weights=weights,
        group=group,
        non_negative=non_negative,
    )
    settings = path_solver(settings, b, prior)
    if density is None and noise is None:
        return choose_by_held_out(
            *(A, b, prior),
            settings=settings,
            held_out=held_out,
            seed=seed,
            lams=lams,
            num_lams=num_lams,
            smallest_ratio=smallest_ratio,
            lam_max_quantile=lam_max_quantile,
            chunk=chunk,
        )
    noise = None if noise is None else Noise.of(noise, preprocess, b, seed)
    lams, lam_max = lams_of_path(A, b, prior, lams, num_lams, smallest_ratio, lam_max_quantile)
    rows = PathRows(b, lam_max)
    if density is not None:
        return _choose_by_density(A, b, lams, prior, settings, chunk, density, rows)
    errors = _sure(A, b, lams, prior, settings, chunk, noise, rows)
    return LamChoice(_lam_of_least(lams, errors), "sure", rows.path(), errors)


def choose_by_held_out(
    A: Deconvolution,
    b: Tensor,
    prior: Prior,
    *,
    settings: SolverSettings,
    held_out: float = 0.1,
    seed: int = 0,
    lams: Sequence[float] | None = None,
    num_lams: int = 20,
    smallest_ratio: float = 0.01,
    lam_max_quantile: float = 1.0,
    chunk: int | None = None,
) -> LamChoice:
    """`choose_lam` by held-out pixels, for the problem with operator A and data b (N, C, H, W)."""
    if not 0 < as_number(held_out, "held_out") < 1:
        raise ValueError(f"held_out={held_out}: must lie in (0, 1)")
    drawn = torch.rand(b.shape, generator=seeded_generator(seed, 0), dtype=torch.float64)
    hidden = (drawn < held_out).to(b)
    seen = (1 - hidden) if A.mask is None else (1 - hidden) * A.mask
    counted = hidden.bool() if A.mask is None else hidden.bool() & (A.mask > 0)
    if not counted.any():
        raise ValueError(f"held_out={held_out}: hides none of the {counted.numel()} pixels")
    rest, b_rest = Deconvolution(A.f, A.boundary, seen), b * (1 - hidden)
    lams, lam_max = lams_of_path(
        rest, b_rest, prior, lams, num_lams, smallest_ratio, lam_max_quantile
    )
    rows, errors = PathRows(b_rest, lam_max), []
    numbers = counted.sum((1, 2, 3)).clamp(min=1).cpu()
    for solution in solutions_along(rest, b_rest, lams, prior, settings, chunk):
        rows.add(solution)
        errors.append(squares(hidden * (b - A(solution.z))) / numbers)
    errors = torch.stack(errors)
    return LamChoice(_lam_of_least(lams, errors), "held_out", rows.path(), errors)


def _sure(
    A: Deconvolution,
    b: Tensor,
    lams: list[float],
    prior: Prior,
    settings: SolverSettings,
    chunk: int | None,
    noise: Noise,
    rows: PathRows,
) -> Tensor:
    """(L, N): SURE of the mean squared error of an observed pixel. It adds the path to the rows."""
    seen = torch.ones_like(b) if A.mask is None else A.mask.expand_as(b)
    numbers = (seen > 0).sum((1, 2, 3)).clamp(min=1).cpu()
    errors, solutions = [], solutions_along(A, b, lams, prior, settings, chunk)
    binary = bool(((seen == 0) | (seen == 1)).all())
    if noise.is_white and prior.p == 1 and prior.group == 1 and binary:
        for solution in solutions:
            rows.add(solution)
            freedom = count_by_image(solution.z)
            total = squares(solution.residual) + noise.sigma**2 * (2 * freedom - numbers)
            errors.append(total / numbers)
        return torch.stack(errors)
    # Weighted by the mask, as the images are.
    before, after = (seen * sample for sample in noise.sample(b))
    moved = solutions_along(A, b + STEP * after, lams, prior, settings, chunk)
    for solution, other in zip(solutions, moved, strict=True):
        rows.add(solution)
        # What the estimate of the images before the preprocessing adopts of the noise.
        adopted = before - (other.residual - solution.residual) / STEP
        covariance = (before.double() * adopted).sum((1, 2, 3)).cpu()
        errors.append((squares(solution.residual) - squares(before) + 2 * covariance) / numbers)
    return torch.stack(errors)


@dataclass(frozen=True)
class Noise:
    """The noise in images before their preprocessing: white with sigma, or like a given sample."""

    sigma: float | None
    given: Tensor | None
    preprocess: Callable[[Tensor], Tensor] | None
    seed: int

    @classmethod
    def of(
        cls,
        noise: float | Tensor,
        preprocess: Callable[[Tensor], Tensor] | None,
        b: Tensor,
        seed: int,
    ) -> Noise:
        if preprocess is not None and not callable(preprocess):
            raise ValueError(f"preprocess={preprocess!r}: must be a function of images")
        given = as_tensor(noise, "noise") if hasattr(noise, "shape") else None
        if given is None or given.numel() == 1:
            return cls(as_positive_number(noise, "noise"), None, preprocess, seed)
        if given.shape != b.shape or not torch.isfinite(given).all():
            raise ValueError(
                f"noise of shape {tuple(given.shape)}: must be a number, or finite and of the "
                f"shape of the images, {tuple(b.shape)}"
            )
        return cls(None, given, preprocess, seed)

    @property
    def is_white(self) -> bool:
        """Whether the noise in the images that are coded is white, of standard deviation sigma."""
        return self.sigma is not None and self.preprocess is None

    def sample(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """A sample of the noise in images of the shape of b, before and after the preprocessing."""
        before = self.given
        if before is None:
            generator = seeded_generator(self.seed, 1)
            before = self.sigma * torch.randn(b.shape, generator=generator, dtype=torch.float64)
        before = before.to(b)
        if self.preprocess is None:
            return before, before
        after = as_tensor(self.preprocess(before), "preprocess(noise)").to(b)
        if after.shape != b.shape:
            raise ValueError(
                f"preprocess: makes {tuple(after.shape)} of noise {tuple(before.shape)}; it must "
                "keep the shape"
            )
        return before, after


def _choose_by_density(
    A: Deconvolution,
    b: Tensor,
    lams: list[float],
    prior: Prior,
    settings: SolverSettings,
    chunk: int | None,
    density: float,
    rows: PathRows,
) -> LamChoice:
    """Descend until the density is exceeded, then bisect between the last two lams."""
    if not 0 < as_number(density, "density") < 1:
        raise ValueError(f"density={density}: must lie in (0, 1)")
    sparser = None
    for solution in solutions_along(A, b, lams, prior, settings, chunk):
        rows.add(solution)
        if _density(solution) >= density:
            break
        sparser = solution
    else:
        raise ValueError(
            f"density={density}: the densest code of the path, with lam={lams[-1]:g}, has "
            f"{_density(solution):.3g}; lower smallest_ratio, or give larger lams"
        )
    if sparser is None and _density(solution) > (1 + DENSITY_TOLERANCE) * density:
        raise ValueError(
            f"density={density}: the sparsest code of the path, with lam={lams[0]:g}, has "
            f"{_density(solution):.3g}; give smaller lams"
        )
    denser, found = solution, solution
    for _ in range(BISECTIONS):
        if sparser is None or abs(_density(found) / density - 1) <= DENSITY_TOLERANCE:
            break
        middle = math.sqrt(sparser.lam * denser.lam)
        (found,) = solutions_along(A, b, [middle], prior, settings, chunk, start=sparser)
        rows.add(found)
        sparser, denser = (found, denser) if _density(found) < density else (sparser, found)
    closest = min((sparser or denser, denser, found), key=lambda s: abs(_density(s) - density))
    return LamChoice(closest.lam, "density", rows.path())


def _lam_of_least(lams: list[float], errors: Tensor) -> float:
    """The lam at the minimum of a parabola in log lam, through the least mean error and those
    beside it; at an end of the path, the lam there.
    """
    mean = errors.mean(1)
    best = int(mean.argmin())
    if best in (0, len(lams) - 1):
        return lams[best]
    (x0, x1, x2), (e0, e1, e2) = (
        [math.log(lam) for lam in lams[best - 1 : best + 2]],
        mean[best - 1 : best + 2].tolist(),
    )
    numerator = (x1 - x0) ** 2 * (e1 - e2) - (x1 - x2) ** 2 * (e1 - e0)
    denominator = (x1 - x0) * (e1 - e2) - (x1 - x2) * (e1 - e0)
    return lams[best] if denominator == 0 else math.exp(x1 - numerator / (2 * denominator))


def _density(solution: Solution) -> float:
    return float(torch.count_nonzero(solution.z)) / solution.z.numel()
