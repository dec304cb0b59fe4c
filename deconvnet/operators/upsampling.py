"""Upsampling layers: bilinear interpolation as a transposed convolution, and resizing followed by
a convolution.

    N images · C channels · H, W pixels · s factor · k = 2s - s mod 2 filter

Beyond the border, the maps are continued by repeating their last row or column. A constant image
therefore stays constant, up to the border.

Both are layers for networks that are trained elsewhere (`docs/upsampling.md` is a guide). They are
"deconvolution layers" in the sense of upsampling, applied forwards; nothing here is inferred.
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
    With padding s // 2 the output is s times as large. The filter sums to s^2, and the weights that
    contribute to one output sum to 1. dtype: torch's default if None.
    """
    _check(factor=factor)
    dtype = dtype or torch.get_default_dtype()
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}: must be a floating-point type, such as torch.float32")
    size = 2 * factor - factor % 2
    # In float64, since 1/3 rounded to float32 is wrong in float64.
    positions = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    ramp = 1 - positions.abs() / factor
    return torch.outer(ramp, ramp).to(dtype)


class BilinearUpsampling(nn.Module):
    """Maps (N, C, sH, sW) from maps (N, C, H, W): a transposed convolution, initially bilinear.

    Every channel has its own filter, `weight` (C, 1, k, k), and channels do not mix. With the
    initial weights it equals

        torch.nn.functional.interpolate(x, scale_factor=s, mode="bilinear", align_corners=False)

    to rounding, up to the border, where a plain transposed convolution sums fewer terms and fades:
    here the border is repeated by one pixel, and the additional output is cropped.

    channels: C; factor: s, a positive integer; learnable: whether `weight` is a parameter, else it
    is a buffer with the same name in the `state_dict`; dtype: of the weights. For a float64 layer
    set it here: `.double()` keeps the rounding of float32.
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
        """x: (N, C, H, W). Returns (N, C, sH, sW). Raises ValueError if the shape differs."""
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
    """Maps (N, out_channels, sH, sW): the maps resized by a fixed rule, followed by a convolution.

    Odena, Dumoulin and Olah 2016: unlike a transposed convolution of stride s, whose neighbouring
    outputs sum different weights, it never turns a constant image into a checkerboard, whatever its
    weights. 3x3 filters cost 9 products per output and pair of channels; a transposed convolution
    with 2s x 2s filters costs 4.

    in_channels, out_channels: of the convolution, an `nn.Conv2d` of stride 1 with torch's default
    initialisation; size: of its filters, odd, so that maps keep their size; factor: s, a positive
    integer; mode: "nearest" repeats every pixel, "bilinear" interpolates; bias: whether the
    convolution has one.
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
        """x: (N, in_channels, H, W). Raises ValueError if the shape differs."""
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
