"""Windows of an image that suffice to project a unit, little larger than its receptive field.

Pixels outside the receptive field affect neither a unit nor any value on which it depends. If every
operation treats all positions alike, a window therefore gives the same projection as the whole
image, provided that all strides sample the same pixels in it, and that it ends at the border of the
image wherever the field reaches the border, so that padding is at the same position. A field of 14
of 224 pixels then costs a two-hundredth of the image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deconvnet.visualization.projection.autograd_graph import LEAF, Operation, output_shape
from deconvnet.visualization.projection.field_geometry import FieldGeometry
from deconvnet.visualization.projection.map_axis import VIEWS, unflattened_shape
from deconvnet.visualization.projection.operations import (
    NORMALIZATIONS,
    OTHER_RECTIFIERS,
    RECTIFIERS,
    SKIPPED,
    Operations,
)
from deconvnet.visualization.projection.starts import Footprint

# Operations that treat all positions alike.
ALIKE = {
    *("MaxPool2DWithIndices", "AvgPool2D", "Add", "Sub", "Neg", "Mul", "Div", "Clone"),
    *RECTIFIERS,
    *OTHER_RECTIFIERS,
    *NORMALIZATIONS,
    *(SKIPPED, LEAF),
}
# Windows with a larger share of the pixels of the image are not worth it.
LARGEST_SHARE = 0.6


@dataclass(frozen=True)
class WindowPlan:
    """The windows of the units of a layer, in images of one size.

    shape: (K, H, W) of the layer; geometry: of the receptive fields of units, stride: (rows,
    columns), the pixels from one position of its maps to the next; image: (H, W) in pixels;
    operations: the names of the operations that lead to the layer.
    """

    shape: tuple[int, int, int]
    geometry: FieldGeometry
    stride: tuple[int, int]
    image: tuple[int, int]
    operations: list[str]

    def windows(self, units: Tensor) -> Tensor:
        """(U, 4): top, left, bottom, right of the window of each of the units (U, 4)."""
        sides = [self._sides(units[:, 2 + axis], axis) for axis in (0, 1)]
        (top, bottom), (left, right) = sides
        return torch.stack([top, left, bottom, right], 1)

    def units_in_windows(self, units: Tensor, windows: Tensor) -> Tensor:
        """(U, 4): the units, with the number of the window as image and positions in the window."""
        stride = torch.tensor(self.geometry.stride)
        local = units.clone()
        local[:, 0] = torch.arange(len(units))
        local[:, 2:] -= windows[:, :2] // stride
        return local

    def map_corners(self, windows: Tensor) -> Tensor:
        """(U, 2): the first row and column of the maps of the layer in windows (U, 4)."""
        return windows[:, :2] // torch.tensor(self.stride)

    def _sides(self, positions: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Start and end of the windows of units at these positions along an axis."""
        geometry, limit = self.geometry, self.image[axis]
        stride, size = geometry.stride[axis], geometry.size[axis]
        field = geometry.offset[axis] + stride * positions
        # A field may lie wholly in the padding.
        start = field.clamp(min=0, max=limit - 1) // stride * stride
        # The largest extent of a field of this size, wherever it starts within a stride.
        length = -(-(size + stride - 1) // stride) * stride
        return start, (start + length).clamp(max=limit)


def plan_windows(
    operations: Operations,
    shape: tuple[int, int, int],
    geometry: FieldGeometry | None,
    image: tuple[int, int],
    footprint: Footprint | None = None,
) -> WindowPlan | None:
    """The windows of the units of a layer, or of a dictionary whose units have this footprint in
    it; None if windows do not suffice or save too little."""
    if geometry is None or not all(isinstance(n, int) and n > 0 for n in geometry.stride):
        return None
    if not all(map(_is_alike, operations.order)):
        return None
    fields = geometry if footprint is None else footprint.fields(geometry)
    names = [op.name for op in operations.order]
    plan = WindowPlan(shape, fields, geometry.stride, image, names)
    middle = torch.tensor([[0, 0, shape[1] // 2, shape[2] // 2]])
    top, left, bottom, right = plan.windows(middle)[0].tolist()
    is_small = (bottom - top) * (right - left) < LARGEST_SHARE * image[0] * image[1]
    return plan if is_small else None


def _is_alike(op: Operation) -> bool:
    """Whether an operation treats all positions alike."""
    if op.name == "Convolution":
        return op.is_convolution and not op.saved("transposed")
    if op.name in ("Cat", "Split", "SplitWithSizes"):
        return int(op.saved("dim")) in (1, -3)
    if op.name in ("Permute", "Transpose"):
        return len(output_shape(op.node, 0)) == 4
    if op.name in (*VIEWS, "Addmm", "Mm"):
        # A linear layer on maps (N, H, W, C): it works on a table of their positions.
        return any(
            unflattened_shape(node) is not None for node in (op.node, *(n for n, _ in op.inputs))
        )
    if op.name == "NativeLayerNorm":
        return len(op.saved("normalized_shape")) == 1
    return op.name in ALIKE
