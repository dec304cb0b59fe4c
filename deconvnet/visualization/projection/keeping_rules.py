"""What operations depend on that leave axes as they are: convolutions, pooling, resizing, padding.

A rule gives, for a box of the output of an operation, a box in each of its inputs: `box` (U, 3, 2),
`shape` of the output, `shapes` of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deconvnet.visualization.projection.autograd_graph import Operation, pair
from deconvnet.visualization.projection.field_boxes import (
    FAR,
    Box,
    Shapes,
    all_channels,
    everything,
    unknown,
)
from deconvnet.visualization.projection.map_axis import unflattened_shape
from deconvnet.visualization.projection.operations import (
    GATES,
    NORMALIZATIONS,
    OTHER_RECTIFIERS,
    RECTIFIERS,
)


def elementwise(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    """The same positions; in an input that is broadcast, its only position."""
    result = []
    for below in shapes:
        if below == shape:
            result.append(box)
            continue
        wide, narrow = np.array(shape[1:]), np.array(below[1:])
        if (len(shape), len(below)) != (4, 4) or ((narrow != wide) & (narrow != 1)).any():
            result.append(everything(box, below))
        else:
            broadcast = (narrow == 1) & (wide != 1)
            result.append(np.where(broadcast[:, None], np.array([0, 1]), box))
    return result


def _over_channels(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    """Sums, means and stacks along axes in front of rows and columns."""
    dims = op.saved("dim")
    dims = (dims,) if isinstance(dims, int) else dims or ()
    rank = max(len(shape), *map(len, shapes))
    is_in_front = dims and all(0 < dim % rank < rank - 2 for dim in dims)
    if min(len(shape), *map(len, shapes)) < 4 or not is_in_front:
        return unknown(op, box, shape, shapes)
    return [all_channels(box) for _ in shapes]


def _table(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    """A linear layer on maps (N, H, W, C): the same positions in all channels."""
    if len(shapes) != 1 or unflattened_shape(op.node) is None:
        return unknown(op, box, shape, shapes)
    return [np.roll(all_channels(np.roll(box, 1, 1)), -1, 1)]


def is_norm_of_channels(op: Operation) -> bool:
    """Whether each position has its own statistics, so that nothing beyond it is seen."""
    return op.name == "NativeLayerNorm" and len(op.saved("normalized_shape")) == 1


def _layer_norm(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    """All of the axes that are normalised, which are the last."""
    if len(shape) != 4 or len(shapes) != 1:
        return unknown(op, box, shape, shapes)
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


def _pad(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    pad = op.saved("pad") or op.saved("padding") or ()
    if len(shape) != 4 or len(pad) > 6:
        return unknown(op, box, shape, shapes)
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


# What padding that repeats pixels adds to boxes that reach beyond the maps.
FOLDS = {"ReflectionPad2D": _reflected, "ReplicationPad2D": _repeated}

KEEPING: dict[str, Callable[[Operation, Box, tuple, Shapes], list[Box | None]]] = {
    **dict.fromkeys(RECTIFIERS | OTHER_RECTIFIERS | GATES, elementwise),
    **dict.fromkeys(NORMALIZATIONS | {"Add", "Sub", "Rsub", "Neg", "Mul", "Div"}, elementwise),
    "Addcmul": elementwise,
    **dict.fromkeys(("Sum", "Mean", "Stack"), _over_channels),
    **dict.fromkeys(("Clone", "Alias", "ToCopy", "Expand", "Contiguous", "Copy"), elementwise),
    **dict.fromkeys(("Softplus", "Tanh"), elementwise),
    **dict.fromkeys(("UpsampleNearest2D", "UpsampleNearestExact2D"), _nearest),
    **dict.fromkeys(("AdaptiveAvgPool2D", "AdaptiveMaxPool2D"), _adaptive_pool),
    **dict.fromkeys(("MaxPool2DWithIndices", "AvgPool2D"), _pool),
    "Convolution": _convolution,
    **dict.fromkeys(("Addmm", "Mm"), _table),
    "NativeLayerNorm": _layer_norm,
    "UpsampleBilinear2D": _bilinear,
    **dict.fromkeys(("ConstantPadNd", "ReflectionPad2D", "ReplicationPad2D"), _pad),
}
