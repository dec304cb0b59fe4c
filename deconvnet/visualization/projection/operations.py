"""The operations between the pixels and a unit, and which rule each has on the way down."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.autograd.graph import Node

from deconvnet.visualization.projection.autograd_graph import (
    IN_PLACE,
    LEAF,
    Operation,
    inputs_of,
    operation_name,
    output_shape,
    record_parts,
    record_shapes,
    topological_order,
)
from deconvnet.visualization.projection.hand_written import HandWritten, hand_written

# Operations for which the paper has a rule, the transpose.
CONVOLUTIONS = {"Convolution", "Addmm", "Mm", "T"}
SWITCHES = {"MaxPool2DWithIndices", "AdaptiveMaxPool2D", "MaxPool3DWithIndices"}
RECTIFIERS = {"Relu", "Threshold"}
SMOOTH_RECTIFIERS = {"Gelu", "Silu", "Hardswish", "Mish"}
OTHER_RECTIFIERS = {
    *("Hardtanh", "Clamp", "ClampMin", "LeakyRelu", "PreluKernel", "Elu", "Celu"),
    *SMOOTH_RECTIFIERS,
}
# Operations that are rectifiers only if their lower bound, saved under this name, is zero.
BOUNDED = {"Hardtanh": "min_val", "Clamp": "min", "ClampMin": "min"}
GATES = {"Sigmoid", "Hardsigmoid"}
# Weights of branches, which are summed (Li et al. 2019, Zhang et al. 2022).
BRANCH_GATES = {"Softmax"}
# Normalisation by statistics of the maps, which are constants on the way down.
NORMS = {"NativeLayerNorm": "layer_norm", "NativeGroupNorm": "group_norm"}
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
PRODUCTS = {"Mul", "Div", "Bmm", "Mm", "Addmm", "Addcmul", "Convolution"}
SKIPPED = "SkippedResponseNorm"
SMOOTH_IN_PLACE = [{f"{name.lower()}_backward"} for name in SMOOTH_RECTIFIERS]


@dataclass
class Operations:
    """All operations between some maps and the pixels, from the maps down.

    output: the index of the maps among the outputs of the first operation. exact, linear, extended,
    skipped, unsupported: counts by name, as in `ProjectionReport`. clamps, gates: nodes that need
    their own rule; hand_written: activations that do. constant_statistics: whether those of
    normalisation are constants.
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
    hand_written: list[HandWritten] = field(default_factory=list)
    constant_statistics: bool = False

    @property
    def convolutions(self) -> list[Operation]:
        """The two-dimensional convolutions that are not transposed."""
        return [op for op in self.order if op.is_convolution and not op.saved("transposed")]

    @property
    def switches(self) -> int:
        """The number of operations with switches, that is, of max pooling."""
        return sum(op.name in SWITCHES for op in self.order)


def read_operations(
    y: Tensor,
    *,
    constant_gates: bool = False,
    constant_statistics: bool = False,
    marked: Mapping[Node, str] | None = None,
) -> Operations:
    """Read the operations that lead from the pixels to y.

    constant_gates: do not follow a sigmoid that multiplies maps; constant_statistics: nor those of
    layer and group normalisation. marked: by node, how the pixels
    enter it without a gradient (`hidden_dependence`).
    """
    marked = marked or {}
    record_shapes([y])
    order = topological_order(y.grad_fn)
    gates = {node for op in order for node in gates_of(op)}
    if constant_gates:
        order = topological_order(y.grad_fn, gates)
    if any(op.name == IN_PLACE for op in order):
        record_parts([y])
    operations = Operations(
        order, y.output_nr, gates=list(gates), constant_statistics=constant_statistics
    )
    operations.hand_written = activations = _hand_written(order, marked)
    names = {activation.node: activation.name for activation in activations}
    parts = {part for activation in activations for part in activation.parts}
    for op in order:
        is_input = op.name == "Clone" and operation_name(op.inputs[0][0]) == LEAF
        if op.name == LEAF or op.node in parts or (is_input and op.node not in marked):
            continue
        if op.node in names:
            kind, name = "extended", names[op.node]
        elif op.node in gates:
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


def _hand_written(order: list[Operation], marked: Mapping[Node, str]) -> list[HandWritten]:
    """The activations whose gates are used for nothing else."""
    found = [activation for op in order if (activation := hand_written(op)) is not None]
    users: dict[Node, set[Node]] = {}
    for op in order:
        for below, _ in op.inputs:
            users.setdefault(below, set()).add(op.node)
    return [
        activation
        for activation in found
        if all(
            users[part] <= {activation.node, *activation.parts} and part not in marked
            for part in activation.parts
        )
    ]


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
    if name in NORMS:
        return "extended", NORMS[name]
    if name in BOUNDED and not _rectifies(op):
        return "unsupported", _snake(name)
    if name.startswith("ScaledDotProduct"):  # followed by the name of an algorithm
        return "unsupported", "attention"
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
    if hidden in SMOOTH_IN_PLACE:
        return "extended", hidden.pop().removesuffix("_backward")
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
    nodes = op.node.next_functions[op.name in ("Addmm", "Addcmul") :]
    return sum(node is not None for node, _ in nodes)


def gates_of(op: Operation) -> list[Node]:
    """The factor of a product that is a gate, if the other factor is something else: a sigmoid or
    softmax, or a single number for each map, whatever it is computed by."""
    if op.name != "Mul" or len(op.inputs) != 2 or hand_written(op) is not None:
        return []
    nodes = [skip_moves(node) for node, _ in op.inputs]
    gates = [node for node in nodes if operation_name(node) in GATES | BRANCH_GATES]
    if not gates:
        shapes = [output_shape(node, nr) for node, nr in op.inputs]
        gates = [
            node
            for (node, _), shape, other in zip(op.inputs, shapes, shapes[::-1], strict=True)
            if _is_number_per_map(shape, other)
        ]
    return gates if len(gates) == 1 else []


def _is_number_per_map(shape: tuple[int, ...], maps: tuple[int, ...]) -> bool:
    """Whether a shape is (N, C, 1, 1) or (N, 1, 1, C), and maps have more positions."""
    return len(shape) == len(maps) == 4 and any(
        shape[axis] == shape[axis + 1] == 1 < maps[axis] * maps[axis + 1] for axis in (1, 2)
    )


def skip_moves(node: Node) -> Node:
    """The node below all operations that only move values, starting with this node."""
    while operation_name(node) in MOVES and len(inputs_of(node)) == 1:
        node = inputs_of(node)[0][0]
    return node


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-zD])(?=[A-Z][a-z])", "_", name).lower()
