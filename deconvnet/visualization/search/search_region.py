"""Which units of a layer are searched: those that see the image, and little of its padding.

At the border of an image, a unit sees padding, to which many maps respond as to a strong edge. In
low layers most receptive fields lie inside the image, and the others are left out. The fields of a
high layer may be as large as the image. Their weight is in their middle, so there the units closest
to the middle of the image are taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deconvnet.visualization.projection.projection import LayerInfo

# Only units whose field lies inside the image are searched if they are this share of all units.
ENOUGH = 0.25


def searched_units(info: LayerInfo, image: tuple[int, int]) -> Tensor:
    """(H, W): whether the unit there is searched in images of these sides.

    These are the units whose receptive field lies inside the image if they are at least a quarter
    of all; otherwise those in the half of the rows and of the columns that are closest to the
    middle of the image (see `includes_border`). All if a unit depends on the whole image.
    """
    inside = info.inside(image)
    return inside if inside.double().mean() >= ENOUGH else _in_the_middle(info, image)


def includes_border(info: LayerInfo, image: tuple[int, int]) -> bool:
    """Whether receptive fields of searched units reach beyond images of these sides."""
    return bool(info.inside(image).double().mean() < ENOUGH)


def _in_the_middle(info: LayerInfo, image: tuple[int, int]) -> Tensor:
    """(H, W): the half of the rows and of the columns whose fields are closest to the middle of the
    image."""
    axes = []
    for axis, size in enumerate(info.shape[1:]):
        centres = info.starts(axis) + (info.field[axis] - image[axis]) / 2
        closest = centres.abs().argsort(stable=True)[: max(1, size // 2)]
        axes.append(torch.zeros(size, dtype=torch.bool).index_fill(0, closest, True))
    rows, columns = axes
    return rows[:, None] & columns
