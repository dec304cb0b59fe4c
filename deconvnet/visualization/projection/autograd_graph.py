"""The operations between the pixels and a unit of a network, read from the graph of autograd.

PyTorch records every operation of a forward pass, whatever the code of the model looks like: in the
list of those that a projection will pass nothing can hide.

The attributes `_saved_*` and `_input_metadata` of the nodes are used here and nowhere else. A
backward pass frees them: read the graph before. What nodes do not tell (what is done in place to a
part of a tensor; in older versions shapes) is found by sending zeros down.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose backward pass is the transpose, so that nothing is to be decided for them.
CONVOLUTIONS = {"Convolution", "Addmm", "Mm", "T"}
SWITCHES = {"MaxPool2DWithIndices", "AdaptiveMaxPool2D", "MaxPool3DWithIndices"}
RECTIFIERS = {"Relu", "Threshold"}
OTHER_RECTIFIERS = {"Hardtanh", "Clamp", "ClampMin", "LeakyRelu", "PreluKernel", "Elu", "Celu"}
# Bounded below: rectifiers only if the bound, saved under this name, is zero.
BOUNDED = {"Hardtanh": "min_val", "Clamp": "min", "ClampMin": "min"}
GATES = {"Sigmoid", "Hardsigmoid"}
NORMALIZATIONS = {"NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "BatchNorm"}
MOVES = {
    *("View", "UnsafeView", "Reshape", "ReshapeAlias", "Alias", "Clone", "ToCopy", "AsStrided"),
    *("Permute", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Repeat", "Flip", "Roll"),
    *("Cat", "Stack", "Split", "SplitWithSizes", "Chunk", "Unbind", "Slice", "Select", "Narrow"),
    *("ConstantPadNd", "ReflectionPad2D", "ReplicationPad2D", "PixelShuffle", "PixelUnshuffle"),
    *("Contiguous", "Copy", "Unfold", "Im2Col", "Col2Im", "Index", "IndexSelect"),
    *("ChannelShuffle", "NativeChannelShuffle"),
}
SPLITS = {"Split", "SplitWithSizes", "Chunk", "Unbind"}
SUMS = {
    *("Add", "Sub", "Rsub", "Neg", "Sum", "Mean", "AvgPool2D", "AdaptiveAvgPool2D"),
    *("UpsampleNearest2D", "UpsampleBilinear2D", "UpsampleBicubic2D", "UpsampleNearestExact2D"),
    *("UpsampleBilinear2DAa", "UpsampleBicubic2DAa"),
}
# Linear where only one of the factors depends on the pixels.
PRODUCTS = {"Mul", "Div", "Bmm", "Mm", "Addmm", "Convolution"}
SKIPPED = "SkippedResponseNorm"
LEAF = "AccumulateGrad"
CUSTOM = "custom "
# Something done in place to a part of a tensor, and what goes down through any such node: the part
# is taken out of the signal, and the result put back.
IN_PLACE = "CopySlices"
TAKING_OUT = {"new_empty_strided", "copy_", "as_strided", "clone", "zeros_like", "detach"}


@dataclass(frozen=True)
class Operation:
    """One node of the graph: what it is called in the forward pass, and what it was given."""

    node: Node
    name: str
    inputs: tuple[tuple[Node, int], ...]

    def saved(self, key: str) -> object:
        value = getattr(self.node, f"_saved_{key}", None)
        return tuple(map(_signed, value)) if isinstance(value, tuple) else _signed(value)

    def pair(self, key: str) -> tuple[int, int]:
        """A setting of both axes of maps, of which PyTorch may keep one number."""
        return pair(self.saved(key))

    @property
    def is_convolution(self) -> bool:
        """Whether it is a two-dimensional convolution, or a transposed one."""
        return self.name == "Convolution" and self.saved("weight").dim() == 4


@dataclass
class Operations:
    """All operations between some maps and the pixels, from the maps down, and what they are.

    output: which of the outputs of the first operation the maps are.
    """

    order: list[Operation]
    output: int = 0
    exact: dict[str, int] = field(default_factory=dict)
    linear: dict[str, int] = field(default_factory=dict)
    extended: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    unsupported: dict[str, int] = field(default_factory=dict)
    clamps: list[Node] = field(default_factory=list)
    gates: list[Node] = field(default_factory=list)

    @property
    def convolutions(self) -> list[Operation]:
        """Those that are two-dimensional convolutions, transposed ones left out."""
        return [op for op in self.order if op.is_convolution and not op.saved("transposed")]


def read_operations(
    y: Tensor, *, constant_gates: bool = False, marked: Mapping[Node, str] | None = None
) -> Operations:
    """The operations that lead from the pixels to y.

    constant_gates: of a sigmoid that multiplies maps nothing is followed further down. marked: of
    nodes what entered there without a gradient (`dependence`).
    """
    marked = marked or {}
    order = topological_order(y.grad_fn)
    gates = {node for op in order for node in gates_of(op)}
    if constant_gates:
        order = topological_order(y.grad_fn, gates)
    if any(op.name == IN_PLACE for op in order):
        _probe([y])
    record_shapes([y])
    found = Operations(order, y.output_nr, gates=list(gates))
    for op in order:
        is_input = op.name == "Clone" and operation_name(op.inputs[0][0]) == LEAF
        if op.name == LEAF or (is_input and op.node not in marked):
            continue
        if op.node in gates:
            way = "as a constant gate" if constant_gates else "as a gate, with its gradient"
            kind, name = "extended", f"{_snake(op.name)} {way}"
        else:
            kind, name = _kind(op)
        if op.node in marked and kind not in ("unsupported", "skipped"):
            kind, name = "unsupported", marked[op.node]
        counts = getattr(found, kind)
        counts[name] = counts.get(name, 0) + 1
        if op.name.startswith("Clamp") and kind == "extended":
            found.clamps.append(op.node)
    return found


def _kind(op: Operation) -> tuple[str, str]:
    name = op.name
    if name == SKIPPED:
        return "skipped", "local_response_norm"
    if name == IN_PLACE:
        return _kind_in_place(op)
    if name == "Div" and op.node.next_functions[1][0] is not None:
        return "unsupported", "div by something that depends on the pixels"
    if name in PRODUCTS and _factors(op) > 1:
        # A product with a gate is linear once the gate is a constant.
        if gates_of(op):
            return "linear", "gated product"
        return "unsupported", f"{_snake(name)} of two things that depend on the pixels"
    if name in NORMALIZATIONS:
        if op.saved("training"):
            return "unsupported", "batch_norm in training mode"
        return "linear", "batch_norm"
    if name == "Threshold" and float(op.saved("threshold")) != 0:
        return "extended", "threshold"
    if name in RECTIFIERS:
        return "exact", "relu"
    if name in BOUNDED and not _rectifies(op):
        return "unsupported", _snake(name)
    for kind, names in (
        ("exact", CONVOLUTIONS | SWITCHES),
        ("extended", OTHER_RECTIFIERS),
        ("linear", MOVES | SUMS | PRODUCTS),
    ):
        if name in names:
            return kind, _snake(name)
    return "unsupported", _snake(name)


def _kind_in_place(op: Operation) -> tuple[str, str]:
    hidden = set(op.node.metadata.get(IN_PLACE, ()))
    if not hidden:
        return "linear", "copy into a part"
    if hidden == {"threshold_backward"}:
        return "exact", "relu"
    if hidden == {"mul"} and len(op.inputs) == 1:
        return "linear", "mul"
    names = " and ".join(sorted(hidden))
    return "unsupported", f"{names} of an operation in place on a part of a tensor"


def _rectifies(op: Operation) -> bool:
    """A clamp is a rectifier if it is one at zero, whatever it does to large values."""
    least = op.saved(BOUNDED[op.name])
    return isinstance(least, int | float) and least == 0


def _factors(op: Operation) -> int:
    """How many of the factors of a product depend on the pixels; what is added is no factor."""
    nodes = op.node.next_functions[op.name == "Addmm" :]
    return sum(node is not None for node, _ in nodes)


def gates_of(op: Operation) -> list[Node]:
    """The sigmoids whose values a product takes as factors, if another factor is none of them."""
    if op.name != "Mul" or len(op.inputs) != 2:
        return []
    found = [
        node
        for node in (skip_moves(node) for node, _ in op.inputs)
        if operation_name(node) in GATES
    ]
    # x sigmoid(x) is an activation, not a gate.
    return found if len(found) == 1 and inputs_of(found[0])[0] not in op.inputs else []


def skip_moves(node: Node) -> Node:
    while operation_name(node) in MOVES and len(inputs_of(node)) == 1:
        node = inputs_of(node)[0][0]
    return node


def topological_order(top: Node | None, ends: Collection[Node] = ()) -> list[Operation]:
    """All nodes from the top down, each after all that use it; nothing below `ends`."""
    finished, seen, path = [], set(), [(top, False)]
    while path:
        node, is_done = path.pop()
        if node is None or (not is_done and node in seen):
            continue
        inputs = () if node in ends else inputs_of(node)
        if is_done:
            finished.append(Operation(node, operation_name(node), inputs))
            continue
        seen.add(node)
        path.append((node, True))
        path += [(below, False) for below, _ in inputs]
    return finished[::-1]


def inputs_of(node: Node) -> tuple[tuple[Node, int], ...]:
    return tuple((below, nr) for below, nr in node.next_functions if below is not None)


def operation_name(node: Node) -> str:
    # Of the class: in PyTorch 2.2 nodes that are written in Python have no name.
    name = type(node).__name__
    name = node.name().rpartition("::")[2] if name == "CppFunction" else name
    name = re.sub(r"Backwards?\d*$", "", name).lstrip("_")
    # A function of the model's own has a backward pass of its own, whatever it is called.
    is_own = isinstance(node, BackwardCFunction) and not (
        node._forward_cls.__module__.startswith(f"{__package__}.")
    )
    return f"{CUSTOM}{name}" if is_own else name


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """What is set for both axes of maps, rows and columns, of which one number may be given."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


