"""Conversion between pixels and the input of a network.

All other code uses RGB pixels in [0, 1], whatever a network was trained on. Only the network uses
its own input space.

N images · H W pixels
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

ORDERS = ("rgb", "bgr", "grey")


@dataclass(frozen=True)
class Normalization:
    """The input of a network: x = (planes - mean) / std, with the planes in a given order.

    mean, std: one number for each plane, in the order of the network, or one for all. order: rgb,
    bgr, or grey, which is one plane, the mean of the three. By default, pixels are not changed. A
    Caffe network, whose input is blue, green and red from 0 to 255 with the mean subtracted, has
    mean=(103.939/255, 116.779/255, 123.68/255), std=(1/255,), order="bgr".
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    order: str = "rgb"  # rgb | bgr | grey

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r}: choose {', '.join(ORDERS)}")
        counts = (1,) if self.order == "grey" else (1, 3)
        for key in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, key))
            if len(values) not in counts:
                lengths = " or ".join(map(str, counts))
                raise ValueError(
                    f"{key}={values}: order={self.order} takes {lengths} numbers, not {len(values)}"
                )
            if not all(map(math.isfinite, values)) or (key == "std" and min(values) <= 0):
                raise ValueError(
                    f"{key}={values}: must be finite" + (" and above 0" if key == "std" else "")
                )
            object.__setattr__(self, key, values)

    def apply(self, pixels: Tensor) -> Tensor:
        """Convert RGB pixels (N, 3, H, W) in [0, 1] to the network's input (N, 3 or 1, H, W)."""
        _check_planes("pixels", pixels, 3)
        if self.order == "grey":
            pixels = pixels.mean(1, keepdim=True)
        elif self.order == "bgr":
            pixels = pixels.flip(1)
        return (pixels - self._column(self.mean, pixels)) / self._column(self.std, pixels)

    def pixels(self, images: Tensor) -> Tensor:
        """Convert images in the input space (N, 3 or 1, H, W) back to RGB pixels (N, 3, H, W)."""
        _check_planes("images", images, 1 if self.order == "grey" else 3)
        planes = images * self._column(self.std, images) + self._column(self.mean, images)
        return planes.flip(1) if self.order == "bgr" else planes.expand(-1, 3, -1, -1)

    def signed_rgb(self, images: Tensor) -> Tensor:
        """Convert images in the input space to signed RGB (N, 3, H, W) in units of pixels.

        This is the inverse of `apply` without the mean: it maps a difference of two inputs to the
        difference of their pixels. A grey plane is repeated three times.
        """
        _check_planes("images", images, 1 if self.order == "grey" else 3)
        scaled = images * self._column(self.std, images)
        if self.order == "bgr":
            return scaled.flip(1)
        return scaled.expand(-1, 3, -1, -1)

    @staticmethod
    def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
        return like.new_tensor(values).view(1, -1, 1, 1)


def _check_planes(what: str, images: Tensor, planes: int) -> None:
    if images.ndim != 4 or images.shape[1] != planes:
        raise ValueError(f"{what} must be (N, {planes}, H, W), got {tuple(images.shape)}")
