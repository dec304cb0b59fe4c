"""Masks of observed pixels: generated for an experiment, or read from a file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from deconvnet.images.decoding import read_image

# Hidden regions: a box of a quarter of each side in the middle, or the right half.
REGIONS = ("box", "half")


def make_mask(
    missing: str, size: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, bool]:
    """(mask (1, 1, H, W) of 0 and 1, whether it was generated rather than read from a file).

    missing: the fraction of random pixels to hide, "box", "half", or an image file that is black
    where pixels are missing.
    """
    H, W = size
    mask = torch.ones(1, 1, H, W)
    fraction = missing_fraction(missing)
    if fraction is not None:
        return (torch.rand(1, 1, H, W, generator=generator) >= fraction).float(), True
    if missing == "box":
        mask[..., 3 * H // 8 : 5 * H // 8, 3 * W // 8 : 5 * W // 8] = 0
        return mask, True
    if missing == "half":
        mask[..., W // 2 :] = 0
        return mask, True
    mask = read_mask(mask_file(missing))
    if mask.shape[2:] != (H, W):
        raise ValueError(
            f"missing={missing}: {mask.shape[2]}x{mask.shape[3]} pixels, the image has {H}x{W}"
        )
    return mask, False


def missing_fraction(missing: str) -> float | None:
    """The fraction of missing pixels; None if the setting is not a number."""
    try:
        fraction = float(missing)
    except ValueError:
        return None
    if not 0 < fraction < 1:
        raise ValueError(f"missing={missing}: must lie between 0 and 1")
    return fraction


def mask_file(missing: str) -> Path | None:
    """The image file of a mask; None if the setting names a fraction or a region."""
    if missing in REGIONS or missing_fraction(missing) is not None:
        return None
    path = Path(missing).expanduser()
    if not path.is_file():
        raise ValueError(
            f"missing={missing}: no such file; or a fraction such as 0.5, box, or half"
        )
    return path


def read_mask(path: Path) -> Tensor:
    """(1, 1, H, W): 0 where an image file is black, 1 elsewhere."""
    return (read_image(path).mean(0)[None, None] > 0.5).float()


def check_mask_file(path: Path, sizes: dict[Path, tuple[int, int]]) -> None:
    """Raise ValueError unless a mask has the size of every image and an observed pixel."""
    mask = read_mask(path)
    for file, size in sizes.items():
        if tuple(mask.shape[2:]) != size:
            raise ValueError(
                f"missing={path}: {mask.shape[2]}x{mask.shape[3]} pixels, the image {file} has "
                f"{size[0]}x{size[1]}"
            )
    if not mask.any():
        raise ValueError(f"missing={path}: is black everywhere, so no pixel is observed")
