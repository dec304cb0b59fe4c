"""What a unit of a network can see of the image: interval arithmetic from the unit to the pixels.

    U units · a box is an array (U, 3, 2): for channels, rows and columns the first and last + 1,
              in the order of the axes of what it is a part of, which may be (N, H, W, C)

Clipped to the maps at every operation the field of a unit is exact. Behind an operation that has no
rule here a unit is taken to see everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.autograd.graph import Node

from deconvnet.visualization.projection.autograd_graph import (
    GATES,
    IN_PLACE,
    LEAF,
    NORMALIZATIONS,
    OTHER_RECTIFIERS,
    RECTIFIERS,
    SKIPPED,
    SPLITS,
    Operation,
    Operations,
    gates_of,
    inputs_of,
    operation_name,
    output_shape,
    pair,
    skip_moves,
    topological_order,
)
from deconvnet.visualization.projection.map_axis import VIEWS, MapAxes, unflattened_shape

Box = np.ndarray
Shapes = list[tuple[int, ...]]
# Beyond every place in every map.
FAR = 1 << 40


def trace_fields(
    found: Operations, units: Box, x: Tensor, *, clip: bool = True, last: bool = False
) -> Box:
    """(U, 2, 2): rows and columns of the pixels that units can see, the first and last + 1.

    units: (U, 3), map, row and column of each in what the operations lead to, (N, K, H, W) or, if
    `last`, (N, H, W, K). x: the leaf (N, C, H, W). Clipped to the maps at every operation the
    result is exact. Without, it is that of all maps together: of one size for all units, and it may
    reach beyond the image. Behind an operation that is not known here a unit is taken to see
    everything.
    """
    start = np.stack([units, units + 1], 2)
    start = start if clip else _all_channels(start)
    start = np.roll(start, -1, 1) if last else start
    boxes = {found.order[0].node: {found.output: start}}
    pixels = np.zeros_like(start)
    for op in found.order:
        if op.node not in boxes:
            continue
        box = _joined(op, boxes.pop(op.node))
        if op.name == LEAF:
            pixels = box if op.node.variable is x else pixels
            continue
        for (below, nr), seen in zip(
            op.inputs, _seen(op, box, output_shape(op.node, 0)), strict=True
        ):
            if seen is None:
                continue
            size = output_shape(below, nr)
            if clip and op.name in FOLDS:
                seen = FOLDS[op.name](seen, np.array(size[2:]))
            if len(size) == 4:
                seen = _bounded(seen, size[1:], clip)
            asked = boxes.setdefault(below, {})
            asked[nr] = _union(asked.get(nr), seen)
    pixels = pixels[:, 1:]
    empty = (pixels[..., 1] <= pixels[..., 0]).any(1)
    return np.where(empty[:, None, None], 0, pixels)


@dataclass(frozen=True)
class FieldGeometry:
    """The pixels that units on a regular grid see, (rows, columns): `size` of them from
    first + stride * unit on, borders left aside. A stride of 0: all units see the same."""

    first: tuple[int, int]
    size: tuple[int, int]
    stride: tuple[int, int]


class FieldGeometries:
    """The lattices of what the operations of one forward pass give, each looked at once."""

    def __init__(self, x: Tensor, *, constant_gates: bool = False):
        self.x, self.constant_gates = x, constant_gates
        self._known: dict[Node, np.ndarray | None] = {}
        self._layouts = MapAxes()

    def of(self, node: Node) -> FieldGeometry | None:
        """That of the output of a node; None where it does not depend on the image."""
        for op in reversed(topological_order(node, self._known)):
            if op.node not in self._known:
                self._known[op.node] = self._pixels(op)
        pixels = self._known[node]
        if pixels is None:
            return None
        first, second = pixels[0], pixels[1]
        stride = second[:, 0] - first[:, 0]
        each = first[:, 0], first[:, 1] - first[:, 0], stride
        return FieldGeometry(*(tuple(values.tolist()) for values in each))

    def _pixels(self, op: Operation) -> np.ndarray | None:
        """(2, 2, 2): of two neighbouring units the rows and columns, the first and last + 1."""
        if op.name == LEAF:
            units = np.array([0, 1])[:, None, None] + np.array([0, 1])
            return units.repeat(2, 1) if op.node.variable is self.x else None
        units = _all_channels(np.array([[0, 0, 0], [0, 1, 1]])[..., None] + np.array([0, 1]))
        units = np.roll(units, -1, 1) if self._is_last(op.node) else units
        gates = gates_of(op) if self.constant_gates else ()
        whole = None
        seen = _seen(op, units, output_shape(op.node, 0))
        for (below, nr), box in zip(op.inputs, seen, strict=True):
            known = self._known.get(below)
            if box is None or known is None or skip_moves(below) in gates:
                continue
            size = output_shape(below, nr)
            box = _bounded(box, size[1:], False) if len(size) == 4 else box
            if operation_name(below) in SPLITS:
                box = _unsplit(Operation(below, operation_name(below), inputs_of(below)), nr, box)
            box = box[:, :2] if self._is_last(below) else box[:, 1:]
            # Where what is below has no places, all of it is seen.
            box = np.where(np.abs(box) > FAR, np.array([0, 1]), box)
            stride = known[1, :, 0] - known[0, :, 0]
            first, last = (
                known[0, :, 0] + stride * box[..., 0],
                known[0, :, 1] + stride * (box[..., 1] - 1),
            )
            pixels = np.stack([first, last], 2)
            whole = pixels if whole is None else _hull(whole, pixels)
        return whole

    def _is_last(self, node: Node) -> bool:
        return self._layouts.last(node) or unflattened_shape(node) is not None


def _hull(a: Box, b: Box) -> Box:
    return np.stack([np.minimum(a[..., 0], b[..., 0]), np.maximum(a[..., 1], b[..., 1])], 2)


def _bounded(box: Box, size: tuple[int, ...], clip: bool) -> Box:
    """A box within maps of this size; unless it is to be clipped, only where it has no end."""
    limits = np.array(size)
    first = np.where((box[..., 0] < -FAR) | clip, box[..., 0].clip(0), box[..., 0])
    last = np.where((box[..., 1] > FAR) | clip, np.minimum(box[..., 1], limits), box[..., 1])
    return np.stack([first, last], 2)


def _joined(op: Operation, asked: dict[int, Box]) -> Box:
    """What is asked of an operation, in the coordinates of what it was given where it splits."""
    whole = None
    for nr, box in asked.items():
        whole = _union(whole, _unsplit(op, nr, box) if op.name in SPLITS else box)
    return whole


def _union(a: Box | None, b: Box) -> Box:
    if a is None:
        return b
    # An empty box, of a branch that the channel of a unit does not take, adds nothing.
    a_empty = (a[..., 1] <= a[..., 0]).any(1)[:, None, None]
    b_empty = (b[..., 1] <= b[..., 0]).any(1)[:, None, None]
    both = np.stack([np.minimum(a[..., 0], b[..., 0]), np.maximum(a[..., 1], b[..., 1])], 2)
    return np.where(a_empty, b, np.where(b_empty, a, both))


def _seen(op: Operation, box: Box, shape: tuple[int, ...]) -> list[Box | None]:
    """Of every input of an operation the part that a box of its result depends on."""
    rule = RULES.get(op.name) or _unknown
    shapes = [output_shape(node, nr) for node, nr in op.inputs]
    if op.name == "Convolution" and not op.is_convolution:
        rule = _unknown
    empty = (box[..., 1] <= box[..., 0]).any(1)[:, None, None]
    seen = rule(op, box, shape, shapes)
    return [None if part is None else np.where(empty, 0, part) for part in seen]


def _everything(box: Box, shape: tuple[int, ...]) -> Box:
    """All of some maps; of what is no maps, without an end."""
    full = np.zeros_like(box)
    if len(shape) == 4:
        full[..., 1] = np.array(shape[1:])
    else:
        full[..., 0], full[..., 1] = -2 * FAR, 2 * FAR
    return full


def _unknown(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    return [_everything(box, below) for below in shapes]


def _elementwise(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    """The same places; of an input that was broadcast, its only one."""
    seen = []
    for below in shapes:
        if below == shape:
            seen.append(box)
            continue
        wide, narrow = np.array(shape[1:]), np.array(below[1:])
        if (len(shape), len(below)) != (4, 4) or ((narrow != wide) & (narrow != 1)).any():
            seen.append(_everything(box, below))
        else:
            broadcast = (narrow == 1) & (wide != 1)
            seen.append(np.where(broadcast[:, None], np.array([0, 1]), box))
    return seen


def _all_channels(box: Box) -> Box:
    box = box.copy()
    box[:, 0] = -2 * FAR, 2 * FAR
    return box


def _across_channels(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    """The same places in all channels, where the last two dimensions are left alone."""
    below = shapes[0]
    if below == shape and op.name in VIEWS:
        return [box]
    node = op.inputs[0][0] if len(below) == 2 else op.node
    if {len(shape), len(below)} == {2, 4} and unflattened_shape(node) == max(shape, below, key=len)[
        :3
    ]:
        return [box]
    kept = min(len(shape), len(below)) > 3 and below[-2:] == shape[-2:]
    return [_all_channels(box)] if kept else _unknown(op, box, shape, shapes)


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
    """A linear layer on maps (N, H, W, C): the same places in all channels."""
    if len(shapes) != 1 or unflattened_shape(op.node) is None:
        return _unknown(op, box, shape, shapes)
    return [np.roll(_all_channels(np.roll(box, 1, 1)), -1, 1)]


def _layer_norm(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    """All of the axes that are normalised, which are the last ones."""
    if len(shape) != 4 or len(shapes) != 1:
        return _unknown(op, box, shape, shapes)
    seen = box.copy()
    seen[:, 3 - min(3, len(op.saved("normalized_shape"))) :] = -2 * FAR, 2 * FAR
    return [seen]


def _window(box: Box, kernel: object, stride: object, padding: object, dilation: object) -> Box:
    """What windows at the rows and columns of a box cover."""
    kernel, stride, padding, dilation = map(np.array, (kernel, stride, padding, dilation))
    first = box[:, 1:, 0] * stride - padding
    last = (box[:, 1:, 1] - 1) * stride - padding + dilation * (kernel - 1)
    seen = box.copy()
    seen[:, 1:] = np.stack([first, last + 1], 2)
    return seen


def _convolution(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    weight, groups = op.saved("weight"), op.saved("groups")
    kernel, stride = np.array(weight.shape[2:]), np.array(op.pair("stride"))
    padding, dilation = np.array(op.pair("padding")), np.array(op.pair("dilation"))
    if op.saved("transposed"):
        # Output o takes input i where o = i stride - padding + dilation tap.
        reach = dilation * (kernel - 1)
        first = -((reach - box[:, 1:, 0] - padding) // stride)
        last = (box[:, 1:, 1] - 1 + padding) // stride
        seen = box.copy()
        seen[:, 1:] = np.stack([first, last + 1], 2)
    else:
        seen = _window(box, kernel, stride, padding, dilation)
    given, made = shapes[0][1] // groups, shape[1] // groups
    group = np.stack([box[:, 0, 0] // made, (box[:, 0, 1] - 1) // made + 1], 1)
    seen[:, 0] = group * given
    return [seen, *(None for _ in shapes[1:])]


def _pool(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    kernel, dilation = op.pair("kernel_size"), op.saved("dilation") or (1, 1)
    stride = op.saved("stride") or kernel
    return [_window(box, kernel, pair(stride), op.pair("padding"), pair(dilation))]


def _adaptive_pool(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    out, given = np.array(shape[2:]), np.array(shapes[0][2:])
    seen = box.copy()
    first, last = box[:, 1:, 0] * given // out, -(-box[:, 1:, 1] * given // out)
    seen[:, 1:] = np.stack([first, last], 2)
    return [seen]


def _zoom(op: Operation, shape: tuple, below: tuple) -> np.ndarray:
    """(2,): places of the maps below to one of the maps; as given, not as sizes were rounded."""
    given = zip((op.saved("scales_h"), op.saved("scales_w")), below[2:], shape[2:], strict=True)
    return np.array([1 / scale if scale else size / out for scale, size, out in given])


def _nearest(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    # In single precision, as PyTorch finds the places; half a place on for "nearest-exact".
    zoom = _zoom(op, shape, shapes[0]).astype(np.float32)
    ends = np.stack([box[:, 1:, 0], box[:, 1:, 1] - 1], 2).astype(np.float32)
    half = np.float32(0.5 if op.name == "UpsampleNearestExact2D" else 0)
    seen = box.copy()
    seen[:, 1:] = np.floor((ends + half) * zoom[:, None])
    seen[:, 1:, 1] += 1
    return [seen]


def _bilinear(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    out, given = np.array(shape[2:]), np.array(shapes[0][2:])
    ends = np.stack([box[:, 1:, 0], box[:, 1:, 1] - 1], 2).astype(float)
    if op.saved("align_corners"):
        places = ends * ((given - 1) / np.maximum(out - 1, 1))[:, None]
    else:
        places = np.maximum((ends + 0.5) * _zoom(op, shape, shapes[0])[:, None] - 0.5, 0)
    seen = box.copy()
    # A place on the grid takes nothing of its neighbour; rounding must not say so by accident.
    first, last = np.floor(places[..., 0] + 1e-9), np.ceil(places[..., 1] - 1e-9)
    seen[:, 1:] = np.stack([first, last + 1], 2).astype(np.int64)
    return [seen]


def _cat(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    dim = op.saved("dim") % max(len(shape), 1)
    whole = len(op.inputs) == len(op.node.next_functions)
    if len(shape) != 4 or dim == 0 or not whole:
        return _unknown(op, box, shape, shapes)
    seen, start = [], 0
    for below in shapes:
        part = box.copy()
        part[:, dim - 1] = (box[:, dim - 1] - start).clip(0, below[dim])
        seen.append(part)
        start += below[dim]
    return seen


def _slice(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    dim, start, step = (op.saved(key) or 0 for key in ("dim", "start", "step"))
    dim %= len(shape)
    if len(shape) != 4 or dim == 0:
        return [box] if len(shape) == 4 else _unknown(op, box, shape, shapes)
    start = min(max(start + shapes[0][dim], 0) if start < 0 else start, shapes[0][dim])
    seen = box.copy()
    first, last = box[:, dim - 1, 0] * step, (box[:, dim - 1, 1] - 1) * step
    seen[:, dim - 1] = start + np.stack([first, last + 1], 1)
    return [seen]


def _unsplit(op: Operation, nr: int, box: Box) -> Box:
    """A box of one part of a split in the coordinates of the whole."""
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
    seen = box.copy()
    # Pairs of before and after, from the last dimension on.
    for axis, before in zip((2, 1, 0), pad[::2], strict=False):
        seen[:, axis] -= before
    return [seen]


def _reflected(box: Box, size: np.ndarray) -> Box:
    """A box that reaches beyond maps of this size, with the places that are mirrored there."""
    first, last, seen = box[:, 1:, 0], box[:, 1:, 1], box.copy()
    # Places within, before and behind the maps; what has no places in it does not count.
    parts = [
        (np.maximum(first, 0), np.minimum(last, size)),
        (1 - np.minimum(last, 0), 1 - first),
        (2 * size - 1 - last, 2 * size - 1 - np.maximum(first, size)),
    ]
    starts = [np.where(start < stop, start, FAR) for start, stop in parts]
    stops = [np.where(start < stop, stop, -FAR) for start, stop in parts]
    seen[:, 1:] = np.stack([np.minimum.reduce(starts), np.maximum.reduce(stops)], 2)
    return seen


def _repeated(box: Box, size: np.ndarray) -> Box:
    """A box that reaches beyond maps of this size, with the border that is repeated there."""
    seen = box.copy()
    seen[:, 1:, 0] = np.minimum(box[:, 1:, 0], size - 1)
    seen[:, 1:, 1] = np.maximum(box[:, 1:, 1], 1)
    return seen


FOLDS = {"ReflectionPad2D": _reflected, "ReplicationPad2D": _repeated}


def _in_place(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    # On a part of the first input: with nothing copied in from elsewhere it stays in its place.
    if len(op.node.next_functions) == 1 and len(shape) == 4:
        return [_all_channels(box)]
    return _unknown(op, box, shape, shapes)


RULES: dict[str, Callable[[Operation, Box, tuple, Shapes], list[Box | None]]] = {
    **dict.fromkeys(RECTIFIERS | OTHER_RECTIFIERS | GATES, _elementwise),
    **dict.fromkeys(NORMALIZATIONS | {"Add", "Sub", "Rsub", "Neg", "Mul", "Div"}, _elementwise),
    **dict.fromkeys(("Clone", "Alias", "ToCopy", "Expand", "Contiguous", "Copy"), _elementwise),
    **dict.fromkeys(("Gelu", "Silu", "Hardswish", "Mish", "Softplus", "Tanh"), _elementwise),
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
    "Slice": _slice,
    **dict.fromkeys(("ConstantPadNd", "ReflectionPad2D", "ReplicationPad2D"), _pad),
    IN_PLACE: _in_place,
}
