"""The operations of a forward pass, read from the autograd graph.

PyTorch records every operation of a forward pass, however the model is written, so the list of
operations that a projection passes is complete.

Only this module uses the attributes `_saved_*` and `_input_metadata` of nodes. A backward pass
frees them, so the graph is read first. Information that nodes do not have (operations in place on a
part of a tensor; in older versions, shapes) is recorded during a backward pass with zeros.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode

LEAF = "AccumulateGrad"
CUSTOM = "custom "
# An operation in place on a part of a tensor. The backward pass of such a node extracts the part
# from the signal and puts the result back, using these operations. PART: the sizes, strides and
# start of the part in memory.
IN_PLACE = "CopySlices"
PART = "part"
PART_COPIES = {"new_empty_strided", "copy_", "as_strided", "clone", "zeros_like", "detach"}


@dataclass(frozen=True)
class Operation:
    """A node of the graph: its name in the forward pass, and the nodes (and outputs) it takes."""

    node: Node
    name: str
    inputs: tuple[tuple[Node, int], ...]

    def saved(self, key: str) -> object:
        value = getattr(self.node, f"_saved_{key}", None)
        return tuple(map(_signed, value)) if isinstance(value, tuple) else _signed(value)

    def pair(self, key: str) -> tuple[int, int]:
        """A setting for both axes of maps, for which PyTorch may save one number."""
        return pair(self.saved(key))

    @property
    def is_convolution(self) -> bool:
        """Whether this is a two-dimensional convolution, possibly transposed."""
        return self.name == "Convolution" and self.saved("weight").dim() == 4


def topological_order(top: Node | None, ends: Collection[Node] = ()) -> list[Operation]:
    """All nodes from the top down, each after all nodes that use it; none below `ends`."""
    finished, visited, path = [], set(), [(top, False)]
    while path:
        node, is_done = path.pop()
        if node is None or (not is_done and node in visited):
            continue
        inputs = () if node in ends else inputs_of(node)
        if is_done:
            finished.append(Operation(node, operation_name(node), inputs))
            continue
        visited.add(node)
        path.append((node, True))
        path += [(below, False) for below, _ in inputs]
    return finished[::-1]


def inputs_of(node: Node) -> tuple[tuple[Node, int], ...]:
    return tuple((below, nr) for below, nr in node.next_functions if below is not None)


def operation_name(node: Node) -> str:
    # From the class: in PyTorch 2.2, nodes written in Python have no name.
    name = type(node).__name__
    name = node.name().rpartition("::")[2] if name == "CppFunction" else name
    name = re.sub(r"Backwards?\d*$", "", name).lstrip("_")
    # A custom function of the model has its own backward pass, whatever its name.
    is_custom = isinstance(node, BackwardCFunction) and not (
        node._forward_cls.__module__.startswith(f"{__package__}.")
    )
    return f"{CUSTOM}{name}" if is_custom else name


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """A setting for rows and columns, which may be given as one number."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


def _signed(value: object) -> object:
    """Convert the unsigned integers of nodes back to negative ones."""
    return value - (1 << 64) if isinstance(value, int) and value >= 1 << 63 else value


def output_shape(node: Node, nr: int) -> tuple[int, ...]:
    """The shape of an output of a node, (N, C, H, W) for maps."""
    if operation_name(node) == LEAF:
        return tuple(node.variable.shape)
    if _has_shapes(node):
        return tuple(node._input_metadata[nr].shape)
    return node.metadata["shapes"].get(nr, ())


def _has_shapes(node: Node) -> bool:
    return hasattr(node, "_input_metadata") or operation_name(node) == LEAF


def record_shapes(outputs: list[Tensor], *, parts: bool = False) -> None:
    """Make the output shapes of all nodes below some tensors available; parts: and of operations
    in place on a part of a tensor, which part."""
    visited: set[Node] = set()
    has_parts = False
    for y in outputs if parts else ():
        new = {op.node: op.name for op in topological_order(y.grad_fn, visited)}
        visited |= new.keys()
        has_parts |= IN_PLACE in new.values()
    # In PyTorch 2.2, nodes do not hold shapes.
    if outputs and (has_parts or not _has_shapes(outputs[0].grad_fn)):
        record_parts(outputs)


def record_parts(outputs: list[Tensor]) -> None:
    """Run a backward pass with zeros, and record in the metadata of nodes what they do not hold:
    their shapes, and the operations inside those that work in place on a part of a tensor."""
    recorder, nodes = _Recorder(), set()
    for y in outputs:
        nodes |= {op.node for op in topological_order(y.grad_fn, nodes)}
    leaves = [node.variable for node in nodes if operation_name(node) == LEAF]
    with ExitStack() as undo:
        for node in nodes:
            if operation_name(node) != LEAF:
                undo.callback(node.register_prehook(recorder.entering(node)).remove)
                undo.callback(node.register_hook(recorder.leaving).remove)
        zeros = [torch.zeros_like(y) for y in outputs]
        with recorder:
            torch.autograd.grad(outputs, leaves, zeros, retain_graph=True, allow_unused=True)


class _Recorder(TorchDispatchMode):
    """Records the shape of the signal that reaches a node, and the operations inside some nodes."""

    inside: Node | None = None

    def entering(self, node: Node) -> Callable[[tuple[Tensor | None, ...]], None]:
        def enter(above: tuple[Tensor | None, ...]) -> None:
            shapes = {nr: tuple(s.shape) for nr, s in enumerate(above) if s is not None}
            node.metadata["shapes"] = shapes
            if operation_name(node) == IN_PLACE:
                node.metadata[IN_PLACE] = []
                self.inside = node

        return enter

    def leaving(self, below: tuple, above: tuple) -> None:
        self.inside = None

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        name = func.overloadpacket.__name__
        if self.inside is not None and name not in PART_COPIES:
            self.inside.metadata[IN_PLACE].append(name)
        elif self.inside is not None and name == "as_strided":
            size, stride, start = (*args[1:], *(kwargs or {}).values())
            self.inside.metadata.setdefault(PART, (tuple(size), tuple(stride), int(start)))
        return func(*args, **(kwargs or {}))
