"""The way down of every operation of a network: what a projection does differently from a gradient.

A projection is the backward pass of autograd with other rules for some operations (Zeiler and
Fergus 2014, section 2.1). Convolutions go down through their transposed filters and max pooling
through its switches, as in a gradient. What differs:

    rectifier    deconv    max(signal, 0), whatever the units of the forward pass were
                 guided    the same, and only where the unit was active (Springenberg et al. 2015)
                 gradient  where the unit was active, of either sign
    contrast normalisation      skipped: the signal passes as it is
    sigmoid gate of a product   a constant: no signal goes down through the gate itself

The rules act on the operations of the backward pass, not on modules, so that functional, shared and
in-place rectifiers are all met.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from deconvnet.operators.arithmetic import is_uneven
from deconvnet.operators.arithmetic import overlap as overlap_counts
from deconvnet.visualization.projection.autograd_graph import SKIPPED, Operations, pair

METHODS = ("deconv", "guided", "gradient")
OVERLAPS = ("sum", "normalised")

aten = torch.ops.aten
RECTIFIERS = {
    aten.threshold_backward.default,
    aten.hardtanh_backward.default,
    aten.leaky_relu_backward.default,
    aten.elu_backward.default,
    aten._prelu_kernel_backward.default,
}
SWITCHES = {
    aten.max_pool2d_with_indices_backward.default,
    aten.adaptive_max_pool2d_backward.default,
}


class SkippedResponseNorm(torch.autograd.Function):
    """Local response normalisation on the way up, nothing on the way down."""

    @staticmethod
    def forward(ctx: object, x: Tensor, *settings: object) -> Tensor:
        return F.local_response_norm(x, *settings)

    @staticmethod
    def backward(ctx: object, signal: Tensor) -> tuple[Tensor | None, ...]:
        return signal, None, None, None, None


assert SkippedResponseNorm.__name__ == SKIPPED, "the graph knows it by its name"


class SkippedNormalization(TorchFunctionMode):
    """Within it contrast normalisation is skipped by what goes down. For the forward pass."""

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
    """Within it a backward pass follows the rules of a method. For the backward pass only.

    local: convolutions are computed only where there is a signal, a small part of the image for
    most units; the result is the same up to rounding. rectified, switched: what was met.
    """

    def __init__(self, method: str, *, overlap: str = "sum", local: bool = True):
        super().__init__()
        self.method, self.overlap, self.local = method, overlap, local
        self.met: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in RECTIFIERS and not (func is aten.hardtanh_backward.default and args[2] != 0):
            self.met["rectified"] += 1
            return func(*args, **kwargs) if self.method == "gradient" else self._rectify(func, args)
        if func in SWITCHES:
            self.met["switched"] += 1
        elif func is aten.convolution_backward.default:
            return self._convolution(func, args, kwargs)
        return func(*args, **kwargs)

    def _rectify(self, func: object, args: tuple) -> object:
        signal = args[0].clamp(min=0)
        if self.method == "guided":
            forward = args[5] if func is aten.elu_backward.default else args[1]
            bound = args[2] if func is aten.threshold_backward.default else 0
            signal = signal * (forward > bound)
        return (signal, None) if func is aten._prelu_kernel_backward.default else signal

    def _convolution(self, func: object, args: tuple, kwargs: dict) -> object:
        signal, given, weight, _, stride, padding, dilation, transposed, _, groups, mask = args
        plain = not transposed and weight.dim() == 4 and list(mask) == [True, False, False]
        if not plain:
            return func(*args, **kwargs)
        stride, padding, dilation = map(pair, (stride, padding, dilation))
        kernel = tuple(weight.shape[2:])
        if self.overlap == "normalised" and overlaps_unevenly(kernel, stride, dilation):
            result = _paint(signal, given, weight, stride, padding, dilation, groups)
            return result / _coverage(given, signal, kernel, stride, padding, dilation), None, None
        if not self.local:
            return func(*args, **kwargs)
        return _paint(signal, given, weight, stride, padding, dilation, groups), None, None


def overlaps_unevenly(
    kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> bool:
    """Whether the transpose of a convolution sums more terms in some pixels than in others."""
    axes = zip(kernel, stride, dilation, strict=True)
    return any(is_uneven(k, stride=s, dilation=d) for k, s, d in axes)


def _coverage(
    given: Tensor,
    signal: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """(rows, columns): how many terms are summed in each pixel, over their mean inside.

    As if the maps had no border, since there it is not the pattern that makes pixels darker.
    """
    axes = []
    for axis in (0, 1):
        reach = dilation[axis] * kernel[axis]
        margin = -(-reach // stride[axis])
        units = signal.shape[2 + axis] + 2 * margin + given.shape[2 + axis]
        counts = overlap_counts(units, kernel[axis], stride=stride[axis], dilation=dilation[axis])
        start = margin * stride[axis] + padding[axis]
        counts = counts[start : start + given.shape[2 + axis]].to(given)
        axes.append(counts.clamp(min=1) * stride[axis] / kernel[axis])
    return axes[0][:, None] * axes[1]


def _paint(
    signal: Tensor,
    given: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """The transposed convolution of a signal that is zero almost everywhere, image by image."""
    painted = given.new_zeros(given.shape)
    for one, image in zip(signal, painted, strict=True):
        extent = _extent(one)
        if extent is None:
            continue
        part = F.conv_transpose2d(
            one[None, :, slice(*extent[0]), slice(*extent[1])],
            weight,
            stride=stride,
            dilation=dilation,
            groups=groups,
        )[0]
        (rows, part_rows), (columns, part_columns) = (
            _placed(extent[axis][0] * stride[axis] - padding[axis], size, limit)
            for axis, (size, limit) in enumerate(zip(part.shape[1:], image.shape[1:], strict=True))
        )
        image[:, rows, columns] = part[:, part_rows, part_columns]
    return painted


def _extent(signal: Tensor) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Rows and columns, first and last + 1, between which a signal (K, H, W) is not zero."""
    places = signal.ne(0).any(0).nonzero()
    if len(places) == 0:
        return None
    first, last = places.amin(0).tolist(), places.amax(0).tolist()
    return (first[0], last[0] + 1), (first[1], last[1] + 1)


def _placed(first: int, size: int, limit: int) -> tuple[slice, slice]:
    """Where a part that begins at `first` lies in an image of `limit` pixels, and what of it."""
    start, stop = (min(max(end, 0), limit) for end in (first, first + size))
    return slice(start, stop), slice(start - first, stop - first)


@contextmanager
def node_rules(found: Operations, method: str, gates: str) -> Iterator[None]:
    """The rules that belong to single operations: clamps, which look like nothing else on the way
    down, and gates."""
    with ExitStack() as undo:
        if method != "gradient":
            rule = _rectified_above if method == "deconv" else _rectified_below
            for node in found.clamps:
                undo.callback(node.register_hook(rule).remove)
        if method != "gradient" and gates == "constant":
            for node in found.gates:
                hook = node.register_hook(lambda below, above: (None,) * len(below))
                undo.callback(hook.remove)
        yield


def _rectified_above(below: tuple[Tensor, ...], above: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (above[0].clamp(min=0), *below[1:])


def _rectified_below(below: tuple[Tensor, ...], above: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (below[0].clamp(min=0), *below[1:])
