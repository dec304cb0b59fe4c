"""How alike the filters of two dictionaries are, and which of them correspond to each other.

A dictionary that was learned again, from another seed or from other data, has its filters in
another order, and a filter of 3x3 may lie a pixel further in its window. Two filters are therefore
compared at the shift of one against the other at which they agree most, and the filters of two
dictionaries are matched one to one.

K, L filters of two dictionaries · C channels · (h, w) and (h', w') filters
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deconvnet.support.torch_modes import plain
from deconvnet.support.validation import as_filters, as_tensor

# Filters of the first dictionary that are compared at a time, which bounds memory.
ROWS = 1024


@dataclass(frozen=True)
class FilterMatch:
    """The filters of one dictionary in another one.

    best: (K,), the largest cosine of each filter with any filter of the other dictionary; nearest:
    (K,), the number of that filter. matched: (K,), its cosine with the filter that the one-to-one
    matching of the largest total cosine gives it, NaN if it gives it none as the other dictionary
    is smaller; partners: (K,), the number of that filter, -1 for none.
    """

    best: np.ndarray
    nearest: np.ndarray
    matched: np.ndarray
    partners: np.ndarray

    @property
    def mean_best(self) -> float:
        return float(self.best.mean())

    @property
    def mean_matched(self) -> float:
        return float(np.nanmean(self.matched))


def match_filters(f: Tensor, g: Tensor, *, either_sign: bool = False) -> FilterMatch:
    """The filters f (K, C, h, w) in the dictionary g (L, C, h', w'); arguments: `filter_cosines`.

    The one-to-one matching has the largest sum of cosines (Kuhn 1955, the Hungarian method).
    """
    # Imported here because it takes a sixth of a second to load.
    from scipy.optimize import linear_sum_assignment

    cosines = filter_cosines(f, g, either_sign=either_sign)
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    matched = np.full(len(cosines), np.nan, cosines.dtype)
    partners = np.full(len(cosines), -1)
    matched[rows], partners[rows] = cosines[rows, columns], columns
    return FilterMatch(cosines.max(1), cosines.argmax(1), matched, partners)


@plain
def filter_cosines(f: Tensor, g: Tensor, *, either_sign: bool = False) -> np.ndarray:
    """(K, L): the cosine of every filter f (K, C, h, w) with every filter g (L, C, h', w').

    Each pair is compared at the shift of g against f that makes their cosine largest: the inner
    product where the two overlap, divided by the norms of both whole filters, so that what is
    shifted out of the overlap counts as missing. For 1x1 filters there is one shift, and this is
    the cosine of two vectors. A filter of zeros has the cosine 0 with all. either_sign: compare
    magnitudes of inner products, for maps that may be negative, where f and -f are one feature.
    """
    f, g = as_tensor(f, "f"), as_tensor(g, "g")
    f = as_filters(f, f.shape[1] if f.ndim > 1 else 1, "f")
    g = as_filters(g, f.shape[1], "g").to(f)
    f, g = _normalised(f), _normalised(g)
    parts = [_largest_products(rows, g, either_sign) for rows in f.split(ROWS)]
    return torch.cat(parts).clamp(-1, 1).cpu().numpy()


def _largest_products(f: Tensor, g: Tensor, either_sign: bool) -> Tensor:
    """(K, L): the largest inner product of filters over all shifts of one against the other."""
    (h, w), (hg, wg) = f.shape[2:], g.shape[2:]
    largest = f.new_full((len(f), len(g)), -torch.inf)
    for down in range(1 - hg, h):
        rows, rows_of_g = _overlap(down, h, hg)
        for right in range(1 - wg, w):
            columns, columns_of_g = _overlap(right, w, wg)
            a = f[:, :, rows, columns].flatten(1)
            b = g[:, :, rows_of_g, columns_of_g].flatten(1)
            products = a @ b.T
            largest = torch.maximum(largest, products.abs() if either_sign else products)
    return largest


def _overlap(shift: int, size: int, size_of_g: int) -> tuple[slice, slice]:
    """Where f and g overlap along an axis if g begins at `shift` of f, in both of them."""
    first, last = max(0, shift), min(size, shift + size_of_g)
    return slice(first, last), slice(first - shift, last - shift)


def _normalised(f: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(f.flatten(1), dim=1)
    return f / torch.where(norms > 0, norms, torch.ones_like(norms)).view(-1, 1, 1, 1)
