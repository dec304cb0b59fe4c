"""Receptive fields: the pixels that a unit depends on, by interval arithmetic down from the unit.

    U units · a box is an array (U, 3, 2): first and last + 1 along channels, rows and columns, in
              the order of the axes of the maps, which may be (N, H, W, C)

Fields are exact if boxes are clipped to the maps at every operation. Below an operation that has no
rule here, a unit is assumed to depend on everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from deconvnet.visualization.projection.autograd_graph import (
    IN_PLACE,
    LEAF,
    PART,
    Operation,
    inputs_of,
    operation_name,
    output_shape,
    pair,
)
from deconvnet.visualization.projection.map_axis import VIEWS, unflattened_shape
from deconvnet.visualization.projection.operations import (
    GATES,
    NORMALIZATIONS,
    NORMS,
    OTHER_RECTIFIERS,
    RECTIFIERS,
    SKIPPED,
    SPLITS,
    Operations,
)

Box = np.ndarray
Shapes = list[tuple[int, ...]]
# Beyond every position in every map.
FAR = 1 << 40


def trace_fields(
    operations: Operations, units: Box, x: Tensor, *, clip: bool = True, last: bool = False
) -> Box:
    """(U, 2, 2): for rows and columns, the first and last + 1 of the pixels that units can see.

    units: (U, 3), map, row and column in the output of the operations, which is (N, K, H, W) or, if
    `last`, (N, H, W, K). x: the leaf (N, C, H, W). clip: clip boxes to the maps at every operation,
    which makes the result exact. Otherwise the result is the field for all maps together: it has
    one size for all units and may reach beyond the image.
    """
    start = np.stack([units, units + 1], 2)
    start = start if clip else all_channels(start)
    start = np.roll(start, -1, 1) if last else start
    if len(output_shape(operations.order[0].node, operations.output)) == 3:  # tokens see it all
        start = _everything(start, ())
    boxes = {operations.order[0].node: {operations.output: start}}
    pixels = np.zeros_like(start)
    for op in operations.order:
        if op.node not in boxes:
            continue
        box = _join_outputs(op, boxes.pop(op.node))
        if op.name == LEAF:
            pixels = box if op.node.variable is x else pixels
            continue
        op = across_rearrangement(op)
        parts = input_boxes(op, box, output_shape(op.node, 0), operations.constant_statistics)
        for (below, nr), part in zip(op.inputs, parts, strict=True):
            if part is None:
                continue
            size = output_shape(below, nr)
            if clip and op.name in FOLDS:
                part = FOLDS[op.name](part, np.array(size[2:]))
            if len(size) == 4:
                part = bounded(part, size[1:], clip)
            outputs = boxes.setdefault(below, {})
            outputs[nr] = _union(outputs.get(nr), part)
    pixels = pixels[:, 1:]
    empty = (pixels[..., 1] <= pixels[..., 0]).any(1)
    return np.where(empty[:, None, None], 0, pixels)


def bounded(box: Box, size: tuple[int, ...], clip: bool) -> Box:
    """A box within maps of this size. If `clip` is false, only infinite ends are bounded."""
    limits = np.array(size)
    first = np.where((box[..., 0] < -FAR) | clip, box[..., 0].clip(0), box[..., 0])
    last = np.where((box[..., 1] > FAR) | clip, np.minimum(box[..., 1], limits), box[..., 1])
    return np.stack([first, last], 2)


def _join_outputs(op: Operation, outputs: dict[int, Box]) -> Box:
    """The box of all outputs of an operation, in the coordinates of the input if it is a split."""
    joined = None
    for nr, box in outputs.items():
        joined = _union(joined, unsplit(op, nr, box) if op.name in SPLITS else box)
    return joined


def _union(a: Box | None, b: Box) -> Box:
    if a is None:
        return b
    # A box is empty in a branch that does not lead to the channel of the unit.
    a_empty = (a[..., 1] <= a[..., 0]).any(1)[:, None, None]
    b_empty = (b[..., 1] <= b[..., 0]).any(1)[:, None, None]
    both = np.stack([np.minimum(a[..., 0], b[..., 0]), np.maximum(a[..., 1], b[..., 1])], 2)
    return np.where(a_empty, b, np.where(b_empty, a, both))


def input_boxes(
    op: Operation, box: Box, shape: tuple[int, ...], constant_statistics: bool
) -> list[Box | None]:
    """For every input of an operation, the box that a box of its output depends on."""
    rule = RULES.get(op.name) or _unknown
    if constant_statistics and op.name in NORMS and not _is_norm_of_channels(op):
        rule = elementwise
    shapes = [output_shape(node, nr) for node, nr in op.inputs]
    if op.name == "Convolution" and not op.is_convolution:
        rule = _unknown
    empty = (box[..., 1] <= box[..., 0]).any(1)[:, None, None]
    inputs = rule(op, box, shape, shapes)
    return [None if part is None else np.where(empty, 0, part) for part in inputs]


def _everything(box: Box, shape: tuple[int, ...]) -> Box:
    """All of some maps; a box without ends for anything else."""
    full = np.zeros_like(box)
    if len(shape) == 4:
        full[..., 1] = np.array(shape[1:])
    else:
        full[..., 0], full[..., 1] = -2 * FAR, 2 * FAR
    return full


def _unknown(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    return [_everything(box, below) for below in shapes]


def elementwise(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    """The same positions; in an input that is broadcast, its only position."""
    result = []
    for below in shapes:
        if below == shape:
            result.append(box)
            continue
        wide, narrow = np.array(shape[1:]), np.array(below[1:])
        if (len(shape), len(below)) != (4, 4) or ((narrow != wide) & (narrow != 1)).any():
            result.append(_everything(box, below))
        else:
            broadcast = (narrow == 1) & (wide != 1)
            result.append(np.where(broadcast[:, None], np.array([0, 1]), box))
    return result


def all_channels(box: Box) -> Box:
    box = box.copy()
    box[:, 0] = -2 * FAR, 2 * FAR
    return box


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
    return [all_channels(box)] if is_same else _unknown(op, box, shape, shapes)


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
            return _unknown(op, given, shape, shapes)
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


def _over_channels(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    """Sums, means and stacks along axes in front of rows and columns."""
    dims = op.saved("dim")
    dims = (dims,) if isinstance(dims, int) else dims or ()
    rank = max(len(shape), *map(len, shapes))
    is_in_front = dims and all(0 < dim % rank < rank - 2 for dim in dims)
    if min(len(shape), *map(len, shapes)) < 4 or not is_in_front:
        return _unknown(op, box, shape, shapes)
    return [all_channels(box) for _ in shapes]


def _transpose(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    rank = len(shape)
    if rank == 4 and 0 not in (op.saved("dim0") % rank, op.saved("dim1") % rank):
        axes = [0, 1, 2]
        one, other = (op.saved(key) % rank - 1 for key in ("dim0", "dim1"))
        axes[one], axes[other] = other, one
        return [box[:, axes]]
    if max(op.saved(key) % rank for key in ("dim0", "dim1")) >= rank - 2:
        return _unknown(op, box, shape, shapes)
    return _across_channels(op, box, shape, shapes)


def _permute(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    dims = [dim % len(shape) for dim in op.saved("dims")]
    if len(dims) == 4 and dims[0] == 0:
        return [box[:, np.argsort(dims[1:])]]
    if dims[-2:] != [len(shape) - 2, len(shape) - 1]:
        return _unknown(op, box, shape, shapes)
    return _across_channels(op, box, shape, shapes)


def _table(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    """A linear layer on maps (N, H, W, C): the same positions in all channels."""
    if len(shapes) != 1 or unflattened_shape(op.node) is None:
        return _unknown(op, box, shape, shapes)
    return [np.roll(all_channels(np.roll(box, 1, 1)), -1, 1)]


def _is_norm_of_channels(op: Operation) -> bool:
    """Whether each position has its own statistics, so that nothing beyond it is seen."""
    return op.name == "NativeLayerNorm" and len(op.saved("normalized_shape")) == 1


def _layer_norm(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    """All of the axes that are normalised, which are the last."""
    if len(shape) != 4 or len(shapes) != 1:
        return _unknown(op, box, shape, shapes)
    result = box.copy()
    result[:, 3 - min(3, len(op.saved("normalized_shape"))) :] = -2 * FAR, 2 * FAR
    return [result]


def _kernel_extent(
    box: Box, kernel: object, stride: object, padding: object, dilation: object
) -> Box:
    """The positions that kernels cover, for outputs at the rows and columns of a box."""
    kernel, stride, padding, dilation = map(np.array, (kernel, stride, padding, dilation))
    first = box[:, 1:, 0] * stride - padding
    last = (box[:, 1:, 1] - 1) * stride - padding + dilation * (kernel - 1)
    result = box.copy()
    result[:, 1:] = np.stack([first, last + 1], 2)
    return result


def _convolution(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    weight, groups = op.saved("weight"), op.saved("groups")
    kernel, stride = np.array(weight.shape[2:]), np.array(op.pair("stride"))
    padding, dilation = np.array(op.pair("padding")), np.array(op.pair("dilation"))
    if op.saved("transposed"):
        # Output o takes input i where o = i stride - padding + dilation tap.
        extent = dilation * (kernel - 1)
        first = -((extent - box[:, 1:, 0] - padding) // stride)
        last = (box[:, 1:, 1] - 1 + padding) // stride
        result = box.copy()
        result[:, 1:] = np.stack([first, last + 1], 2)
    else:
        result = _kernel_extent(box, kernel, stride, padding, dilation)
    inputs, outputs = shapes[0][1] // groups, shape[1] // groups
    group = np.stack([box[:, 0, 0] // outputs, (box[:, 0, 1] - 1) // outputs + 1], 1)
    result[:, 0] = group * inputs
    return [result, *(None for _ in shapes[1:])]


def _pool(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    kernel, dilation = op.pair("kernel_size"), op.saved("dilation") or (1, 1)
    stride = op.saved("stride") or kernel
    return [_kernel_extent(box, kernel, pair(stride), op.pair("padding"), pair(dilation))]


def _adaptive_pool(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    outputs, inputs = np.array(shape[2:]), np.array(shapes[0][2:])
    result = box.copy()
    first, last = box[:, 1:, 0] * inputs // outputs, -(-box[:, 1:, 1] * inputs // outputs)
    result[:, 1:] = np.stack([first, last], 2)
    return [result]


def zoom_of(op: Operation, shape: tuple, below: tuple) -> np.ndarray:
    """(2,): input positions per output position, by the given scale, not by rounded sizes."""
    scales = op.saved("scales_h"), op.saved("scales_w")
    axes = zip(scales, below[2:], shape[2:], strict=True)
    return np.array([1 / scale if scale else inputs / outputs for scale, inputs, outputs in axes])


def _nearest(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    # In single precision, as PyTorch computes positions; shifted by a half for "nearest-exact".
    zoom = zoom_of(op, shape, shapes[0]).astype(np.float32)
    ends = np.stack([box[:, 1:, 0], box[:, 1:, 1] - 1], 2).astype(np.float32)
    half = np.float32(0.5 if op.name == "UpsampleNearestExact2D" else 0)
    result = box.copy()
    result[:, 1:] = np.floor((ends + half) * zoom[:, None])
    result[:, 1:, 1] += 1
    return [result]


def _bilinear(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    outputs, inputs = np.array(shape[2:]), np.array(shapes[0][2:])
    ends = np.stack([box[:, 1:, 0], box[:, 1:, 1] - 1], 2).astype(float)
    if op.saved("align_corners"):
        positions = ends * ((inputs - 1) / np.maximum(outputs - 1, 1))[:, None]
    else:
        positions = np.maximum((ends + 0.5) * zoom_of(op, shape, shapes[0])[:, None] - 0.5, 0)
    result = box.copy()
    # A position on the grid does not depend on its neighbour, whatever rounding says.
    first, last = np.floor(positions[..., 0] + 1e-9), np.ceil(positions[..., 1] - 1e-9)
    result[:, 1:] = np.stack([first, last + 1], 2).astype(np.int64)
    return [result]


def _cat(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    dim = op.saved("dim") % max(len(shape), 1)
    is_complete = len(op.inputs) == len(op.node.next_functions)
    if len(shape) != 4 or dim == 0 or not is_complete:
        return _unknown(op, box, shape, shapes)
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
        return [box] if len(shape) == 4 else _unknown(op, box, shape, shapes)
    start = min(max(start + shapes[0][dim], 0) if start < 0 else start, shapes[0][dim])
    result = box.copy()
    first, last = box[:, dim - 1, 0] * step, (box[:, dim - 1, 1] - 1) * step
    result[:, dim - 1] = start + np.stack([first, last + 1], 1)
    return [result]


def unsplit(op: Operation, nr: int, box: Box) -> Box:
    """A box of one output of a split, in the coordinates of the input."""
    below, below_nr = op.inputs[0]
    shape = output_shape(below, below_nr)
    dim, size = op.saved("dim"), op.saved("split_size") or op.saved("split_sizes")
    if dim is None or size is None or len(shape) != 4 or dim % 4 == 0:
        return _everything(box, shape)
    box = box.copy()
    box[:, dim % 4 - 1] += nr * size if isinstance(size, int) else sum(size[:nr])
    return box


def _same(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    return [box for _ in shapes]


def _pad(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    pad = op.saved("pad") or op.saved("padding") or ()
    if len(shape) != 4 or len(pad) > 6:
        return _unknown(op, box, shape, shapes)
    result = box.copy()
    # Pairs of before and after, from the last dimension on.
    for axis, before in zip((2, 1, 0), pad[::2], strict=False):
        result[:, axis] -= before
    return [result]


def _reflected(box: Box, size: np.ndarray) -> Box:
    """A box that reaches beyond maps of this size, extended to the positions mirrored there."""
    first, last, result = box[:, 1:, 0], box[:, 1:, 1], box.copy()
    # Positions inside, in front of and behind the maps; empty parts do not count.
    parts = [
        (np.maximum(first, 0), np.minimum(last, size)),
        (1 - np.minimum(last, 0), 1 - first),
        (2 * size - 1 - last, 2 * size - 1 - np.maximum(first, size)),
    ]
    starts = [np.where(start < stop, start, FAR) for start, stop in parts]
    stops = [np.where(start < stop, stop, -FAR) for start, stop in parts]
    result[:, 1:] = np.stack([np.minimum.reduce(starts), np.maximum.reduce(stops)], 2)
    return result


def _repeated(box: Box, size: np.ndarray) -> Box:
    """A box that reaches beyond maps of this size, extended to the border repeated there."""
    result = box.copy()
    result[:, 1:, 0] = np.minimum(box[:, 1:, 0], size - 1)
    result[:, 1:, 1] = np.maximum(box[:, 1:, 1], 1)
    return result


FOLDS = {"ReflectionPad2D": _reflected, "ReplicationPad2D": _repeated}


def _in_place(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    # The part belongs to the first input; if nothing is copied in, positions stay the same.
    if len(op.node.next_functions) == 1 and len(shape) == 4:
        return [all_channels(box)]
    # Maps are added to some of the maps.
    size, stride, start = op.node.metadata.get(PART, ((), (), 0))
    corner = _corner(size, stride, start, shape)
    if corner is None or op.node.metadata[IN_PLACE] or size[2:] != shape[2:]:
        return _unknown(op, box, shape, shapes)
    moved = box.copy()
    moved[:, 0] = (box[:, 0] - corner[0]).clip(0, size[1])
    whole = [node is not None for node, _ in op.node.next_functions][0]
    added = shapes[1:] if whole else shapes
    parts = [moved if below == size else _everything(box, below) for below in added]
    return [box] * whole + parts


def _as_strided(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    """A part of maps, after an operation in place on it."""
    corner = _corner(shape, op.saved("stride"), op.saved("storage_offset") or 0, shapes[0])
    if corner is None:
        return _unknown(op, box, shape, shapes)
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


# What rearranges maps by way of more axes.
MOVED = VIEWS | {"Permute", "Transpose", "Clone", "Contiguous"}
REARRANGED = "rearranged"

RULES: dict[str, Callable[[Operation, Box, tuple, Shapes], list[Box | None]]] = {
    **dict.fromkeys(RECTIFIERS | OTHER_RECTIFIERS | GATES, elementwise),
    **dict.fromkeys(NORMALIZATIONS | {"Add", "Sub", "Rsub", "Neg", "Mul", "Div"}, elementwise),
    "Addcmul": elementwise,
    **dict.fromkeys(("Sum", "Mean", "Stack"), _over_channels),
    **dict.fromkeys(("Clone", "Alias", "ToCopy", "Expand", "Contiguous", "Copy"), elementwise),
    **dict.fromkeys(("Softplus", "Tanh"), elementwise),
    **dict.fromkeys(("View", "UnsafeView", "Reshape", "ReshapeAlias"), _across_channels),
    **dict.fromkeys(("ChannelShuffle", "NativeChannelShuffle"), _across_channels),
    **dict.fromkeys(SPLITS, _same),
    **dict.fromkeys(("UpsampleNearest2D", "UpsampleNearestExact2D"), _nearest),
    **dict.fromkeys(("AdaptiveAvgPool2D", "AdaptiveMaxPool2D"), _adaptive_pool),
    **dict.fromkeys(("MaxPool2DWithIndices", "AvgPool2D"), _pool),
    SKIPPED: _across_channels,
    "Convolution": _convolution,
    **dict.fromkeys(("Addmm", "Mm"), _table),
    "NativeLayerNorm": _layer_norm,
    "Transpose": _transpose,
    "Permute": _permute,
    "UpsampleBilinear2D": _bilinear,
    "Cat": _cat,
    REARRANGED: _rearranged,
    "PixelShuffle": _pixel_shuffle,
    "PixelUnshuffle": _pixel_unshuffle,
    "Slice": _slice,
    **dict.fromkeys(("ConstantPadNd", "ReflectionPad2D", "ReplicationPad2D"), _pad),
    IN_PLACE: _in_place,
    "AsStrided": _as_strided,
}
