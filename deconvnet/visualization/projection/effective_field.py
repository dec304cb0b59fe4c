"""The effective field of a layer: the part of its receptive field where projections have energy.

The receptive field of a high layer is far larger than what drives a unit: the weight of its pixels
falls from the middle like a Gaussian (Luo et al., NIPS 2016). Pictures that show the whole field
are mostly grey, so tiles are cropped to the box that holds most of the energy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from deconvnet.visualization.projection.boxes import crop, tile_boxes

# The share of the mean energy that lies in the effective field.
SHARE = 0.95


@dataclass(frozen=True)
class EffectiveField:
    """A box in pixels, the same for all units of a layer.

    offset: of its first row and column from the centre of a unit's receptive field; size: its rows
    and columns.
    """

    offset: tuple[int, int]
    size: tuple[int, int]

    def boxes(self, fields: Tensor) -> Tensor:
        """(U, 4): the boxes of units with these receptive fields (U, 4), not clipped."""
        corners = _centres(fields) + torch.tensor(self.offset)
        return torch.cat([corners, corners + torch.tensor(self.size)], 1)


def windows_of(fields: Tensor, image: tuple[int, int], effective: EffectiveField | None) -> Tensor:
    """(U, 4): the boxes that tiles of units show, which may reach beyond the image (H, W).

    fields: (U, 4), their receptive fields, which tiles show if there is no effective field. Along
    an axis where a box is as long as the image, it is that of the image.
    """
    return tile_boxes(fields if effective is None else effective.boxes(fields), image)


def effective_field(projections: Iterable[tuple[Tensor, Tensor]]) -> EffectiveField | None:
    """The box that holds 95% of the mean energy of some projections of units of one layer.

    projections: pairs of projections (U, C, H, W) and the receptive fields (U, 4) of their units.
    Every projection counts as much as any other. The box is square, or as large as the receptive
    field along an axis. None if a unit depends on the whole image, or if all projections are zero.
    """
    reach, total = None, None
    for images, fields in projections:
        if not len(fields) or _are_whole_images(fields, tuple(images.shape[2:])):
            continue
        if reach is None:
            # Half of the largest field along each axis.
            largest = (fields[:, 2:] - fields[:, :2]).amax(0)
            reach = (largest + 1) // 2
            total = torch.zeros([2 * int(r) for r in reach], dtype=torch.float64)
        boxes = torch.cat([_centres(fields) - reach, _centres(fields) + reach], 1)
        energy = crop(images, boxes).cpu().double().square().sum(1)
        sums = energy.sum((1, 2), keepdim=True)
        total += (energy / sums.clamp(min=torch.finfo(torch.float64).tiny)).sum(0)
    if total is None or not total.sum() > 0:
        return None
    # Each of the four sides cuts off the same share, so that at least SHARE remains.
    ends = [_middle(total.sum(1 - axis), (1 - SHARE) / 4) for axis in (0, 1)]
    side = max(last - first for first, last in ends)
    # Of a field of odd length, the total has one more pixel, before the first of the field.
    ends = [
        _widened(end, side, int(size) % 2, int(size))
        for end, size in zip(ends, largest, strict=True)
    ]
    offset = tuple(first - int(r) for (first, _), r in zip(ends, reach, strict=True))
    return EffectiveField(offset, tuple(last - first for first, last in ends))


def _centres(fields: Tensor) -> Tensor:
    """(U, 2): the centres of boxes (U, 4), rounded down."""
    return fields[:, :2] + (fields[:, 2:] - fields[:, :2]) // 2


def _are_whole_images(fields: Tensor, image: tuple[int, int]) -> bool:
    return bool((fields == torch.tensor([0, 0, *image])).all())


def _middle(energy: Tensor, tail: float) -> tuple[int, int]:
    """The first and last + 1 of the positions that remain if both ends lose at most this share."""
    shares = energy.cumsum(0) / energy.sum()
    inside = ((shares > tail) & (shares - energy / energy.sum() < 1 - tail)).nonzero()[:, 0]
    return int(inside[0]), int(inside[-1]) + 1


def _widened(end: tuple[int, int], side: int, start: int, size: int) -> tuple[int, int]:
    """An interval widened to this side about its middle, within start to start + size."""
    side = min(side, size)
    first = end[0] - (side - (end[1] - end[0])) // 2
    first = min(max(first, start), start + size - side)
    return first, first + side
