"""The positions of tokens in the image: which of the tokens (N, T, C) of a transformer form a grid.

A vision transformer flattens the maps of its patches to tokens, and may add others: a class token,
registers, a token for distillation. We follow the grid through the autograd graph from where maps
are flattened, so that the tokens of each layer can be shown as maps (N, C, H, W).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import Node

from deconvnet.visualization.projection.autograd_graph import (
    Operation,
    output_shape,
    topological_order,
)
from deconvnet.visualization.projection.map_axis import VIEWS, MapAxes


@dataclass(frozen=True)
class TokenGrid:
    """H x W tokens in the order of their rows, after `before` others, among `count` tokens."""

    rows: int
    columns: int
    before: int
    count: int

    def maps(self, tokens: Tensor) -> Tensor:
        """(N, C, H, W): the tokens (N, T, C) of the grid as maps."""
        grid = tokens[:, self.before : self.before + self.rows * self.columns]
        return grid.transpose(1, 2).unflatten(2, (self.rows, self.columns))

    def tokens_with(self, tokens: Tensor, maps: Tensor) -> Tensor:
        """(N, T, C): the tokens (N, T, C) with maps (N, C, H, W) in those of the grid."""
        grid = maps.flatten(2).transpose(1, 2)
        before, after = tokens[:, : self.before], tokens[:, self.before + grid.shape[1] :]
        return torch.cat([before, grid, after], 1)


class TokenGrids:
    """The grids of the tokens in one forward pass."""

    def __init__(self, axes: MapAxes) -> None:
        self._axes = axes
        self._grids: dict[Node, TokenGrid | None] = {}

    def of(self, node: Node | None) -> TokenGrid | None:
        """The grid of the output (N, T, C) of a node; None if it is something else."""
        shape = () if node is None else output_shape(node, 0)
        grid = self._latest(node) if len(shape) == 3 else None
        # With as many channels as tokens, either axis could be that of the tokens.
        is_grid = grid is not None and grid.count == shape[1] != shape[2]
        return grid if is_grid else None

    def is_inside(self, node: Node | None) -> bool:
        """Whether the output of a node is part of an attention: (N, heads, T, C) or (N, heads, T,
        T)."""
        if node is None or self._axes.of(node) is not None:
            return False
        grid = self._latest(node)
        return grid is not None and grid.count in output_shape(node, 0)[1:]

    def _latest(self, node: Node) -> TokenGrid | None:
        """The grid of the latest tokens below the output of a node."""
        for op in reversed(topological_order(node, self._grids)):
            if op.node not in self._grids:
                self._grids[op.node] = self._grid(op)
        return self._grids[node]

    def _grid(self, op: Operation) -> TokenGrid | None:
        """The same for an operation whose inputs are known."""
        shape = output_shape(op.node, 0)
        if op.name in VIEWS and (grid := self._flattened(op, shape)) is not None:
            return grid
        below = [
            (grid, output_shape(node, nr), node)
            for node, nr in op.inputs
            if (grid := self._grids.get(node)) is not None
        ]
        if not below:
            return None
        if op.name in ("Cat", "Slice") and len(shape) == 3 and op.saved("dim") % 3 == 1:
            tokens = [(grid, node) for grid, given, node in below if given[1:2] == (grid.count,)]
            return self._joined_or_cut(op, shape[1], *tokens[0]) if len(tokens) == 1 else None
        # If inputs are broadcast, the one that has the shape of the result.
        return min(below, key=lambda one: one[1] != shape)[0]

    def _joined_or_cut(
        self, op: Operation, count: int, grid: TokenGrid, node: Node
    ) -> TokenGrid | None:
        """The grid among `count` tokens, after others were added or taken away."""
        change = self._joined(op, count, node) if op.name == "Cat" else -op.saved("start")
        before = grid.before + change
        is_whole = before >= 0 and before + grid.rows * grid.columns <= count
        return replace(grid, before=before, count=count) if is_whole else None

    def _flattened(self, op: Operation, shape: tuple[int, ...]) -> TokenGrid | None:
        """The grid of maps (N, C, H, W) or (N, H, W, C) that an operation flattens."""
        node, nr = op.inputs[0]
        given = output_shape(node, nr)
        if len(given) != 4 or len(shape) != 3:
            return None
        _, one, two, three = given
        if self._axes.is_last(node):
            rows, columns, flattened = one, two, (one * two, three)
        else:
            rows, columns, flattened = two, three, (one, two * three)
        return TokenGrid(rows, columns, 0, rows * columns) if shape[1:] == flattened else None

    def _joined(self, op: Operation, count: int, grid_node: Node) -> int:
        """How many tokens a concatenation adds in front of those with a grid."""
        nodes = [node for node, _ in op.node.next_functions]
        counts = [
            None if node is None else output_shape(node, nr)[1]
            for node, nr in op.node.next_functions
        ]
        # Of parameters, such as the class token, the sizes are not known one by one.
        parameters = count - sum(known for known in counts if known is not None)
        in_front = counts[: nodes.index(grid_node)]
        known = sum(size for size in in_front if size is not None)
        return known + (parameters if None in in_front else 0)
