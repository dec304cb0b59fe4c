"""An image that is read on demand: the element of sources and image sets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deconvnet.images.decoding import digest_file, shown_name


@dataclass(frozen=True)
class Item:
    """An image that is read when it is needed.

    All functions raise ValueError with a one-line message if they cannot read it.
    """

    name: str  # stored as `shown_name` of it
    read: Callable[[], Tensor]  # the image (3, H, W) float32 in [0, 1]
    path: Path | None = None  # its file, if it has its own
    read_label: Callable[[], str] | None = None  # the name of its class
    # SHA-256 of its content; None: that of its file, or of its pixels if it has no file
    read_digest: Callable[[], str] | None = None
    # the opacity (1, H, W) of its pixels in [0, 1]; None: it is no image file
    read_alpha: Callable[[], Tensor] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", shown_name(self.name))

    def digest(self) -> str:
        """SHA-256 of its content, 64 hexadecimal digits, equal only for equal content.

        The content is the bytes of its file or member of a shard, without decoding; if there are
        no bytes, as in torchvision's data sets, it is the pixels.
        """
        if self.read_digest is not None:
            return self.read_digest()
        return pixel_digest(self.read()) if self.path is None else digest_file(self.path)

    @property
    def has_bytes(self) -> bool:
        """Whether the digest is of bytes rather than of pixels."""
        return self.read_digest is not None or self.path is not None


def pixel_digest(image: Tensor) -> str:
    """SHA-256 of the shape, the type and the pixels of an image."""
    pixels = image.cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(pixels.shape)} {pixels.dtype}".encode())
    digest.update(pixels.view(torch.uint8).numpy())
    return digest.hexdigest()
