"""Detection of unused, duplicate and off-centre filters while a layer learns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.filters.constraint import normalize

# Filters of up to SMALL pixels are also off centre if the row or column at one border has less than
# the fraction EMPTY of the energy, and that at the other more than FULL.
SMALL, EMPTY, FULL = 4, 0.05, 0.2


def dead_filters(energy: Tensor) -> list[int]:
    """The filters whose maps have at most a millionth of the mean energy of a map.

    energy: (K,), the sum of squares of each map over the images.
    """
    return torch.nonzero(energy <= 1e-6 * energy.mean()).flatten().tolist()


def duplicate_filters(f: Tensor, energy: Tensor, *, similarity: float = 0.97) -> list[int]:
    """The filters that equal another one with a stronger map, up to sign and shift.

    f: (K, C, h, w). energy: (K,), the sum of squares of each map; of equal ones the first filter
    is the original. similarity: the normalised correlation above which two filters are equal.
    """
    h, w = f.shape[2:]
    f = normalize(f)
    # Correlate all pairs at all shifts; (K, K, 2h-1, 2w-1).
    similar = F.conv2d(f, f, padding=(h - 1, w - 1)).abs().amax((2, 3)) > similarity
    originals: list[int] = []
    duplicates: list[int] = []
    for k in energy.argsort(descending=True, stable=True).tolist():
        is_duplicate = bool(similar[k, originals].any())
        (duplicates if is_duplicate else originals).append(k)
    return sorted(duplicates)


def centring_shifts(f: Tensor) -> dict[int, tuple[int, int]]:
    """{filter: (rows, columns)}: the shifts that centre the energy of filters (K, C, h, w).

    In whole pixels, down and right; filters that are already centred are omitted.
    """
    h, w = f.shape[2:]
    energy = f.double().square().sum(1)
    energy = energy / energy.sum((1, 2), keepdim=True).clamp(min=1e-300)
    shifts = torch.stack([_shifts(energy.sum(2)), _shifts(energy.sum(1))], 1).tolist()
    return {k: (i, j) for k, (i, j) in enumerate(shifts) if i or j}


def _shifts(energy: Tensor) -> Tensor:
    """(K,) int64: the shifts along one axis, from the energy (K, side) of rows or columns."""
    side = energy.shape[1]
    centre = energy @ torch.arange(side, dtype=energy.dtype, device=energy.device)
    shifts = ((side - 1) / 2 - centre).round().long()
    if side > SMALL:
        return shifts
    # Of a small pattern that is cut off by one pixel, the centre moves by about half a pixel only.
    first, last = energy[:, 0], energy[:, -1]
    towards_end = (last < EMPTY) & (first > FULL)
    towards_start = (first < EMPTY) & (last > FULL)
    return torch.where(shifts == 0, towards_end.long() - towards_start.long(), shifts)


def shift_filters(f: Tensor, shifts: dict[int, tuple[int, int]]) -> Tensor:
    """A copy of filters f (K, C, h, w), shifted by shifts = {filter: (rows, columns)}."""
    f = f.clone()
    for k, (rows, columns) in shifts.items():
        f[k] = shift(f[k], rows, columns)
    return f


def shift(planes: Tensor, rows: int, columns: int, *, wrap: bool = False) -> Tensor:
    """Planes (..., H, W) shifted down and right, filled with zeros or, with wrap, circularly."""
    shifted = planes.roll((rows, columns), (-2, -1))
    if not wrap:
        for axis, distance in ((-2, rows), (-1, columns)):
            start = 0 if distance > 0 else shifted.shape[axis] + distance
            shifted.narrow(axis, start, abs(distance)).zero_()
    return shifted
