"""Windows of an image that are enough to project a unit: its receptive field, and little more.

Nothing beyond its field has a part in a unit, nor in whatever stands between the unit and the
pixels. So where every operation treats all places alike, a window gives the same projection as the
whole image, if the grids of all strides fall on the same pixels in it and if it ends where the
image ends wherever the field reaches the border, so that padding stays where it was. A field of 14
of 224 pixels then costs a two-hundredth of what the image does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deconvnet.visualization.projection.autograd_graph import (
    LEAF,
    NORMALIZATIONS,
    OTHER_RECTIFIERS,
    RECTIFIERS,
    SKIPPED,
    Operation,
    Operations,
)
from deconvnet.visualization.projection.receptive_fields import FieldGeometry

ALIKE = {
    *("MaxPool2DWithIndices", "AvgPool2D", "Add", "Sub", "Neg", "Mul", "Div", "Clone"),
    *RECTIFIERS,
    *OTHER_RECTIFIERS,
    *NORMALIZATIONS,
    *(SKIPPED, LEAF),
}
# Of the pixels of the image: larger windows are not worth it.
WORTH = 0.6


@dataclass(frozen=True)
class WindowPlan:
    """Where the units of a layer lie in images of one size: shape (K, H, W) and lattice, and the
    names of the operations that lead to them."""

    shape: tuple[int, int, int]
    lattice: FieldGeometry
    image: tuple[int, int]
    operations: list[str]

    def windows(self, units: Tensor) -> Tensor:
        """(U, 4): top, left, bottom, right of the window of each of units (U, 4)."""
        sides = [self._sides(units[:, 2 + axis], axis) for axis in (0, 1)]
        (top, bottom), (left, right) = sides
        return torch.stack([top, left, bottom, right], 1)

    def within(self, units: Tensor, windows: Tensor) -> Tensor:
        """The units as they are called in their windows, each an image of its own."""
        stride = torch.tensor(self.lattice.stride)
        local = units.clone()
        local[:, 0] = torch.arange(len(units))
        local[:, 2:] -= windows[:, :2] // stride
        return local

    def _sides(self, places: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        lattice, limit = self.lattice, self.image[axis]
        stride, size = lattice.stride[axis], lattice.size[axis]
        field = lattice.first[axis] + stride * places
        # A field may lie wholly in the padding.
        start = field.clamp(min=0, max=limit - 1) // stride * stride
        # The most that a field of this size, wherever it begins in a step of the grid, reaches.
        length = -(-(size + stride - 1) // stride) * stride
        return start, (start + length).clamp(max=limit)


def plan_windows(
    found: Operations,
    shape: tuple[int, int, int],
    lattice: FieldGeometry | None,
    image: tuple[int, int],
) -> WindowPlan | None:
    """Where the units of a layer lie; None if windows would not do, or would not be worth it."""
    if lattice is None or min(lattice.stride) < 1 or not all(map(_is_alike, found.order)):
        return None
    place = WindowPlan(shape, lattice, image, [op.name for op in found.order])
    middle = torch.tensor([[0, 0, shape[1] // 2, shape[2] // 2]])
    top, left, bottom, right = place.windows(middle)[0].tolist()
    worth = (bottom - top) * (right - left) < WORTH * image[0] * image[1]
    return place if worth else None


def _is_alike(op: Operation) -> bool:
    """Whether an operation treats all places alike."""
    if op.name == "Convolution":
        return op.is_convolution and not op.saved("transposed")
    if op.name in ("Cat", "Split", "SplitWithSizes"):
        return int(op.saved("dim")) in (1, -3)
    return op.name in ALIKE
