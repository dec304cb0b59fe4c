"""The choice of the number of maps: how many filters do the images need?

More filters always explain the images from which they were learned better. So other images judge:
some of their pixels are hidden, and the code of the rest must predict them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deconvnet.dictionary import Learned, learn_filters
from deconvnet.filters.update import LearningSettings
from deconvnet.operators.convolution import Boundary
from deconvnet.sparse_coding.lambda_choice import LamChoice, choose_lam
from deconvnet.sparse_coding.problem import SolverSettings
from deconvnet.support.validation import as_images, as_number, as_positive_integer


@dataclass(frozen=True, eq=False)
class NumMapsChoice:
    """The number of maps that was chosen, and what it was chosen from.

    candidates: the numbers, in increasing order. errors: (candidates, images), the squared error of
    the hidden pixels of each image that judges, relative to that of maps of zeros, with the lam
    that is best for that candidate. learned: the filters of each candidate.
    """

    num_maps: int
    candidates: list[int]
    errors: Tensor = field(repr=False)
    learned: list[Learned] = field(repr=False)

    @property
    def best(self) -> Learned:
        """The filters of the number that was chosen."""
        return self.learned[self.candidates.index(self.num_maps)]


def choose_num_maps(
    images: Tensor,
    candidates: Iterable[int],
    filter_size: int | tuple[int, int],
    *,
    lam: float | None = None,
    lam_ratio: float | None = None,
    lam_max_quantile: float = 1.0,
    judges: float = 0.25,
    held_out: float = 0.5,
    boundary: Boundary = "valid",
    group: int = 1,
    non_negative: bool = False,
    solver: SolverSettings | None = None,
    learning: LearningSettings | None = None,
    seed: int = 0,
    progress: bool = False,
) -> NumMapsChoice:
    """The smallest of some numbers of maps that predicts hidden pixels about as well as the best.

    For each candidate, filters are learned by `learn_filters` from a part of the images (N, C, H,
    W). The others, a fraction `judges` in (0, 1) evenly spaced over all, judge by held-out pixels
    (`choose_lam`), half of them by default, so that it takes structure to predict them. About as
    well: on average over these images, the error exceeds that of the best candidate by at most one
    standard error of the difference (the rule of Breiman et al. 1984).
    lam or lam_ratio, and all other arguments, are those of `learn_filters`; p is 1. Raises
    ValueError if an argument is out of range or does not fit the others.
    """
    images = as_images(images)
    is_list = isinstance(candidates, Iterable) and not isinstance(candidates, str)
    candidates = list(candidates) if is_list else candidates
    if not is_list or not candidates:
        raise ValueError(f"candidates={candidates!r}: must be a list of at least one number")
    candidates = sorted({as_positive_integer(number, "candidates") for number in candidates})
    learns, judge = _split(len(images), judges)
    learned, errors = [], []
    for number in candidates:
        filters = learn_filters(
            *(images[learns], number, filter_size),
            lam=lam,
            lam_ratio=lam_ratio,
            lam_max_quantile=lam_max_quantile,
            boundary=boundary,
            group=group,
            non_negative=non_negative,
            solver=solver,
            learning=learning,
            seed=seed,
            progress=progress,
        )
        choice = choose_lam(
            *(images[judge], filters.filters),
            held_out=held_out,
            seed=seed,
            boundary=boundary,
            group=group,
            non_negative=non_negative,
        )
        learned.append(filters)
        errors.append(_unpredicted(choice))
    errors = torch.stack(errors)
    return NumMapsChoice(candidates[_smallest_sufficient(errors)], candidates, errors, learned)


def _unpredicted(choice: LamChoice) -> Tensor:
    """(N,): the share of the energy of the hidden pixels that the best code does not predict."""
    energy = choice.errors[0]
    errors = torch.where(energy > 0, choice.errors / energy, 0.0)
    return errors[errors.mean(1).argmin()]


def _split(images: int, judges: float) -> tuple[Tensor, Tensor]:
    """The indices of the images to learn from, and of those that judge."""
    if not 0 < as_number(judges, "judges") < 1:
        raise ValueError(f"judges={judges}: must lie in (0, 1)")
    number = round(judges * images)
    if not 2 <= number < images:
        raise ValueError(
            f"judges={judges}: makes {number} of the {images} images judge; at least 2 must, and "
            "at least 1 must remain to learn from"
        )
    judging = torch.zeros(images, dtype=torch.bool)
    judging[((torch.arange(number) + 0.5) * images / number).long()] = True
    return (~judging).nonzero()[:, 0], judging.nonzero()[:, 0]


def _smallest_sufficient(errors: Tensor) -> int:
    """The first candidate whose mean error is within one standard error of the least."""
    excess = errors - errors[errors.mean(1).argmin()]
    standard_error = excess.std(1) / excess.shape[1] ** 0.5
    return int((excess.mean(1) <= standard_error).nonzero()[0])
