"""Detection of unused, duplicate and off-centre filters while a layer learns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.filters.constraint import normalize


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
    rows = energy.sum(2) @ torch.arange(h, dtype=energy.dtype, device=f.device)
    columns = energy.sum(1) @ torch.arange(w, dtype=energy.dtype, device=f.device)
    shifts = torch.stack([(h - 1) / 2 - rows, (w - 1) / 2 - columns], 1).round().long().tolist()
    return {k: (i, j) for k, (i, j) in enumerate(shifts) if i or j}


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
