"""Codes along a path of lambdas, each starting from the one before it, which is close.

    lambda = 1/lam; the path begins at lambda_max, where all maps are zero, and descends.

A warm start makes the whole path little more expensive than its densest code from zero (Friedman,
Hastie and Tibshirani 2010). `lambda_choice` chooses one of its lambdas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deconvnet.operators.convolution import Boundary
from deconvnet.operators.linear import LinearOperator
from deconvnet.sparse_coding.events import Events
from deconvnet.sparse_coding.prior import Prior
from deconvnet.sparse_coding.problem import Solution, SolverSettings
from deconvnet.sparse_coding.solve import (
    check_quantile,
    coding_problem,
    default_solver,
    lam_from_ratio,
    of_one_layer,
    solve,
)
from deconvnet.support.torch_modes import plain
from deconvnet.support.validation import (
    as_number,
    as_positive_integer,
    as_positive_number,
    check_settings,
)


@dataclass(frozen=True, eq=False)
class RegularizationPath:
    """Codes of the same N images for L values of lam, from sparse to dense.

    lam: (L,), and lam_max, the one up to which all maps are zero (None if lams were given). All
    others are (L, N), one value for each lam and image: objective and its terms, reconstruction
    and sparsity, as in `Solution`; non_zeros; density, the fraction of coefficients that are not
    zero; snr, 10 log10(||b||^2 / ||A z - b||^2) in dB, NaN for an image of zeros (means over
    images: snr.nanmean(1)); gap, the duality gap (None unless p = 1).
    events: the codes, if they were asked for. All tensors are float64 but non_zeros, which is
    int64, and on the CPU.
    """

    lam: Tensor
    objective: Tensor
    reconstruction: Tensor
    sparsity: Tensor
    non_zeros: Tensor
    density: Tensor
    snr: Tensor
    gap: Tensor | None = None
    lam_max: float | None = None
    events: list[Events] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.lam)

    def __repr__(self) -> str:
        L, N = self.objective.shape
        return (
            f"RegularizationPath({L} lams from {float(self.lam[0]):.4g} to "
            f"{float(self.lam[-1]):.4g}, {N} images, density {float(self.density[0].mean()):.2%} "
            f"to {float(self.density[-1].mean()):.2%})"
        )


@plain
def regularization_path(
    images: Tensor,
    filters: Tensor,
    *,
    lams: Sequence[float] | None = None,
    num_lams: int = 20,
    smallest_ratio: float = 0.01,
    lam_max_quantile: float = 1.0,
    events: bool = False,
    p: float = 1.0,
    boundary: Boundary = "valid",
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    group: int = 1,
    non_negative: bool = False,
    settings: SolverSettings | None = None,
    chunk: int | None = None,
) -> RegularizationPath:
    """Codes of the images for several lams, each starting from the code for the one before.

    By default the path has num_lams values, from lambda_max (`lam_from_ratio`) to smallest_ratio
    times that, in (0, 1), equally spaced in their logarithm; or give the lams. lam_max_quantile: as
    in `sparse_code`; below 1, the images with the largest correlations begin with maps that are not
    zero. With p < 1 there is no lambda_max, so give the lams. events: keep the codes, as `Events`.
    All other arguments are those of `sparse_code`; half_quadratic, whose result is no minimum, has
    no path. Raises ValueError if an argument is out of range or does not fit the others.
    """
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
    lams, lam_max = lams_of_path(A, b, prior, lams, num_lams, smallest_ratio, lam_max_quantile)
    rows = PathRows(b, lam_max)
    for solution in solutions_along(A, b, lams, prior, settings, chunk):
        rows.add(solution, of_one_layer(solution, A).events() if events else None)
    return rows.path()


def solutions_along(
    A: LinearOperator,
    b: Tensor,
    lams: Sequence[float],
    prior: Prior,
    settings: SolverSettings,
    chunk: int | None,
    start: Solution | None = None,
) -> Iterator[Solution]:
    """The solution for each lam, starting from the one before it."""
    for lam in lams:
        start = solve(
            *(A, b),
            lam=lam,
            prior=prior,
            settings=settings,
            state=None if start is None else start.state,
            certify=prior.convex,
            chunk=chunk,
        )
        yield start


class PathRows:
    """The rows of a `RegularizationPath` of data b, in any order."""

    def __init__(self, b: Tensor, lam_max: float | None):
        self.signal, self.lam_max = squares(b), lam_max
        self.rows: list[dict[str, Tensor | float]] = []
        self.events: list[tuple[float, Events]] = []

    def add(self, solution: Solution, events: Events | None = None) -> None:
        z, error = solution.z, squares(solution.residual)
        non_zeros = count_by_image(z)
        self.rows.append(
            {
                "lam": torch.tensor(solution.lam, dtype=torch.float64),
                "objective": solution.objective.cpu(),
                "reconstruction": solution.reconstruction.cpu(),
                "sparsity": solution.sparsity.cpu(),
                "non_zeros": non_zeros,
                "density": non_zeros.double() / z[0].numel(),
                "snr": 10 * (self.signal / error).log10(),
                "gap": solution.gap if solution.gap is None else solution.gap.cpu(),
            }
        )
        if events is not None:
            self.events.append((solution.lam, events))

    def path(self) -> RegularizationPath:
        rows = sorted(self.rows, key=lambda row: float(row["lam"]))
        columns = {
            name: None if rows[0][name] is None else torch.stack([row[name] for row in rows])
            for name in rows[0]
        }
        events = [codes for _, codes in sorted(self.events, key=lambda pair: pair[0])]
        return RegularizationPath(**columns, lam_max=self.lam_max, events=events)


def lams_of_path(
    A: LinearOperator,
    b: Tensor,
    prior: Prior,
    lams: Sequence[float] | None,
    num_lams: int,
    smallest_ratio: float,
    lam_max_quantile: float,
) -> tuple[list[float], float | None]:
    """(the lams of a path in increasing order, the lam of lambda_max if they were not given)."""
    quantile = check_quantile(lam_max_quantile)
    if lams is not None:
        if quantile != 1:
            raise ValueError(
                f"lam_max_quantile={quantile}: there is no lambda_max if lams is given"
            )
        given = lams.tolist() if hasattr(lams, "tolist") else lams
        if not isinstance(given, Sequence) or isinstance(given, str) or len(given) == 0:
            raise ValueError(f"lams={given!r}: must be a list of at least one number")
        return sorted(as_positive_number(lam, "lams") for lam in given), None
    if prior.p != 1:
        raise ValueError(f"p={prior.p}: only p=1 has a lambda_max; give lams")
    num = as_positive_integer(num_lams, "num_lams")
    if num < 2:
        raise ValueError(f"num_lams={num}: must be at least 2; or give lams")
    if not 0 < as_number(smallest_ratio, "smallest_ratio") < 1:
        raise ValueError(f"smallest_ratio={smallest_ratio}: must lie in (0, 1)")
    try:
        first = lam_from_ratio(A, b, 1.0, prior, lam_max_quantile=quantile)
    except ValueError as error:
        raise ValueError(f"lambda_max {str(error).split(': ')[-1]}; or give lams") from None
    return [first * smallest_ratio ** (-n / (num - 1)) for n in range(num)], first


def path_solver(settings: SolverSettings | None, b: Tensor, prior: Prior) -> SolverSettings:
    check_settings(settings, SolverSettings, "settings")
    settings = settings or default_solver(b, prior.p)
    if settings.method == "half_quadratic":
        raise ValueError(
            "settings.method=half_quadratic: ends above the minimum wherever it starts; choose "
            "admm, fista, ista or coordinate"
        )
    return settings


def count_by_image(z: Tensor) -> Tensor:
    """The number of non-zero coefficients of each image, (N,) int64 on the CPU."""
    # Ten times as fast on the CPU as one count over dimensions 1 to 3.
    return torch.stack([torch.count_nonzero(image) for image in z]).cpu()


def squares(y: Tensor) -> Tensor:
    """The sum of squares of each image, (N,) in float64 on the CPU."""
    return y.double().square().sum((1, 2, 3)).cpu()
