"""The axis of a tensor that indexes its maps: the second, or the last, as in (N, H, W, C).

ConvNeXt, Swin and others switch between the two, so the shape of an output is ambiguous. We follow
the axis through the autograd graph from where it is certain: it is the second axis after a
convolution, and the last after a linear layer or a LayerNorm over one axis.
"""

from __future__ import annotations

import math

from torch.autograd.graph import Node

from deconvnet.visualization.projection.autograd_graph import (
    LEAF,
    Operation,
    inputs_of,
    operation_name,
    output_shape,
    topological_order,
)
from deconvnet.visualization.projection.operations import NORMALIZATIONS, SWITCHES

VIEWS = {"View", "UnsafeView", "Reshape", "ReshapeAlias"}
PRODUCTS = {"Addmm", "Mm", "Bmm", "Linear", "MkldnnLinear"}
SECOND = {
    *("Convolution", "MkldnnConvolution", "AvgPool2D", "AdaptiveAvgPool2D", "PixelShuffle"),
    *("PixelUnshuffle", "UpsampleNearest2D", "UpsampleBilinear2D", "UpsampleBicubic2D"),
    *("UpsampleNearestExact2D", "NativeGroupNorm", LEAF),
    *(NORMALIZATIONS | SWITCHES),
}


class MapAxes:
    """The axis of the maps in the outputs of the operations of one forward pass."""

    def __init__(self) -> None:
        self._axes: dict[Node, int | None] = {}

    def is_last(self, node: Node | None) -> bool:
        """Whether the output of a node is (N, H, W, C)."""
        return node is not None and len(output_shape(node, 0)) == 4 and self.of(node) == 3

    def of(self, node: Node) -> int | None:
        """The axis of the maps in the output of a node; None if it is not known."""
        for op in reversed(topological_order(node, self._axes)):
            if op.node not in self._axes:
                self._axes[op.node] = self._axis(op)
        return self._axes[node]

    def _axis(self, op: Operation) -> int | None:
        shape = output_shape(op.node, 0)
        rank = len(shape)
        if op.name in SECOND:
            return 1 if rank > 2 else None
        if op.name in PRODUCTS and len(op.inputs) < 2:
            return rank - 1
        if op.name in PRODUCTS:
            # Attention weights have no axis of maps; the values that they weight keep theirs.
            node, nr = op.inputs[-1]
            is_last = self._axes.get(node) == len(output_shape(node, nr)) - 1
            return rank - 1 if is_last else None
        if op.name == "NativeLayerNorm" and len(op.saved("normalized_shape")) == 1:
            return rank - 1
        inputs = [(self._axes.get(node), output_shape(node, nr)) for node, nr in op.inputs]
        inputs = [(axis, below) for axis, below in inputs if axis is not None]
        if op.name in VIEWS:
            return _viewed(*inputs[0], shape) if inputs else None
        # If inputs are broadcast, the one that has the shape of the result.
        inputs = sorted(
            (pair for pair in inputs if len(pair[1]) == rank), key=lambda p: p[1] != shape
        )
        if not inputs:
            return None
        axis = inputs[0][0]
        if op.name == "Permute":
            return [dim % rank for dim in op.saved("dims")].index(axis)
        if op.name == "Transpose":
            one, other = (op.saved(key) % rank for key in ("dim0", "dim1"))
            return {one: other, other: one}.get(axis, axis)
        return axis


def _viewed(axis: int, below: tuple[int, ...], shape: tuple[int, ...]) -> int | None:
    """The axis of the maps after a view; None if the view splits or joins it."""
    if shape[: axis + 1] == below[: axis + 1]:
        return axis
    is_last = axis == len(below) - 1 and shape[-1:] == below[-1:]
    return len(shape) - 1 if is_last else None


def unflattened_shape(node: Node) -> tuple[int, ...] | None:
    """(N, H, W) if the output of a node is a table (N H W, C) of maps (N, H, W, C), else None.

    This is how linear layers process such maps.
    """
    name, shape = operation_name(node), output_shape(node, 0)
    if len(shape) != 2:
        return None
    if name in PRODUCTS:
        tables = [below for below, _ in inputs_of(node) if operation_name(below) in VIEWS]
        return unflattened_shape(tables[0]) if len(tables) == 1 else None
    if name not in VIEWS:
        return None
    below, nr = inputs_of(node)[0]
    maps = output_shape(below, nr)
    if len(maps) != 4 or maps[3] != shape[1] or maps[1] * maps[2] < 2:
        return None
    return maps[:3] if math.prod(maps[:3]) == shape[0] else None
