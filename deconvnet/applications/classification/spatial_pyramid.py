"""Spatial pyramids of visual words (Lazebnik et al. 2006), and kernels that compare them.

N images   P patches of an image   V words   levels g: grids of g x g cells over the picture
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from deconvnet.support.compiling import compiled

# Columns of pyramids compared at a time, which stay in a cache.
COLUMNS = 1024


def check_levels(levels: Sequence[int], *, nested: bool = True) -> None:
    """Raise ValueError unless these are sides of grids.

    nested: also unless the finest grid, the last level, refines all others.
    """
    if not levels or min(levels) < 1:
        raise ValueError(f"levels={list(levels)}: must be sides of grids, such as [1, 2, 4]")
    if nested and any(levels[-1] % g for g in levels):
        raise ValueError(
            f"levels={list(levels)}: must be sides of grids that all divide the last, such as "
            "[1, 2, 4]"
        )


def word_histogram(
    words: Tensor,
    memberships: Tensor,
    positions: Tensor,
    weights: Tensor,
    *,
    side: int,
    num_words: int,
) -> Tensor:
    """(side^2, num_words) float64: the weighted count of each word in each cell of a grid.

    words, memberships: (P, neighbours), from `Codebook.assign`. positions: (P, 2), row and column
    in [0, 1) of the picture. weights: (P,); the histogram has the same sum.
    """
    cell = (positions * side).long().clamp(max=side - 1)
    bins = (cell[:, :1] * side + cell[:, 1:]) * num_words + words
    votes = (memberships * weights[:, None]).double()
    histogram = torch.bincount(bins.flatten(), votes.flatten(), side**2 * num_words)
    return histogram.view(side**2, num_words)


def pyramid(histograms: Tensor, levels: Sequence[int] = (1, 2, 4), *, power: float = 1.0) -> Tensor:
    """Spatial pyramids (N, V sum of g^2), each of sum 1.

    histograms: (N, side^2, V), counts in the cells of the finest grid. Of L + 1 levels, the first
    has weight 1 / 2^L and level l weight 1 / 2^(L - l + 1). Counts are raised to `power`; below 1,
    a word that fills a cell counts less, since many patches with one word carry little more
    information than a few. An image without patches has a pyramid of zeros.
    """
    check_levels(levels)
    N, cells, V = histograms.shape
    side, L = levels[-1], len(levels) - 1
    if cells != side * side:
        raise ValueError(f"histograms of {cells} cells: levels={list(levels)} has {side * side}")
    fine, parts = histograms.view(N, side, side, V), []
    for number, g in enumerate(levels):
        weight = 2.0 ** -(L if number == 0 else L - number + 1)
        coarse = fine.view(N, g, side // g, g, side // g, V).sum((2, 4)).flatten(1)
        coarse = coarse if power == 1 else coarse**power
        total = coarse.sum(1, keepdim=True).clamp(min=torch.finfo(coarse.dtype).tiny)
        parts.append(weight * coarse / total)
    return torch.cat(parts, 1)


def intersection_kernel(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) float64: sum_v min(a_nv, b_mv), of a (N, D) and b (M, D); on the CPU.

    Runs in as many threads as torch uses.
    """
    left, right = (pyramids.detach().cpu().numpy() for pyramids in (a, b))
    kernel = np.zeros((len(left), len(right)))
    threads = torch.get_num_threads()
    rows_per_thread = max(1, -(-len(left) // threads))

    def fill_rows(start: int) -> None:
        rows = slice(start, start + rows_per_thread)
        for first in range(0, left.shape[1], COLUMNS):
            columns = slice(first, first + COLUMNS)
            parts = (np.ascontiguousarray(p) for p in (left[rows, columns], right[:, columns]))
            _add_minima(*parts, kernel[rows])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill_rows, range(0, len(left), rows_per_thread)))
    return torch.from_numpy(kernel)


@compiled(fastmath=True, nogil=True)
def _add_minima(a: np.ndarray, b: np.ndarray, kernel: np.ndarray) -> None:
    """kernel (N, M) += sum_v min(a_nv, b_mv): 4 times faster than torch, which stores minima."""
    for n in range(len(a)):
        for m in range(len(b)):
            x, y = a[n], b[m]
            total = x[:0].sum()
            for v in range(len(x)):
                total += min(x[v], y[v])
            kernel[n, m] += total


def bhattacharyya_kernel(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) float64: sum_v sqrt(a_nv b_mv), the linear kernel of the square roots of pyramids."""
    return (a.sqrt() @ b.sqrt().T).double().cpu()


# By the values of the setting `kernel`.
KERNELS = {"intersection": intersection_kernel, "linear": bhattacharyya_kernel}
