"""Sizes, receptive fields, and a convolution written out as a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deconvnet.convolution import Boundary, deconvolve, map_size


def convolution_size(size: int, kernel: int, *, stride: int = 1, padding: int = 0) -> int:
    """Outputs of a convolution along one axis: floor((size + 2 padding - kernel) / stride) + 1."""
    return (size + 2 * padding - kernel) // stride + 1


def transposed_convolution_size(
    size: int, kernel: int, *, stride: int = 1, padding: int = 0, output_padding: int = 0
) -> int:
    """Outputs of a transposed convolution along one axis.

    (size - 1) stride - 2 padding + kernel + output_padding
    """
    return (size - 1) * stride - 2 * padding + kernel + output_padding


@dataclass(frozen=True)
class Field:
    """The pixels of an axis that a unit of a layer reaches: `size` of them from offset + stride i.

    Some of them lie outside the image: the maps of a "valid" layer are larger than what they
    explain.
    """

    size: int
    stride: int
    offset: int

    def pixels(self, unit: int) -> tuple[int, int]:
        """(first pixel, last pixel + 1) of a unit; the first may be negative."""
        first = self.offset + self.stride * unit
        return first, first + self.size


def receptive_field(
    filter_sizes: Sequence[int],
    pools: Sequence[int],
    boundary: Boundary | Sequence[Boundary] = "valid",
) -> Field:
    """The field in pixels of a unit of the top layer of a stack, along one axis.

    filter_sizes: of the layers from the bottom to the top; pools: of the layers below the top, one
    fewer; boundary: of all layers, or of each. A unit of layer l paints filter_size units of what
    is below, each of which may be any of the `pool` units that it stands for.
    """
    if len(pools) != len(filter_sizes) - 1:
        raise ValueError(
            f"{len(filter_sizes)} layers have {len(filter_sizes) - 1} poolings, got {len(pools)}"
        )
    boundaries = [boundary] * len(filter_sizes) if isinstance(boundary, str) else boundary
    size, stride, offset = 1, 1, 0
    for level, filter_size in enumerate(filter_sizes):
        if level:
            size, stride = size + (pools[level - 1] - 1) * stride, stride * pools[level - 1]
        if boundaries[level] == "valid":
            offset -= (filter_size - 1) * stride
        size += (filter_size - 1) * stride
    return Field(size, stride, offset)


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
