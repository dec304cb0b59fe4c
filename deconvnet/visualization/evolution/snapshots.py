"""The features of a layer of a deconvolutional network, recorded while the layer learns.

This costs no inference beyond that of learning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deconvnet.network.codes import Codes
from deconvnet.network.network import DeconvNet
from deconvnet.operators.convolution import deconvolve, map_size
from deconvnet.support.modes import plain
from deconvnet.visualization.evolution.evolution import (
    Evolution,
    Region,
    bounding_region,
    crop_boxes,
    evolution_of_epoch,
    square_boxes,
)
from deconvnet.visualization.projection.pixel_features import layer_field, signed_rgb

# The columns of figure 4.
EPOCHS = (1, 2, 5, 10, 20, 30, 40, 64)
# Filters to project at a time.
CHUNK = 8


def shown_epochs(epochs: int) -> tuple[int, ...]:
    """Which epochs of a layer are shown: those of figure 4 that it reaches, and its last."""
    return (*(epoch for epoch in EPOCHS if epoch < epochs), epochs)


@dataclass(frozen=True)
class SnapshotPlan:
    """What to look out for while a layer learns: in which epochs, and where in the maps first."""

    epochs: tuple[int, ...]
    first: Region


def plan_snapshots(net: DeconvNet, codes: Codes, layer: int) -> SnapshotPlan:
    """The watch for a layer that is to learn on top of these codes: in `shown_epochs`, and first
    where the whole field of an activation lies inside the image.

    At the border most of a feature is cut off, and activations are large to make up for it.
    """
    rows, columns = (
        torch.tensor([a >= 0 and b <= size for a, b in map(field.pixels, range(places))])
        for field, places, size in zip(
            (layer_field(net, layer, axis) for axis in (0, 1)),
            _map_size(net, codes, layer),
            codes.y.shape[2:],
            strict=True,
        )
    )
    epochs = shown_epochs(net.layer(layer).settings.learning.epochs)
    return SnapshotPlan(epochs, bounding_region(rows[:, None] & columns))


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


@dataclass(frozen=True)
class Snapshot:
    """A layer at the end of an epoch: its strongest activations, and its filters (K, C, h, w) as
    they were before any of them was moved or started anew.
    """

    epoch: int
    peaks: Peaks
    filters: Tensor


@plain
def project_snapshot(
    net: DeconvNet,
    codes: Codes,
    layer: int,
    snapshot: Snapshot,
    images: Tensor | None = None,
) -> Evolution:
    """One column: the strongest activation of every map, with sign and unit value, in pixel space.

    codes: of the layers below, for the images of these numbers, ascending, among which those of
    the snapshot are; None: for all images. Each activation goes through them with the switches of
    its own image.
    """
    peaks, f = snapshot.peaks, snapshot.filters
    boundary, shape = net.layer(layer).settings.boundary, _map_size(net, codes, layer)
    rows, columns = (layer_field(net, layer, axis) for axis in (0, 1))
    top, left = (
        rows.offset + rows.stride * peaks.rows,
        columns.offset + columns.stride * peaks.columns,
    )
    boxes = square_boxes(peaks.images, top, left, max(rows.size, columns.size), codes.y.shape[2:])
    # A map that was not active paints nothing, through whatever switches.
    images = torch.arange(len(codes.y)) if images is None else images
    places = torch.searchsorted(images.to(f.device), peaks.images).clamp(max=len(images) - 1)
    tiles = []
    for maps in torch.arange(len(f), device=f.device).split(CHUNK):
        painted = []
        for k in maps:
            one = f.new_zeros(1, 1, *shape)
            one[..., peaks.rows[k], peaks.columns[k]] = peaks.values[k].sign()
            painted.append(deconvolve(one, f[k : k + 1], boundary=boundary))
        y = net.decoder(codes, layer, places[maps])(torch.cat(painted))
        tiles += crop_boxes(y, boxes[maps])
    return evolution_of_epoch(
        snapshot.epoch, range(len(f)), signed_rgb(net, torch.stack(tiles)), boxes, peaks.values
    )


def _map_size(net: DeconvNet, codes: Codes, layer: int) -> tuple[int, int]:
    """(H, W) of the maps of a layer on top of these codes."""
    below = codes.y if layer == 1 else codes.layer(layer - 1).pooled
    settings = net.layer(layer).settings
    size = (settings.filter_size, settings.filter_size)
    return map_size(tuple(below.shape[2:]), size, settings.boundary)
