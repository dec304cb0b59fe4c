"""Smooth rectifiers that a model computes by hand, such as x sigmoid(x), which is SiLU.

Such an activation is a product of its input x and a gate g(x) that increases with x and is never
negative. A product of two things that depend on the pixels has no rule, but as one operation
(`torch.nn.SiLU`) the activation has the rule of a rectifier, and both forms must agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import Node

from deconvnet.visualization.projection.autograd_graph import (
    Operation,
    inputs_of,
    operation_name,
    output_shape,
)

# The activation whose gate is one of these operations.
NAMES = {"Sigmoid": "silu", "Hardsigmoid": "hardswish", "Hardtanh": "hardswish", "Tanh": "mish"}


@dataclass(frozen=True)
class HandWritten:
    """A product x g(x) that is an activation.

    node: of the product. slot: the position of x among its two factors. parts: the nodes of g.
    """

    node: Node
    name: str
    slot: int
    parts: frozenset[Node]

    def is_active(self) -> Tensor:
        """Whether the activation is above zero, in each position."""
        factors = self.node._saved_self, self.node._saved_other
        return (factors[self.slot] > 0) & (factors[1 - self.slot] > 0)


def hand_written(op: Operation) -> HandWritten | None:
    """The activation of which an operation is the product, if it is one."""
    if op.name != "Mul" or len(op.inputs) != 2:
        return None
    for slot in (0, 1):
        x, gate = op.inputs[slot], op.inputs[1 - slot]
        parts = list(_parts(Operation(*_named(gate[0])), x))
        names = [part.name for part in parts if part.name in NAMES]
        below = parts[-1].inputs[0] if parts else None
        if below == x and len(names) == 1 and output_shape(*x) == output_shape(*gate):
            return HandWritten(op.node, NAMES[names[0]], slot, frozenset(p.node for p in parts))
    return None


def _parts(op: Operation, x: tuple[Node, int]) -> Iterator[Operation]:
    """The operations of a gate g(x), from the top down to x, or to one that no gate has."""
    while (op.node, 0) != x and len(op.inputs) == 1 and _is_increasing(op):
        yield op
        below = op.inputs[0]
        if below == x:
            return
        op = Operation(*_named(below[0]))


def _is_increasing(op: Operation) -> bool:
    """Whether an operation on one tensor may be part of a gate: it increases with it."""
    if op.name in ("Mul", "Div"):
        factor = next(
            (op.saved(key) for key in ("other", "self") if op.saved(key) is not None), None
        )
        return isinstance(factor, Tensor) and bool((factor > 0).all())
    if op.name == "Hardtanh":
        return op.saved("min_val") == 0
    if op.name == "Tanh":
        return operation_name(op.inputs[0][0]) == "Softplus"
    return op.name in ("Add", "Sigmoid", "Hardsigmoid", "Softplus")


def _named(node: Node) -> tuple[Node, str, tuple[tuple[Node, int], ...]]:
    return node, operation_name(node), inputs_of(node)
