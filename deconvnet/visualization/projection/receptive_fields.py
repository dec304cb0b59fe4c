"""Receptive fields: the pixels that a unit depends on, by interval arithmetic down from the unit.

Fields are exact if boxes are clipped to the maps at every operation. Below an operation that has no
rule (`keeping_rules`, `moving_rules`), a unit is assumed to depend on everything.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from deconvnet.visualization.projection.autograd_graph import LEAF, Operation, output_shape
from deconvnet.visualization.projection.field_boxes import (
    Box,
    all_channels,
    bounded,
    everything,
    union,
    unknown,
)
from deconvnet.visualization.projection.keeping_rules import (
    FOLDS,
    KEEPING,
    elementwise,
    is_norm_of_channels,
)
from deconvnet.visualization.projection.moving_rules import MOVING, across_rearrangement, unsplit
from deconvnet.visualization.projection.operations import NORMS, SPLITS, Operations

RULES = {**KEEPING, **MOVING}


def trace_fields(
    operations: Operations, starts: Box, x: Tensor, *, clip: bool = True, last: bool = False
) -> Box:
    """(U, 2, 2): for rows and columns, the first and last + 1 of the pixels that units can see.

    starts: (U, 3, 2), first and last + 1 of maps, rows and columns of each unit in the output of
    the operations, which is (N, K, H, W) or, if `last`, (N, H, W, K); they may reach beyond it.
    x: the leaf (N, C, H, W). clip: clip boxes to the maps at every operation,
    which makes the result exact. Otherwise the result is the field for all maps together: it has
    one size for all units and may reach beyond the image.
    """
    start = starts if clip else all_channels(starts)
    start = np.roll(start, -1, 1) if last else start
    size = output_shape(operations.order[0].node, operations.output)
    if len(size) == 3:  # tokens see it all
        start = everything(start, ())
    elif clip and len(size) == 4:
        start = bounded(start, size[1:], clip)
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
            outputs[nr] = union(outputs.get(nr), part)
    pixels = pixels[:, 1:]
    empty = (pixels[..., 1] <= pixels[..., 0]).any(1)
    return np.where(empty[:, None, None], 0, pixels)


def input_boxes(
    op: Operation, box: Box, shape: tuple[int, ...], constant_statistics: bool
) -> list[Box | None]:
    """For every input of an operation, the box that a box of its output depends on."""
    rule = RULES.get(op.name) or unknown
    if constant_statistics and op.name in NORMS and not is_norm_of_channels(op):
        rule = elementwise
    shapes = [output_shape(node, nr) for node, nr in op.inputs]
    if op.name == "Convolution" and not op.is_convolution:
        rule = unknown
    empty = (box[..., 1] <= box[..., 0]).any(1)[:, None, None]
    inputs = rule(op, box, shape, shapes)
    return [None if part is None else np.where(empty, 0, part) for part in inputs]


def _join_outputs(op: Operation, outputs: dict[int, Box]) -> Box:
    """The box of all outputs of an operation, in the coordinates of the input if it is a split."""
    joined = None
    for nr, box in outputs.items():
        joined = union(joined, unsplit(op, nr, box) if op.name in SPLITS else box)
    return joined
