"""The strongest activation of every map while a layer learns: what its pictures are made of.

z maps (N, K, H, W)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Places of a map: from top to bottom and from left to right, the ends exclusive.
Region = tuple[int, int, int, int]


@dataclass(frozen=True)
class SnapshotPlan:
    """What to look out for while a layer learns: in which epochs, and where in the maps first."""

    epochs: tuple[int, ...]
    first: Region


@dataclass(frozen=True)
class Snapshot:
    """A layer at the end of an epoch: its strongest activations, and its filters (K, C, h, w) as
    they were before any of them was moved or started anew.
    """

    epoch: int
    peaks: Peaks
    filters: Tensor


@dataclass(frozen=True)
class Peaks:
    """The strongest activation of every map so far, (K,) each.

    values: with sign, 0 where there was none; images, rows, columns: where, -1 for nowhere;
    inside: whether at one of the places that come first, which win over all others. Of equals the
    first in the image of the lowest number wins: neither the order of the images nor how many come
    at a time makes a difference.
    """

    values: Tensor
    images: Tensor
    rows: Tensor
    columns: Tensor
    inside: Tensor

    @classmethod
    def none(cls, like: Tensor) -> Peaks:
        """Of maps (N, K, H, W) of which none was seen yet."""
        nowhere = torch.full((like.shape[1],), -1, device=like.device)
        values = like.new_zeros(like.shape[1])
        return cls(values, nowhere, nowhere, nowhere, torch.zeros_like(values, dtype=torch.bool))

    def updated(self, z: Tensor, images: Tensor, first: Region) -> Peaks:
        """With the maps z (N, K, H, W) of images (N,) that were not seen before."""
        W, (top, bottom, left, right) = z.shape[3], first
        strength = z.abs()
        most = strength[:, :, top:bottom, left:right].amax((2, 3))
        inside = (most > 0).any(0)
        settled = self.inside | inside
        if not settled.all():
            most = torch.where(settled, most, strength.amax((2, 3)))
        best = most.amax(0)
        image, n = torch.where(most == best, images[:, None], images.max() + 1).min(0)
        before = self.values.abs()
        again = (best == before) & (best > 0) & (image < self.images)
        won = ((inside & ~self.inside) | (best > before) | again).nonzero()[:, 0]
        # The places are looked up in the maps that won alone.
        n, image, inside = n[won], image[won], inside[won]
        allowed = torch.zeros(z.shape[2:], dtype=torch.bool, device=z.device)
        allowed[top:bottom, left:right] = True
        places = strength[n, won] * (allowed | ~inside[:, None, None])
        place = places.flatten(1).argmax(1)
        row, column = place // W, place % W
        found = Peaks(z[n, won, row, column], image, row, column, inside)
        return Peaks(
            **{key: old.index_copy(0, won, vars(found)[key]) for key, old in vars(self).items()}
        )

    def merged(self, other: Peaks) -> Peaks:
        """The stronger of these and those of other images, map by map."""
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
