"""Which pixels of an image file are seen: from its alpha channel, or from a mask file beside it.

While images with holes are read, NaN stands for an unseen pixel in all planes; `holes` separates
the two again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from deconvnet.images.decoding import SUFFIXES, Content, shown_name, user_path
from deconvnet.images.files import assignment, files_in
from deconvnet.images.item import Item

# The value of data.mask that stands for the transparency of the images themselves.
ALPHA = "alpha"


def with_holes(items: Iterator[Item], mask: str) -> Iterator[Item]:
    """The items with NaN at their unseen pixels.

    mask: "alpha": pixels that are more transparent than opaque are unseen; or a folder of image
    files that have the names of the images, with any suffix, and are black where pixels are unseen.
    """
    files = None if mask == ALPHA else _mask_files(mask)
    for item in items:
        if files is None:
            read_seen, digest = item.read_alpha or partial(_no_alpha, item.name), None
        else:
            read_seen = partial(_read_seen, item.name, files, mask)
            digest = partial(_mask_digest, item.name, files, mask)
        yield replace(
            item,
            read=partial(_read, item, read_seen),
            read_digest=partial(_digest, item, digest),
        )


def _mask_files(folder: str) -> dict[str, Path]:
    """The mask files of a folder by their names relative to it, without suffix."""
    root, key = user_path(folder), "data.mask"
    files = {}
    for file in files_in(folder, SUFFIXES, key):
        stem = file.relative_to(root).with_suffix("").as_posix()
        if stem in files:
            raise ValueError(
                f"{assignment(folder, key)}: {shown_name(files[stem].name)} and "
                f"{shown_name(file.name)} are masks of the same image"
            )
        files[stem] = file
    if not files:
        raise ValueError(f"{assignment(folder, key)}: no mask in this folder")
    return files


def _mask_of(name: str, files: dict[str, Path], folder: str) -> Content:
    stem = Path(name).with_suffix("").as_posix()
    if stem not in files:
        raise ValueError(
            f"{assignment(folder, 'data.mask')}: no mask named {shown_name(stem)}, for the image "
            f"{shown_name(name)}"
        )
    return Content(files[stem], str(files[stem]))


def _read_seen(name: str, files: dict[str, Path], folder: str) -> Tensor:
    """(1, H, W): 1 where the mask file of an image is white, 0 where it is black."""
    return _mask_of(name, files, folder).image().mean(0, keepdim=True)


def _mask_digest(name: str, files: dict[str, Path], folder: str) -> str:
    return _mask_of(name, files, folder).digest()


def _no_alpha(name: str) -> Tensor:
    raise ValueError(f"{shown_name(name)}: data.mask=alpha is for image files")


def _read(item: Item, read_seen: Callable[[], Tensor]) -> Tensor:
    """The image (3, H, W) of an item, NaN where it is not seen."""
    image, seen = item.read(), read_seen()
    if seen.shape[1:] != image.shape[1:]:
        (a, b), (c, d) = seen.shape[1:], image.shape[1:]
        raise ValueError(f"{item.name}: the mask has {a}x{b} pixels, the image {c}x{d}")
    seen = seen > 0.5
    if not seen.any():
        raise ValueError(f"{item.name}: none of its pixels is seen")
    return image.where(seen, torch.nan)


def _digest(item: Item, mask_digest: Callable[[], str] | None) -> str:
    """A digest of the image and its mask: the same image without a mask has another."""
    parts = f"{item.digest()} {ALPHA if mask_digest is None else mask_digest()}"
    return hashlib.sha256(parts.encode()).hexdigest()
