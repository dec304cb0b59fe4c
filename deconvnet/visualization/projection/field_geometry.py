"""The receptive fields of all units of a layer as a grid: where the first begins, how large they
are, and how far apart.

The rules of `receptive_fields` are applied to neighbouring units. Above upsampling, units next to
each other may see the same pixels, so the fields of a row of units repeat after several units; they
are followed for one such period.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from torch import Tensor
from torch.autograd.graph import Node

from deconvnet.visualization.projection.autograd_graph import (
    LEAF,
    Operation,
    inputs_of,
    operation_name,
    output_shape,
    topological_order,
)
from deconvnet.visualization.projection.field_boxes import FAR, all_channels, bounded
from deconvnet.visualization.projection.keeping_rules import elementwise, zoom_of
from deconvnet.visualization.projection.map_axis import MapAxes, unflattened_shape
from deconvnet.visualization.projection.moving_rules import across_rearrangement, unsplit
from deconvnet.visualization.projection.operations import SPLITS, gates_of, skip_moves
from deconvnet.visualization.projection.receptive_fields import RULES, input_boxes

# Fields that repeat after more units than this are taken to be the whole image.
LONGEST_PERIOD = 512
RESIZED = {
    *("UpsampleNearest2D", "UpsampleNearestExact2D", "UpsampleBilinear2D"),
    *("AdaptiveAvgPool2D", "AdaptiveMaxPool2D"),
}
# Operations whose units depend on the units in the same place.
KEEPING_PLACES = {name for name, rule in RULES.items() if rule is elementwise}


@dataclass(frozen=True)
class FieldGeometry:
    """The receptive fields of units on a regular grid, along (rows, columns), ignoring borders.

    Unit n sees at most `size` pixels, starting at floor(offset + stride * n); above upsampling,
    offset and stride may be fractions. With stride 0, all units see the same pixels.
    """

    offset: tuple[int | Fraction, int | Fraction]
    size: tuple[int, int]
    stride: tuple[int | Fraction, int | Fraction]


class FieldGeometries:
    """The field geometries of the outputs of all operations of one forward pass, computed once.

    x: the leaf. constant_gates: gates of products do not count, as they are constants.
    constant_statistics: nor do the statistics of normalisation.
    """

    def __init__(
        self, x: Tensor, *, constant_gates: bool = False, constant_statistics: bool = False
    ):
        self.x, self.constant_gates = x, constant_gates
        self.constant_statistics = constant_statistics
        self._cache: dict[Node, list[_Axis] | None] = {}
        self._map_axes = MapAxes()

    def at(self, node: Node) -> FieldGeometry | None:
        """The geometry for the output of a node; None if it does not depend on the image."""
        for op in reversed(topological_order(node, self._cache)):
            if op.node not in self._cache:
                self._cache[op.node] = self._pixels(op)
        axes = self._cache[node]
        if axes is None:
            return None
        return FieldGeometry(*zip(*(axis.geometry() for axis in axes), strict=True))

    def _pixels(self, op: Operation) -> list[_Axis] | None:
        """The fields of the units of an operation, along rows and columns."""
        if op.name == LEAF:
            pixel = _Axis(np.array([0]), np.array([1]), 1)
            return [pixel, pixel] if op.node.variable is self.x else None
        op = across_rearrangement(op)
        if self._keeps_places(op):
            return self._cache.get(op.inputs[0][0])
        periods = _periods(op)
        # Interpolation treats the first units in a special way.
        starts = [period if period > 1 else 0 for period in periods]
        places = np.arange(max(periods) + 1)[:, None] + np.array([[0, *starts]])
        units = all_channels(places[..., None] + np.array([0, 1]))
        units = np.roll(units, -1, 1) if self._is_last(op.node) else units
        gates = gates_of(op) if self.constant_gates else ()
        pixels = None
        boxes = input_boxes(op, units, output_shape(op.node, 0), self.constant_statistics)
        for (below, nr), box in zip(op.inputs, boxes, strict=True):
            fields = self._cache.get(below)
            if box is None or fields is None or skip_moves(below) in gates:
                continue
            size = output_shape(below, nr)
            box = bounded(box, size[1:], False) if len(size) == 4 else box
            if operation_name(below) in SPLITS:
                box = unsplit(Operation(below, operation_name(below), inputs_of(below)), nr, box)
            box = box[:, :2] if self._is_last(below) else box[:, 1:]
            # If the input has no positions, all of it is seen.
            box = np.where(np.abs(box) > FAR, np.array([0, 1]), box)
            branch = [
                field.below(box[: period + 1, axis], start) or self._all(axis)
                for axis, (field, period, start) in enumerate(
                    zip(fields, periods, starts, strict=True)
                )
            ]
            pixels = branch if pixels is None else self._union(pixels, branch)
        return pixels

    def _keeps_places(self, op: Operation) -> bool:
        """Whether each unit depends only on the unit in its place, as in a rectifier."""
        if op.name not in KEEPING_PLACES or len(op.inputs) != 1:
            return False
        below, nr = op.inputs[0]
        return (
            operation_name(below) not in SPLITS
            and len(output_shape(below, nr)) == 4
            and output_shape(below, nr) == output_shape(op.node, 0)
            and self._is_last(below) == self._is_last(op.node)
        )

    def _union(self, one: list[_Axis], other: list[_Axis]) -> list[_Axis]:
        pairs = zip(one, other, strict=True)
        return [a.joined(b) or self._all(axis) for axis, (a, b) in enumerate(pairs)]

    def _all(self, axis: int) -> _Axis:
        return _Axis(np.array([0]), np.array([self.x.shape[2 + axis]]), 0)

    def _is_last(self, node: Node) -> bool:
        return self._map_axes.is_last(node) or unflattened_shape(node) is not None


@dataclass(frozen=True)
class _Axis:
    """The fields of units along one axis, ignoring borders, which repeat after P units.

    Unit n < P sees the pixels from first[n] to last[n], exclusive; unit n + P sees those `shift`
    pixels further.
    """

    first: np.ndarray
    last: np.ndarray
    shift: int

    @property
    def period(self) -> int:
        return len(self.first)

    def of(self, box: np.ndarray) -> np.ndarray:
        """(n, 2): the first and last + 1 of the pixels that some units (n, 2) see."""
        turns, phases = np.divmod(box - np.array([0, 1]), self.period)
        return np.stack([self.first, self.last])[[0, 1], phases] + self.shift * turns

    def below(self, boxes: np.ndarray, start: int) -> _Axis | None:
        """The fields of the units above, where unit `start` + n depends on the units boxes[n].

        boxes: (Q + 1, 2), where the last is the first of the next period. None if the result has
        too long a period.
        """
        Q, step = len(boxes) - 1, int(boxes[-1, 0] - boxes[0, 0])
        turns = self.period // math.gcd(self.period, step)
        if Q * turns > LONGEST_PERIOD:
            return None
        cycle, phase = np.divmod(np.arange(Q * turns) - start, Q)
        pixels = self.of(boxes[phase] + step * cycle[:, None])
        shift = self.shift * (step * turns // self.period)
        if shift == 0:
            return _Axis(pixels[:, 0].min(keepdims=True), pixels[:, 1].max(keepdims=True), 0)
        return _Axis(pixels[:, 0], pixels[:, 1], shift)

    def joined(self, other: _Axis) -> _Axis | None:
        """The fields of units that see what both see; None if their steps differ."""
        period = math.lcm(self.period, other.period)
        parts = [axis.repeated(period // axis.period) for axis in (self, other)]
        if parts[0].shift != parts[1].shift or period > LONGEST_PERIOD:
            return None
        first = np.minimum(parts[0].first, parts[1].first)
        return _Axis(first, np.maximum(parts[0].last, parts[1].last), parts[0].shift)

    def repeated(self, count: int) -> _Axis:
        turns = self.shift * np.arange(count).repeat(self.period)
        first, last = (np.tile(ends, count) + turns for ends in (self.first, self.last))
        return _Axis(first, last, self.shift * count)

    def geometry(self) -> tuple[Fraction | int, int, Fraction | int]:
        """Offset, size and stride, as in `FieldGeometry`."""
        P = self.period
        moves = self.shift * np.arange(P)
        # The largest offset, in units of 1 / P, for which no field begins before its start.
        offset = int((P * self.first - moves).min()) + P - 1
        size = int((self.last - (offset + moves) // P).max())
        offset, stride = _whole(Fraction(offset, P)), _whole(Fraction(self.shift, P))
        return math.floor(offset) if isinstance(stride, int) else offset, size, stride


def _whole(number: Fraction) -> Fraction | int:
    return int(number) if number.denominator == 1 else number


def _periods(op: Operation) -> tuple[int, int]:
    """After how many rows and columns the positions that units depend on repeat."""
    if op.name == "Convolution" and op.is_convolution and op.saved("transposed"):
        return op.pair("stride")
    if op.name == "PixelShuffle":
        return (int(op.saved("upscale_factor")),) * 2
    if op.name in RESIZED:
        shape, below = output_shape(op.node, 0), output_shape(*op.inputs[0])
        return tuple(step.denominator for step in _steps(op, shape, below))
    return 1, 1


def _steps(op: Operation, shape: tuple, below: tuple) -> list[Fraction]:
    """Input positions per output position of an operation that resizes maps, as fractions."""
    sizes = list(zip(below[2:], shape[2:], strict=True))
    if op.saved("align_corners"):
        return [Fraction(inputs - 1, max(outputs - 1, 1)) for inputs, outputs in sizes]
    if op.name.startswith("Adaptive"):
        return [Fraction(*size) for size in sizes]
    return [Fraction(step).limit_denominator(LONGEST_PERIOD) for step in zoom_of(op, shape, below)]
