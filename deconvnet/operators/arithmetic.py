"""Sizes, receptive fields and overlaps of convolutions, and convolutions as dense matrices.

Everything except the matrices is along one axis. "Convolution" and "transposed convolution" are
PyTorch's, with its stride, padding, dilation and output padding: the convolution is a correlation,
without a flip, and its transpose pastes the unflipped kernel (`docs/deconvolution.md` is a guide
with pictures). The deconvolution of the sparse models, which has other sizes and borders, is
`deconvolve`; only `convolution_matrix` and `receptive_field` refer to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.operators.convolution import Boundary, deconvolve, map_size


def convolution_size(
    size: int, kernel: int, *, stride: int = 1, padding: int = 0, dilation: int = 1
) -> int:
    """Outputs of a convolution: floor((size + 2 padding - dilation (kernel - 1) - 1) / stride) + 1.

    This is also the size of a pooling that skips partial windows. Raises ValueError if the kernel
    is larger than the padded input.
    """
    _check(size=size, kernel=kernel, stride=stride, padding=padding, dilation=dilation)
    span = dilation * (kernel - 1) + 1
    if span > size + 2 * padding:
        raise ValueError(
            f"kernel={kernel}, dilation={dilation}: spans {span} pixels, more than the "
            f"{size + 2 * padding} of size={size} with padding={padding}"
        )
    return (size + 2 * padding - span) // stride + 1


def transposed_convolution_size(
    size: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int = 0,
    output_padding: int = 0,
    dilation: int = 1,
) -> int:
    """Outputs of a transposed convolution.

    (size - 1) stride - 2 padding + dilation (kernel - 1) + 1 + output_padding

    If stride > 1, convolutions of inputs of several sizes have equally many outputs;
    output_padding, less than stride or dilation, selects the size to return to
    (`undoing_output_padding`).
    """
    _check(size=size, kernel=kernel, stride=stride, padding=padding, dilation=dilation)
    _check(output_padding=output_padding)
    if output_padding >= max(stride, dilation):
        raise ValueError(
            f"output_padding={output_padding}: must be less than stride={stride} or "
            f"dilation={dilation}"
        )
    outputs = (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1 + output_padding
    if outputs < 1:
        raise ValueError(
            f"padding={padding}: crops all of the {outputs + 2 * padding} outputs of size={size}, "
            f"kernel={kernel}, stride={stride}, dilation={dilation}"
        )
    return outputs


def undoing_padding(kernel: int, padding: int, *, dilation: int = 1) -> int:
    """The padding with which a second convolution of stride 1 undoes the size of a first.

    dilation (kernel - 1) - padding. With the kernel rotated by 180 degrees, and input and output
    channels exchanged, the second is the transpose of the first. For a first convolution of stride
    s the padding is the same, after s - 1 zeros are inserted between its outputs and
    `undoing_output_padding` zeros after the last.
    """
    _check(kernel=kernel, padding=padding, dilation=dilation)
    reach = dilation * (kernel - 1)
    if padding > reach:
        raise ValueError(
            f"padding={padding}: at most dilation * (kernel - 1) = {reach} can be undone by padding"
        )
    return reach - padding


def undoing_output_padding(
    size: int, kernel: int, *, stride: int = 1, padding: int = 0, dilation: int = 1
) -> int:
    """The output padding with which the transposed convolution returns to `size`.

    (size + 2 padding - dilation (kernel - 1) - 1) mod stride: the number of pixels, padding
    included, beyond the last window of the convolution.
    """
    # Called for its check that at least one window fits.
    convolution_size(size, kernel, stride=stride, padding=padding, dilation=dilation)
    return (size + 2 * padding - dilation * (kernel - 1) - 1) % stride


def overlap(
    size: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int = 0,
    output_padding: int = 0,
    dilation: int = 1,
) -> Tensor:
    """The number of terms summed in each output of a transposed convolution: int64 (outputs,).

    size: of its input. In two dimensions the counts are the products of those of rows and columns.
    """
    outputs = transposed_convolution_size(
        size,
        kernel,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        dilation=dilation,
    )
    positions = stride * torch.arange(size)[:, None] + dilation * torch.arange(kernel) - padding
    inside = (positions >= 0) & (positions < outputs)
    return torch.bincount(positions[inside], minlength=outputs)


def is_uneven(kernel: int, *, stride: int, dilation: int = 1) -> bool:
    """Whether the overlaps of a transposed convolution differ between outputs far from the border.

    They do if the stride does not divide the kernel, or has a common divisor with the dilation, so
    that some outputs receive no terms. The result is a pattern of period `stride`, in two
    dimensions a checkerboard, which the weights would have to compensate.
    """
    _check(kernel=kernel, stride=stride, dilation=dilation)
    return kernel % stride != 0 or math.gcd(stride, dilation) != 1


@dataclass(frozen=True)
class Window:
    """A convolution or pooling along one axis."""

    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    def __post_init__(self) -> None:
        _check(kernel=self.kernel, stride=self.stride, padding=self.padding, dilation=self.dilation)


@dataclass(frozen=True)
class Field:
    """The receptive field of unit i of a layer along an axis: `size` pixels from offset + stride i.

    Some of them lie outside the image: in its padding, or because the maps of a "valid" layer are
    larger than their target. With dilation the unit may skip some of the pixels in between.
    """

    size: int
    stride: int
    offset: int

    def pixels(self, unit: int) -> tuple[int, int]:
        """(first pixel, last pixel + 1) of a unit; the first may be negative."""
        first = self.offset + self.stride * unit
        return first, first + self.size


def chain_field(chain: Sequence[Window | tuple[int, ...]]) -> Field:
    """The field in pixels of a unit after a chain of convolutions and poolings, along one axis.

    chain: from the image up, each a Window or (kernel, stride, padding, dilation), the last of
    which may be omitted.
    """
    size, stride, offset = 1, 1, 0
    for link in chain:
        if not isinstance(link, Window) and not 1 <= len(link) <= 4:
            raise ValueError(f"{link}: must be (kernel, stride, padding, dilation)")
        window = link if isinstance(link, Window) else Window(*link)
        size += window.dilation * (window.kernel - 1) * stride
        offset -= window.padding * stride
        stride *= window.stride
    return Field(size, stride, offset)


def receptive_field(
    filter_sizes: Sequence[int],
    pools: Sequence[int],
    boundary: Boundary | Sequence[Boundary] = "valid",
) -> Field:
    """The field in pixels of a unit of the top layer of a deconvolutional network, along one axis.

    filter_sizes: of the layers from the bottom to the top; pools: of the layers below the top, one
    fewer; boundary: of all layers, or of each. A unit of layer l paints filter_size units of the
    layer below, each of which may unpool to any of `pool` units. Pixels mirrored at a border count
    where the filter would paint them without the border, outside the image.
    """
    if len(pools) != len(filter_sizes) - 1:
        raise ValueError(
            f"{len(filter_sizes)} layers have {len(filter_sizes) - 1} poolings, got {len(pools)}"
        )
    boundaries = [boundary] * len(filter_sizes) if isinstance(boundary, str) else boundary
    chain = []
    for level, filter_size in enumerate(filter_sizes):
        if level:
            chain.append(Window(pools[level - 1], stride=pools[level - 1]))
        padding = {"valid": filter_size - 1, "circular": 0}.get(
            boundaries[level], (filter_size - 1) // 2
        )
        chain.append(Window(filter_size, padding=padding))
    return chain_field(chain)


def correlation_matrix(
    weight: Tensor,
    image: tuple[int, int],
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """torch's conv2d without bias as a dense matrix M (K*rows*columns, C*H*W). For small problems.

        M @ x.flatten()    = conv2d(x, weight, ...).flatten()               x (C, H, W)
        M.T @ y.flatten()  = conv_transpose2d(y, weight, ...).flatten()     y (K, rows, columns)

    with the same stride, padding, dilation and groups, and in the transpose the output padding that
    returns to H and W (`undoing_output_padding`). weight: (K, C / groups, h, w); image: (H, W).
    """
    if weight.ndim != 4:
        raise ValueError(f"weight must have the shape (K, C, h, w), got {tuple(weight.shape)}")
    for axis in (0, 1):  # torch's own messages name neither axis nor argument
        convolution_size(
            image[axis],
            weight.shape[2 + axis],
            stride=_along(stride, axis),
            padding=_along(padding, axis),
            dilation=_along(dilation, axis),
        )
    C = weight.shape[1] * groups
    impulses = torch.eye(C * image[0] * image[1], dtype=weight.dtype, device=weight.device)
    x = impulses.view(-1, C, *image)
    return F.conv2d(x, weight, None, stride, padding, dilation, groups).flatten(1).T


def convolution_matrix(
    f: Tensor, image: tuple[int, int], *, boundary: Boundary = "valid", g: Tensor | None = None
) -> Tensor:
    """F as a dense matrix (C*H*W, K*rows*columns): F @ z.flatten() = deconvolve(z, f).flatten().
    For small problems.

    f: (K, C, h, w); image: (H, W).
    """
    K, C, h, w = f.shape
    rows, columns = map_size(image, (h, w), boundary)
    impulses = torch.eye(K * rows * columns, dtype=f.dtype, device=f.device)
    painted = deconvolve(impulses.view(-1, K, rows, columns), f, g, boundary=boundary)
    return painted.flatten(1).T


def _along(value: int | tuple[int, int], axis: int) -> int:
    return value if isinstance(value, Integral) else value[axis]


def _check(**values: int) -> None:
    for name, value in values.items():
        least = 0 if name.endswith("padding") else 1
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r}: must be a whole number, at least {least}")
