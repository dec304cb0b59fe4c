"""Tracking of the strongest activation of each map while a layer learns, for its pictures.

N images · K maps · H, W size of a map     z maps (N, K, H, W)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A region of a map: top, bottom, left, right, the ends exclusive.
Region = tuple[int, int, int, int]


@dataclass(frozen=True)
class SnapshotPlan:
    """Which epochs to record while a layer learns, and the preferred region of the maps."""

    epochs: tuple[int, ...]
    first: Region


@dataclass(frozen=True)
class Snapshot:
    """A layer at the end of an epoch.

    peaks: its strongest activations; filters: (K, C, h, w), before any was moved or reinitialised.
    """

    epoch: int
    peaks: Peaks
    filters: Tensor


@dataclass(frozen=True)
class Peaks:
    """The strongest activation of each map so far, tensors (K,).

    values: signed, 0 if there was none; images, rows, columns: its position, -1 if there was none;
    inside: whether it lies in the preferred region, which takes precedence over other positions.
    Ties go to the image with the lowest number and to the first position in it, so the result does
    not depend on the order of the images or on the batches.
    """

    values: Tensor
    images: Tensor
    rows: Tensor
    columns: Tensor
    inside: Tensor

    @classmethod
    def none(cls, like: Tensor) -> Peaks:
        """The peaks before any image, for maps like these (N, K, H, W)."""
        unset = torch.full((like.shape[1],), -1, device=like.device)
        values = like.new_zeros(like.shape[1])
        return cls(values, unset, unset, unset, torch.zeros_like(values, dtype=torch.bool))

    def updated(self, z: Tensor, images: Tensor, first: Region) -> Peaks:
        """The peaks after the maps z (N, K, H, W) of further images, numbered `images` (N,)."""
        W, (top, bottom, left, right) = z.shape[3], first
        strength = z.abs()
        maxima = strength[:, :, top:bottom, left:right].amax((2, 3))
        inside = (maxima > 0).any(0)
        settled = self.inside | inside
        if not settled.all():
            maxima = torch.where(settled, maxima, strength.amax((2, 3)))
        best = maxima.amax(0)
        image, n = torch.where(maxima == best, images[:, None], images.max() + 1).min(0)
        before = self.values.abs()
        tied = (best == before) & (best > 0) & (image < self.images)
        won = ((inside & ~self.inside) | (best > before) | tied).nonzero()[:, 0]
        # Only the maps with a new peak are searched for its position.
        n, image, inside = n[won], image[won], inside[won]
        allowed = torch.zeros(z.shape[2:], dtype=torch.bool, device=z.device)
        allowed[top:bottom, left:right] = True
        candidates = strength[n, won] * (allowed | ~inside[:, None, None])
        position = candidates.flatten(1).argmax(1)
        row, column = position // W, position % W
        new = Peaks(z[n, won, row, column], image, row, column, inside)
        return Peaks(
            **{key: old.index_copy(0, won, vars(new)[key]) for key, old in vars(self).items()}
        )

    def merged(self, other: Peaks) -> Peaks:
        """The stronger of these peaks and those of other images, for each map."""
        before, after = self.values.abs(), other.values.abs()
        equal = (after == before) & (other.images < self.images)
        better = torch.where(other.inside == self.inside, (after > before) | equal, other.inside)
        won = (other.images >= 0) & (better | (self.images < 0))
        return Peaks(
            **{key: torch.where(won, vars(other)[key], mine) for key, mine in vars(self).items()}
        )

    def state_dict(self) -> dict[str, Tensor]:
        return {key: value.cpu() for key, value in vars(self).items()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], device: torch.device) -> Peaks:
        return cls(**{key: value.to(device) for key, value in state.items()})
