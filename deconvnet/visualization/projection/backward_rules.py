"""The rules of the backward pass in which a projection differs from a gradient.

A projection is the backward pass of autograd with other rules for some operations (Zeiler and
Fergus 2014, section 2.1). As in a gradient, the signal passes convolutions through their transposed
filters and max pooling through its switches. The differences are:

    rectifier    deconv    max(signal, 0), whatever the units of the forward pass were
                 guided    the same, and only where the unit was active (Springenberg et al. 2015)
                 gradient  where the unit was active, of either sign
    smooth rectifier            like a rectifier: GELU, SiLU, Hardswish, Mish, ELU
    contrast normalisation      skipped: the signal passes unchanged
    layer and group norm        the statistics are constants, as those of batch normalisation
    sigmoid gate of a product   a constant: no signal passes through the gate itself

The rules act on the operations of the backward pass, not on modules, so they also apply to
functional, shared and in-place rectifiers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from deconvnet.operators.arithmetic import is_uneven
from deconvnet.operators.arithmetic import overlap as overlap_counts
from deconvnet.visualization.projection.autograd_graph import pair
from deconvnet.visualization.projection.hand_written import HandWritten
from deconvnet.visualization.projection.operations import SKIPPED, Operations

METHODS = ("deconv", "guided", "gradient")
# The method that depends on the layer.
AUTO = "auto"
OVERLAPS = ("sum", "normalised")

aten = torch.ops.aten
RECTIFIERS = {
    aten.threshold_backward.default,
    aten.hardtanh_backward.default,
    aten.leaky_relu_backward.default,
    aten.elu_backward.default,
    aten._prelu_kernel_backward.default,
    aten.gelu_backward.default,
    aten.silu_backward.default,
    aten.hardswish_backward.default,
    aten.mish_backward.default,
}
SWITCHES = {
    aten.max_pool2d_with_indices_backward.default,
    aten.adaptive_max_pool2d_backward.default,
}


class SkippedResponseNorm(torch.autograd.Function):
    """Local response normalisation in the forward pass, the identity in the backward pass."""

    @staticmethod
    def forward(ctx: object, x: Tensor, *settings: object) -> Tensor:
        return F.local_response_norm(x, *settings)

    @staticmethod
    def backward(ctx: object, signal: Tensor) -> tuple[Tensor | None, ...]:
        return signal, None, None, None, None


assert SkippedResponseNorm.__name__ == SKIPPED, "operations identifies it by its name"


class SkippedNormalization(TorchFunctionMode):
    """A mode for the forward pass: its backward pass will skip contrast normalisation."""

    def __torch_function__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is F.local_response_norm:
            return _local_response_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    with torch._C.DisableTorchFunction():
        return SkippedResponseNorm.apply(input, size, alpha, beta, k)


class BackwardRules(TorchDispatchMode):
    """A mode for the backward pass, which then follows the rules of a method.

    local: compute convolutions only where there is a signal, which for most units is a small part
    of the image; the result is the same up to rounding. counts: how often the signal was
    "rectified" and "switched".
    """

    def __init__(self, method: str, *, overlap: str = "sum", local: bool = True):
        super().__init__()
        self.method, self.overlap, self.local = method, overlap, local
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in RECTIFIERS and not (func is aten.hardtanh_backward.default and args[2] != 0):
            self.counts["rectified"] += 1
            return func(*args, **kwargs) if self.method == "gradient" else self._rectify(func, args)
        if func in SWITCHES:
            self.counts["switched"] += 1
        elif func is aten.convolution_backward.default:
            return self._convolution(func, args, kwargs)
        elif func in NORMS and self.method != "gradient":
            return NORMS[func](*args, **kwargs)
        return func(*args, **kwargs)

    def _rectify(self, func: object, args: tuple) -> object:
        signal = args[0].clamp(min=0)
        if self.method == "guided":
            forward = args[5] if func is aten.elu_backward.default else args[1]
            bound = args[2] if func is aten.threshold_backward.default else 0
            signal = signal * (forward > bound)
        return (signal, None) if func is aten._prelu_kernel_backward.default else signal

    def _convolution(self, func: object, args: tuple, kwargs: dict) -> object:
        signal, x, weight, _, stride, padding, dilation, transposed, _, groups, mask = args
        is_plain = not transposed and weight.dim() == 4 and list(mask) == [True, False, False]
        if not is_plain:
            return func(*args, **kwargs)
        stride, padding, dilation = map(pair, (stride, padding, dilation))
        kernel = tuple(weight.shape[2:])
        if self.overlap == "normalised" and overlaps_unevenly(kernel, stride, dilation):
            result = _local_transpose(signal, x, weight, stride, padding, dilation, groups)
            return result / _coverage(x, signal, kernel, stride, padding, dilation), None, None
        if not self.local:
            return func(*args, **kwargs)
        return _local_transpose(signal, x, weight, stride, padding, dilation, groups), None, None


def _layer_norm(
    signal: Tensor,
    x: Tensor,
    shape: list[int],
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    *_: object,
) -> tuple[Tensor, None, None]:
    """The way down through (x - mean) scale weight if mean and scale are constants."""
    signal = signal * scale
    return signal if weight is None else signal * weight, None, None


def _group_norm(
    signal: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    N: int,
    C: int,
    positions: int,
    groups: int,
    *_: object,
) -> tuple[Tensor, None, None]:
    """The same for groups of channels; scale: (N, groups)."""
    columns = scale.reshape(N, groups).repeat_interleave(C // groups, 1)
    columns = columns if weight is None else columns * weight
    return signal * columns.reshape(N, C, *[1] * (signal.dim() - 2)), None, None


NORMS = {
    aten.native_layer_norm_backward.default: _layer_norm,
    aten.native_group_norm_backward.default: _group_norm,
}


def overlaps_unevenly(
    kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> bool:
    """Whether the transpose of a convolution sums more terms in some pixels than in others."""
    axes = zip(kernel, stride, dilation, strict=True)
    return any(is_uneven(k, stride=s, dilation=d) for k, s, d in axes)


def _coverage(
    x: Tensor,
    signal: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """(H, W): the number of terms that are summed in each pixel of x, relative to the mean.

    The maps are assumed to have no border: pixels there are darker for other reasons.
    """
    axes = []
    for axis in (0, 1):
        extent = dilation[axis] * kernel[axis]
        margin = -(-extent // stride[axis])
        units = signal.shape[2 + axis] + 2 * margin + x.shape[2 + axis]
        counts = overlap_counts(units, kernel[axis], stride=stride[axis], dilation=dilation[axis])
        start = margin * stride[axis] + padding[axis]
        counts = counts[start : start + x.shape[2 + axis]].to(x)
        axes.append(counts.clamp(min=1) * stride[axis] / kernel[axis])
    return axes[0][:, None] * axes[1]


def _local_transpose(
    signal: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """The transposed convolution of a signal that is zero almost everywhere, image by image.

    x: the input of the forward pass, for the shape of the result.
    """
    result = x.new_zeros(x.shape)
    for maps, image in zip(signal, result, strict=True):
        extent = _extent(maps)
        if extent is None:
            continue
        part = F.conv_transpose2d(
            maps[None, :, slice(*extent[0]), slice(*extent[1])],
            weight,
            stride=stride,
            dilation=dilation,
            groups=groups,
        )[0]
        (rows, part_rows), (columns, part_columns) = (
            _overlapping(extent[axis][0] * stride[axis] - padding[axis], size, limit)
            for axis, (size, limit) in enumerate(zip(part.shape[1:], image.shape[1:], strict=True))
        )
        image[:, rows, columns] = part[:, part_rows, part_columns]
    return result


def _extent(signal: Tensor) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The rows and columns, first and last + 1, outside which a signal (K, H, W) is zero."""
    positions = signal.ne(0).any(0).nonzero()
    if len(positions) == 0:
        return None
    first, last = positions.amin(0).tolist(), positions.amax(0).tolist()
    return (first[0], last[0] + 1), (first[1], last[1] + 1)