def _signed(value: object) -> object:
    """Integers below zero come out of a node as unsigned ones."""
    return value - (1 << 64) if isinstance(value, int) and value >= 1 << 63 else value


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-zD])(?=[A-Z][a-z])", "_", name).lower()


def output_shape(node: Node, nr: int) -> tuple[int, ...]:
    """The shape of what a node gives, (N, C, H, W) for maps."""
    if operation_name(node) == LEAF:
        return tuple(node.variable.shape)
    if _tells_shapes(node):
        return tuple(node._input_metadata[nr].shape)
    return node.metadata["shapes"].get(nr, ())


def _tells_shapes(node: Node) -> bool:
    return hasattr(node, "_input_metadata") or operation_name(node) == LEAF


def record_shapes(outputs: list[Tensor]) -> None:
    """Make sure that the shapes are known of what all nodes below some tensors give."""
    # In PyTorch 2.2 nodes do not tell them.
    if outputs and not _tells_shapes(outputs[0].grad_fn):
        _probe(outputs)


def _probe(outputs: list[Tensor]) -> None:
    """Send zeros down, and note in the metadata of nodes what they do not tell by themselves."""
    hidden = _Hidden()
    nodes = {op.node for y in outputs for op in topological_order(y.grad_fn)}
    leaves = [node.variable for node in nodes if operation_name(node) == LEAF]
    with ExitStack() as undo:
        for node in nodes:
            if operation_name(node) != LEAF:
                undo.callback(node.register_prehook(hidden.entering(node)).remove)
                undo.callback(node.register_hook(hidden.leaving).remove)
        zeros = [torch.zeros_like(y) for y in outputs]
        with hidden:
            torch.autograd.grad(outputs, leaves, zeros, retain_graph=True, allow_unused=True)


class _Hidden(TorchDispatchMode):
    """Notes the shape of the signal that comes to nodes, and what is done inside some of them."""

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
        if self.inside is not None and name not in TAKING_OUT:
            self.inside.metadata[IN_PLACE].append(name)
        return func(*args, **(kwargs or {}))
