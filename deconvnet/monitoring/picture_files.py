"""Pictures as the content of files: PNG, which keeps every pixel, or the smaller WebP and JPEG.

Grids of photographs and of projections to pixels hardly compress without loss: WebP needs about a
tenth of the space of PNG. Browsers and TensorBoard show JPEG, TensorBoard no WebP.
"""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

# Higher levels take several times as long for files that are hardly smaller.
LEVEL = 3
# From 0 to 100: at these, text stays sharp.
WEBP_QUALITY, JPEG_QUALITY = 75, 80
# The largest side of a WebP file in pixels.
WEBP_LARGEST = 16383


def png(picture: Tensor) -> bytes:
    """A picture (1 or 3, H, W) in [0, 1] as the content of a PNG file, grey or RGB."""
    return _encoded(picture, "png", compress_level=LEVEL)


def webp(picture: Tensor) -> bytes:
    """The same as a WebP file; ValueError if a side is larger than WEBP_LARGEST."""
    if max(picture.shape[1:]) > WEBP_LARGEST:
        raise ValueError(
            f"picture of {tuple(picture.shape[1:])} pixels: WebP has at most {WEBP_LARGEST} a side"
        )
    return _encoded(picture, "webp", quality=WEBP_QUALITY)


def png_or_jpeg(picture: Tensor) -> bytes:
    """The same as a PNG or a JPEG file, whichever is smaller."""
    return min(
        png(picture), _encoded(picture, "jpeg", quality=JPEG_QUALITY, optimize=True), key=len
    )


def _encoded(picture: Tensor, format: str, **options: int | bool) -> bytes:
    buffer = io.BytesIO()
    _image(picture).save(buffer, format, **options)
    return buffer.getvalue()


def _image(picture: Tensor) -> Image.Image:
    """Grey or RGB."""
    pixels = picture.clamp(0, 1).mul_(255).round_().to("cpu", torch.uint8).numpy()
    # Pillow interleaves the channels faster than NumPy and torch.
    channels = [Image.fromarray(channel) for channel in pixels]
    return channels[0] if len(channels) == 1 else Image.merge("RGB", channels)
