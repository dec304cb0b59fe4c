"""What operations depend on that move positions: views, permutations, shuffles, slices, splits.

A rule gives, for a box of the output of an operation, a box in each of its inputs: `box` (U, 3, 2),
`shape` of the output, `shapes` of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from deconvnet.visualization.projection.autograd_graph import (
    IN_PLACE,
    PART,
    Operation,
    inputs_of,
    operation_name,
    output_shape,
)
from deconvnet.visualization.projection.field_boxes import (
    Box,
    Shapes,
    all_channels,
    everything,
    unknown,
)
from deconvnet.visualization.projection.map_axis import VIEWS, unflattened_shape
from deconvnet.visualization.projection.operations import SKIPPED, SPLITS

# What rearranges maps by way of more axes.
MOVED = VIEWS | {"Permute", "Transpose", "Clone", "Contiguous"}
REARRANGED = "rearranged"


def across_rearrangement(op: Operation) -> Operation:
    """A view of maps (N, C, H, W) as such maps, by way of more axes: the view, with these maps as
    input and the operations from it down to them; any other operation as it is."""
    if op.name not in VIEWS or len(output_shape(op.node, 0)) != 4:
        return op
    chain = [op]
    while chain[-1].name in MOVED and len(chain[-1].inputs) == 1:
        below, nr = chain[-1].inputs[0]
        rank = len(output_shape(below, nr))
        if rank == 4 and len(chain) > 1:
            return Rearrangement(op.node, REARRANGED, ((below, nr),), tuple(chain))
        if rank <= 4:
            break
        chain.append(Operation(below, operation_name(below), inputs_of(below)))
    return op


def unsplit(op: Operation, nr: int, box: Box) -> Box:
    """A box of one output of a split, in the coordinates of the input."""
    below, below_nr = op.inputs[0]
    shape = output_shape(below, below_nr)
    dim, size = op.saved("dim"), op.saved("split_size") or op.saved("split_sizes")
    if dim is None or size is None or len(shape) != 4 or dim % 4 == 0:
        return everything(box, shape)
    box = box.copy()
    box[:, dim % 4 - 1] += nr * size if isinstance(size, int) else sum(size[:nr])
    return box


@dataclass(frozen=True)
class Rearrangement(Operation):
    """Views and permutations through more than four axes, as one operation."""

    chain: tuple[Operation, ...]


def _rearranged(op: Rearrangement, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    given, box = box, box.copy()
    box[:, 0] = box[:, 0].clip(0, shape[1])
    for one in op.chain:
        above, below = output_shape(one.node, 0), output_shape(*one.inputs[0])
        if one.name in VIEWS:
            box = _viewed(box, above, below)
        elif one.name == "Permute":
            dims = [dim % len(above) for dim in one.saved("dims")]
            box = box[:, np.argsort(dims[1:])] if dims[0] == 0 else None
        elif one.name == "Transpose":
            axes = list(range(len(above)))
            first, second = (one.saved(key) % len(above) for key in ("dim0", "dim1"))
            axes[first], axes[second] = second, first
            box = box[:, np.array(axes[1:]) - 1] if axes[0] == 0 else None
        if box is None:
            return unknown(op, given, shape, shapes)
    return [box]


def _viewed(box: Box, shape: tuple[int, ...], below: tuple[int, ...]) -> Box | None:
    """The box in the input of a view that a box of its output depends on; axes that are split or
    joined are seen from the first to the last position. None if images are mixed."""
    if shape[0] != below[0]:
        return None
    result, i, j = [], 1, 1
    while i < len(shape) and j < len(below):
        # The fewest axes on both sides with the same number of positions.
        i_end, j_end = i + 1, j + 1
        while (one := math.prod(shape[i:i_end])) != (other := math.prod(below[j:j_end])):
            i_end, j_end = (i_end + 1, j_end) if one < other else (i_end, j_end + 1)
        first = last = np.zeros(len(box), np.int64)
        for axis in range(i, i_end):
            first = first * shape[axis] + box[:, axis - 1, 0]
            last = last * shape[axis] + box[:, axis - 1, 1] - 1
        for axis in range(j, j_end):
            inner = math.prod(below[axis + 1 : j_end])
            start, stop = first // inner, last // inner
            result.append(np.stack([start, stop + 1], 1))
            together = start == stop
            first = np.where(together, first % inner, 0)
            last = np.where(together, last % inner, inner - 1)
        i, j = i_end, j_end
    only = np.tile(np.array([0, 1]), (len(box), 1))  # further axes have one position
    return np.stack(result + [only] * (len(below) - j), 1)


def _across_channels(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    """The same positions in all channels, if the last two dimensions stay as they are."""
    below = shapes[0]
    if below == shape and op.name in VIEWS:
        return [box]
    node = op.inputs[0][0] if len(below) == 2 else op.node
    if {len(shape), len(below)} == {2, 4} and unflattened_shape(node) == max(shape, below, key=len)[
        :3
    ]:
        return [box]
    is_same = min(len(shape), len(below)) > 3 and below[-2:] == shape[-2:]
    return [all_channels(box)] if is_same else unknown(op, box, shape, shapes)


def _pixel_shuffle(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    """Output (c, y r + i, x r + j) is input (c r r + i r + j, y, x)."""
    r = int(op.saved("upscale_factor"))
    result = box.copy()
    result[:, 0] = box[:, 0] * r * r
    result[:, 1:, 0], result[:, 1:, 1] = box[:, 1:, 0] // r, (box[:, 1:, 1] - 1) // r + 1
    return [result]


def _pixel_unshuffle(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    """Output (c r r + i r + j, y, x) is input (c, y r + i, x r + j)."""
    r = int(op.saved("downscale_factor"))
    _, C, H, W = shapes[0]
    box = box.copy()
    box[:, 0] = box[:, 0].clip(0, shape[1])
    split = _viewed(box, shape, (1, C, r, r, *shape[2:]))
    return [_viewed(split[:, [0, 3, 1, 4, 2]], (1, C, H // r, r, W // r, r), (1, C, H, W))]


def _transpose(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    rank = len(shape)
    if rank == 4 and 0 not in (op.saved("dim0") % rank, op.saved("dim1") % rank):
        axes = [0, 1, 2]
        one, other = (op.saved(key) % rank - 1 for key in ("dim0", "dim1"))
        axes[one], axes[other] = other, one
        return [box[:, axes]]
    if max(op.saved(key) % rank for key in ("dim0", "dim1")) >= rank - 2:
        return unknown(op, box, shape, shapes)
    return _across_channels(op, box, shape, shapes)


def _permute(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    dims = [dim % len(shape) for dim in op.saved("dims")]
    if len(dims) == 4 and dims[0] == 0:
        return [box[:, np.argsort(dims[1:])]]
    if dims[-2:] != [len(shape) - 2, len(shape) - 1]:
        return unknown(op, box, shape, shapes)
    return _across_channels(op, box, shape, shapes)


def _cat(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    dim = op.saved("dim") % max(len(shape), 1)
    is_complete = len(op.inputs) == len(op.node.next_functions)
    if len(shape) != 4 or dim == 0 or not is_complete:
        return unknown(op, box, shape, shapes)
    result, start = [], 0
    for below in shapes:
        part = box.copy()
        part[:, dim - 1] = (box[:, dim - 1] - start).clip(0, below[dim])
        result.append(part)
        start += below[dim]
    return result


def _slice(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    dim, start, step = (op.saved(key) or 0 for key in ("dim", "start", "step"))
    dim %= len(shape)
    if len(shape) != 4 or dim == 0:
        return [box] if len(shape) == 4 else unknown(op, box, shape, shapes)
    start = min(max(start + shapes[0][dim], 0) if start < 0 else start, shapes[0][dim])
    result = box.copy()
    first, last = box[:, dim - 1, 0] * step, (box[:, dim - 1, 1] - 1) * step
    result[:, dim - 1] = start + np.stack([first, last + 1], 1)
    return [result]


def _same(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    return [box for _ in shapes]


def _in_place(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    # The part belongs to the first input; if nothing is copied in, positions stay the same.
    if len(op.node.next_functions) == 1 and len(shape) == 4:
        return [all_channels(box)]
    # Maps are added to some of the maps.
    size, stride, start = op.node.metadata.get(PART, ((), (), 0))
    corner = _corner(size, stride, start, shape)
    if corner is None or op.node.metadata[IN_PLACE] or size[2:] != shape[2:]:
        return unknown(op, box, shape, shapes)
    moved = box.copy()
    moved[:, 0] = (box[:, 0] - corner[0]).clip(0, size[1])
    whole = [node is not None for node, _ in op.node.next_functions][0]
    added = shapes[1:] if whole else shapes
    parts = [moved if below == size else everything(box, below) for below in added]
    return [box] * whole + parts


def _as_strided(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    """A part of maps, after an operation in place on it."""
    corner = _corner(shape, op.saved("stride"), op.saved("storage_offset") or 0, shapes[0])
    if corner is None:
        return unknown(op, box, shape, shapes)
    return [box + np.array(corner)[:, None]]


def _corner(
    size: tuple[int, ...], stride: tuple[int, ...], start: int, whole: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Where a part begins in maps (N, C, H, W) that are contiguous in memory: its first channel,
    row and column. None unless the part is a box of neighbouring positions."""
    steps = [math.prod(whole[axis + 1 :]) for axis in range(len(whole))]
    if len(size) != 4 or len(whole) != 4 or size[0] != whole[0]:
        return None
    if any(n > 1 and one != step for n, one, step in zip(size, stride, steps, strict=True)):
        return None
    corner = np.unravel_index(start, whole)
    fits = all(first + n <= m for first, n, m in zip(corner, size, whole, strict=True))
    return tuple(int(first) for first in corner[1:]) if fits and corner[0] == 0 else None


MOVING: dict[str, Callable[[Operation, Box, tuple, Shapes], list[Box | None]]] = {
    **dict.fromkeys(("View", "UnsafeView", "Reshape", "ReshapeAlias"), _across_channels),
    **dict.fromkeys(("ChannelShuffle", "NativeChannelShuffle"), _across_channels),
    **dict.fromkeys(SPLITS, _same),
    SKIPPED: _across_channels,
    "Transpose": _transpose,
    "Permute": _permute,
    "Cat": _cat,
    REARRANGED: _rearranged,
    "PixelShuffle": _pixel_shuffle,
    "PixelUnshuffle": _pixel_unshuffle,
    "Slice": _slice,
    IN_PLACE: _in_place,
    "AsStrided": _as_strided,
}
