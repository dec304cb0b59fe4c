"""The operations between the pixels and a unit of a network, read from the autograd graph.

PyTorch records every operation of a forward pass, however the model is written, so the list of
operations that a projection passes is complete.

Only this module uses the attributes `_saved_*` and `_input_metadata` of nodes. A backward pass
frees them, so the graph is read first. Information that nodes do not have (operations in place on a
part of a tensor; in older versions, shapes) is recorded during a backward pass with zeros.
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

# Operations for which the paper has a rule, the transpose.
CONVOLUTIONS = {"Convolution", "Addmm", "Mm", "T"}
SWITCHES = {"MaxPool2DWithIndices", "AdaptiveMaxPool2D", "MaxPool3DWithIndices"}
RECTIFIERS = {"Relu", "Threshold"}
OTHER_RECTIFIERS = {"Hardtanh", "Clamp", "ClampMin", "LeakyRelu", "PreluKernel", "Elu", "Celu"}
# Operations that are rectifiers only if their lower bound, saved under this name, is zero.
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
# Linear if only one of the factors depends on the pixels.
PRODUCTS = {"Mul", "Div", "Bmm", "Mm", "Addmm", "Convolution"}
SKIPPED = "SkippedResponseNorm"
LEAF = "AccumulateGrad"
CUSTOM = "custom "
# An operation in place on a part of a tensor. The backward pass of such a node extracts the part
# from the signal and puts the result back, using these operations.
IN_PLACE = "CopySlices"
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


@dataclass
class Operations:
    """All operations between some maps and the pixels, from the maps down.

    output: the index of the maps among the outputs of the first operation. exact, linear, extended,
    skipped, unsupported: counts by name, as in `ProjectionReport`. clamps, gates: nodes that need
    their own rule.
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
        """The two-dimensional convolutions that are not transposed."""
        return [op for op in self.order if op.is_convolution and not op.saved("transposed")]

    @property
    def switches(self) -> int:
        """The number of operations with switches, that is, of max pooling."""
        return sum(op.name in SWITCHES for op in self.order)


def read_operations(
    y: Tensor, *, constant_gates: bool = False, marked: Mapping[Node, str] | None = None
) -> Operations:
    """Read the operations that lead from the pixels to y.

    constant_gates: do not follow a sigmoid that multiplies maps. marked: by node, how the pixels
    enter it without a gradient (`hidden_dependence`).
    """
    marked = marked or {}
    order = topological_order(y.grad_fn)
    gates = {node for op in order for node in gates_of(op)}
    if constant_gates:
        order = topological_order(y.grad_fn, gates)
    if any(op.name == IN_PLACE for op in order):
        _probe([y])
    record_shapes([y])
    operations = Operations(order, y.output_nr, gates=list(gates))
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
        counts = getattr(operations, kind)
        counts[name] = counts.get(name, 0) + 1
        if op.name.startswith("Clamp") and kind == "extended":
            operations.clamps.append(op.node)
    return operations


def _kind(op: Operation) -> tuple[str, str]:
    """The field of `Operations` that counts an operation, and its name there."""
    name = op.name
    if name == SKIPPED:
        return "skipped", "local_response_norm"
    if name == IN_PLACE:
        return _kind_in_place(op)
    if name == "Div" and op.node.next_functions[1][0] is not None:
        return "unsupported", "div by something that depends on the pixels"
    if name in PRODUCTS and _factors(op) > 1:
        # A product with a gate is linear if the gate is a constant.
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
    """Whether a clamp has the lower bound zero, whatever it does to large values."""
    least = op.saved(BOUNDED[op.name])
    return isinstance(least, int | float) and least == 0


def _factors(op: Operation) -> int:
    """The number of factors of a product that depend on the pixels; summands do not count."""
    nodes = op.node.next_functions[op.name == "Addmm" :]
    return sum(node is not None for node, _ in nodes)


def gates_of(op: Operation) -> list[Node]:
    """The sigmoid that a product has as one factor, if the other factor is something else."""
    if op.name != "Mul" or len(op.inputs) != 2:
        return []
    nodes = [skip_moves(node) for node, _ in op.inputs]
    gates = [node for node in nodes if operation_name(node) in GATES]
    # x sigmoid(x) is an activation, not a gate.
    return gates if len(gates) == 1 and inputs_of(gates[0])[0] not in op.inputs else []


def skip_moves(node: Node) -> Node:
    """The node below all operations that only move values, starting with this node."""
    while operation_name(node) in MOVES and len(inputs_of(node)) == 1:
        node = inputs_of(node)[0][0]
    return node


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


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-zD])(?=[A-Z][a-z])", "_", name).lower()


def output_shape(node: Node, nr: int) -> tuple[int, ...]:
    """The shape of an output of a node, (N, C, H, W) for maps."""
    if operation_name(node) == LEAF:
        return tuple(node.variable.shape)
    if _has_shapes(node):
        return tuple(node._input_metadata[nr].shape)
    return node.metadata["shapes"].get(nr, ())


def _has_shapes(node: Node) -> bool:
    return hasattr(node, "_input_metadata") or operation_name(node) == LEAF


def record_shapes(outputs: list[Tensor]) -> None:
    """Make the output shapes of all nodes below some tensors available."""
    # In PyTorch 2.2, nodes do not hold them.
    if outputs and not _has_shapes(outputs[0].grad_fn):
        _probe(outputs)


def _probe(outputs: list[Tensor]) -> None:
    """Run a backward pass with zeros, and record missing information in the metadata of nodes."""
    recorder = _Recorder()
    nodes = {op.node for y in outputs for op in topological_order(y.grad_fn)}
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
        return func(*args, **(kwargs or {}))
