"""Fitting images of many sizes to one: by cropping, or by padding, with a frame for the picture.

H, W pixels     image (3, H, W) float32 in [0, 1]
frame: top, left, height, width of the picture in its square, with zeros around it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from deconvnet.images.preprocessing import Frame

FITS = ("crop", "pad")
INTERPOLATIONS = ("bicubic", "bilinear")

MIN_SIDE = 8  # pixels: the smallest side of an image, and of a picture in its square
MAX_SIDE = 100_000  # pixels: a larger side can only be a mistake


@dataclass(frozen=True)
class Crop:
    """A centre crop, as used by networks of fixed input size.

    The short side is resized to `resize` pixels, as in `crop_to_square`; the central square of
    `size` pixels of the result is kept.
    """

    resize: int
    size: int
    interpolation: str = "bicubic"  # bicubic | bilinear

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"crop.size={self.size}: must be at least 1")
        if self.resize < self.size:
            raise ValueError(
                f"crop.resize={self.resize}: must be at least crop.size={self.size}, the side of "
                "the square that is cropped from it"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"crop.interpolation={self.interpolation!r}: choose {', '.join(INTERPOLATIONS)}"
            )

    def __call__(self, image: Tensor) -> Tensor:
        """(3, size, size) of an image (3, H, W)."""
        square = crop_to_square(image, self.resize, interpolation=self.interpolation)
        # Rounded as in torchvision, so that networks see the pixels they were trained on.
        first = round((self.resize - self.size) / 2)
        return square[:, first : first + self.size, first : first + self.size]

    def box(
        self, box: tuple[int, int, int, int], size: tuple[int, int]
    ) -> tuple[int, int, int, int]:
        """Where a box of an image of H x W pixels is in the crop: top, left, bottom, right.

        It is clipped to the crop, in which it has no pixel if bottom <= top or right <= left.
        """
        short, first = min(size), round((self.resize - self.size) / 2)
        edges = []
        for axis, edge in enumerate(box):
            margin = (size[axis % 2] - short) // 2
            position = round((edge - margin) * self.resize / short) - first
            edges.append(min(max(position, 0), self.size))
        return tuple(edges)


def crop_to_square(image: Tensor, size: int, *, interpolation: str = "bicubic") -> Tensor:
    """The centre of an image (3, H, W) as (3, size, size): its short side becomes `size`.

    The image is cropped first, so that a long thin one does not become huge. Then it is resampled
    with antialiasing and clamped to [0, 1], since bicubic interpolation overshoots at edges.
    """
    height, width = image.shape[1:]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    image = image[:, top : top + short, left : left + short]
    return _resize(image, size, size, interpolation)


def pad_to_square(image: Tensor, size: int) -> tuple[Tensor, Frame]:
    """The whole image, its long side resized to `size`, centred in (3, size, size), and its frame.

    The rest is zero. Resampled as in `crop_to_square`. Raises ValueError if the short side would
    fall below MIN_SIDE pixels, too few for preprocessing at a border.
    """
    long = max(image.shape[1:])
    height, width = (round(length * size / long) for length in image.shape[1:])
    if min(height, width) < MIN_SIDE:
        raise ValueError(
            f"{image.shape[1]}x{image.shape[2]} pixels become {height}x{width} in a square of "
            f"data.size={size}: both must be at least {MIN_SIDE}"
        )
    top, left = (size - height) // 2, (size - width) // 2
    square = image.new_zeros(len(image), size, size)
    square[:, top : top + height, left : left + width] = _resize(image, height, width)
    return square, (top, left, height, width)


def reduced(image: Tensor, side: int, *, fit: str = "crop") -> Tensor:
    """The whole image (3, H, W), reduced so that its short side has at most `side` pixels.

    fit: "pad" means the long side. Resampled as in `crop_to_square`.
    """
    return _resize(image, *reduced_size(tuple(image.shape[1:]), side, fit=fit))


def reduced_size(size: tuple[int, int], side: int, *, fit: str = "crop") -> tuple[int, int]:
    """The size of an image of H x W pixels after `reduced`."""
    scale = min(1.0, side / (max(size) if fit == "pad" else min(size)))
    height, width = (max(1, round(length * scale)) for length in size)
    return height, width


@dataclass(frozen=True)
class TrainingScale:
    """The scale of training images: `side` pixels along the short side of a whole image, or along
    its long side if fit is "pad"."""

    side: int
    fit: str = "crop"

    def __post_init__(self) -> None:
        if not isinstance(self.side, int) or self.side < 1:
            raise ValueError(f"side={self.side}: must be a whole number of at least 1")
        if self.fit not in FITS:
            raise ValueError(f"fit={self.fit}: choose {' or '.join(FITS)}")

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size of an image of H x W pixels at this scale; smaller images are not enlarged."""
        return reduced_size(size, self.side, fit=self.fit)

    def __str__(self) -> str:
        which = "long" if self.fit == "pad" else "short"
        return f"{self.side} pixels along the {which} side, the scale of the training images"


def fit_image(image: Tensor, name: str, size: int | None, fit: str) -> tuple[Tensor, Frame]:
    """The image fitted to data.size by data.fit, and its frame; name: for messages.

    NaN marks unseen pixels. A pixel of the result is the mean of those that are seen of what it
    covers, and NaN if they are less than half of it.
    """
    unseen = image.isnan().any(0, keepdim=True)
    if unseen.any():
        weighted = torch.cat([image.masked_fill(unseen, 0), (~unseen).to(image)])
        # In the middle of [0, 1], so that no overshoot is clamped before the division.
        fitted, frame = _fit_planes((weighted + 0.5) / 2, name, size, fit)
        top, left, height, width = frame
        picture = fitted[:, top : top + height, left : left + width]
        *planes, seen = 2 * picture - 0.5
        planes = (torch.stack(planes) / seen.clamp(min=0.5)).clamp(0, 1)
        picture[:-1] = planes.masked_fill(seen < 0.5, torch.nan)
        return fitted[:-1].contiguous(), frame
    return _fit_planes(image, name, size, fit)


def _fit_planes(planes: Tensor, name: str, size: int | None, fit: str) -> tuple[Tensor, Frame]:
    if fit == "pad":
        try:
            return pad_to_square(planes, size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if size is not None:
        planes = crop_to_square(planes, size)
    return planes, (0, 0, *planes.shape[1:])


def is_enlarged(image: Tensor, size: int | None, fit: str) -> bool:
    """Whether `fit_image` enlarges the image."""
    side = max(image.shape[1:]) if fit == "pad" else min(image.shape[1:])
    return size is not None and side < size


def check_equal_sizes(images: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise ValueError unless all images have one size."""
    for image, name in zip(images, names, strict=True):
        if image.shape != images[0].shape:
            (a, b), (c, d) = images[0].shape[1:], image.shape[1:]
            raise ValueError(
                f"data.size=None: all images must have one size, but {names[0]} has {a}x{b} pixels "
                f"and {name} {c}x{d}; a number in data.size crops or, with data.fit=pad, pads them"
            )


def _resize(image: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    if image.shape[1:] == (height, width):
        return image
    resized = functional.interpolate(image[None], (height, width), mode=mode, antialias=True)
    return resized[0].clamp(0, 1)