def _overlapping(first: int, size: int, limit: int) -> tuple[slice, slice]:
    """The overlap of a part that starts at `first` with `limit` pixels: slices of both."""
    start, stop = (min(max(end, 0), limit) for end in (first, first + size))
    return slice(start, stop), slice(start - first, stop - first)


@contextmanager
def node_rules(operations: Operations, method: str, gates: str) -> Iterator[None]:
    """The rules for single nodes of the graph: gates, clamps and activations written by hand, whose
    backward pass consists of operations that other nodes have, too."""
    with ExitStack() as undo:
        if method != "gradient":
            rule = _rectify_input if method == "deconv" else _rectify_output
            for node in operations.clamps:
                undo.callback(node.register_hook(rule).remove)
            for activation in operations.hand_written:
                hook = _activation_rule(activation, method)
                undo.callback(activation.node.register_hook(hook).remove)
        if method != "gradient" and gates == "constant":
            for node in operations.gates:
                hook = node.register_hook(lambda below, above: (None,) * len(below))
                undo.callback(hook.remove)
        yield


def _activation_rule(activation: HandWritten, method: str) -> Callable[[tuple, tuple], tuple]:
    """The rule for a product x g(x): x gets the signal of a rectifier, and g gets none."""

    def rule(below: tuple[Tensor, ...], above: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        signal = above[0].clamp(min=0)
        if method == "guided":
            signal = signal * activation.is_active()
        return tuple(signal if slot == activation.slot else None for slot in range(len(below)))

    return rule


def _rectify_input(below: tuple[Tensor, ...], above: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (above[0].clamp(min=0), *below[1:])


def _rectify_output(below: tuple[Tensor, ...], above: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (below[0].clamp(min=0), *below[1:])
