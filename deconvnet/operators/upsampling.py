"""Layers that enlarge maps: bilinear interpolation as a transposed convolution, and resizing
before a convolution.

    N images · C channels · H, W pixels · s factor · k = 2s - s mod 2 filter

This module decides what lies beyond the border of maps that are enlarged: their last row or column,
again and again. A constant image therefore stays constant, up to the border.

Both are layers for networks that are trained elsewhere (`docs/upsampling.md` is a guide). They are
"deconvolution layers" in the sense of upsampling, a map used forwards; nothing here is inferred.
"""

from __future__ import annotations

from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deconvnet.support.validation import check_tensors

MODES = ("nearest", "bilinear")


def bilinear_filter(factor: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """The filter (k, k) that interpolates bilinearly as a transposed convolution of stride s.

        f(i, j) = t(i) t(j),   t(i) = 1 - |i - (k - 1) / 2| / s,   k = 2s - s mod 2

    for factor s: the weights of fully convolutional networks (Long, Shelhamer and Darrell 2015).
    With padding s // 2 the output is s times as large. It sums to s^2, and what meets in one output
    to 1. dtype: torch's default if None.
    """
    _check(factor=factor)
    dtype = dtype or torch.get_default_dtype()
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}: must be a floating one, such as torch.float32")
    size = 2 * factor - factor % 2
    # In float64, since a third that was rounded to float32 is wrong in float64.
    places = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    ramp = 1 - places.abs() / factor
    return torch.outer(ramp, ramp).to(dtype)


class BilinearUpsampling(nn.Module):
    """Maps (N, C, sH, sW) of maps (N, C, H, W): a transposed convolution, at first bilinear.

    Every channel has its own filter, `weight` (C, 1, k, k), and channels do not mix. With
    the weights that it starts from it is

        torch.nn.functional.interpolate(x, scale_factor=s, mode="bilinear", align_corners=False)

    to rounding, up to the border, where a plain transposed convolution adds less and less and
    fades: here the border is repeated by one pixel, and what that adds outside is cropped.

    channels: C; factor: s, any whole number; learnable: whether `weight` is a parameter, else it is
    a buffer, of the same name in the `state_dict`; dtype: of the weights. To make a layer float64
    say so here: `.double()` keeps the rounding of float32.
    """

    def __init__(
        self,
        channels: int,
        factor: int,
        *,
        learnable: bool = True,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check(channels=channels, factor=factor)
        self.channels, self.factor = channels, factor
        weight = bilinear_filter(factor, dtype=dtype).repeat(channels, 1, 1, 1)
        if learnable:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W). Returns (N, C, sH, sW). Raises ValueError where the shape differs."""
        _check_maps(x, self.channels)
        # One pixel is enough: an output lies less than one input away from its nearest input.
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        padding = self.factor + self.factor // 2
        return F.conv_transpose2d(
            x, self.weight, stride=self.factor, padding=padding, groups=self.channels
        )

    def extra_repr(self) -> str:
        return f"{self.channels}, factor={self.factor}"


class ResizeConvolution(nn.Module):
    """Maps (N, out_channels, sH, sW): the maps enlarged by a fixed rule, and then a convolution.

    Odena, Dumoulin and Olah 2016: unlike a transposed convolution of stride s, whose outputs are
    sums of different weights in turn, it turns no constant image into a checkerboard, whatever its
    weights are. Filters of 3x3 cost 9 products for an output of a pair of channels, those of a
    transposed convolution with 2s x 2s filters 4.

    in_channels, out_channels: of the convolution, an `nn.Conv2d` of stride 1 that is drawn as torch
    draws it; size: of its filters, odd, so that maps keep their size; factor: s, any whole number;
    mode: "nearest" repeats every pixel, "bilinear" interpolates; bias: whether it has one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        factor: int,
        *,
        mode: str = "nearest",
        bias: bool = True,
    ):
        super().__init__()
        _check(in_channels=in_channels, out_channels=out_channels, size=size, factor=factor)
        if size % 2 == 0:
            raise ValueError(f"size={size}: must be odd, so that maps keep their size")
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: choose {' or '.join(map(repr, MODES))}")
        self.factor, self.mode = factor, mode
        self.convolution = nn.Conv2d(
            in_channels,
            out_channels,
            size,
            padding=size // 2,
            padding_mode="replicate",
            bias=bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, in_channels, H, W). Raises ValueError where the shape differs."""
        _check_maps(x, self.convolution.in_channels)
        return self.convolution(F.interpolate(x, scale_factor=self.factor, mode=self.mode))

    def extra_repr(self) -> str:
        return f"factor={self.factor}, mode={self.mode!r}"


def _check(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: must be a whole number, at least 1")


def _check_maps(x: Tensor, channels: int) -> None:
    check_tensors(maps=x)
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"maps must have the shape (N, {channels}, H, W), got {tuple(x.shape)}")
