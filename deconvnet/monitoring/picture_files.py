"""Pictures as the content of PNG files."""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

# Higher levels take several times as long for files that are hardly smaller.
LEVEL = 3


def png(picture: Tensor) -> bytes:
    """A picture (1 or 3, H, W) in [0, 1] as the content of a PNG file, grey or RGB."""
    pixels = (picture.clamp(0, 1).cpu() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    image = Image.fromarray(pixels[..., 0] if len(picture) == 1 else pixels)
    image.save(buffer, "png", compress_level=LEVEL)
    return buffer.getvalue()
