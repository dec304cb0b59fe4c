"""Boxes of positions in maps, on which rules compute what an operation depends on.

U units · a box is an array (U, 3, 2): first and last + 1 along channels, rows and columns, in
          the order of the axes of the maps, which may be (N, H, W, C)
"""

from __future__ import annotations

import numpy as np

from deconvnet.visualization.projection.autograd_graph import Operation

Box = np.ndarray
Shapes = list[tuple[int, ...]]
# Beyond every position in every map.
FAR = 1 << 40


def bounded(box: Box, size: tuple[int, ...], clip: bool) -> Box:
    """A box within maps of this size. If `clip` is false, only infinite ends are bounded."""
    limits = np.array(size)
    first = np.where((box[..., 0] < -FAR) | clip, box[..., 0].clip(0), box[..., 0])
    last = np.where((box[..., 1] > FAR) | clip, np.minimum(box[..., 1], limits), box[..., 1])
    return np.stack([first, last], 2)


def union(a: Box | None, b: Box) -> Box:
    """The smallest box around two."""
    if a is None:
        return b
    # A box is empty in a branch that does not lead to the channel of the unit.
    a_empty = (a[..., 1] <= a[..., 0]).any(1)[:, None, None]
    b_empty = (b[..., 1] <= b[..., 0]).any(1)[:, None, None]
    both = np.stack([np.minimum(a[..., 0], b[..., 0]), np.maximum(a[..., 1], b[..., 1])], 2)
    return np.where(a_empty, b, np.where(b_empty, a, both))


def everything(box: Box, shape: tuple[int, ...]) -> Box:
    """All of some maps; a box without ends for anything else."""
    full = np.zeros_like(box)
    if len(shape) == 4:
        full[..., 1] = np.array(shape[1:])
    else:
        full[..., 0], full[..., 1] = -2 * FAR, 2 * FAR
    return full


def unknown(op: Operation, box: Box, shape: tuple, shapes: Shapes) -> list[Box]:
    """The rule of an operation that has none: it depends on everything."""
    return [everything(box, below) for below in shapes]


def all_channels(box: Box) -> Box:
    """The same positions in all channels."""
    box = box.copy()
    box[:, 0] = -2 * FAR, 2 * FAR
    return box
